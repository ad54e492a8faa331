"""Scores of extractions: JSON read off a clinical page, held against the page's own, by medical terms and by values.

A value counts only with its name, its number and its unit: 5.9 mg/dL is not 5.9 mmol/L. The combined score is the mean of
both F1, as an earlier project averaged its term and value accuracies (83.8 and 83.2 to 83.5 %).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from decimal import Decimal
from functools import lru_cache

import numpy as np

from sonovqa.extraction_json import parse
from sonovqa.extraction_units import FREQUENCIES, SPELLINGS, UNITS, WITH_CASE
from sonovqa.metrics import Score, mean

ANSWER_TYPE = "extraction"
#: The questions asked of a page, by id; the stored answer is the JSON that each asks for.
QUESTIONS = {
    "medications": "List every medication on this page with its dose, route and frequency, doses with units, and the action "
    'if one is given. Answer with JSON only: {"medications": [{"name": "", "dose": "", "route": "", "frequency": ""}]}',
    "findings": 'List the diagnoses, procedures and findings on this page. Answer with JSON only: {"findings": [""]}',
    "values": "List every result, vital sign, measurement and infusion rate on this page with its unit, and the flag or the time "
    'where one is printed. Answer with JSON only: {"values": [{"name": "", "value": 0, "unit": ""}]}',
}
_NAMES = ("name", "medication", "drug", "test", "parameter", "analyte", "measurement", "finding", "diagnosis")
_AMOUNTS = ("value", "dose", "dosage", "strength", "result")
_NUMBER = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
#: Sign, number, how a second one is joined to it (``120/80``, ``10-15``, ``10 to 15``), that one, and the unit.
_QUANTITY = re.compile(rf"([<>]?=?)\s*(-?{_NUMBER})(?:\s*(/|-|–|to)\s*({_NUMBER}))?(?:\s*(.*))?", re.DOTALL)
_NOT_MEASURED = {"s", "ms", "min", "h", "days", "weeks", "months", "years", "tablets", "capsules", "drops", "puffs", ""}
_PROSE_UNITS = [
    u for u, name in SPELLINGS.items() if u in ("%", "g") or (len(u) > 1 and name not in _NOT_MEASURED)
]  # "m" is a word
_AS_WRITTEN = {"/": r"\s?(?:/|per)\s?", " ": r"\s?", "u": "[uµμ]"}
_UNIT_WORDS = "|".join(
    "".join(_AS_WRITTEN.get(letter, re.escape(letter)) for letter in u) for u in sorted(_PROSE_UNITS, key=len, reverse=True)
)
_IN_PROSE = re.compile(
    rf"(?<![\w.,/–-])([<>]?=?\s*-?{_NUMBER}(?:\s?(?:/|-|–|to)\s?{_NUMBER})?)\s?-?({_UNIT_WORDS}|(?-i:[CF]))(?![\w/])",
    re.IGNORECASE,
)
#: Between which a bare C or F is a temperature: "a 6 F sheath" and "36 F" are French sizes.
_TEMPERATURES = {"C": (30, 43), "F": (90, 110)}


@lru_cache(maxsize=1 << 16)
def score(reference: str, prediction: str) -> dict:
    """Compare one extraction with its reference.

    Args:
        reference: JSON, as a data set stores it.
        prediction: a model's answer; JSON in a code fence or between sentences is found, JSON cut short is not read.

    Returns:
        ``read`` (whether JSON was found) and, from 0 to 1 or ``None`` where neither side has any, ``term_precision``,
        ``term_recall``, ``term_f1``, ``value_precision``, ``value_recall``, ``value_f1`` and their mean ``combined``: 1 where
        nothing was to be found and nothing was given, 0 where the answer was not read.

    Raises:
        ValueError: the reference holds no JSON.
    """
    wanted, given = parse(reference), parse(prediction)
    if wanted is None:
        raise ValueError(f"the reference is no JSON: {reference[:80]!r}")
    made = {"read": given is not None}
    for kind, right, said in zip(("term", "value"), collect(wanted), collect(given), strict=True):
        made |= {f"{kind}_{name}": figure for name, figure in _f1(right, said).items()}
    parts = [made[f"{kind}_f1"] for kind in ("term", "value") if made[f"{kind}_f1"] is not None]
    return made | {"combined": sum(parts) / len(parts) if parts else float(made["read"])}


def measure(references: Sequence[str], predictions: Sequence[str]) -> dict[str, Score]:
    """`score` of many, as `metrics.Score`s: ``combined``, F1, precision and recall of terms and of values."""
    found = [score(reference, prediction) for reference, prediction in zip(references, predictions, strict=True)]

    def column(name: str) -> list[float]:
        return [math.nan if one[name] is None else one[name] for one in found]

    names = {"combined": "combined"}
    names |= {f"{kind} {what}": f"{kind}_{what.lower()}" for kind in ("term", "value") for what in ("F1", "precision", "recall")}
    return {name: mean(column(key)) for name, key in names.items() if not np.isnan(column(key)).all()}


def key_of(text: str) -> str | None:
    """A name for what an extraction says, the same for all wordings that `score` takes as equal; ``None`` if it is not read."""
    found = parse(text)
    if found is None:
        return None
    terms, values = collect(found)
    told = [f"{name} {key} {term}" for name, key, term in terms.elements()]
    told += [f"{name} {'/'.join(map(str, numbers))} {unit}" for name, _, numbers, unit in values.elements()]
    return "; ".join(" ".join(one.split()) for one in sorted(told)) or "nothing"


def collect(extracted) -> tuple[Counter, Counter]:
    """Terms ``(name, key, text)`` and values ``(name, key, numbers, unit)`` of parsed JSON, each as often as it occurs.

    A named item's name is a term, its other texts are terms tied to that name: the right frequency on the wrong drug is wrong.
    """
    terms, values = Counter(), Counter()
    for kind, *entry in _walk(extracted, "", ""):
        (terms if kind == "term" else values)[tuple(entry)] += 1
    return terms, values


def _walk(node, name: str, key: str) -> Iterator[tuple]:
    """Terms and values below a JSON node that belongs to the item ``name``, under ``key``."""
    if isinstance(node, dict):
        yield from _item(node, name)
    elif isinstance(node, list):
        for entry in node:
            yield from _walk(entry, name, key)
    elif isinstance(node, bool) or node is None or str(node).strip() == "":
        return
    elif found := quantity(str(node), known=key not in _AMOUNTS):
        yield "value", name, "" if key in _AMOUNTS else key, *found
    else:
        yield "term", name, key, _frequency(str(node)) if key == "frequency" else plain(str(node))


def _item(node: dict, outer: str) -> Iterator[tuple]:
    lowered = {str(key).strip().casefold(): value for key, value in node.items()}
    title = next((key for key in _NAMES if isinstance(lowered.get(key), str) and lowered[key].strip()), None)
    name = plain(lowered.pop(title)) if title else ""
    if name:
        yield "term", outer, "name", name
    if time := lowered.pop("time", None):
        name = f"{name} at {_time(str(time))}"
    unit = lowered.pop("unit", lowered.pop("units", None)) or ""
    for key, value in lowered.items():
        if key in _AMOUNTS and isinstance(value, int | float | str) and not isinstance(value, bool):
            value = _with_unit(str(value), str(unit))
        inside = name or outer
        if not inside and not isinstance(value, dict | list) and key not in _AMOUNTS:
            inside, key = plain(key), "value"  # {"potassium": "5.9 mmol/L"}
            yield "term", outer, "name", inside
        yield from _walk(value, inside, key)


def _with_unit(amount: str, unit: str) -> str:
    """An amount and the unit beside it, which stands there once where the amount ends in it already."""
    own = quantity(amount, known=False)
    return amount if own and own[1] and own[1] == quantity(f"0 {unit}", known=False)[1] else f"{amount} {unit}"


def _time(text: str) -> str:
    """``8:00``, ``0800`` and ``8:00 AM`` as ``08:00``; what is no time of day stays."""
    found = re.fullmatch(r"(\d{1,2}):?([0-5]\d)(?::[0-5]\d)?\s*(?:([ap])\.?m|h|hrs|hours)?", plain(text))
    if not found:
        return plain(text)
    hour = int(found[1]) % 12 + 12 * (found[3] == "p") if found[3] else int(found[1])
    return f"{hour:02}:{found[2]}"


@lru_cache(maxsize=1 << 16)
def quantity(text: str, known: bool = True) -> tuple[tuple[Decimal | str, ...], str] | None:
    """``1,200 mg/dl`` as numbers and unit, ``((Decimal("1200"),), "mg/dl")``; ``120/80 mmHg`` has two numbers,
    and so has ``10-15 mg``, with "to" before them.

    ``None`` if the text does not begin with a number, or with ``known`` if what follows it is no known unit; else such a unit
    stands as it is written. Trailing zeros mean nothing.
    """
    found = _QUANTITY.fullmatch(text.strip())
    if not found or (unit(found[5] or "") is None and known):
        return None
    named = unit(found[5] or "")
    named = plain(found[5]) if named is None else named
    numbers = [Decimal(part.replace(",", "")).normalize() for part in (found[2], found[4]) if part]
    signs = [found[1]] * bool(found[1]) + ["to"] * (found[3] not in (None, "/"))
    return (*signs, *numbers), named


def unit(text: str) -> str | None:
    """The one spelling of a unit (``mg/dL`` and ``MG / DL`` are ``mg/dl``), "" for none, ``None`` if it is not known."""
    plainly = re.sub(r"\s+", "", re.sub(r"\bper\b", "/", text)).strip(".").replace("μ", "u").replace("µ", "u")
    if plainly in WITH_CASE:
        return WITH_CASE[plainly]
    squeezed = re.sub("10([⁰¹²³⁴⁵⁶⁷⁸⁹]+)", lambda found: f"10^{found[1].translate(_RAISED)}", plainly.casefold()).replace(
        "×", "x"
    )
    return UNITS.get(squeezed, _BY_PARTS.get(_parts(squeezed)))


def _parts(unit: str) -> str:
    """``cc/h`` and ``ml/hr`` as the same ``ml/h``: each part of a quotient in its one spelling."""
    return "/".join(UNITS.get(part, part) for part in unit.split("/"))


_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")
_BY_PARTS = {_parts(name): name for name in UNITS.values()}


def quantities(text: str) -> list[tuple[str, str]]:
    """Numbers with known units in prose, as written: ``[("120/80", "mmHg")]``. Ages and durations are none."""
    return [(found[1].strip(), found[2]) for found in _IN_PROSE.finditer(text) if _is_measured(found[1], found[2])]


def _is_measured(amount: str, unit: str) -> bool:
    """Whether a bare C or F stands behind a temperature."""
    least, most = _TEMPERATURES.get(unit, (-math.inf, math.inf))
    return all(least <= float(number) <= most for number in re.findall(r"\d+(?:\.\d+)?", amount.replace(",", "")))


def plain(text: str) -> str:
    """A term without case, punctuation at its ends and repeated white space."""
    return " ".join(text.split()).strip(" .,;:!'\"*-").casefold()


def _frequency(text: str) -> str:
    words = plain(text).replace(".", "").replace("-", " ")
    words = re.sub(r"\bq ?(\d+) ?h(?:ours?|rs?)?\b", r"every \1 hours", words)
    return FREQUENCIES.get(words, words)


def _f1(wanted: Counter, given: Counter) -> dict[str, float | None]:
    if not wanted and not given:
        return dict.fromkeys(("precision", "recall", "f1"))
    right = (wanted & given).total()
    return {
        "precision": right / given.total() if given else 0.0,
        "recall": right / wanted.total() if wanted else 0.0,
        "f1": 2 * right / (wanted.total() + given.total()),
    }
