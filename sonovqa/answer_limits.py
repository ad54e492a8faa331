"""How many tokens an answer may have before it is cut, where nobody says: by what is asked and by the answers trained on."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol

from sonovqa import extraction

USUAL = 128  # an answer to one of Q1 … Q8, or to any other short question
EXTRACTION = 2048  # a page's medications, findings or values as JSON
LETTERS_A_TOKEN = 2  # half of what plain English has: a model may say it at more length, and medical terms take more tokens


class Asked(Protocol):
    """What is needed of an `asking.Item`."""

    answer_type: str
    reference: str


def usual(asked: Iterable[Asked], trained: Iterable[Asked] = ()) -> int:
    """The limit of an evaluation: the largest that one of its questions needs, as an image's questions are answered together.

    Args:
        asked: the questions.
        trained: those of the training split: where answers are long, as figures' descriptions are, the longest sets the limit,
            up to `EXTRACTION`, for which a server that serve.sh starts has room beside the image.

    Returns:
        Tokens of one answer, in multiples of `USUAL`; a report's eight may have eight times it.
    """
    if any(item.answer_type == extraction.ANSWER_TYPE for item in asked):
        return EXTRACTION
    longest = max((len(item.reference) for item in trained), default=0)
    return min(EXTRACTION, USUAL * max(1, math.ceil(longest / LETTERS_A_TOKEN / USUAL)))


def cut_in_words(cut: int, answers: int, flag: str = "--max-new-tokens") -> str:
    """``3 of 8 answers (37.5%) were cut at the token limit; raise --max-new-tokens``."""
    return f"{cut} of {answers} answers ({cut / answers:.1%}) were cut at the token limit; raise {flag}"
