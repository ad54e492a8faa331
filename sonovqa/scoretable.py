"""Scores as a person reads them in a terminal: findings first, then one table, every figure with its n and interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sonovqa import records
from sonovqa.findings import Finding, counted, digest
from sonovqa.metrics import FEWEST_GROUPS

#: Shown for every question where it has them, in this order; `scores.json` and the report hold all.
SHOWN = (
    "accuracy", "F1", "within one", "MAE (weeks)", "within 10 %", "MAE (mm)", "balanced accuracy", "sensitivity", "specificity",
    "numbers right", "completeness", "coherent", "combined", "term F1", "value F1",
)  # fmt: skip
MOST_FINDINGS = 8
PIPE_WIDTH = 120  # columns of the table where no terminal says how many there are
WIDE = 105  # columns from which on the difference to the base has room
COVERAGES = (1.0, 0.9, 0.5)  # shares of the answers, the most confident first, whose accuracy is shown


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
    wide.print(table(scores, wide.width))
    if "base" in scores:
        console.print(escape(f"{scores['base']['verdict']} Base: {scores['base']['path']}"), style="bold", soft_wrap=True)
    if any("confidence" in about for about in scores["questions"].values()):
        wide.print(confidence_table(scores["questions"]))
    if scores.get("speed"):
        wide.print(speed_table({scores["speed"]["engine"]: scores["speed"]}))
    console.print(caption(scores), style="dim", soft_wrap=True)


def table(scores: Mapping, width: int = PIPE_WIDTH) -> Table:
    """One row a question and score, its main one first and bold: value with interval, baselines, base, n, unread, failed.

    Args:
        width: columns there are; with `WIDE` of them the base comes with the paired difference to it.
    """
    base, gain = "base" in scores, "base" in scores and width >= WIDE
    made = _plain_table()
    left = ("", "score", "value [95 %]", "gain over base [95 %]")
    columns = ["", "score", "value [95 %]", "majority" if width >= WIDE else "maj.", "blind"]
    columns += ["base"] * base + ["gain over base [95 %]"] * gain
    for name in (*columns, "n/groups", *(("unread", "failed") if width >= WIDE else ("u/f",))):
        made.add_column(escape(name), justify="left" if name in left else "right", no_wrap=True)
    overall = {"all": scores["overall"]} if len(scores["questions"]) > 1 else {}
    report = {"report": scores["report"]} if "report" in scores else {}
    for kind, about in (scores["questions"] | report | overall).items():
        names = sorted((n for n in SHOWN if n in about["metrics"]), key=lambda name: name != about.get("headline"))
        for i, name in enumerate(names):
            figure = about["metrics"][name]
            sides = ["" if i else str(about.get("unread", "")), "" if i else str(about["failed"])]
            sides = sides if width >= WIDE else ["/".join(sides).strip("/")]
            beside = [baseline(figure, other) for other in ("majority", "blind", *["base"] * base)] + [difference(figure)] * gain
            cells = ["" if i else kind, f"{name} {arrow(figure)}", value(figure), *beside, f"{figure['n']}/{figure['groups']}"]
            bold = "bold" if name == about.get("headline", name) else "dim"
            made.add_row(*cells, *sides, style=bold)
    return made


def _plain_table(title: str | None = None) -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title=title, title_justify="left", title_style="bold")


def confidence_table(questions: Mapping[str, Mapping]) -> Table:
    """What label probabilities are worth: ranking, calibration, and accuracy of the most confident answers."""
    made = _plain_table("Confidence")
    abstain = next((about["confidence"]["abstain"] for about in questions.values() if "confidence" in about), None)
    held = [f"≥{abstain['below']:g}", "held"] if abstain else []
    for name in ("", "AUROC [95 %]", "pos.", "AP", "ECE", *(f"@{c:.0%}" for c in COVERAGES), *held, "n"):
        made.add_column(escape(name), justify="left" if name in ("", "AUROC [95 %]") else "right", no_wrap=True)
    for kind, about in questions.items():
        if "confidence" not in about:
            continue
        found = about["confidence"]
        at = {point["coverage"]: f"{point['accuracy']:.2f}" for point in found["curve"]}
        ranked = ["", "", ""]
        if "AUROC" in found:
            ranked = [value(found["AUROC"]), str(found["positives"]), number(found["average precision"]["value"])]
        given = [number(found["abstain"]["accuracy"]["value"]), str(found["abstain"]["held_back"])] if abstain else []
        error = f"{number(found['calibration error']['value'])} ({number(found['calibration error']['by chance'])})"
        made.add_row(kind, *ranked, error, *(at.get(c, "-") for c in COVERAGES), *given, str(found["n"]))
    return made


def speed_table(speeds: Mapping[str, Mapping]) -> Table:
    """One row an engine: throughput, what an answer's asker waits, time to load, most memory of this process or its GPU."""
    made = _plain_table("Speed")
    for name in ("engine", "answers/s", "tokens/s", "median s", "p95 s", "load s", "peak memory"):
        made.add_column(name, justify="left" if name == "engine" else "right")
    for name, speed in speeds.items():
        memory = speed["peak_memory_bytes"]
        made.add_row(
            escape(name), f"{speed['answers_per_second']:.1f}", f"{speed['tokens_per_second']:.1f}",
            f"{speed['median_seconds']:.2f}", f"{speed['p95_seconds']:.2f}", f"{speed['load_seconds']:.1f}",
            records.gigabytes(memory) if memory else "-",
        )  # fmt: skip
    return made


def number(figure: float | None) -> str:
    """Two decimals, or a dash."""
    return "-" if figure is None else f"{figure:.2f}"


def arrow(figure: Mapping) -> str:
    """Which way is better."""
    return {True: "↑", False: "↓", None: ""}[figure["higher_is_better"]]


def value(figure: Mapping) -> str:
    """``0.81 [0.74, 0.88]``, ``0.81 too few groups``, or ``-`` where the score is not defined."""
    if figure["value"] is None:
        return "-"
    return f"{figure['value']:.2f}{span(figure, figure['interval'])}"


def span(figure: Mapping, interval: Sequence[float] | None, form: str = ".2f") -> str:
    """`` [0.74, 0.88]`` for a table's cell; `` too few groups`` where that is why there is none."""
    if interval:
        return f" \\[{interval[0]:{form}}, {interval[1]:{form}}]"
    return " too few groups" if figure["carriers"] < FEWEST_GROUPS else ""


def difference(figure: Mapping) -> str:
    """How far the run is above its base, paired: ``+0.31 [+0.22, +0.40]``, green or red where the interval leaves no doubt."""
    other = figure.get("base")
    if other is None or other["difference"] is None:
        return "-"
    between = other["difference_interval"]
    text = f"{other['difference']:+.2f}{span(figure, between, '+.2f')}"
    if not between or between[0] <= 0 <= between[1] or figure["higher_is_better"] is None:
        return text
    return f"[{'green' if (between[0] > 0) == figure['higher_is_better'] else 'red'}]{text}[/]"


def baseline(figure: Mapping, name: str) -> str:
    """A baseline's value; ``-`` where there is none."""
    other = figure.get(name)
    return "-" if other is None or other["value"] is None else f"{other['value']:.2f}"


def caption(scores: Mapping) -> str:
    """What the columns are."""
    about = scores["intervals"]
    spans = f"Intervals: 95 %, {about['resamples']} bootstrap resamples of {counted(about['groups'], 'group')}."
    spans = spans if about["resamples"] else "No intervals (--resamples 0)."
    blind = "Blind: the model's own answer with the image greyed out."
    blind = blind if scores["blind"] else "Blind answers were not asked (--no-blind)."
    majority = f"Majority: the commonest answer of {scores['majority_of']}, of measured values the median."
    parts = ["↑ higher is better, ↓ lower.", spans, majority, blind, "u/f: unread (scored as wrong), failed (not scored)."]
    found = [about["confidence"] for about in scores["questions"].values() if "confidence" in about]
    if found:
        parts.append("AP: average precision. ECE: calibration error (in brackets: by chance alone, were all calibrated).")
        parts.append("@50%: accuracy of the surest half of the answers.")
        unread = sum(one["fallback"]["unread"] for one in found)
        parts.append(f"For {unread} unread answers the likeliest label is offered in scores.json (fallback)." if unread else "")
    return " ".join(part for part in parts if part)
