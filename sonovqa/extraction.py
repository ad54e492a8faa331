"""Scores of extractions: JSON read off a clinical page, held against the page's own, by medical terms and by values.

A value counts only with its name, its number and its unit: 5.9 mg/dL is not 5.9 mmol/L. The combined score is the mean of
both F1, as an earlier project averaged its term and value accuracies (83.8 and 83.2 to 83.5 %).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from sonovqa.extraction_json import parse
from sonovqa.extraction_quantities import plain, quantity
from sonovqa.extraction_units import FREQUENCIES
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
#: Keys that only say of what kind the entries below them are. Others say more: what stands under "ruled out" is no finding.
_KINDS = frozenset(
    ("findings", "finding", "diagnoses", "diagnosis", "procedures", "procedure", "problems", "impression", "medications",
     "medication", "drugs", "values", "results", "measurements", "vitals", "vital signs", "labs", "lab results",
     "laboratory values", "infusions", "infusion rates")
)  # fmt: skip
#: Keys and texts that deny what they stand with, and keys that do so with ``false``.
_DENIED = frozenset(("absent", "negative", "ruled out", "excluded", "denied", "negated", "not present", "not seen", "no"))
_HELD = frozenset(("present", "confirmed", "detected", "observed", "positive"))
_FLAGS = {"high": "h", "low": "l", "↑": "h", "↓": "l"}
_NO_FLAG = ("n", "na", "normal", "no flag", "not flagged", "wnl", "within normal limits", "within range", "in range")


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
    Shape is not scored: a name may be an entry, a field of one or the key of one, and entries may stand under a kind or bare.
    """
    terms, values = Counter(), Counter()
    for kind, *entry in _walk(extracted, "", ""):
        (terms if kind == "term" else values)[tuple(entry)] += 1
    return terms, values


def _walk(node, name: str, key: str) -> Iterator[tuple]:
    """Terms and values below a JSON node that belongs to the item ``name``, under ``key``."""
    if isinstance(node, dict):
        yield from _item(node, name, key)
    elif isinstance(node, list):
        for entry in node:
            yield from _walk(entry, name, key)
    elif isinstance(node, bool) or node is None or _is_blank(str(node)):
        return
    elif key == "flag":
        if (said := plain(str(node))) not in _NO_FLAG:
            yield "term", name, key, _FLAGS.get(said, said)
    elif found := quantity(str(node), known=key not in _AMOUNTS):
        yield "value", name, "" if key in _AMOUNTS or _is_bare(name, key) else key, *found
    else:
        yield "term", name, "" if _is_bare(name, key) else key, _frequency(str(node)) if key == "frequency" else plain(str(node))


def _is_blank(text: str) -> bool:
    """Whether a text says that there is nothing: empty, a dash or "N/A". An asterisk marks something."""
    return not text.strip(" \n\t-–—") or plain(text) in ("n/a", "none", "null")


def _is_bare(name: str, key: str) -> bool:
    """Whether what stands under a key belongs to no item, and the key to no entry."""
    return not name and key in _KINDS


def _item(node: dict, outer: str, under: str = "") -> Iterator[tuple]:
    """Terms and values of an object: of an item with a name, or of entries by their kinds or names."""
    fields = _fields(node)
    title, has_amount = _title(fields), any(amount in fields for amount in _AMOUNTS)
    name = plain(fields.pop(title)) if title else ""
    if name and not outer and not has_amount and _is_denied(fields):
        name = f"not {name}"
    if name:
        yield "term", outer, "" if has_amount or under in _KINDS else under, name
    time = fields.pop("time", None)
    if time and not _is_blank(str(time)):
        name = f"{name} at {_time(str(time))}"
    unit = str(fields.pop("unit", fields.pop("units", None)) or "")
    unit = "" if _is_blank(unit) else unit
    for key, value in fields.items():
        is_scalar = isinstance(value, int | float | str) and not isinstance(value, bool)
        if is_scalar and (key in _AMOUNTS or (unit and not name)):
            value = _with_unit(str(value), unit)
        yield from _field(key, value, name or outer)


def _field(key: str, value, inside: str) -> Iterator[tuple]:
    """Terms and values of one field of an object that belongs to the item ``inside``, if to any."""
    own = _fields(value) if isinstance(value, dict) else {}
    if not inside and key in _DENIED:
        yield from _walk(value, key, key)
    elif inside or key in _AMOUNTS or key in _KINDS or isinstance(value, list):
        yield from _walk(value, inside, key)
    elif not isinstance(value, dict):  # {"potassium": "5.9 mmol/L"}
        yield "term", "", "", f"not {plain(key)}" if value is False or plain(str(value)) in _DENIED else plain(key)
        yield from _walk(value, plain(key), "value")
    elif _title(own) is None and any(amount in own for amount in _AMOUNTS):  # {"potassium": {"value": 5.9, "unit": "mmol/L"}}
        yield from _item(own | {"name": key}, "")
    else:
        yield from _item(own, "", key)


def _is_denied(fields: dict) -> bool:
    """Whether a finding is said not to be there: ``{"name": "Sepsis", "present": false}`` is no sepsis found."""
    return any(
        (value is False and key in _HELD)
        or (value is True and key in _DENIED)
        or (isinstance(value, str) and plain(value) in _DENIED)
        for key, value in fields.items()
    )


def _fields(node: dict) -> dict:
    """Keys in the form they are compared in: ``Vital_Signs`` is ``vital signs``."""
    return {" ".join(str(key).replace("_", " ").split()).casefold(): value for key, value in node.items()}


def _title(fields: dict) -> str | None:
    """The key that names an item; "diagnosis" beside "findings" is one of two kinds, not the name of an item with findings."""
    kinds = [key for key in fields if key in _KINDS]
    named = (key for key in _NAMES if isinstance(fields.get(key), str) and fields[key].strip())
    return next((key for key in named if key not in _KINDS or kinds == [key] or any(a in fields for a in _AMOUNTS)), None)


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


def _frequency(text: str) -> str:
    words = plain(text).replace(".", "").replace("-", " ")
    words = re.sub(r"\b(?:q|every) ?(\d+) ?h(?:ours?|rs?|)\b", r"every \1 hours", words)
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
