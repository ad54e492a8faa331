"""Which number of an answer belongs to which parameter (Q4)."""

from __future__ import annotations

import bisect
import itertools
import re

from sonovqa.answer_meaning import ordered
from sonovqa.answer_numbers import SENTENCE, Found, Quantity
from sonovqa.answer_scope import Span
from sonovqa.answer_words import VOCABULARY

_NO_LENGTH = ("week", "day", "minute")  # "BPD 72 mm (28w6d)"
_SHARE = ("percentile", "%")
_LISTED = re.compile(r"[\s,/&+()]*(?:(?:and|the|fetal|both)\b[\s,/&+()]*)*")
_DIRECTLY = re.compile(r"[^;,.!?\d]{0,12}")


def _either(kind: str) -> str:
    return "|".join(map(re.escape, VOCABULARY["measured_words"][kind]))


#: What stands after a number that is a difference or a former value, and between a name and a number that is no size.
_OTHER_AFTER = re.compile(rf" ?(?:\(|(?:\d+ (?:weeks?|days?) )?)(?:{_either('other_after')})\b")
_OTHER_BEFORE = re.compile(rf"\b(?:{_either('other_before')})\b")


def values(text: str, named: list[tuple[str, Span]], numbers: list[Found]) -> tuple[Quantity, ...]:
    """Each parameter's quantity: the number after its name in the sentence, or right before it ("a 2.3 mm NT").

    Numbers after several names ("BPD and HC: 47 and 175 mm") go to them in order if there are as many, else to none;
    but one number after items set off by commas is the last one's.

    Args:
        text: cleaned text.
        named: the parameters said, with their spans, in the order of the text.
        numbers: `quantities` of the text.
    """
    numbers = [n for n in numbers if n.value.unit not in _NO_LENGTH and not _OTHER_AFTER.match(text, n.end)]
    ends = [found.start() for found in SENTENCE.finditer(text)]
    events = sorted(
        [(s.start, s.end, name) for name, s in named] + [(n.start, n.end, n.value) for n in numbers], key=lambda e: e[:2]
    )
    given: dict[str, Quantity] = {}
    for _, sentence in itertools.groupby(events, key=lambda event: bisect.bisect(ends, event[0])):
        runs = [list(run) for _, run in itertools.groupby(sentence, key=lambda event: isinstance(event[2], str))]
        for at, run in enumerate(runs):
            if isinstance(run[0][2], Quantity):
                before = _listed(text, runs[at - 1][::-1])[::-1] if at else []
                after = _listed(text, runs[at + 1]) if at + 1 < len(runs) else []
                for name, value in _paired(text, before, run, after, given):
                    given.setdefault(name, value._replace(name=name))
    return tuple(given[name] for name in ordered("Q4", given))


def _listed(text: str, names: list[tuple]) -> list[tuple]:
    """The names that make one list with the first of ``names``, each once: "BPD / HC", not "AC is seen, FL"."""
    listed = names[:1]
    for (start, end, _), event in itertools.pairwise(names):
        gap = text[end : event[0]] if end <= event[0] else text[event[1] : start]
        if not _LISTED.fullmatch(gap):
            break
        if event[2] not in [name for _, _, name in listed]:
            listed.append(event)
    return listed


def _paired(text: str, before: list[tuple], run: list[tuple], after: list[tuple], given: dict) -> list[tuple[str, Quantity]]:
    """(name, quantity) of one run of numbers that stands between names."""
    sizes = [event for event in run if event[2].unit not in _SHARE] or run
    several = before if len(before) > 1 else after if not before and len(after) > 1 and len(sizes) > 1 else []
    if several:
        names = [name for _, _, name in several]
        if len(names) == len(sizes):
            return list(zip(names, _one_unit(text, sizes), strict=True))
        if len(sizes) > 1 or text[several[-2][1] : several[-1][0]].strip() != ",":  # but "HC, FL 32 mm" is a list of items
            return []
    pairs = []
    if before and before[-1][2] not in given:
        if _OTHER_BEFORE.search(text, before[-1][1], run[0][0]):
            return []
        pairs.append((before[-1][2], sizes[0][2]))
    if after and (len(run) > 1 or not pairs) and _DIRECTLY.fullmatch(text, run[-1][1], after[0][0]):
        pairs.append((after[0][2], run[-1][2]))
    return pairs


def _one_unit(text: str, sizes: list[tuple]) -> list[Quantity]:
    """The quantities of a list; those without a unit in that of the last: "47 and 175 mm"."""
    start, end, last = sizes[-1]
    written = re.search(r"\d+(?:\.\d+)?", text[start:end])
    factor = last.value / float(written[0]) if last.unit == "mm" and last.low == last.high and float(written[0]) else 1
    read = []
    for _, _, size in sizes:
        scaled = {part: round(getattr(size, part) * factor, 6) for part in ("value", "low", "high")}
        read.append(size if size.unit else size._replace(unit=last.unit, **scaled))
    return read
