"""What label probabilities are worth: do they rank, are they calibrated, and how right are the answers given with confidence.

An answer's *confidence* is the probability of the label it stands for; 0 where it is unread or stands for none.

Sources: expected calibration error over bins of equal mass (Nguyen & O'Connor, 2015; Roelofs et al., 2022); accuracy
against coverage (El-Yaniv & Wiener, 2010; Geifman & El-Yaniv, 2017); `ranking` names its own.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from sonovqa import confidence, measures, metrics, ranking, report_sections, scoretable
from sonovqa.asking import Item
from sonovqa.cli import UserError
from sonovqa.findings import ENOUGH, RARE, Finding
from sonovqa.metrics import Resamples, Score, mean
from sonovqa.predictions import Key

BINS = 10  # of the calibration error; fewer where there are fewer than `BIN_ROWS` rows for each, but in one bin all errors cancel
FEWEST_BINS = 5
BIN_ROWS = 10
CHANCE_DRAWS = 200  # of outcomes, to say what perfectly calibrated probabilities would show
COVERAGES = tuple(round(0.05 * step, 2) for step in range(20, 0, -1))
POSITIVE = {"Q7": ("abnormal", "normal"), "closed": ("yes", "no")}


def bins_of(probability: np.ndarray) -> np.ndarray:
    """The bin of each probability ``[n]``: of equal mass, except that equal probabilities share one."""
    count = max(FEWEST_BINS, min(BINS, len(probability) // BIN_ROWS))
    edges = np.unique(np.quantile(probability, np.linspace(0, 1, count + 1)[1:-1])) if len(probability) else []
    return np.searchsorted(edges, probability, side="right")


def calibration_error(probability: np.ndarray, came_true: np.ndarray) -> Score:
    """Expected calibration error: the mean over bins, weighted by size, of |mean probability - share that came true|."""
    which = bins_of(probability)
    columns = np.zeros((len(probability), which.max(initial=0) + 2))
    columns[np.arange(len(probability)), which] = probability - came_true
    columns[:, -1] = 1

    def of_sums(sums: np.ndarray) -> np.ndarray:
        total = sums[..., -1]
        off = np.abs(sums[..., :-1]).sum(-1)
        return np.divide(off, total, out=np.full(np.shape(total), np.nan), where=total > 0)

    return Score(columns, of_sums, higher=False, bounds=None)


def error_by_chance(probability: np.ndarray, groups: Sequence[str], seed: int = 0) -> float:
    """The calibration error that perfectly calibrated probabilities would show with as few rows: its mean over drawn outcomes.

    The error is a mean of absolute values, so chance only ever adds to it (Roelofs et al., 2022). The rows of a group come
    true together, as they may at worst.

    Args:
        probability: ``[n]``. groups: of the rows.
    """
    if not len(probability):
        return math.nan
    place = np.unique(np.asarray(groups, object).astype(str), return_inverse=True)[1]
    luck = np.random.default_rng(seed).random((CHANCE_DRAWS, place.max() + 1))[:, place]
    return float(np.mean([calibration_error(probability, came < probability).value for came in luck]))


def reliability(probability: np.ndarray, came_true: np.ndarray) -> list[dict]:
    """The bins of `calibration_error`: rows, mean probability and the share that came true."""
    which = bins_of(probability)
    found = ((probability[which == b], came_true[which == b]) for b in np.unique(which))
    return [{"n": len(p), "probability": round(float(p.mean()), 6), "share": round(float(t.mean()), 6)} for p, t in found]


def coverage(certain: np.ndarray, right: np.ndarray) -> list[dict]:
    """Accuracy of the most confident answers, at `COVERAGES` of them, and the confidence from which on they are given.

    Of equally confident answers as many are right as on average, whatever the order of the rows.
    """
    order = np.argsort(-certain, kind="stable")
    _, place, alike = np.unique(certain, return_inverse=True, return_counts=True)
    hits = np.cumsum((np.bincount(place, right) / np.maximum(alike, 1))[place][order])
    curve = []
    for share in COVERAGES if len(certain) else ():
        count = max(1, round(share * len(certain)))
        threshold = round(float(certain[order][count - 1]), 6)
        curve.append({"coverage": share, "n": count, "accuracy": round(float(hits[count - 1] / count), 6), "from": threshold})
    return curve


def told_of(raw, items: Sequence[Item], labels: confidence.Labels, engine: Callable, path: Path,
            answered: Mapping[Key, Mapping]) -> tuple[int, dict]:  # fmt: skip
    """Weigh the labels of closed questions that have no probabilities yet: answers of a choice head came with theirs.

    Args:
        raw: the split, images not decoded. items: its questions, in row order.
        answered: the predictions by key; one that has ``probabilities`` is not asked about again.
        engine: gives the engine first; called only if something is left to weigh.
        path: confidence.jsonl, appended to.

    Returns:
        How many questions have labels, and by key the rows of those that have probabilities.

    Raises:
        UserError: if no question has labels, or the engine gives no likelihoods.
    """
    direct = told_with(answered)
    wordings = {item.key: labels.of(item) for item in items if item.key not in direct and labels.of(item)}
    if not wordings and not direct:
        closed = ", ".join(confidence.CLOSED)
        raise UserError(f"--confidence; --task asks no closed question; {closed} and yes-or-no ones are; choose another")
    done = confidence.read(path)
    todo = {key: texts for key, texts in wordings.items() if key not in done}
    if todo:
        asked = confidence.requests(raw, [item for item in items if item.key in todo], labels)
        confidence.weigh(confidence.engine_of(engine()[0]), asked, todo, path)
    told = {key: row for key, row in confidence.read(path).items() if key in wordings}
    return len(wordings) + len(direct), told | direct


def told_with(answered: Mapping[Key, Mapping]) -> dict[Key, dict]:
    """The label probabilities that answers came with, as those of a choice head do, in the form of `confidence.read`."""
    chosen = {key: row["probabilities"] for key, row in answered.items() if row.get("probabilities")}
    return {key: {"probabilities": found, "mass": 1.0} for key, found in chosen.items()}


def add(scores: dict, rows: Sequence[Mapping], told: Mapping[Key, Mapping], below: float | None, draws: Resamples) -> None:
    """Put ``confidence`` beside the scores of every kind of question that has label probabilities.

    Args:
        scores: what `scoring.score` returned; changed in place.
        rows: the predictions.
        told: by key, rows of `confidence.read`.
        below: answers less confident than this are held back (``--abstain-below``), or ``None``.
        draws: resamples of the rows' groups.
    """
    kinds: dict[str, list[Mapping]] = defaultdict(list)
    for row in rows:
        if row["error"] is None and row["question_id"] != report_sections.REPORT_ID:
            kinds[measures.kind_of(row)].append(row)
    for kind, found in kinds.items():
        known = [row for row in found if (row["image_id"], row["question_id"]) in told]
        if known:
            beside = [told[row["image_id"], row["question_id"]] for row in known]
            scores["questions"][kind]["confidence"] = _of_kind(kind, known, beside, below, draws)


def _of_kind(kind: str, rows: Sequence[Mapping], told: Sequence[Mapping], below: float | None, draws: Resamples) -> dict:
    groups = [row["group"] for row in rows]
    right = np.array([measures.right(row, row["prediction"]) for row in rows], float)
    certain = np.array([confidence_of(row, one) for row, one in zip(rows, told, strict=True)])
    meant = [confidence.label_of(row, row["reference"]) for row in rows]
    likeliest = [likeliest_of(one)[0] == label for label, one in zip(meant, told, strict=True)]
    found = {
        "n": len(rows), "mass": round(float(np.mean([one["mass"] for one in told])), 6),
        "likeliest label": _score(mean(likeliest), groups, draws),
        "curve": coverage(certain, right), "abstain": _abstain(certain, right, groups, below, draws),
        "fallback": _fallback(rows, told, right, groups, draws),
        "of": "the answer's own label", **_calibration(certain, right, groups, draws),
    }  # fmt: skip
    classes = _classes(kind, rows)
    return found | (_two_classes(*classes, rows, told, draws) if classes else {})


def _classes(kind: str, rows: Sequence[Mapping]) -> tuple[str, str] | None:
    """The positive and the negative label of a kind of question; ``None`` where there are not two."""
    if kind == confidence.TEXT:
        return measures.two_labels(confidence.label_of(row, row["reference"]) for row in rows)
    return POSITIVE.get(kind)


def confidence_of(row: Mapping, told: Mapping) -> float:
    """The probability of the label that the row's answer stands for."""
    return told["probabilities"].get(confidence.label_of(row, row["prediction"]), 0.0)


def likeliest_of(told: Mapping) -> tuple[str, float]:
    """The likeliest label and its probability."""
    return max(told["probabilities"].items(), key=lambda entry: entry[1])


def _two_classes(positive: str, negative: str, rows: Sequence[Mapping], told: Sequence[Mapping], draws: Resamples) -> dict:
    """Ranking and calibration of the positive label's probability, over rows whose reference is one of the two.

    ``balanced accuracy`` is that of the likelier of all labels in place of the answer: no threshold is chosen for it.
    """
    kept = [(row, one) for row, one in zip(rows, told, strict=True) if _class_of(row, positive, negative) is not None]
    groups, score = [row["group"] for row, _ in kept], np.array([one["probabilities"].get(positive, 0.0) for _, one in kept])
    truth = np.array([_class_of(row, positive, negative) for row, _ in kept], bool)
    likeliest = [{positive: True, negative: False}.get(likeliest_of(one)[0]) for _, one in kept]
    return {
        "of": f"P({positive})", "positives": int(truth.sum()),
        **{name: ranking.of_weights(statistic, truth, score, groups, draws) for name, statistic in ranking.SCORES.items()},
        "balanced accuracy": _score(metrics.binary(truth, likeliest)["balanced accuracy"], groups, draws),
        **_calibration(score, truth.astype(float), groups, draws),
    }  # fmt: skip


def _class_of(row: Mapping, positive: str, negative: str) -> bool | None:
    return {positive: True, negative: False}.get(confidence.label_of(row, row["reference"]))


def differences(kind: str, first: Sequence[Mapping], second: Sequence[Mapping], told: Sequence[Mapping[Key, Mapping]],
                draws: Resamples) -> dict:  # fmt: skip
    """Paired differences ``second - first`` of how the positive label's probability ranks one kind of question.

    Args:
        first, second: rows of the same questions in the same order, none failed.
        told: both sides' label probabilities (`confidence.read`); questions that either lacks are left out.

    Returns:
        `ranking.difference` by score; empty for kinds without two classes or without probabilities.
    """
    classes = _classes(kind, first) or ()
    keys = [(row["image_id"], row["question_id"]) for row in first]
    known = [i for i, key in enumerate(keys) if classes and key in told[0] and key in told[1]]
    known = [i for i in known if _class_of(first[i], *classes) is not None]
    if not known:
        return {}
    groups, truth = [first[i]["group"] for i in known], np.array([_class_of(first[i], *classes) for i in known], bool)
    sides = [np.array([side[keys[i]]["probabilities"].get(classes[0], 0.0) for i in known]) for side in told]
    made = {name: ranking.difference(statistic, truth, *sides, groups, draws) for name, statistic in ranking.SCORES.items()}
    return {name: one for name, one in made.items() if one}


def _calibration(probability: np.ndarray, came_true: np.ndarray, groups: Sequence[str], draws: Resamples) -> dict:
    """The calibration error beside what chance alone would show.

    Resampled rows repeat, which adds to the error once more: the interval is moved back by that much.
    """
    error = calibration_error(probability, came_true)
    made = _score(error, groups, draws)
    if made["interval"]:
        added = float(np.mean(draws.values(error, groups))) - error.value
        made["interval"] = [round(max(0.0, end - added), 6) for end in made["interval"]]
    made["by chance"] = round(error_by_chance(probability, groups), 6) if len(probability) else None
    return {"calibration error": made, "reliability": reliability(probability, came_true)}


def _abstain(certain: np.ndarray, right: np.ndarray, groups: Sequence[str], below: float | None, draws: Resamples) -> dict | None:
    """How many answers are at least as confident as asked for, and how many of those are right."""
    if below is None:
        return None
    kept = certain >= below
    given = mean(np.where(kept, right, np.nan))
    counts = {"answered": int(kept.sum()), "held_back": int((~kept).sum())}
    return {"below": below, **counts, "accuracy": _score(given, groups, draws)}


def _fallback(
    rows: Sequence[Mapping], told: Sequence[Mapping], right: np.ndarray, groups: Sequence[str], draws: Resamples
) -> dict:
    """The likeliest label in place of every answer that could not be read: an offer, never part of the scores above."""
    offered, with_it = [], right.copy()
    for at, (row, one) in enumerate(zip(rows, told, strict=True)):
        if measures.meaning(row, row["prediction"]) is None and not right[at]:
            label, chance = likeliest_of(one)
            with_it[at] = label == confidence.label_of(row, row["reference"])
            named = {"image_id": row["image_id"], "question_id": row["question_id"]}
            offered.append({**named, "likeliest": label, "probability": chance})
    return {"unread": len(offered), "accuracy": _score(mean(with_it), groups, draws), "offered": offered}


def _score(score: Score, groups: Sequence[str], draws: Resamples) -> dict:
    span = draws.interval(score, groups)
    counted = [group for group, columns in zip(groups, score.columns, strict=True) if columns.any()]
    return ranking.figure(score.value, span, len(counted), counted, score.carriers(groups))


def find(scores: Mapping, asked: int, told: int) -> Iterable[Finding]:
    """What is wrong with the probabilities: missing ones, ones that do not tell the classes apart, labels hardly ever meant.

    Args:
        asked, told: questions with labels, and those that got probabilities.
    """
    if asked - told:
        text = f"{asked - told} of {asked} closed questions got no label probabilities; the same command asks again"
        yield Finding("no probabilities", None, (asked - told) / asked, text, asked - told > RARE * asked)
    for kind, about in scores["questions"].items():
        found = about.get("confidence", {})
        area = found.get("AUROC", {})
        if area.get("interval") and area["interval"][0] <= 0.5 and found["positives"] >= ENOUGH:
            low, high = area["interval"]
            text = f"{kind}: {found['of']} does not tell the classes apart: AUROC {area['value']:.2f} [{low:.2f}, {high:.2f}]"
            yield Finding("no ranking", kind, area["value"], text)
        if found and found["mass"] < 0.5:
            text = f"{kind}: the labels' known wordings hold {found['mass']:.0%} of the model's probability; it says other things"
            yield Finding("little mass", kind, found["mass"], text, False)


def show(scores: Mapping, console: Console) -> None:
    """Print what the probabilities of two-class questions are worth at fixed specificities; nothing where there are none."""
    names = (*(name for name in ranking.SCORES if name.startswith("sensitivity")), "average precision", "balanced accuracy")
    found = {kind: about["confidence"] for kind, about in scores["questions"].items() if "AUROC" in about.get("confidence", {})}
    if not found:
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="By the probability of the positive label", title_justify="left")
    for name in ("", "score", "value \\[95 %]", "positives/n"):
        table.add_column(name, justify="right" if name == "positives/n" else "left", no_wrap=True)
    for kind, about in found.items():
        for name in names:
            figure = about[name]
            table.add_row(kind, name, scoretable.value(figure), f"{about['positives']}/{figure['n']}")
    console.print(table)
