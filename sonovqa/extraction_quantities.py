"""Numbers with units as clinical pages write them, alone (`quantity`) and in prose (`quantities`); nothing is converted."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from functools import lru_cache

from sonovqa.extraction_units import LETTERS, NOT_MEASURED, SPELLINGS, UNITS, WITH_CASE, WORDS

_NUMBER = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
#: Sides of a thing, "3 x 2 x 1.5 cm", but no power of ten: "4.2 x 10^9/L" is one number and its unit.
_SIDES = rf"(?:\s*(?:x|×|by)\s*{_NUMBER}(?!\.?\d|e\d|[\^*⁰¹²³⁴⁵⁶⁷⁸⁹])){{1,3}}"
#: Sign, number, how a second one is joined to it (``120/80``, ``10-15``, ``10 to 15``), that one, or its other sides; the unit.
_QUANTITY = re.compile(
    rf"([<>]?=?)\s*(-?{_NUMBER})(?:\s*(/|-|–|to)\s*({_NUMBER})|({_SIDES}))?(?:\s*(.*))?", re.DOTALL | re.IGNORECASE
)
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")
#: Between which a bare C or F is a temperature: "a 6 F sheath" and "36 F" are French sizes.
_TEMPERATURES = {"C": (30, 43), "F": (90, 110)}


@lru_cache(maxsize=1 << 16)
def quantity(text: str, known: bool = True) -> tuple[tuple[Decimal | str, ...], str] | None:
    """``1,200 mg/dl`` as numbers and unit, ``((Decimal("1200"),), "mg/dl")``; ``120/80 mmHg`` has two numbers,
    and so has ``10-15 mg``, with "to" before them; ``3 x 2 x 1.5 cm`` has "x" and three.

    ``None`` if the text does not begin with a number, or with ``known`` if what follows it is no known unit; else such a unit
    stands as it is written. Trailing zeros mean nothing.
    """
    found = _QUANTITY.fullmatch(text.strip())
    if not found or (unit(found[6] or "") is None and known):
        return None
    named = unit(found[6] or "")
    named = plain(found[6]) if named is None else named
    parts = [found[2], *([found[4]] if found[4] else []), *re.findall(_NUMBER, found[5] or "")]
    numbers = [Decimal(part.replace(",", "")).normalize() for part in parts]
    signs = [found[1]] * bool(found[1]) + ["to"] * (found[3] not in (None, "/")) + ["x"] * bool(found[5])
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
    return "/".join(UNITS.get(part, part) if part else "" for part in unit.split("/"))


_BY_PARTS = {_parts(name): name for name in UNITS.values()}


def _written(unit: str) -> str:
    """A pattern of a unit in prose; of a quotient with each part in every spelling: ``L/min`` is also "liters per minute"."""
    letters = {" ": r"\s?", "u": "[uµμ]", "x": r"[x×]\s?", "^": r"(?:\^|(?=[²³]))", "2": "[2²]", "3": "[3³]"}
    parts = []
    for part in unit.split("/"):
        name = SPELLINGS.get(part) if "/" in unit and part else None
        spellings = sorted((u for u in SPELLINGS if SPELLINGS[u] == name), key=len, reverse=True) if name else [part]
        parts.append("|".join("".join(letters.get(letter, re.escape(letter)) for letter in one) for one in spellings))
    return r"\s?(?:/|per)\s?".join(f"(?:{part})" if "|" in part else part for part in parts)


#: A unit that is a letter is one in its own case only: a "22 G needle" has no grams, and "m" and "in" are words.
_IN_WORDS = [u for u, name in SPELLINGS.items() if u == "%" or (len(u) > 1 and u not in WORDS and name not in NOT_MEASURED)]
_UNIT = "|".join(
    [*map(_written, sorted(_IN_WORDS, key=lambda u: (u.count("/"), len(u)), reverse=True)), f"(?-i:{'|'.join(LETTERS)})"]
)
_IN_PROSE = re.compile(
    rf"(?<![\w.,/–-])([<>]?=?\s*-?{_NUMBER}(?:\s?(?:/|-|–|to)\s?{_NUMBER}|{_SIDES})?)\s?-?({_UNIT})(?![\w/])", re.IGNORECASE
)


def quantities(text: str) -> list[tuple[str, str]]:
    """Numbers with known units in prose, as written: ``[("120/80", "mmHg")]``. Ages and durations are none."""
    return [(found[1].strip(), found[2].strip()) for found in _IN_PROSE.finditer(text) if _is_measured(found[1], found[2])]


def _is_measured(amount: str, unit: str) -> bool:
    """Whether a bare C or F stands behind a temperature, and no letter behind a quotient: "120/80 L arm" says which side."""
    least, most = _TEMPERATURES.get(unit, (-math.inf, math.inf))
    if len(unit) == 1 and unit.isalpha() and "/" in amount:
        return False
    return all(least <= float(number) <= most for number in re.findall(r"\d+(?:\.\d+)?", amount.replace(",", "")))


def plain(text: str) -> str:
    """A term without case, punctuation at its ends and repeated white space."""
    return " ".join(text.split()).strip(" .,;:!'\"*-").casefold()
