"""The canonical wording of an answer: the meaning written anew where every word is understood, else terms replaced."""

from __future__ import annotations

import re

from sonovqa.answer_meaning import Meaning, between_words, ordered, terms
from sonovqa.answer_numbers import age, age_wording, quantities, rewritten_age
from sonovqa.answer_readers import READERS, list_spans, names_of
from sonovqa.answer_scope import CUES, Span
from sonovqa.answer_words import SPELLING, VOCABULARY, fillers, word

_LISTS = {"Q1": "structure", "Q4": "parameter", "Q8": "action"}
_REPLACED = {**_LISTS, "Q2": "presentation", "Q3": "plane", "Q7": "finding"}
_PUNCTUATION = frozenset(".,;:-!()\"'/+&=~")
_SEPARATORS = frozenset((",", ";", ".", "and", "&", "/", "+", "plus", "(", ")"))
_PROSE = 4  # a list item with more unknown words than this is a sentence, whose order stays


def wording(question_id: str, text: str) -> str:
    """The canonical wording of cleaned text, for Q1 … Q8. Source of the rules: `answers.normalise`."""
    if question_id in _LISTS:
        return _list_wording(question_id, text)
    meaning = READERS[question_id](text)
    if question_id == "Q5":
        return _age_text(text)
    spans = terms(question_id).spans(text)
    if meaning is not None and _understood(question_id, spans, meaning):
        return ", ".join(value for _, value in meaning.parts) if question_id == "Q2" and meaning.parts else meaning.key
    replaced = _tidy(_replace(text, spans, _REPLACED.get(question_id, "")))
    return _labelled(replaced) if question_id == "Q7" else replaced


def _understood(question_id: str, spans: list[Span], meaning: Meaning) -> bool:
    """Whether no word would be lost by writing the meaning alone."""
    known = _verdict_word if question_id in ("Q6", "Q7") else _component_word
    return all(span.text in _PUNCTUATION or _all_fillers(span) or known(span, meaning) for span in spans)


def _verdict_word(span: Span, meaning: Meaning) -> bool:
    """Q6, Q7: words that make the verdict, denials and doubts included; a finding or an aspect is more than a verdict."""
    kinds = set(span.kinds)
    return bool(kinds & {"level", "verdict", "overall", "subject", *CUES} and not kinds & {"finding", "deviation", "terminators"})


def _component_word(span: Span, meaning: Meaning) -> bool:
    """Q2, Q3: words that are in the meaning: neither denied, nor contradicted, nor beyond it."""
    parts, kinds = dict(meaning.parts), span.kinds
    plane = VOCABULARY["planes"].get(parts.get("plane", ""), {})
    if span.status:
        return False
    if "none" in kinds:
        return not parts
    finer = VOCABULARY["subfamilies"].get(kinds.get("finer", ""), {})
    return (
        any(name in parts.values() for name in kinds.values())
        or any(f" {name} " in f" {parts.get('side', '')} " for name in kinds.values())
        or (bool(plane) and (finer.get("family") == plane["family"] or kinds.get("region") in plane.get("regions", ())))
        or ("standard" in kinds and "standard" in parts)
        or ("plane" not in parts and span.text in between_words())
    )


def _all_fillers(span: Span) -> bool:
    return all(w in fillers() for w in span.text.split())


def _replace(text: str, spans: list[Span], kind: str) -> str:
    """Text with every term of a kind in its canonical wording, and other single words in their right spelling."""
    out, at = [], 0
    for span in spans:
        out.append(text[at : span.start])
        said = text[span.start : span.end]
        out.append(span.kinds[kind] if kind in span.kinds else SPELLING.get(said, said))
        at = span.end
    return "".join(out) + text[at:]


def _tidy(text: str) -> str:
    text = re.sub(r"\s+([,;.:])", r"\1", re.sub(r"^\s*(?:the|an?)\s", "", text))
    return " ".join(text.split()).strip(" ,;").removesuffix(".")


def _labelled(text: str) -> str:
    """A verdict at the head set off by a colon: "abnormal - thick …" -> "abnormal: thick …"."""
    return re.sub(r"^(normal|abnormal|unclear)\s*[,.;:-]\s+", r"\1: ", text)


def _age_text(text: str) -> str:
    """Q5: the interval in its canonical wording; words around it stay unless they are fillers."""
    rewritten = rewritten_age(text)
    found = age(rewritten)
    if found is None:
        return _tidy(text)
    around = rewritten[: found.start] + " " + rewritten[found.end :]
    if any(w not in fillers() for w in map(word, re.findall(r"\w+", around))):
        return _tidy(text)
    return age_wording(found.value)


def _list_wording(question_id: str, text: str) -> str:
    """Q1, Q4, Q8: the items in canonical wording and order; text with denials or sentences keeps its order."""
    kind = _LISTS[question_id]
    spans = _without_repeats(list_spans(question_id, text), kind)
    items, item = [], []
    for span in [*spans, Span(",", {}, len(text), len(text))]:
        if not span.kinds and span.text in _SEPARATORS and not text[span.end : span.end + 1].isdigit():  # not 14w+2d, 12 4/7
            items, item = [*items, item] if item else items, []
        else:
            item.append(span)
    denied = any(span.status for span in spans)
    loose = [sum(not s.kinds and s.text not in _PUNCTUATION and not _all_fillers(s) for s in item) for item in items]
    if denied or any(count > _PROSE for count in loose) or not any(names_of(kind, s) for s in spans):
        return _tidy(_replace(text, spans, kind))
    known, other = [], []
    for item in items:
        (known if any(names_of(kind, s) for s in item) else other).append(item)
    worded = {text_of: names for item in known for names, text_of in _items(question_id, kind, text, item)}
    ranked = ordered(question_id, dict.fromkeys(name for names in worded.values() for name in names))
    first = sorted(worded, key=lambda t: (ranked.index(worded[t][0]), t))
    rest = sorted({_tidy(_replace_item(text, item, kind)) for item in other if not all(map(_all_fillers, item))})
    return ", ".join(dict.fromkeys([*first, *(t for t in rest if t)]))


def _without_repeats(spans: list[Span], kind: str) -> list[Span]:
    """The spans less a term in brackets that only repeats the one before: "abdominal circumference (AC)"."""
    kept, at = [], 0
    while at < len(spans):
        three = spans[at : at + 3]
        name = three[1].kinds.get(kind) if [s.text for s in three[::2]] == ["(", ")"] else None
        repeats = name and kept and kept[-1].kinds.get(kind) == name
        if not repeats:
            kept.append(spans[at])
        at += 3 if repeats else 1
    return kept


def _items(question_id: str, kind: str, text: str, item: list[Span]) -> list[tuple[tuple[str, ...], str]]:
    """Canonical wordings of one item with the names each holds: one a name if nothing else is said, else the whole item."""
    names = tuple(name for s in item for name in names_of(kind, s))
    loose = [s for s in item if not names_of(kind, s) and s.text not in _PUNCTUATION and not _all_fillers(s)]
    if not loose:
        return [((name,), name) for name in names]
    if question_id == "Q4" and len(names) == 1:
        start = item[0].start
        numbers = quantities(text[start : item[-1].end])
        if len(numbers) == 1 and all(numbers[0].start <= s.start - start < numbers[0].end for s in loose):
            return [(names, str(numbers[0].value._replace(name=names[0])))]
    return [(names, _tidy(_replace_item(text, item, kind)))]


def _replace_item(text: str, item: list[Span], kind: str) -> str:
    shifted = [Span(s.text, s.kinds, s.start - item[0].start, s.end - item[0].start) for s in item]
    return _replace(text[item[0].start : item[-1].end], shifted, kind)
