"""Two or more evaluations of the same questions side by side: paired differences, resampled by group."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from sonovqa import calibration, confidence, files, findings, measures, metrics, predictions, ranking, records, report_sections
from sonovqa.cli import UserError
from sonovqa.findings import counted
from sonovqa.metrics import Resamples
from sonovqa.predictions import Key
from sonovqa.scoretable import PIPE_WIDTH, arrow, span


def folder_of(path: Path, split: str = "test") -> Path:
    """Where an evaluation's predictions.jsonl lies: ``path`` itself, or of a run ``eval-<split>/``, else its only
    ``eval-<split>-…/``, as that of a run trained and asked on one question is called.

    Raises:
        UserError: if there is none, or more than one to choose from.
    """
    for folder in (path, path / f"eval-{split}"):
        if (folder / "predictions.jsonl").exists():
            return folder
    found = sorted(file.parent for file in path.glob(f"eval-{split}-*/predictions.jsonl"))
    if len(found) > 1:
        raise UserError(f"{path} holds several evaluations; {', '.join(f.name for f in found)}; name one, such as {found[0]}")
    if not found:
        raise UserError(f"no predictions in {path} or {path}/eval-{split}; evaluate first: python evaluate.py {path} --data DATA")
    return found[0]


def load(path: Path, split: str = "test") -> dict[Key, dict]:
    """The predictions of an evaluation by key, from `folder_of`. Raises `UserError` as that does."""
    return predictions.latest(predictions.read(folder_of(path, split) / "predictions.jsonl"))


def same_questions(folder: Path, settings: Mapping) -> bool:
    """Whether a folder holds an evaluation of the same data, split and prompts, such as the base's of a tuned run."""
    path = folder / "settings.json"
    if not path.exists() or not (folder / "predictions.jsonl").exists():
        return False
    other = files.read_json(path)
    return all(other.get(name) == settings[name] for name in ("data", "split", "prompt"))


def compare(
    first: Mapping[Key, dict],
    second: Mapping[Key, dict],
    resamples: int = 1000,
    seed: int = 0,
    told: Sequence[Mapping[Key, dict]] = ({}, {}),
) -> dict:
    """``second - first`` for every question that both were asked, over what both answered.

    Reports are compared section by section, with other reports or with separate answers to the same questions.

    Args:
        resamples: bootstrap resamples of groups; the same draws serve both sides, so that differences are paired.
        told: both sides' label probabilities by key (`confidence.read`), where there are some: their ranking is compared too.

    Returns:
        ``{"shared", "only_first", "only_second", "skipped", "answered_by_both", "groups", "resamples", "questions": {kind:
        {score: {first, second, difference, interval, n, groups, carriers, higher_is_better}}}}``; ``skipped`` names the kinds of
        question that ``first`` or ``second`` alone was asked. Failed requests of either side are left out of both.

    Raises:
        UserError: if they share no question, or were scored against different references.
    """
    first, second = _by_question(first), _by_question(second)
    shared = [key for key in first if key in second]
    if not shared:
        raise UserError("nothing to compare: the evaluations share no question; evaluate both on the same data and split")
    differing = [key for key in shared if first[key]["reference"] != second[key]["reference"]]
    if differing:
        image, question = differing[0]
        raise UserError(f"the references differ, such as {question} of {image}; compare evaluations of the same data set")
    both = [key for key in shared if first[key]["error"] is None and second[key]["error"] is None]
    draws = Resamples([first[key]["group"] for key in both], resamples, seed)
    sides = [defaultdict(list), defaultdict(list)]
    for side, found in zip(sides, (first, second), strict=True):
        for key in both:
            side[measures.kind_of(found[key])].append(found[key])
    kinds = sorted(sides[0], key=measures.order_of)
    asked = [{measures.kind_of(row) for row in found.values()} for found in (first, second)]
    return {
        "shared": len(shared), "only_first": len(first) - len(shared), "only_second": len(second) - len(shared),
        "skipped": {"first": _ordered(asked[0] - asked[1]), "second": _ordered(asked[1] - asked[0])},
        "answered_by_both": len(both), "groups": len(draws.codes), "resamples": resamples,
        "questions": {
            kind: _differences(kind, sides[0][kind], sides[1][kind], draws)
            | calibration.differences(kind, sides[0][kind], sides[1][kind], told, draws)
            for kind in kinds
        },
    }  # fmt: skip


def _by_question(rows: Mapping[Key, dict]) -> dict[Key, dict]:
    return {(row["image_id"], row["question_id"]): row for row in report_sections.expand(rows.values())}


def _ordered(kinds: Iterable[str]) -> list[str]:
    return sorted(kinds, key=measures.order_of)


def _differences(kind: str, first: Sequence[dict], second: Sequence[dict], draws: Resamples) -> dict:
    ours, theirs = (measures.measure(kind, rows, [row["prediction"] for row in rows]) for rows in (first, second))
    groups = [row["group"] for row in first]
    out = {}
    for name in dict.fromkeys((measures.headline(kind, ours), *ours)):
        interval = draws.difference(theirs[name], ours[name], groups)
        values = ours[name].value, theirs[name].value
        counted = ours[name].columns.any(axis=1)
        defined = all(value == value for value in values)
        out[name] = {
            "first": values[0] if defined else None, "second": values[1] if defined else None,
            "difference": values[1] - values[0] if defined else None, "interval": list(interval) if interval else None,
            "n": int(counted.sum()), "groups": len({g for g, c in zip(groups, counted, strict=True) if c}),
            "carriers": min(ours[name].carriers(groups), theirs[name].carriers(groups)), "higher_is_better": ours[name].higher,
        }  # fmt: skip
    return out


def compare_with_first(paths: Sequence[Path], split: str, resamples: int, seed: int) -> list[dict]:
    """`compare` of the first evaluation with each of the others, their label probabilities too.

    Raises:
        UserError: for fewer than two, and as `folder_of` and `compare` do.
    """
    if len(paths) < 2:
        raise UserError(f"one run to compare; {paths[0]}; two or more are needed; name another")
    found = [(load(path, split), told(path, split)) for path in paths]
    first, sure = found[0]
    return [compare(first, other, resamples, seed, (sure, others)) for other, others in found[1:]]


def verdict(made: Mapping, first: str, second: str) -> str:
    """One sentence: on which questions the second is clearly better, clearly worse, or no different, or nobody can tell."""
    better, worse, same, few = [], [], [], []
    for kind, scores in made["questions"].items():
        figure = next(iter(scores.values()))
        if figure["carriers"] < metrics.FEWEST_GROUPS:
            few.append(kind)
        elif not figure["interval"] or figure["interval"][0] <= 0 <= figure["interval"][1]:
            same.append(kind)
        else:
            (better if (figure["difference"] > 0) == figure["higher_is_better"] else worse).append(kind)
    parts = [f"{words} on {', '.join(kinds)}" for words, kinds in (("worse", worse), ("better", better)) if kinds]
    rest = (("no clear difference", same), ("too few groups to tell", few))
    parts += [f"{words} on {', '.join(kinds)}" for words, kinds in rest if kinds]
    return f"{second} against {first}: {'; '.join(parts)}."


def show(made: Mapping, first: str, second: str, console: Console) -> None:
    """Print the verdict and one row a question: its headline score on both sides and the paired difference."""
    console.print(verdict(made, first, second), style="bold", markup=False, soft_wrap=True)
    for finding in findings.few_groups(made["groups"]):
        console.print(f"  {'!' if finding.serious else '·'} {finding.text}", markup=False, soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "score", "first", "second", "difference \\[95 %]", "n/groups"):
        table.add_column(name, justify="right" if name in ("first", "second", "n/groups") else "left")
    for kind, scores in made["questions"].items():
        for name in _shown(scores):
            figure = scores[name]
            if figure["difference"] is None:
                continue
            gain = f"{figure['difference']:+.3f}{span(figure, figure['interval'], '+.2f')}"
            sides = (f"{figure[side]:.3f}" for side in ("first", "second"))
            table.add_row(kind, f"{name} {arrow(figure)}", *sides, gain, f"{figure['n']}/{figure['groups']}")
    wide = console if console.is_terminal else Console(file=console.file, width=PIPE_WIDTH, highlight=False)
    wide.print(table)
    left_out = made["shared"] - made["answered_by_both"]
    console.print(
        f"{made['answered_by_both']} questions answered by both ({left_out} left out because a request failed, "
        f"{made['only_first']} and {made['only_second']} asked of one only), resampled by {counted(made['groups'], 'group')}.",
        style="dim", soft_wrap=True,
    )  # fmt: skip
    for side, name in (("first", first), ("second", second)):
        if made["skipped"][side]:
            console.print(f"Not compared, for only {name} was asked: {', '.join(made['skipped'][side])}.", soft_wrap=True)


def _shown(scores: Mapping) -> list[str]:
    """The headline, accuracy beside it where that is another, and all scores of ranking."""
    names = list(scores)
    return names[: 1 if names[0] == "accuracy" else 2] + [name for name in names if name in ranking.SCORES]


def told(path: Path, split: str = "test") -> dict[Key, dict]:
    """An evaluation's label probabilities by key: a choice head's, else those of ``--confidence``, where it was made with it."""
    return confidence.read(folder_of(path, split) / "confidence.jsonl") | calibration.told_with(load(path, split))


def speeds(runs: Sequence[Path], split: str) -> dict[str, dict]:
    """The speed figures of those evaluations that have some, by folder and engine."""
    found = {}
    for run in runs:
        path = next((p / "scores.json" for p in (run, run / f"eval-{split}") if (p / "scores.json").exists()), None)
        speed = files.read_json(path).get("speed") if path else None
        if speed:
            found[f"{run}: {speed['engine']}"] = speed
    return found


def write(path: Path, names: Sequence[str], made: Sequence[Mapping]) -> None:
    """All comparisons with the first as JSON, with the commit and the time."""
    compared = {"first": names[0], "comparisons": dict(zip(names[1:], made, strict=True))}
    files.write_json(path, compared | records.commit() | {"finished": records.now()})
