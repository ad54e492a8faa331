"""Wording scores, ROUGE-L and BLEU-4, as sums a row (`metrics.Score`). They measure words; meaning is `measures`'s job."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

import numpy as np

from sonovqa.metrics import Score, mean

#: How BLEU is computed, in sacrebleu's own terms; written beside the score.
BLEU_SIGNATURE = "sacrebleu BLEU-4, case lc, tokens 13a, smoothing exp, effective order no"
_ORDER = 4


@functools.lru_cache(maxsize=65536)
def rouge_l(reference: str, prediction: str) -> float:
    """ROUGE-L F1 of two texts, 0 to 1. Tokens are lower-case runs of letters and digits, not stemmed.

    Source: Lin, ROUGE: a package for automatic evaluation of summaries (2004); tokens as in Google's ``rouge_score``.
    """
    from rapidfuzz.distance import LCSseq

    a, b = (re.findall(r"[a-z0-9]+", text.lower()) for text in (reference, prediction))
    if not a or not b:
        return 0.0
    common = LCSseq.similarity(a, b)
    return 2 * common / (len(a) + len(b))


@functools.lru_cache(maxsize=1)
def _bleu():
    from sacrebleu.metrics import BLEU

    return BLEU(lowercase=True)


@functools.lru_cache(maxsize=65536)
def _bleu_sums(reference: str, prediction: str) -> tuple[float, ...]:
    score = _bleu().corpus_score([prediction], [[reference]])  # of one: its sums add up to the corpus's
    return (*score.counts, *score.totals, score.sys_len, score.ref_len)


def bleu_of_sums(sums: np.ndarray) -> np.ndarray:
    """Corpus BLEU-4 (0 to 1) from ``[..., 10]`` sums: 4 matches, 4 totals, length of the predictions, of the references.

    Source: Papineni et al. (2002), with sacrebleu's exponential smoothing; `tests/test_metrics.py` holds it to sacrebleu.
    """
    sums = np.asarray(sums, float)
    counts, totals = sums[..., :_ORDER], sums[..., _ORDER : 2 * _ORDER]
    missed = (counts == 0) & (totals > 0)
    smooth = 2.0 ** np.cumsum(missed, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.where(missed, 1 / (smooth * totals), counts / totals)
        length = np.exp(np.minimum(0.0, 1 - sums[..., -1] / sums[..., -2]))
        value = length * np.exp(np.log(precision).mean(axis=-1))
    complete = (totals > 0).all(axis=-1) & (counts.sum(axis=-1) > 0)  # texts shorter than four tokens have no 4-gram
    return np.where(complete, value, 0.0)


def wording(references: Sequence[str], predictions: Sequence[str]) -> dict[str, Score]:
    """``ROUGE-L`` (mean over rows) and ``BLEU-4`` (of the corpus) for paired texts."""
    pairs = list(zip(references, predictions))
    sums = np.array([_bleu_sums(*pair) for pair in pairs], float).reshape(-1, 2 * _ORDER + 2)
    return {"ROUGE-L": mean([rouge_l(*pair) for pair in pairs]), "BLEU-4": Score(sums, bleu_of_sums)}
