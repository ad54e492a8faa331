"""One reader a question: from the spans of an answer to its meaning, or to nothing.

A reader never guesses: contradicting components and unknown words give no component, and an answer without any gives
``None``, which is counted as unread.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Callable

from sonovqa.answer_meaning import COMPONENTS, NOT_ASSESSABLE, Meaning, between_words, bin_of, set_meaning, single, terms
from sonovqa.answer_numbers import AGE, age, quantities, rewritten_age
from sonovqa.answer_scope import Span, asserted
from sonovqa.answer_values import values
from sonovqa.answer_words import VOCABULARY, fillers, word

_COUNTS = frozenset((*AGE["numbers"], "half", "quarter"))  # words before a unit: "seventeen and a half cm"
#: What may stand between a structure and the length that makes it a parameter.
_GAP = re.compile(r"[\s:=(~]*(?:(?:is|was|of|at|about|approx|approximately|measures|measured|measuring)\b[\s:=(~]*){0,2}")


def _none(spans: list[Span]) -> Meaning | None:
    """The meaning of "cannot be determined", if that is what is said."""
    return single(NOT_ASSESSABLE) if any("none" in s.kinds for s in spans) else None


def read_structures(text: str) -> Meaning | None:
    """Q1: the set of structures that are said to be seen; denied ones do not count."""
    spans = list_spans("Q1", text)
    seen = [name for span in spans if not span.status & {"no", "mention"} for name in names_of("structure", span)]
    nothing = re.search(r"\b(?:no|none|nil|nothing)\b", text)
    denied = any(names_of("structure", s) and "no" in s.status for s in spans)
    return set_meaning("Q1", seen) if seen or nothing or denied else None


def names_of(kind: str, span: Span) -> tuple[str, ...]:
    """Canonical names of a kind that a term stands for: none, one, or the several of "internal and external os"."""
    together = VOCABULARY["together"].get(kind, {}).get(span.kinds.get("together", ""), ())
    return (span.kinds[kind],) if kind in span.kinds else tuple(together)


def read_orientation(text: str) -> Meaning | None:
    """Q2: presentation, view and side, each once or, if contradicted, not at all."""
    spans = terms("Q2").spans(text)
    parts = {at for at, span in enumerate(spans) if _is_part(spans, at)}
    kept = [span for at, span in enumerate(spans) if at not in parts]
    said = {kind: {s.kinds[kind] for s in asserted(kept, kind)} for kind in ("presentation", "view")}
    for loose, view in VOCABULARY["orientation"]["either"].items():
        bare = any(s.text == loose and not s.status for s in spans)
        if bare and said["presentation"] - {loose, "longitudinal lie"}:  # "cephalic, transverse": lie is known, so a view
            said["presentation"].discard(loose)
            said["view"].add(view)
    if len(said["presentation"]) > 1:
        said["presentation"].discard("longitudinal lie")
    said["view"] = _finest(said["view"])
    sides = _sides(spans)
    chosen = {kind: next(iter(names)) for kind, names in said.items() if len(names) == 1}
    if sides:
        chosen["side"] = " and ".join(f"{anchor} {direction}" for anchor, direction in sorted(sides.items()))
    parts = tuple((kind, chosen[kind]) for kind in COMPONENTS if kind in chosen)
    key = ", ".join(value for _, value in parts)
    return single(key, parts) if parts else None if any(said.values()) else _none(spans)


def _finest(names: set[str]) -> set[str]:
    """The names without those that another says too, and more: "axial" beside "axial upper abdomen"."""
    words = {name: set(name.replace("-", " ").split()) for name in names}
    return {name for name in names if not any(words[name] < words[other] for other in names)}


def _is_part(spans: list[Span], at: int) -> bool:
    """Whether a presentation's word is a part of the body with a place in the image: "the breech at the bottom"."""
    beyond = _beyond(spans, at)
    return spans[at].text in VOCABULARY["orientation"]["parts"] and beyond is not None and "direction" in spans[beyond].kinds


def _beyond(spans: list[Span], at: int) -> int | None:
    """The place of the first span after ``at`` that is more than "lies (not) on the"."""
    end = at + 1
    while end < len(spans) and (spans[end].text in between_words() or spans[end].text in ("-", ":", "=", "not")) and end - at < 8:
        end += 1
    return end if end < len(spans) else None


def _sides(spans: list[Span]) -> dict[str, str]:
    """Anchor -> direction for every "spine to the left" and "left-sided spine"; anchors with two directions are left out."""
    pairs, at = [], 0
    while at < len(spans):
        end = _beyond(spans, at)
        if end is not None and {"anchor", "direction"} <= spans[at].kinds.keys() | spans[end].kinds.keys():
            direction = _side(spans, at, end)
            if direction:
                pairs.append(direction)
                at = end
        at += 1
    pairs += [tuple(s.kinds["position"].split()) for s in asserted(spans, "position")]
    counts: dict[str, set[str]] = {}
    for anchor, direction in pairs:
        counts.setdefault(anchor, set()).add(direction)
    finest = {anchor: _finest(found) for anchor, found in counts.items()}  # of "left (LOT)", "maternal left" has both
    return {anchor: next(iter(found)) for anchor, found in finest.items() if len(found) == 1}


def _side(spans: list[Span], at: int, end: int) -> tuple[str, str] | None:
    """Anchor and direction of an anchor beside a direction; of "not on the left but on the right" the right."""
    first, second = spans[at], spans[end]
    if "anchor" in first.kinds and "direction" in second.kinds:
        if "no" in second.status and not first.status and end + 1 < len(spans) and spans[end + 1].text == "but":
            instead = _beyond(spans, end + 1)
            second = spans[instead] if instead is not None and "direction" in spans[instead].kinds else second
        return None if first.status or second.status else (first.kinds["anchor"], second.kinds["direction"])
    if "anchor" not in second.kinds or "direction" not in first.kinds or first.status or second.status:
        return None
    apart = any(span.text == "with" for span in spans[at:end])  # "lying on its left side with the spine posterior"
    return None if apart else (second.kinds["anchor"], first.kinds["direction"])


def read_plane(text: str) -> Meaning | None:
    """Q3: the plane with its family; the family alone where only that is said; and whether it is said to be non-standard."""
    spans = terms("Q3").spans(text)
    off = any("standard" in s.kinds and not s.status for s in spans)
    planes = [s.kinds["plane"] for s in asserted(spans, "plane")] or [s.kinds["level"] for s in asserted(spans, "level")]
    planes = list(dict.fromkeys(planes))
    finer = [s.kinds["finer"] for s in asserted(spans, "finer")]
    families = [s.kinds["family"] for s in asserted(spans, "family")] + [VOCABULARY["subfamilies"][f]["family"] for f in finer]
    plane, family = _plane(planes, finer, families, spans)
    if plane is None and not off:
        return None if planes or families else _none(spans)
    parts = [("plane", plane)] * bool(plane) + [("family", family)] * bool(family) + [("standard", "no")] * off
    key = f"non-standard {plane}" if off and plane else plane or "non-standard"
    return single(key, tuple(parts))


def _plane(named: list[str], finer: list[str], families: list[str], spans: list[Span]) -> tuple[str | None, str | None]:
    """Plane and family: the one plane named; else the family that several share; else a family's region; else the family."""
    planes = VOCABULARY["planes"]
    if len(named) == 1:
        return named[0], planes[named[0]]["family"]
    if named:
        families = [planes[plane]["family"] for plane in named]
    akin = VOCABULARY["families_akin"]
    families = [family for family in families if akin.get(family) not in families]  # "long axis, sagittal" is sagittal
    if len(set(families)) != 1:
        return None, None
    family = families[0]
    regions = [] if named or "parasagittal" in finer else [s.kinds["region"] for s in asserted(spans, "region")]
    for of in (family, akin.get(family)):
        for region in regions:
            for plane, entry in planes.items():
                if entry["family"] == of and region in entry.get("regions", ()):
                    return plane, of
    return (finer[0] if len(set(finer)) == 1 and not named else family), family


def read_measurements(text: str) -> Meaning | None:
    """Q4: the set of parameters, and the value of those that have one."""
    spans = list_spans("Q4", text)
    said = [(name, s) for s in spans if not s.status & {"no", "mention"} for name in names_of("parameter", s)]
    if not said:
        denied = any("none" in s.kinds or ("parameter" in s.kinds and "no" in s.status) for s in spans)
        return set_meaning("Q4", ()) if denied else None
    return set_meaning("Q4", (name for name, _ in said), values(text, said, quantities(text)))


def list_spans(question_id: str, text: str) -> list[Span]:
    """Spans of Q1, Q4 or Q8 without terms that are none here, and with those that are one only here.

    None are units (the CM of "17.5 CM") and Q8's general actions that a more exact one follows at once ("follow-up
    anomaly scan"). A bone is a parameter of Q4 where its length follows; an abbreviation is what its neighbours say.
    """
    spans = terms(question_id).spans(text)
    numbers = quantities(text) if question_id in ("Q1", "Q4") else ()
    starts = [number.start for number in numbers]
    named_here = {name for span in spans for name in names_of("structure", span)}
    for at, span in enumerate(spans):
        near = bisect.bisect_left(starts, span.start)
        unit = (near and span.start < numbers[near - 1].end) or (
            at and span.text in ("cm", "mm") and spans[at - 1].text in _COUNTS
        )
        general = span.kinds.get("action") in VOCABULARY["actions_generic"]["names"]
        if unit or (general and at + 1 < len(spans) and "action" in spans[at + 1].kinds):
            span.kinds = {}
        elif "ambiguous" in span.kinds:
            either = VOCABULARY["ambiguous"]["structure"][span.kinds["ambiguous"]]
            fitting = [name for name, neighbours in either.items() if not named_here.isdisjoint(neighbours)]
            span.kinds = {"structure": fitting[0]} if len(fitting) == 1 else {}
        elif "measured" in span.kinds and "parameter" not in span.kinds:
            follows = numbers[bisect.bisect_left(starts, span.end) :][:1]
            length = any(n.value.unit == "mm" and _GAP.fullmatch(text, span.end, n.start) for n in follows)
            span.kinds = {"parameter": span.kinds["measured"]} if length else {}
    return spans


def read_age(text: str) -> Meaning | None:
    """Q5: an interval in weeks, wherever it stands."""
    found = age(rewritten_age(text))
    if found is None:
        return _none(terms("Q4").spans(text)) if not re.search(r"\d", text) else None
    weeks = found.value
    return Meaning("{:.6g}-{:.6g}".format(*weeks), frozenset((bin_of(weeks),)), weeks=weeks)


def read_quality(text: str) -> Meaning | None:
    """Q6: good, medium or low: what is said of the image as a whole, else what all its aspects agree on."""
    spans = terms("Q6").spans(text)
    ranked: dict[tuple[float, bool], set[str]] = {}  # what is denied says less than what is said
    for at, span in enumerate(spans):
        if "level" not in span.kinds or span.status & {"mention", "maybe"}:
            continue
        level = span.kinds["level"]
        level = VOCABULARY["quality_negated"][level] if "no" in span.status else level
        ranked.setdefault((_quality_rank(spans, at), "no" not in span.status), set()).add(level)
    ranked = {rank: levels for rank, levels in ranked.items() if rank[0] >= 0}
    if not ranked:
        return None
    said = ranked[max(ranked)]
    return single(next(iter(said))) if len(said) == 1 else None


def _quality_rank(spans: list[Span], at: int) -> float:
    """3 said overall, 2 said of the quality or the image, 1 said alone, 0 of an aspect, -1 of something where much is bad.

    A verdict that opens the answer and is set off ("Poor: …") comes next to "overall"; a mere flaw ("but grainy") comes
    half a step below a verdict on the same thing.
    """
    first, last = at, at + 1
    while first and not _ends_rank(spans[first - 1], ()):
        first -= 1
    while last < len(spans) and not _ends_rank(spans[last], ("with", "and")):
        last += 1
    kinds = {kind for span in spans[first:last] for kind in span.kinds}
    if "amounts" in spans[at].kinds and any("settings" in s.kinds for s in _beside(spans, at)):  # "low gain"
        return -1
    set_off = len(spans) > 2 and spans[1].text in (":", "-", ".", ";") and "level" not in spans[2].kinds  # not "low - medium"
    glued = len(spans) > 1 and spans[1].text == "-" and spans[0].end == spans[1].start  # "low-to-medium"
    if not at and set_off and not glued:
        return 2.5
    rank = 3 if "overall" in kinds else 2 if "subject" in kinds else -1 if "inverse" in kinds else 0 if "aspect" in kinds else 1
    return rank - 0.5 * ("flaw" in spans[at].kinds and rank > 0)


def _beside(spans: list[Span], at: int) -> list[Span]:
    """The nearest span on either side that is neither filler nor hyphen nor colon."""
    sides = (spans[at + 1 : at + 7], spans[max(0, at - 6) : at][::-1])
    told = ([s for s in side if s.text not in fillers() and s.text not in ("-", ":")] for side in sides)
    return [side[0] for side in told if side]


def _ends_rank(span: Span, words: tuple[str, ...]) -> bool:
    return span.text in (".", ";", ",", *words) or "terminators" in span.kinds


def read_normality(text: str) -> Meaning | None:
    """Q7: an asserted finding makes it abnormal; a doubted one, or doubt about the verdict itself, unclear; else normal."""
    text = re.sub(r"^(?:ab)?normal ?(?:/|or) ?(?:ab)?normal ?[:?=] ?(?=\w)", "", text)  # the choice, repeated before the answer
    spans = terms("Q7").spans(text)
    leading = next((s for s in spans if s.text not in (":", "-")), None)
    if leading is not None and leading.kinds.get("verdict") == "unclear" and _ends_phrase(spans, leading):
        return single("unclear")
    judged = [s for s in spans if set(s.kinds) & {"verdict", "finding", "deviation"} and "mention" not in s.status]
    said = [_verdict(s) for s in judged]
    if {"normal", "abnormal"} <= {s.kinds.get("verdict") for s in judged if "no" in s.status}:  # "neither normal nor abnormal"
        return single("unclear")
    if "abnormal" not in said and "doubted" not in said and _excepted(spans):
        return None
    for verdict in ("abnormal", "doubted", "normal", "unclear"):
        if verdict in said:
            return single("unclear" if verdict == "doubted" else verdict)
    signs = [s.status for s in spans if "sign" in s.kinds and not s.status & {"mention", "maybe"}]
    return single("abnormal" if any("no" in status for status in signs) else "normal") if signs else None


def _excepted(spans: list[Span]) -> bool:
    """Whether something unknown is excepted from what is normal ("normal apart from X"); the view's faults are no such thing."""
    kinds = VOCABULARY["quality_words"]
    of_view = {
        word(w) for table in (kinds["subject"], kinds["aspect"], kinds["inverse"], *VOCABULARY["quality"].values()) for w in table
    }
    for at, span in enumerate(spans):
        ahead = list(itertools.takewhile(lambda s: s.text not in (".", ";", ","), spans[at + 1 :]))
        if "excepts" in span.kinds or (span.text == "but" and _all_but(spans[:at], ahead)):
            unknown = [s for s in ahead if s.text not in fillers() and s.text[0].isalnum()]
            if 2 * sum(s.text in of_view for s in unknown) <= len(unknown) != 0:
                return True
    return False


def _all_but(before: list[Span], ahead: list[Span]) -> bool:
    """Whether a "but" excepts a part: "all normal but the stomach", not "all normal but the view is poor"."""
    words, verbs = VOCABULARY["normal_but"], {"verbs", "predicates", "before", "after"}
    everything = any(s.text in words["all"] for s in before)
    return everything and bool(ahead) and ahead[0].text in words["part"] and not any(verbs & s.kinds.keys() for s in ahead)


def _ends_phrase(spans: list[Span], span: Span) -> bool:
    at = spans.index(span)
    return at + 1 == len(spans) or spans[at + 1].text in (".", ":", ";", ",", "-", "(")


def _verdict(span: Span) -> str | None:
    """What one term says of normality once denied or doubted."""
    verdict = span.kinds.get("verdict", "abnormal")
    if verdict == "unclear":
        return None if "no" in span.status else "unclear"
    if "maybe" in span.status:
        return "doubted" if verdict == "abnormal" else "unclear"
    if "no" in span.status:
        return {"normal": "abnormal", "abnormal": "normal"}[verdict]
    return verdict


def read_actions(text: str) -> Meaning | None:
    """Q8: the set of recommended actions; nothing but denied ones reads "no action"."""
    spans = list_spans("Q8", text)
    found = {s.kinds["action"] for s in spans if "action" in s.kinds and not s.status & {"no", "mention"}}
    if len(found) > 1:
        found.discard("no action")
    if not found and any("action" in s.kinds and "no" in s.status for s in spans):
        found = {"no action"}
    return set_meaning("Q8", found) if found else None


READERS: dict[str, Callable[[str], Meaning | None]] = {
    "Q1": read_structures,
    "Q2": read_orientation,
    "Q3": read_plane,
    "Q4": read_measurements,
    "Q5": read_age,
    "Q6": read_quality,
    "Q7": read_normality,
    "Q8": read_actions,
}
