"""Numbers of an answer: gestational ages as week intervals, and quantities with their units.

Both work on cleaned text (`answer_words.clean`). What must not stand around a number for it to be an age, the
trimesters and the units are data in `answers.toml`.
"""

from __future__ import annotations

import functools
import math
import re
from typing import NamedTuple

from sonovqa.answer_terms import Terms
from sonovqa.answer_words import VOCABULARY, fillers, named

AGE = VOCABULARY["age"]
_WEEK = r"(?:completed )?(?:weeks?|we?a?ks|wks?|w)\b\.?"
_DAY = r"(?:days?|d)\b"
_TO = r"(?:-|~|up to|to at most|to no more than|to about|to|and|until|till|through)"
_NEAR = 120  # characters before and after a number in which words that change it are looked for
#: The end of a sentence in cleaned text.
SENTENCE = re.compile(r"[.;!?](?!\d)")
_FREE = r"(?<![\w.@])(?<!\d[/+])"  # a number begins here, not in the middle of another one or of a date


class Quantity(NamedTuple):
    """A number with its unit.

    Attributes:
        name: what it measures: a parameter of Q4 (``AC`` …), or ``""``.
        value: the number (of a range its middle, of "under 3.5" 3.5), in ``unit``.
        unit: the base unit: ``mm`` for every length, ``degree``, ``percentile``, … or ``""``.
        low: lower end (``-inf`` for "under 3.5"); equal to ``high`` for a plain number.
        high: upper end.
    """

    name: str
    value: float
    unit: str
    low: float
    high: float

    def __str__(self) -> str:
        """Canonical wording: ``AC 235.6 mm``, ``LV under 10 mm``, ``FL 30-32 mm``."""
        if self.low == -math.inf:
            number = f"under {self.value:.10g}"
        elif self.high == math.inf:
            number = f"over {self.value:.10g}"
        else:
            number = f"{self.low:.10g}" if self.low == self.high else f"{self.low:.10g}-{self.high:.10g}"
        return " ".join(part for part in (self.name, number, self.unit) if part)


class Found(NamedTuple):
    """Something read at a place of the cleaned text: the value, and the offsets of what it was read from."""

    value: tuple[float, float] | Quantity
    start: int
    end: int


def _either(words) -> str:
    """A regular expression for any of the words, the longest first, each ending at a word's end; "-" is as good as " "."""
    longest = sorted(words, key=len, reverse=True)
    either = "|".join(re.escape(w).replace(r"\ ", "[ -]") + (r"\b" if w[-1].isalnum() else "") for w in longest)
    return f"(?:{either})"


@functools.cache
def _pattern(name: str) -> re.Pattern:
    """The compiled expressions, built once from the vocabulary."""
    point = r"(?:@\d+(?:\.\d+)?|\d{1,2}(?:\.\d+)?(?!\d))"  # days as `rewritten_age` writes them, or weeks
    thousands = r"\d{1,3}(?:,\d{3})+(?= ?(?:g|gm|grams?|ml)\b| ?(?:$|[;.]))"  # 1,850 g
    number, unit = rf"(?:{thousands}|\d+(?:\.\d+)?)", _either(_units())
    less, more = rf"(?P<less>{_either(AGE['less'])})", rf"(?P<more>{_either(AGE['more'])})"
    plus_or_minus = r"\(?(?:±|\+/-|\+ or -|plus or minus|give or take)"
    patterns = {
        "spelt": rf"\b(?:(?P<tens>twenty|thirty|forty)[ -]+)?(?P<one>{_either(AGE['numbers'])})",
        "point": rf"{_FREE}(\d{{1,2}}) ?(?:"
        rf"(?:{_WEEK})? ?\+ ?0?([0-6])(?!\d|\.\d)(?: ?{_DAY})?(?: ?/ ?7)?"  # 12w+4d, 12+4, 12+4/7
        rf"|{_WEEK} ?(?:and|,)? ?0?([0-6]) ?(?:/ ?7 ?)?{_DAY}"  # 12 weeks and 4 days
        rf"|w ?0?([0-6])(?!\d)(?: ?{_DAY})?"  # 12w4
        r"|[ -]([1-6]) ?/ ?7)",  # 12 4/7
        "choices": rf"{_FREE}\d\d(?:, ?\d\d)*,? or \d\d(?= ?-?{_WEEK})",  # 20, 21 or 22 weeks
        "days": rf"{_FREE}(\d{{2,3}}) ?days\b(?: old)?",
        "error": rf"({point}) ?(?:{_WEEK})? ?{plus_or_minus} ?(@\d+|\d\d?(?:\.\d)?)(?! ?%) ?({_DAY}|{_WEEK})?(?: ?{_WEEK})?",
        "age": rf"(?P<lead>\bweeks? )?{_FREE}(?P<low>{point})(?P<inner> ?{_WEEK})?(?: ?{_TO} ?(?:the )?(?P<high>{point}))?"
        rf"(?P<open> ?\+(?! ?[\d/-]))?(?P<unit> ?-? ?{_WEEK}| ?/ ?40\b)?(?P<open2> ?\+(?! ?[\d/-]))?"
        r"(?P<more> (?:or|and) (?:more|over|above|later|beyond|older|greater|further)\b)?"
        r"(?P<less> or (?:less|earlier|below|younger)\b)?",
        "comma weeks": rf"(?<![\d,.])(\d\d),(\d)(?= ?(?:-|to\b|{_WEEK}))",  # 20,5 weeks
        "from": rf"{_either(AGE['more'])} ?({point})(?: ?{_WEEK})?,? ?(?:and|but)? ?{_either(AGE['less'])} ?(?={point})",
        "from2": rf"({point})(?: ?{_WEEK})? or (?:more|over|above|later),? ?(?:and|but)? ?{_either(AGE['less'])} ?(?={point})",
        "trimesters": r"\b((?:early |mid |late )?)(first |second |third |1st |2nd |3rd |)(or|to|and|/|-) ?"
        r"(?=(?:early |mid |late )?(first|second|third|1st|2nd|3rd) trimester)",
        "generic": rf"\b{_either(AGE['generic'])}(?!.*{_either(AGE['cues'])})",
        "sign": rf"(?:{less}|{more}) ?(?:the )?$",
        "not_after": rf"(?<!\w){_either(AGE['not_after'])}(?: {_either(AGE['between'])})* ?$",
        "not_after_round": rf"(?<!\w){_either(AGE['not_after_round'])}(?: {_either(AGE['between'])})* ?$",
        "not_before": rf"^ ?(?:{_either(AGE['between'])} )*{_either(AGE['not_before'])}",
        "cue": rf"{_either(AGE['cues'])}[^.;]{{0,40}}$",
        "qualifier": rf"\b{_either([*AGE['approximate'], *AGE['cues'], *AGE['less'], *AGE['more'], 'of', 'is', 'the', 'at'])}",
        "quantity": rf"(?:{less}|{more})? ?(?P<low>(?:(?<![\w)])-)?(?<![\d.@]){number})"
        rf"(?: ?(?P<inner>{unit})? ?(?P<joint>-|~|to|±|\+/-) ?(?P<high>{number})(?! ?{_DAY}))? ?-?(?P<unit>{unit})?",
        "listed": r"(?:and|or) ?\d",
        "two units": r" ?\d+ ?cm,?(?: and)? ?\d(?:\.\d+)? ?mm",  # 7 cm 2 mm
        "comma": r"(?<=\d),(?=\d{1,2} ?(?:mm|cm)\b)",
        "sizes": rf"({number}) ?(?:{unit})? ?[x×] ?(?=(?:{number} ?(?:{unit})? ?[x×] ?)*{number} ?({unit}))",
    }
    return re.compile(patterns[name])


@functools.cache
def _units() -> dict[str, tuple[float, str]]:
    """Wording -> (factor, base unit)."""
    return {text: (factor, base) for name, (factor, base, others) in VOCABULARY["units"].items() for text in (name, *others)}


@functools.cache
def _named_ages() -> Terms:
    return Terms({"age": named({name: others for name, (_, _, others) in AGE["named"].items()})})


def digits(text: str) -> str:
    """Number words as digits: "twenty-two" -> "22". ``text`` is cleaned."""
    return _pattern("spelt").sub(lambda m: str(AGE["numbers"].get(m["tens"], 0) + AGE["numbers"][m["one"]]), text)


def rewritten_age(text: str) -> str:
    """Cleaned text with every age of weeks and days, and every "±", written as ``@days`` (12w+4d -> @88)."""
    text = re.sub(r"(?<=[a-z])(?=\d)", " ", digits(text))  # ga23 weeks
    text = re.sub(r"(\d)(?:st|nd|rd|th)(?= (?:week|and|to|-))", r"\1", text)  # 20th to 24th week
    text = _pattern("comma weeks").sub(r"\1.\2", text)
    text = _pattern("choices").sub(_choices, text)
    text = _pattern("point").sub(lambda m: f"@{7 * int(m[1]) + int(next(g for g in m.groups()[1:] if g))}", text)

    def spread(m: re.Match) -> str:
        middle, error = _weeks(m[1]) * 7, float(m[2].lstrip("@")) * (1 if (m[3] or m[2] + "w")[0] in "d@" else 7)
        return f"@{middle - error:.10g}-@{middle + error:.10g}"

    text = re.sub(rf"{_FREE}(\d{{3}}) ?days\b", r"@\1", text)  # no error has three digits
    text = _pattern("error").sub(spread, text)
    text = _pattern("days").sub(lambda m: f"@{m[1]}", text)
    for bounds in ("from", "from2"):
        text = _pattern(bounds).sub(r"\1-", text)
    return _pattern("trimesters").sub(_second_trimester, text)


def _choices(m: re.Match) -> str:
    """Weeks to choose from as one interval if they follow each other ("20, 21 or 22 weeks"), else each with its unit.

    A number further off that only a comma joins is none of them: "BPD 47, 20 or 21 weeks".
    """
    numbers = [int(number) for number in re.findall(r"\d+", m[0])]
    first = len(numbers) - 1
    while first and abs(numbers[first - 1] - numbers[first]) <= AGE["agree"]:
        first -= 1
    if first == len(numbers) - 1:
        return re.sub(r",? or (\d+)$", r" weeks or \1", m[0])
    return "".join(f"{number}, " for number in numbers[:first]) + f"{min(numbers[first:])}-{max(numbers[first:])}"


def _second_trimester(m: re.Match) -> str:
    """The first of two trimesters in full: "first or second trimester", "mid to late second trimester"."""
    if not m[1] and not m[2]:
        return m[0]
    return f"{m[1]}{m[2] or m[4] + ' '}trimester {m[3]} "


def _weeks(point: str) -> float:
    return float(point[1:]) / 7 if point[0] == "@" else float(point)


def ages(text: str) -> list[Found]:
    """Every gestational age said in `rewritten_age` text, as (low, high) in weeks with offsets into that text.

    A number is an age with a week's unit, in days, or when nothing but it was said; never after "small for", before
    "ago" and the like, and only if plausible. "Under 14 weeks" and "38+" end where ``age.open`` says.
    """
    found = []
    alone = not re.search(r"[a-z]", _pattern("qualifier").sub("", text))
    for match in _pattern("age").finditer(text):
        closed = match.end() - match[0].endswith(".")  # "25 weeks." ends the sentence
        before = SENTENCE.split(text[max(0, match.start() - _NEAR) : match.start()])[-1]
        after = SENTENCE.split(text[closed : closed + _NEAR])[0]
        sign = _pattern("sign").search(before)
        start = match.start() - (len(sign[0]) if sign else 0)
        before = before[: len(before) - match.start() + start]
        exact = "@" in match["low"] and not match["high"]
        appointed = not exact and _pattern("not_after_round").search(before)
        if appointed or _another(before, after) or not (alone or _said(match, text)):
            continue
        low, high = _weeks(match["low"]), _weeks(match["high"] or match["low"])
        if (sign and sign["less"]) or match["less"]:
            low = min(AGE["open"][0], high)
        elif (sign and sign["more"]) or match["more"] or match["open"] or match["open2"]:
            high = max(AGE["open"][1], low)
        if AGE["plausible"][0] <= low <= high <= AGE["plausible"][1]:
            found.append(Found((low, high), start, match.end()))
    return found


def _another(before: str, after: str) -> bool:
    """Whether the words around a number make it something else than an age, or negative."""
    negative = re.search(r"(?:^|\s)-$", before)
    no_days = re.match(r" ?\+ ?\d", after)  # 40+10
    words = any(_pattern(name).search(before) for name in ("not_after", "generic"))
    return bool(negative or no_days or words or _pattern("not_before").search(after))


def _said(match: re.Match, text: str) -> bool:
    """Whether a number is said to be weeks, or is all that was said."""
    weeks = match["unit"] or match["inner"] or match["lead"] or "@" in match[0]
    return bool(weeks) or not re.search(r"[a-z]", _pattern("qualifier").sub("", text.replace(match[0], "", 1)))


def age(text: str) -> Found | None:
    """The one gestational age said in `rewritten_age` text; ``None`` if there is none or two contradict each other.

    A number goes before a trimester, one called gestational age before others, the first before those that overlap it;
    estimates that lie close together make one interval.
    """
    found = ages(text) or _trimesters(text)
    called = [f for f in found if _pattern("cue").search(text[max(0, f.start - _NEAR) : f.start])]
    found = called or found
    if not found:
        return None
    first, (low, high) = found[0], found[0].value
    if not all(max(low, f.value[0]) <= min(high, f.value[1]) for f in found):
        low, high = min(f.value[0] for f in found), max(f.value[1] for f in found)
        if high - low > AGE["agree"]:
            return None
    return first._replace(value=(low, high)) if high - low <= AGE["widest"] else None


def _trimesters(text: str) -> list[Found]:
    """The trimesters said; those that follow each other as one, and none "beyond" or "before" one is said."""
    spans = _named_ages().spans(text)
    bare = all(s.text == "term" or s.text in fillers() or not s.text[0].isalnum() for s in spans)
    found: list[Found] = []
    for span in spans:
        before = text[max(0, span.start - _NEAR) : span.start]
        if "age" not in span.kinds or span.status & {"no", "mention"} or (span.text == "term" and not bare):
            continue
        if _pattern("sign").search(before) or _another(before, ""):
            continue
        low, high = map(float, AGE["named"][span.kinds["age"]][:2])
        if found and not (low < found[-1].value[1] and found[-1].value[0] < high):  # they only meet
            last = found.pop()
            found.append(Found((min(low, last.value[0]), max(high, last.value[1])), last.start, span.end))
        else:
            found.append(Found((low, high), span.start, span.end))
    return found


def age_wording(weeks: tuple[float, float]) -> str:
    """Canonical wording of an interval in weeks: "20-25 weeks", "12w+4d", "second trimester", "20.5 weeks"."""
    for name, (low, high, _) in AGE["named"].items():
        if (low, high) == weeks:
            return name
    low, high = map(_point_wording, weeks)
    if low == high:
        return low if "+" in low else f"{low} weeks"
    return f"{low} to {high}" if "+" in low + high else f"{low}-{high} weeks"


def _point_wording(weeks: float) -> str:
    days = round(weeks * 7)
    if days % 7 and abs(weeks * 7 - days) < 1e-6:
        return f"{days // 7}w+{days % 7}d"
    return f"{weeks:.10g}"


def quantities(text: str) -> list[Found]:
    """Every number of cleaned text as a `Quantity` without a name, lengths in mm; ordinals and bare words are not read."""
    text = _pattern("comma").sub(".", text)
    found = []
    for match in _pattern("quantity").finditer(text):
        glued = text[: match.start("low")][-1:].isalpha()
        bare = text[match.end() : match.end() + 1].isalpha() and not _pattern("listed").match(text, match.end())  # 150 and 32 mm
        if bare or (glued and not match["unit"]):  # "3rd", "4ch", "T2", but BPD47mm
            continue
        quantity = Found(_quantity(match), match.start(), match.end())
        if found and _pattern("two units").fullmatch(text, found[-1].start, quantity.end):
            total = round(found[-1].value.value + quantity.value.value, 6)
            quantity = Found(found[-1].value._replace(value=total, low=total, high=total), found.pop().start, quantity.end)
        found.append(quantity)
    return found


def _quantity(match: re.Match) -> Quantity:
    """The quantity of one match of "quantity"."""
    factor, unit = _units().get(match["unit"] or match["inner"] or "", (1, ""))
    first = _units()[match["inner"]][0] if match["inner"] else factor
    low, high = (float(number.replace(",", "")) for number in (match["low"], match["high"] or match["low"]))
    low, high = low * first, high * factor
    if match["joint"] in ("±", "+/-"):
        low, high = low - high, low + high
    if not match["high"]:
        high = low
    value = round((low + high) / 2, 6)
    if match["less"]:
        return Quantity("", value, unit, -math.inf, value)
    if match["more"]:
        return Quantity("", value, unit, value, math.inf)
    return Quantity("", value, unit, round(low, 6), round(high, 6))


def sizes(text: str) -> str:
    """Cleaned text with the unit of "6.5 x 6.2 x 8.8 cm" written after each number."""
    return _pattern("sizes").sub(r"\1 \2 x ", text)
