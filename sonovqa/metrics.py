"""Scores as functions of sums, so that one matrix product resamples any of them by group.

Nearly every score in use is a function of sums over rows: accuracy (right, all), sensitivity (found, present), Matthews
correlation (the four cells), corpus BLEU (matches, totals, lengths). Summed per group once, ``weights @ sums`` gives all
resamples of the cluster bootstrap in one product (`Resamples`).

Source: cluster bootstrap, Davison & Hinkley, Bootstrap Methods and their Application (1997), section 3.8; percentile
intervals, Efron & Tibshirani (1993), chapter 13.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

LEVEL = 0.95
#: Below so many groups resampling them says nothing: of one group it always draws the same rows, of four it draws none of a
#: given one in a third of all resamples. An interval is then left out, and with it any verdict better or worse.
FEWEST_GROUPS = 5


@dataclass(frozen=True)
class Score:
    """One score of n rows, not yet a number.

    Attributes:
        columns: ``[n, k]``, what each row adds to the sums.
        of_sums: from ``[..., k]`` sums to ``[...]`` values; NaN where the score is not defined (no positive row, say).
        higher: whether more is better; ``None`` where neither is.
        bounds: the values it can take, ``None`` for no limit; used where all resamples agree (`interval`).
        classes: the columns of each class that the score needs, where it needs rows of more than one: its interval then
            rests on the groups of the rarest class.
    """

    columns: np.ndarray
    of_sums: Callable[[np.ndarray], np.ndarray]
    higher: bool | None = True
    bounds: tuple[float, float] | None = (0.0, 1.0)
    classes: tuple[tuple[int, ...], ...] = ()

    @property
    def value(self) -> float:
        """The score of all rows; NaN where it is not defined."""
        return float(self.of_sums(self.columns.sum(axis=0)))

    def take(self, rows: np.ndarray) -> Score:
        """The same score over some rows (indices or a mask)."""
        return replace(self, columns=self.columns[rows])

    def only(self, rows: np.ndarray) -> Score:
        """The same score with all rows outside a mask ``[n]`` left out of its sums."""
        return replace(self, columns=self.columns * rows[:, None])

    def carriers(self, groups: Sequence[str]) -> int:
        """How many groups carry the score: those with a row that counts, of the rarest class there is where it needs several.

        200 images of which 2 are abnormal say no more of sensitivity than 2 images do.
        """
        sides = [self.columns[:, list(columns)] for columns in self.classes] or [self.columns]
        counts = [len({group for group, carries in zip(groups, side.any(axis=1)) if carries}) for side in sides]
        return min((count for count in counts if count), default=0)


class Resamples:
    """Bootstrap resamples of groups, drawn once and shared by every score, so that differences are paired.

    Args:
        groups: the group of every row of the evaluation, ``[n]``. A resample draws as many groups as there are, with
            replacement, and a row comes along with its group.
        count: how many resamples; 0 leaves intervals out.
        seed: of the draws.
    """

    def __init__(self, groups: Sequence[str], count: int = 1000, seed: int = 0):
        self.codes = {group: i for i, group in enumerate(sorted(set(groups)))}
        total = len(self.codes)
        draws = np.random.default_rng(seed).integers(total, size=(count, total)) if total else np.zeros((count, 0), int)
        self.weights = np.zeros((count, total), np.float32)
        for weight, draw in zip(self.weights, draws):
            weight += np.bincount(draw, minlength=total)

    def values(self, score: Score, groups: Sequence[str]) -> np.ndarray:
        """The score in every resample, ``[count]``; ``groups`` names the group of each row of the score."""
        codes = np.fromiter((self.codes[g] for g in groups), int, len(groups))
        sums = np.stack([np.bincount(codes, column, len(self.codes)) for column in score.columns.T], axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return score.of_sums(self.weights @ sums)

    def row_weights(self, groups: Sequence[str]) -> np.ndarray:
        """How often each row counts in every resample, ``[count, n]``: for scores that no sums give (ranks)."""
        return self.weights[:, np.fromiter((self.codes[g] for g in groups), int, len(groups))]

    def interval(self, score: Score, groups: Sequence[str]) -> tuple[float, float] | None:
        """The 95 % interval, or ``None`` where there is nothing to resample.

        All resamples agree when every row scores alike (none of 40 images missed); a width of zero would then claim too
        much. A score within bounds gets Clopper and Pearson's exact limit for as many trials as groups carry it.
        """
        if not len(self.weights) or not len(groups):
            return None
        return limits(self.values(score, groups), score.carriers(groups), score.bounds)

    def difference(self, score: Score, other: Score, groups: Sequence[str]) -> tuple[float, float] | None:
        """The 95 % interval of ``score - other`` over the same rows, resampled together; ``None`` for too few groups."""
        groups_of_both = min(score.carriers(groups), other.carriers(groups))
        if not len(self.weights) or groups_of_both < FEWEST_GROUPS:
            return None
        bounds = (score.bounds[0] - other.bounds[1], score.bounds[1] - other.bounds[0]) if score.bounds and other.bounds else None
        return limits(self.values(score, groups) - self.values(other, groups), groups_of_both, bounds)


def limits(values: np.ndarray, groups: int, bounds: tuple[float, float] | None) -> tuple[float, float] | None:
    """The 95 % interval that resampled values give; ``None`` where they are never defined, or from too few groups.

    Args:
        values: ``[R]``. groups: how many carry the score. bounds: of the score.

    Where all values agree at a bound, the interval is the exact one of ``groups`` trials that all went alike (Clopper &
    Pearson, 1934), and that holds for few groups too.
    """
    low, high = percentiles(values)
    if not math.isfinite(low):
        return None
    if high - low < 1e-12 and bounds and min(bounds[1] - low, high - bounds[0]) < 1e-9:
        reach = (1 - ((1 - LEVEL) / 2) ** (1 / max(groups, 1))) * (bounds[1] - bounds[0])
        return (bounds[1] - reach, bounds[1]) if bounds[1] - low < 1e-9 else (bounds[0], bounds[0] + reach)
    return (low, high) if groups >= FEWEST_GROUPS else None


def percentiles(values: np.ndarray) -> tuple[float, float]:
    """The limits of the middle 95 % of the resamples in which the score is defined; NaN twice if it never is."""
    values = values[np.isfinite(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    top, bottom = np.asarray(top, float), np.asarray(bottom, float)
    return np.divide(top, bottom, out=np.full(np.shape(top), np.nan), where=bottom != 0)


def mean(values: Sequence[float], higher: bool | None = True, bounds: tuple[float, float] | None = (0.0, 1.0)) -> Score:
    """The mean of a value a row; rows whose value is NaN are left out of it."""
    values = np.asarray(values, float)
    known = np.isfinite(values)
    columns = np.stack([np.where(known, values, 0.0), known], axis=1)
    return Score(columns, lambda s: _ratio(s[..., 0], s[..., 1]), higher, bounds)


def binary(truth: Sequence[bool], predicted: Sequence[bool | None]) -> dict[str, Score]:
    """Scores of a yes/no decision, the positive class being ``True``.

    A prediction of ``None`` (unread, unclear) finds nothing and clears nobody: it counts against sensitivity and
    against specificity, and as no alarm for precision.

    Returns:
        ``sensitivity``, ``specificity``, ``balanced accuracy``, ``precision``, ``F1`` and ``MCC`` (Matthews, 1975; an
        unread answer counts as the wrong class).
    """
    truth = np.asarray(truth, bool)
    yes = np.array([p is True for p in predicted], bool)
    no = np.array([p is False for p in predicted], bool)
    columns = np.stack([truth & yes, truth & ~yes, ~truth & no, ~truth & ~no, ~truth & yes], axis=1).astype(float)
    classes = ((0, 1), (2, 3))

    def sensitivity(s):
        return _ratio(s[..., 0], s[..., 0] + s[..., 1])

    def specificity(s):
        return _ratio(s[..., 2], s[..., 2] + s[..., 3])

    def f1(s):
        return _ratio(2 * s[..., 0], 2 * s[..., 0] + s[..., 1] + s[..., 4])

    def mcc(s):
        tp, fn, tn, fp = (s[..., i] for i in range(4))
        below = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
        defined = (tp + fn) * (tn + fp) > 0  # both classes present; a constant answer then scores 0
        return np.where(defined, np.where(below > 0, (tp * tn - fp * fn) / np.where(below > 0, below, 1), 0.0), np.nan)

    def balanced(s):
        return (sensitivity(s) + specificity(s)) / 2

    return {
        "sensitivity": Score(columns[:, :2], sensitivity),  # its n is the positive rows
        "specificity": Score(columns[:, 2:4], lambda s: _ratio(s[..., 0], s[..., 0] + s[..., 1])),
        "balanced accuracy": Score(columns, balanced, classes=classes),
        "precision": Score(columns[:, [0, 4]], lambda s: _ratio(s[..., 0], s[..., 0] + s[..., 1])),
        "F1": Score(columns, f1, classes=classes),
        "MCC": Score(columns, mcc, bounds=(-1.0, 1.0), classes=classes),
    }


def sets(references: Sequence[frozenset], predictions: Sequence[frozenset | None]) -> dict[str, Score]:
    """Precision, recall, F1 and F2 of sets, each the mean over rows; ``None`` (unread) counts as an empty set.

    Two empty sets agree (1); one empty set scores 0. F2 weighs recall four times: a structure missed is worse than one
    too many (van Rijsbergen, 1979).
    """
    rows = []
    for reference, predicted in zip(references, predictions):
        hits = len(reference & (predicted or frozenset()))
        if predicted is not None and not reference and not predicted:
            rows.append((1.0, 1.0, 1.0, 1.0))
            continue
        precision = hits / len(predicted) if predicted else 0.0
        recall = hits / len(reference) if reference else 0.0
        rows.append((precision, recall, _f(precision, recall, 1), _f(precision, recall, 2)))
    table = np.array(rows, float).reshape(-1, 4)
    return {name: mean(table[:, i]) for i, name in enumerate(("precision", "recall", "F1", "F2"))}


def _f(precision: float, recall: float, beta: float) -> float:
    below = beta**2 * precision + recall
    return (1 + beta**2) * precision * recall / below if below else 0.0


def entropy(labels: Sequence[str]) -> float:
    """Shannon entropy of the labels in bits (plug-in estimate)."""
    counts = np.unique(np.asarray(labels, object).astype(str), return_counts=True)[1] if len(labels) else np.array([1])
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum()) + 0.0


def mutual_information(labels: Sequence[str], categories: Sequence[str], shuffles: int = 100, seed: int = 0) -> float:
    """Mutual information of answers and categories in bits, less what shuffled answers have by chance; at least 0.

    The plug-in estimate is biased upwards for few rows and many labels; the mean over permutations estimates that bias
    (Miller, 1955; permutation form as in Vinh et al., 2010).
    """
    if not len(labels):
        return 0.0
    a = np.unique(np.asarray(labels, object).astype(str), return_inverse=True)[1]
    b = np.unique(np.asarray(categories, object).astype(str), return_inverse=True)[1]
    draw = np.random.default_rng(seed)
    chance = float(np.mean([_mutual(draw.permutation(a), b) for _ in range(shuffles)])) if shuffles else 0.0
    return max(0.0, _mutual(a, b) - chance)


def _mutual(a: np.ndarray, b: np.ndarray) -> float:
    joint = np.bincount(a * (b.max() + 1) + b, minlength=(a.max() + 1) * (b.max() + 1)) / len(a)
    joint = joint.reshape(a.max() + 1, b.max() + 1)
    apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log2(joint[seen] / apart[seen])).sum())
