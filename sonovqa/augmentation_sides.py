"""Left and right in the text of answers: what a mirrored picture's answers say, or that nobody can tell.

A mirrored ultrasound image is the same slice with the probe turned by 180 degrees: sides of the *picture* change, the mother's
and the fetus's own do not. So "spine left" becomes "spine right", the left ventricle stays the left ventricle, and wherever
a text holds a side that is not surely the picture's (maternal left, LOA, a left kidney) there is no mirrored answer.
Questions other than Q1 … Q8 have none either: a radiograph's sides are the patient's by convention.
"""

from __future__ import annotations

import functools
import re

from sonovqa import answers
from sonovqa.answer_words import VOCABULARY, clean
from sonovqa.questions import QUESTIONS, REPORT_ID, report_text
from sonovqa.report_sections import sections_of

_DIRECTIONS = VOCABULARY["orientation"]["direction"]
_CLOCK = re.compile(r"\b(1[0-2]|[1-9])(?=\s*o'?\s*clock\b)", re.IGNORECASE)
#: A side in any spelling, and findings that are one: none may be left over.
_SIDED = re.compile(
    r"\b(?:left|right|dextr|la?evo|sinist|situs|heterotax|isomeri|mirror)|\b(?:[lr]|[lr]t|lhs|rhs)\b|clockwise|o'?\s*clock"
)
_LETTER = re.compile(r"(?<=\bto )[lr]\b|(?<=\bon )[lr]\b", re.IGNORECASE)
_TURNED = re.compile(r"o'?\s*clock|\bdeg(?:rees?)?\b|°|rotat|tilt|diagonal|\bangle", re.IGNORECASE)


@functools.cache
def _opposites() -> dict[str, str]:
    """Word -> its mirror image: "left" -> "right", "rightmost" -> "leftmost", from the vocabulary's directions."""
    words = {side: {w for text in (side, *_DIRECTIONS[side]) for w in text.split() if side in w} for side in ("left", "right")}
    pairs = {w: w.replace("left", "right") for w in words["left"] if w.replace("left", "right") in words["right"]}
    return pairs | {other: word for word, other in pairs.items()}


@functools.cache
def _side_words() -> re.Pattern:
    return re.compile(rf"\b(?:{'|'.join(sorted(_opposites(), key=len, reverse=True))})\b", re.IGNORECASE)


@functools.cache
def _not_the_pictures() -> re.Pattern:
    """What names the mother's sides, and positions such as LOA, which are hers too."""
    places = {text for side in ("maternal left", "maternal right") for text in (side, *_DIRECTIONS[side])}
    hers = {re.sub(r"\b(?:left|right|side|of|l|r)\b", "", text).strip() for text in places}
    codes = {text for texts in VOCABULARY["orientation"]["position"].values() for text in texts}
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, sorted(hers | codes | {'mother'})))})\b")


@functools.cache
def _names_with_sides() -> re.Pattern:
    """Structures and planes whose own name holds a side: "left ventricle", "right ventricular outflow tract"."""
    named = [(name, *texts) for name, texts in VOCABULARY["structures"].items()]
    named += [tuple(VOCABULARY["together"]["structure"])]
    named += [(name, *plane["names"]) for name, plane in VOCABULARY["planes"].items()]
    sided = {text for texts in named for text in texts if re.search(r"\b(?:left|right)\b", text)}
    return re.compile(rf"\b(?:{'|'.join(sorted(map(re.escape, sided), key=len, reverse=True))})s?\b")


@functools.lru_cache(maxsize=65536)
def has_side(text: str) -> bool:
    """Whether a text may speak of a side: one of `_SIDED`, or a word one typing error away from left or right."""
    from rapidfuzz.distance import OSA

    plain = clean(text)
    near = (w for w in re.findall(r"[a-z]{4,6}", plain) if w not in ("bright", "eight", "weight", "height"))
    return bool(_SIDED.search(plain)) or any(OSA.distance(w, s, score_cutoff=1) <= 1 for w in near for s in ("left", "right"))


@functools.lru_cache(maxsize=65536)
def mirrored(question_id: str, answer: str) -> str | None:
    """The answer that is true of the mirrored picture; ``None`` where that is not certain.

    Args:
        question_id: Q1 … Q8 or ``report``; any other gives ``None``.
        answer: its text, in any wording.

    Of Q2 every word that names a side is changed, and each must count in what `answers.read` reads; of the others, and of
    Q2 otherwise, only a text that is read and holds no side (but in the name of a structure or plane) is certain: it stays.
    """
    if question_id == REPORT_ID:
        return _mirrored_report(answer)
    if question_id not in QUESTIONS or answers.read(question_id, answer) is None:
        return None
    if question_id == "Q2":
        return _mirrored_orientation(answer)
    plain = clean(answer)
    if question_id in ("Q1", "Q3"):
        plain = _names_with_sides().sub(" ", plain)
    return None if has_side(plain) else answer


def _mirrored_report(text: str) -> str | None:
    parts = {question_id: mirrored(question_id, body) for question_id, body in sections_of(text).items()}
    if not parts or None in parts.values() or report_text(sections_of(text)) != text.strip():
        return None
    return report_text(parts)


def _mirrored_orientation(text: str) -> str | None:
    """Q2. Each word that is swapped is also swapped alone: a word that changes no meaning may mean anything."""
    before = dict(answers.read("Q2", text).parts)
    expected = {**before, "side": _mirrored_side(before["side"])} if "side" in before else before
    if not has_side(text):
        return text if before == expected else None  # LOA holds a side, and no word that is one
    if _not_the_pictures().search(clean(text)):
        return None
    found = [*_side_words().finditer(text), *_CLOCK.finditer(text), *_LETTER.finditer(text)]
    rest = text
    for one in sorted(found, key=re.Match.start, reverse=True):
        rest = rest[: one.start()] + " " + rest[one.end() :]
    if has_side(re.sub(r"o'?\s*clock", " ", rest, flags=re.IGNORECASE)):
        return None
    alone = (answers.read("Q2", _swapped(text, [one])) for one in found if _opposite(one) != one[0])
    if any(other is not None and dict(other.parts) == before for other in alone):
        return None
    after = answers.read("Q2", _swapped(text, found))
    return _swapped(text, found) if after is not None and dict(after.parts) == expected else None


def _mirrored_side(side: str) -> str:
    return _side_words().sub(lambda found: _opposites()[found[0]], side)


def _swapped(text: str, found: list[re.Match]) -> str:
    for one in sorted(found, key=re.Match.start, reverse=True):
        text = text[: one.start()] + _opposite(one) + text[one.end() :]
    return text


def _opposite(found: re.Match) -> str:
    """The mirror image of a word, an hour of the clock, or the letters L and R, capitals kept."""
    said = found[0]
    if said.isdigit():
        return str((12 - int(said)) % 12 or 12)
    other = {"l": "r", "r": "l"}.get(said.lower()) or _opposites()[said.lower()]
    return other.upper() if said.isupper() else other.capitalize() if said[0].isupper() else other


def names_a_turn(text: str) -> bool:
    """Whether a text speaks of angles in the picture (hours of a clock, degrees, tilt), which a rotation would change."""
    return bool(_TURNED.search(text))
