"""What label probabilities are worth: do they rank, are they calibrated, and how right are the answers given with confidence.

An answer's *confidence* is the probability of the label it stands for; 0 where it is unread or stands for none.

Sources: AUROC as the Mann-Whitney statistic (Hanley & McNeil, 1982); average precision as scikit-learn defines it;
expected calibration error over bins of equal mass (Nguyen & O'Connor, 2015; Roelofs et al., 2022); accuracy against
coverage (El-Yaniv & Wiener, 2010; Geifman & El-Yaniv, 2017).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from sonovqa import confidence, measures, metrics, report_sections
from sonovqa.findings import ENOUGH, RARE, Finding
from sonovqa.metrics import Resamples, Score, mean
from sonovqa.predictions import Key

BINS = 10  # of the calibration error; fewer where there are fewer than `BIN_ROWS` rows for each
BIN_ROWS = 10
COVERAGES = tuple(round(0.05 * step, 2) for step in range(20, 0, -1))
POSITIVE = {"Q7": ("abnormal", "normal"), "closed": ("yes", "no")}
ROWS_AT_ONCE = 100  # resamples held in memory by `of_weights`


def auroc(truth: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve, ties counted half, ``[R]``; NaN where a class is absent.

    Args:
        truth: boolean ``[n]``.
        score: ``[n]``, more is likelier true.
        weights: ``[R, n]``, how often each row counts.
    """
    _, positives, negatives = _by_threshold(truth, score, weights)
    below = np.cumsum(negatives, axis=1) - negatives
    pairs = positives.sum(1) * negatives.sum(1)
    won = (positives * (below + negatives / 2)).sum(1)
    return np.divide(won, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)


def average_precision(truth: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Average precision, ``[R]``; arguments as for `auroc`. Chance gives the share of true rows."""
    _, positives, negatives = _by_threshold(truth, score, weights)
    hits = np.cumsum(positives[:, ::-1], axis=1)  # from the highest threshold down
    said = hits + np.cumsum(negatives[:, ::-1], axis=1)
    precision = np.divide(hits, said, out=np.zeros_like(hits), where=said > 0)
    found, total = (precision * positives[:, ::-1]).sum(1), positives.sum(1)
    return np.divide(found, total, out=np.full(len(total), np.nan), where=total > 0)


def _by_threshold(truth: np.ndarray, score: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct scores in rising order ``[u]``, and the weight of true and of false rows at each, ``[R, u]``."""
    order = np.argsort(score, kind="stable")
    distinct, starts = np.unique(score[order], return_index=True)
    counted, true = weights[:, order].astype(float), truth[order]
    return distinct, *(np.add.reduceat(counted * side, starts, axis=1) for side in (true, ~true))


def of_weights(statistic: Callable, truth: Sequence[bool], score: Sequence[float], groups: Sequence[str], draws: Resamples):
    """``{value, interval, n, groups}`` of `auroc` or `average_precision`, its interval resampled by group."""
    truth, score = np.asarray(truth, bool), np.asarray(score, float)
    value = float(statistic(truth, score, np.ones((1, len(truth))))[0]) if len(truth) else np.nan
    weights = draws.row_weights(groups)
    parts = [statistic(truth, score, weights[at : at + ROWS_AT_ONCE]) for at in range(0, len(weights), ROWS_AT_ONCE)]
    span = metrics.percentiles(np.concatenate(parts)) if parts and np.isfinite(value) else (np.nan, np.nan)
    fewest = min((len({g for g, t in zip(groups, truth, strict=True) if t == side}) for side in (True, False)), default=0)
    span = metrics.widened(*span, max(fewest, 1), (0.0, 1.0))
    return _figure(value, span, len(truth), groups)


def bins_of(probability: np.ndarray) -> np.ndarray:
    """The bin of each probability ``[n]``: of equal mass, except that equal probabilities share one."""
    count = max(1, min(BINS, len(probability) // BIN_ROWS))
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


def reliability(probability: np.ndarray, came_true: np.ndarray) -> list[dict]:
    """The bins of `calibration_error`: rows, mean probability and the share that came true."""
    which = bins_of(probability)
    found = ((probability[which == b], came_true[which == b]) for b in np.unique(which))
    return [{"n": len(p), "probability": round(float(p.mean()), 6), "share": round(float(t.mean()), 6)} for p, t in found]


def coverage(certain: np.ndarray, right: np.ndarray) -> list[dict]:
    """Accuracy of the most confident answers, at `COVERAGES` of them, and the confidence from which on they are given."""
    order = np.argsort(-certain, kind="stable")
    hits = np.cumsum(right[order])
    curve = []
    for share in COVERAGES if len(certain) else ():
        count = max(1, round(share * len(certain)))
        threshold = round(float(certain[order][count - 1]), 6)
        curve.append({"coverage": share, "n": count, "accuracy": round(float(hits[count - 1] / count), 6), "from": threshold})
    return curve


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
    return found | (_two_classes(*POSITIVE[kind], rows, told, draws) if kind in POSITIVE else {})


def confidence_of(row: Mapping, told: Mapping) -> float:
    """The probability of the label that the row's answer stands for."""
    return told["probabilities"].get(confidence.label_of(row, row["prediction"]), 0.0)


def likeliest_of(told: Mapping) -> tuple[str, float]:
    """The likeliest label and its probability."""
    return max(told["probabilities"].items(), key=lambda entry: entry[1])


def _two_classes(positive: str, negative: str, rows: Sequence[Mapping], told: Sequence[Mapping], draws: Resamples) -> dict:
    """Ranking and calibration of the positive label's probability, over rows whose reference is one of the two."""
    pairs = [(row["group"], confidence.label_of(row, row["reference"]), one["probabilities"].get(positive, 0.0))
             for row, one in zip(rows, told, strict=True)]  # fmt: skip
    pairs = [pair for pair in pairs if pair[1] in (positive, negative)]
    groups, score = [pair[0] for pair in pairs], np.array([pair[2] for pair in pairs])
    truth = np.array([pair[1] == positive for pair in pairs], bool)
    return {
        "of": f"P({positive})", "positives": int(truth.sum()),
        "AUROC": of_weights(auroc, truth, score, groups, draws),
        "average precision": of_weights(average_precision, truth, score, groups, draws),
        **_calibration(score, truth.astype(float), groups, draws),
    }  # fmt: skip


def _calibration(probability: np.ndarray, came_true: np.ndarray, groups: Sequence[str], draws: Resamples) -> dict:
    error = _score(calibration_error(probability, came_true), groups, draws)
    return {"calibration error": error, "reliability": reliability(probability, came_true)}


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
    return _figure(score.value, span or (np.nan, np.nan), len(counted), counted)


def _figure(value: float, span: tuple[float, float], n: int, groups: Sequence[str]) -> dict:
    numbers = [round(float(v), 6) if np.isfinite(v) else None for v in (value, *span)]
    return {"value": numbers[0], "interval": None if None in numbers[1:] else numbers[1:], "n": n, "groups": len(set(groups))}


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
