"""Scores as a person reads them in a terminal: findings first, then one table, every figure with its n and interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sonovqa.findings import Finding, digest

#: Shown for every question where it has them, in this order; `scores.json` and the report hold all.
SHOWN = (
    "accuracy", "F1", "F2", "within one", "MAE (weeks)", "within 10 %", "MAE (mm)", "relative error", "balanced accuracy",
    "sensitivity", "specificity", "MCC", "completeness", "coherent",
)  # fmt: skip
MOST_FINDINGS = 8
PIPE_WIDTH = 110  # columns of the table where no terminal says how many there are


def show(scores: Mapping, verdict: str, found: Sequence[Finding], console: Console) -> None:
    """Print the verdict, the gravest findings and the table."""
    serious = [f for f in found if f.serious]
    console.print(f"[bold {'red' if serious else 'green'}]{escape(verdict)}[/]", soft_wrap=True)
    told = digest(found)
    for finding in told[:MOST_FINDINGS]:
        console.print(f"  {'[red]![/]' if finding.serious else '[yellow]·[/]'} {escape(finding.text)}", soft_wrap=True)
    if len(told) > MOST_FINDINGS:
        console.print(f"  … and {len(told) - MOST_FINDINGS} more in scores.json and the report")
    wide = console if console.is_terminal else Console(file=console.file, width=PIPE_WIDTH, highlight=False)
    wide.print(table(scores))
    console.print(caption(scores), style="dim", soft_wrap=True)


def table(scores: Mapping) -> Table:
    """One row a question and score: n, value with its interval, baselines, and what was not scored."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "score", "value [95 %]", "majority", "blind", "n/groups", "unread", "failed"):
        made.add_column(name.replace("[", "\\["), justify="left" if name in ("", "score", "value [95 %]") else "right")
    overall = {"overall": scores["overall"]} if len(scores["questions"]) > 1 else {}
    report = {"report": scores["report"]} if "report" in scores else {}
    for kind, about in (scores["questions"] | report | overall).items():
        names = [name for name in SHOWN if name in about["metrics"]]
        for i, name in enumerate(names):
            figure = about["metrics"][name]
            sides = ["" if i else str(about.get("unread", "")), "" if i else str(about["failed"])]
            beside = [baseline(figure, name) for name in ("majority", "blind")]
            counts = f"{figure['n']}/{figure['groups']}"
            cells = ["" if i else kind, f"{name} {arrow(figure)}", value(figure), *beside, counts, *sides]
            made.add_row(*cells, end_section=i == len(names) - 1)
    return made


def arrow(figure: Mapping) -> str:
    """Which way is better."""
    return {True: "↑", False: "↓", None: ""}[figure["higher_is_better"]]


def value(figure: Mapping) -> str:
    """``0.81 [0.74, 0.88]``, or ``-`` where the score is not defined."""
    if figure["value"] is None:
        return "-"
    span = figure["interval"]
    return f"{figure['value']:.3f}" + (f" \\[{span[0]:.2f}, {span[1]:.2f}]" if span else "")


def baseline(figure: Mapping, name: str) -> str:
    """A baseline's value; ``-`` where there is none."""
    other = figure.get(name)
    return "-" if other is None or other["value"] is None else f"{other['value']:.3f}"


def caption(scores: Mapping) -> str:
    """What the columns are."""
    about = scores["intervals"]
    spans = f"Intervals: 95 %, {about['resamples']} bootstrap resamples of {about['groups']} groups."
    spans = spans if about["resamples"] else "No intervals (--resamples 0)."
    blind = "Blind: the model's own answer with the image greyed out."
    blind = blind if scores["blind"] else "Blind answers were not asked (--no-blind)."
    majority = f"Majority: the commonest answer of {scores['majority_of']}, of measured values the median."
    return f"↑ higher is better, ↓ lower. {spans} {majority} {blind} Failed requests are not scored."
