"""Where a model is weak: the worst slice of each question by name, with what its answers are taken for there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console

from sonovqa.findings import ENOUGH, short
from sonovqa.metrics import FEWEST_GROUPS

MOST = 5  # questions told in a terminal


def worst(questions: Mapping[str, Mapping]) -> list[dict]:
    """Of each question the slice that is furthest below its score of all images, the question with the widest gap first.

    A slice counts from `ENOUGH` rows of `FEWEST_GROUPS` groups on, and if its interval, where there is one, ends below the
    score of all: the worst of many slices is low by chance alone.

    Args:
        questions: by kind, as `scoring.score` has them.

    Returns:
        ``{"question", "by", "slice", "score", "value", "of_all", "n", "confused", "text"}``.
    """
    found = [low for kind, about in questions.items() for low in _lowest(kind, about)]
    return sorted(found, key=lambda low: low["value"] - low["of_all"])


def _lowest(kind: str, about: Mapping) -> list[dict]:
    below = []
    for by, slices in about["slices"].items():
        for name, figure in slices.items():
            of_all = about["metrics"][figure["score"]]["value"]
            if figure["value"] is None or figure["n"] < ENOUGH or figure["carriers"] < FEWEST_GROUPS:
                continue
            if (figure["interval"][1] if figure["interval"] else figure["value"]) < of_all:
                below.append({"question": kind, "by": by, "slice": name, "of_all": of_all}
                             | {key: figure[key] for key in ("score", "value", "n", "confused")})  # fmt: skip
    lowest = sorted(below, key=lambda low: low["value"] - low["of_all"])[:1]
    return [low | {"text": _sentence(low)} for low in lowest]


def _sentence(low: Mapping) -> str:
    where = f"{low['question']} by {low['by']}, “{short(low['slice'])}”"
    figures = f"{low['score']} {low['value']:.2f} (n={low['n']}) against {low['of_all']:.2f} of all"
    return f"{where}: {figures}" + (f"; {taken(low['confused'])}" if low["confused"] else "")


def taken(confused: Sequence[Mapping]) -> str:
    """What is taken for what there, and how often: ``“NT” taken for “CRL” 7 times``."""
    pairs = (f"“{short(c['reference'])}” taken for “{short(c['predicted'])}” {_times(c['n'])}" for c in confused)
    return ", ".join(pairs)


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


def show(found: Sequence[Mapping], console: Console) -> None:
    """Print the worst slices (`worst`), a line a question."""
    if found:
        console.print("Weakest:", style="bold")
    for low in found[:MOST]:
        console.print(f"  {low['text']}", markup=False, soft_wrap=True)
    if len(found) > MOST:
        console.print(f"  … and {len(found) - MOST} more in scores.json and the report")
