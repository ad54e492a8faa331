"""Answers without any reference: what can still be said is how many failed, are unread, or have nothing to do with the image."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sonovqa import elsewhere, files, findings, measures, scoring
from sonovqa.findings import ENOUGH, ENOUGH_TO_VARY, RARE, Finding, short


def describe(rows: Sequence[Mapping]) -> dict:
    """Per question: asked, failed, unread, cut, and how much the answers vary and depend on the image's category."""
    kinds: dict[str, list[Mapping]] = defaultdict(list)
    for row in rows:
        kinds[measures.kind_of(row)].append(row)
    questions = {}
    for kind in sorted(kinds, key=measures.order_of):
        answered = [row for row in kinds[kind] if row["error"] is None]
        cut = sum(row["finish_reason"] == "length" for row in answered)
        keys = [measures.key_of(row, row["prediction"]) for row in answered]
        questions[kind] = {
            "asked": len(kinds[kind]), "failed": len(kinds[kind]) - len(answered), "n": len(answered),
            "unread": keys.count("unread"), "references_unread": 0, "cut": cut,
            "categories": len({row["category"] for row in answered}),
            "answers": {"predicted": scoring.labels(keys, [row["category"] for row in answered])},
        }  # fmt: skip
    failed = sum(row["error"] is not None for row in rows)
    return {"questions": questions, "overall": {"asked": len(rows), "failed": failed}}


def find(described: Mapping, joined: elsewhere.Joined) -> list[Finding]:
    """What is wrong with the answers, as far as that shows without references."""
    rows = joined.rows
    found = [*findings.failures(described, rows), *elsewhere.find(joined)]
    for kind, about in described["questions"].items():
        found += [*findings.unread(kind, about), *findings.cut(kind, about), *_independent(kind, about)]
    found += findings.garbled([row | {"reference": ""} for row in rows])
    if rows and not any(row["category"] for row in rows):
        text = "the image ids hold no category (a folder before the file), so dependence on it cannot be judged"
        found.append(Finding("no category", None, 0, text, False))
    return sorted(found, key=lambda f: not f.serious)


def _independent(kind: str, about: Mapping) -> Iterable[Finding]:
    said = about["answers"]["predicted"]
    if about["n"] < ENOUGH or said["commonest"] == "unread":
        return
    if said["distinct"] == 1 or said["share"] > 1 - 5 * RARE:
        categories = f" of {about['categories']} categories" if about["categories"] > 1 else ""
        whom = f"{said['share']:.0%} of {about['n']} images{categories}"
        text = f"{kind}: {whom} get the same answer, “{short(said['commonest'])}”"
        yield Finding("constant", kind, said["share"], text)
    elif about["categories"] > 1 and about["n"] >= ENOUGH_TO_VARY and kind in ("Q1", "Q3", "Q4") and said["category_bits"] < 0.1:
        bits = f"{said['category_bits']:.2f} bits of mutual information"
        text = f"{kind}: answers have next to nothing to do with the image's category ({bits})"
        yield Finding("unrelated", kind, said["category_bits"], text)


def report(joined: elsewhere.Joined, path: Path, console: Console) -> list[Finding]:
    """Describe, write to ``path`` as JSON, print; gives the findings."""
    described = describe(joined.rows)
    found = find(described, joined)
    about = {"unmatched": joined.unmatched, "repeated": joined.repeated}
    files.write_json(path, {"findings": [f.json() for f in found], **described, **about})
    elsewhere.list_unmatched(joined, console)
    show(described, found, console)
    return found


def show(described: Mapping, found: Sequence[Finding], console: Console) -> None:
    """Print findings and the table."""
    console.print("Nothing is scored: there are no references.", style="bold")
    for finding in findings.digest(found):
        console.print(f"  {'!' if finding.serious else '·'} {finding.text}", markup=False, soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "answers", "failed", "unread", "distinct", "commonest", "its share", "category bits"):
        table.add_column(name, justify="left" if name in ("", "commonest") else "right")
    for kind, about in described["questions"].items():
        said = about["answers"]["predicted"]
        share = "-" if said["share"] is None else f"{said['share']:.0%}"
        table.add_row(kind, str(about["n"]), str(about["failed"]), str(about["unread"]), str(said["distinct"]),
                      escape(short(said["commonest"] or "-", 40)), share, f"{said['category_bits']:.2f}")  # fmt: skip
    console.print(table)
