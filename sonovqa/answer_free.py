"""Reading answers to any other question (VQA-RAD): yes or no, a number with its unit, else the words themselves."""

from __future__ import annotations

import re

from sonovqa.answer_meaning import Meaning, single
from sonovqa.answer_numbers import AGE, digits, quantities, sizes
from sonovqa.answer_words import VOCABULARY, clean, fillers, word

_WORDS = VOCABULARY["yes_no"]


def _either(kind: str) -> str:
    return "|".join(re.escape(text) for text in sorted(_WORDS[kind], key=len, reverse=True))


_LEAD_IN = re.compile(rf"(?:{_either('lead_in')})(?:\s*[:,-]\s*|\s+)(?:is\b[\s:]*)?")
_REPLY = re.compile(rf"(?:(?P<yes>{_either('yes')})|(?P<no>{_either('no')}))\b")
_SET_OFF = re.compile(r"\s*(?:$|[.,;:!])")
_DENIAL = re.compile(rf"\b(?:{_either('denial')})\b")


def read_free(text: str, question: str | None = None) -> Meaning | None:
    """Yes or no where the question asks for it, else a number with its unit or the words themselves, items in any order.

    Args:
        text: the cleaned answer.
        question: the question's text; without it only a yes or no that is set off is read as one.
    """
    if question is not None and _is_yes_no(clean(question)):
        return _read_yes_no(text, clean(question))
    lead = re.match(r"(yes|no)\b", text)
    return single(lead[0]) if lead and _SET_OFF.match(text, lead.end()) else _read_words(text)


def _read_yes_no(text: str, question: str) -> Meaning | None:
    """Yes or no: said as such, or no by denying what was asked for in the question's own words ("there is no fracture")."""
    text = text[lead_in.end() :] if (lead_in := _LEAD_IN.match(text)) else text
    reply = _REPLY.match(text)
    if reply and (reply["yes"] or _SET_OFF.match(text, reply.end())):
        return single("yes" if reply["yes"] else "no")
    denial = reply or _DENIAL.search(text)
    if denial is None or re.search(r"\b(?:no|not|without)\b", question):
        return None
    denied = _content(text[: denial.start()] + " " + text[denial.end() :])
    return single("no") if denied and denied <= _content(question) else None


def _content(text: str) -> set[str]:
    return {word(w) for w in re.findall(r"[^\W\d_]+", text)} - fillers() - set(_WORDS["idle"])


def _is_yes_no(question: str) -> bool:
    """Whether a question asks for yes or no: it begins with an auxiliary and offers no choice."""
    auxiliary = r"(?:is|are|was|were|do|does|did|has|have|can|could|would|will|should|any)\b"
    return bool(re.match(auxiliary, question)) and " or " not in question


def _read_words(text: str) -> Meaning | None:
    plain = sizes(digits(text))
    numbers = tuple(found.value for found in quantities(plain))
    for found in reversed(quantities(plain)):
        plain = f"{plain[: found.start]} {found.value} {plain[found.end :]}"
    words = re.sub(rf"\b(?:the|a|an|{'|'.join(map(re.escape, AGE['approximate']))})\b|~", " ", plain)
    items = sorted({" ".join(item.strip(" .!?'\"").split()) for item in re.split(r"[,;]|\band\b(?=.*,|$)", words)} - {""})
    key = ", ".join(items)
    return Meaning(key, frozenset((key,)), values=numbers) if key else None
