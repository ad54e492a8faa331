"""How well a probability ranks two classes, whatever threshold is chosen later: scores that no sums give.

Sources: AUROC as the Mann-Whitney statistic (Hanley & McNeil, 1982); average precision as scikit-learn defines it;
sensitivity at a fixed specificity as a point of the empirical ROC curve, nothing interpolated (Pepe, The Statistical
Evaluation of Medical Tests, 2003, chapter 4). Every statistic takes ``[R, n]`` weights, how often each row counts, and
gives ``[R]`` values, so that resamples of groups cost one call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np

from sonovqa import metrics
from sonovqa.metrics import Resamples

SPECIFICITIES = (0.80, 0.90, 0.95)  # at which sensitivity is read off
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


def sensitivity_at(specificity: float, truth: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The largest sensitivity at no less than a specificity, ``[R]``; other arguments as for `auroc`.

    The threshold is chosen on these rows themselves, and anew in every resample, so the interval holds that choice too. It
    says what the scores can tell apart; a threshold for use is chosen on other patients.
    """
    _, positives, negatives = _by_threshold(truth, score, weights)
    cleared = np.cumsum(negatives, axis=1) - negatives  # negatives below each threshold
    found = np.cumsum(positives[:, ::-1], axis=1)[:, ::-1]  # positives at or above it
    total = positives.sum(1)
    allowed = cleared >= (specificity - 1e-9) * negatives.sum(1, keepdims=True)
    most = np.where(allowed, found, 0).max(axis=1, initial=0)
    return np.divide(most, total, out=np.full(len(total), np.nan), where=(total > 0) & (negatives.sum(1) > 0))


#: By name, in the order of tables.
SCORES: dict[str, Callable] = {
    "AUROC": auroc,
    "average precision": average_precision,
    **{f"sensitivity at specificity {s:.2f}": functools.partial(sensitivity_at, s) for s in SPECIFICITIES},
}


def _by_threshold(truth: np.ndarray, score: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct scores in rising order ``[u]``, and the weight of true and of false rows at each, ``[R, u]``."""
    order = np.argsort(score, kind="stable")
    distinct, starts = np.unique(score[order], return_index=True)
    counted, true = weights[:, order].astype(float), truth[order]
    return distinct, *(np.add.reduceat(counted * side, starts, axis=1) for side in (true, ~true))


def of_weights(statistic: Callable, truth: Sequence[bool], score: Sequence[float], groups: Sequence[str], draws: Resamples):
    """``{value, interval, n, groups, carriers}`` of one of `SCORES`, its interval resampled by group."""
    truth, score = np.asarray(truth, bool), np.asarray(score, float)
    value = _of_all(statistic, truth, score)
    span = None
    if np.isfinite(value):
        span = metrics.limits(_resampled(statistic, truth, score, groups, draws), _rarer(truth, groups), (0.0, 1.0))
    return figure(value, span, len(truth), groups, _rarer(truth, groups))


def _rarer(truth: np.ndarray, groups: Sequence[str]) -> int:
    """How many groups have a row of the rarer class."""
    return min(len({g for g, t in zip(groups, truth, strict=True) if t == side}) for side in (True, False))


def _of_all(statistic: Callable, truth: np.ndarray, score: np.ndarray) -> float:
    return float(statistic(truth, score, np.ones((1, len(truth))))[0]) if len(truth) else np.nan


def _resampled(statistic: Callable, truth: np.ndarray, score: np.ndarray, groups: Sequence[str], draws: Resamples) -> np.ndarray:
    weights = draws.row_weights(groups)
    parts = [statistic(truth, score, weights[at : at + ROWS_AT_ONCE]) for at in range(0, len(weights), ROWS_AT_ONCE)]
    return np.concatenate(parts) if parts else np.zeros(0)


def difference(statistic: Callable, truth: np.ndarray, first: np.ndarray, second: np.ndarray, groups: Sequence[str],
               draws: Resamples) -> dict | None:  # fmt: skip
    """``second - first`` of one of `SCORES` over the same rows, paired, as `comparing.compare` has its figures; ``None`` where
    a class is absent.

    Args:
        truth: boolean ``[n]``. first, second: both sides' scores ``[n]``. groups: of the rows.
    """
    values = [_of_all(statistic, truth, side) for side in (first, second)]
    if not np.isfinite(values).all():
        return None
    drawn = [_resampled(statistic, truth, side, groups, draws) for side in (first, second)]
    rarer = _rarer(truth, groups)
    span = metrics.limits(drawn[1] - drawn[0], rarer, (-1.0, 1.0)) if rarer >= metrics.FEWEST_GROUPS else None
    return {
        "first": values[0], "second": values[1], "difference": values[1] - values[0],
        "interval": list(span) if span else None,
        "n": len(truth), "groups": len(set(groups)), "carriers": rarer, "higher_is_better": True,
    }  # fmt: skip


def figure(value: float, span: tuple[float, float] | None, n: int, groups: Sequence[str], carriers: int) -> dict:
    """A score as JSON: ``value``, ``interval`` (``None`` where there is none), ``n``, ``groups`` and its `Score.carriers`."""
    shown = round(float(value), 6) if np.isfinite(value) else None
    about = {"n": n, "groups": len(set(groups)), "carriers": carriers}
    return {"value": shown, "interval": [round(float(v), 6) for v in span] if span else None, **about}
