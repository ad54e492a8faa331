"""Reading answers: every answer, terse or a paragraph, is reduced to its meaning, or to *unread*; and one canonical wording.

The vocabulary is `answers.toml`, for a sonographer to edit. `answer_words` cleans text and words, `answer_terms`
finds terms, `answer_scope` what negation does to them, `answer_numbers` reads ages and measurements, `answer_meaning`
says what can be meant, `answer_values` gives numbers to parameters, `answer_readers` holds one reader a question,
`answer_free` that of all others, `answer_wording` writes.
"""

from __future__ import annotations

import functools

from sonovqa import answer_wording
from sonovqa.answer_free import read_free
from sonovqa.answer_meaning import COMPONENTS, NOT_ASSESSABLE, Meaning, bin_of, ordered
from sonovqa.answer_numbers import AGE, Quantity
from sonovqa.answer_readers import READERS
from sonovqa.answer_words import LONGEST, VOCABULARY, clean, one_line

__all__ = [
    "CANONICAL", "COHERENCE", "COMPONENTS", "NOT_ASSESSABLE", "PLANE_RULES", "Meaning", "Quantity", "bin_of", "label",
    "labels_of", "normalise", "read",
]  # fmt: skip

#: Planes with their ``family``, the ``parameters`` measured there and the range of ``weeks`` in which they are used.
PLANE_RULES: dict[str, dict] = {
    name: {"family": plane["family"], "parameters": tuple(plane["parameters"]), "weeks": tuple(plane["weeks"])}
    for name, plane in VOCABULARY["planes"].items()
}

#: ``abnormal_actions``, ``unclear_actions``: what a finding calls for, at least one of them.
COHERENCE: dict[str, tuple[str, ...]] = {name: tuple(actions) for name, actions in VOCABULARY["coherence"].items()}

#: Canonical labels by question. Q2's are those of each component; Q1, Q4 and Q8 are sets of these.
CANONICAL: dict[str, tuple[str, ...]] = {
    "Q1": tuple(VOCABULARY["structures"]),
    "Q2": (*VOCABULARY["orientation"]["presentation"], *VOCABULARY["orientation"]["view"],
           *(f"{a} {d}" for a in VOCABULARY["orientation"]["anchor"] for d in VOCABULARY["orientation"]["direction"])),
    "Q3": tuple(dict.fromkeys((*VOCABULARY["planes"], *VOCABULARY["families"], *VOCABULARY["subfamilies"], "non-standard"))),
    "Q4": tuple(VOCABULARY["parameters"]),
    "Q5": tuple(dict.fromkeys(bin_of((w, w)) for w in AGE["bins"])),
    "Q6": tuple(VOCABULARY["quality"]),
    "Q7": tuple(VOCABULARY["normality"]),
    "Q8": tuple(VOCABULARY["actions"]),
}  # fmt: skip


@functools.lru_cache(maxsize=65536)
def read(question_id: str, text: str, question: str | None = None) -> Meaning | None:
    """The meaning of an answer; ``None`` if it is empty or unread, as is what is neither yes nor no where that was asked for.

    Args:
        question_id: Q1 … Q8 have readers of their own; any other id (VQA-RAD) is read as yes/no, number or plain words.
        text: the answer.
        question: the question's text, for other ids only: it tells whether yes or no was asked for.
    """
    cleaned = clean(text)
    if not cleaned:
        return None
    return READERS[question_id](cleaned) if question_id in READERS else read_free(cleaned, question)


def label(question_id: str, text: str, question: str | None = None) -> str:
    """Short canonical label: Q7 "normal", Q5 "20-25", Q2 "cephalic, sagittal", Q1 "stomach, liver"; "" if unread."""
    meaning = read(question_id, text, question)
    if meaning is None:
        return ""
    if question_id in ("Q1", "Q4", "Q8"):
        return ", ".join(ordered(question_id, meaning.labels)) or "none"
    return next(iter(meaning.labels))


def labels_of(question_id: str) -> tuple[str, ...]:
    """The canonical labels of Q1 … Q8 (Q2: of its components); empty for other questions."""
    return CANONICAL.get(question_id, ())


@functools.lru_cache(maxsize=65536)
def normalise(question_id: str, text: str) -> str:
    """The canonical wording of an answer: white space, case, spelling, synonyms, order of a list. For stored answers.

    Where every word is understood, the meaning is written anew ("Within Normal limits." -> "normal"); elsewhere known
    terms are replaced and all other words stay ("Abnormal, thickened NT" -> "abnormal: thick nuchal translucency").
    Never changes what `read` reads; a text of more than `LONGEST` characters keeps its wording. Other ids than Q1 … Q8:
    white space only.
    """
    if question_id not in READERS:
        return " ".join(str(text).split())
    plain = worded = one_line(text)
    before = read(question_id, text)
    for _ in range(4 if 0 < len(plain) <= LONGEST else 0):  # a replaced term may complete another: "fetal skull contour"
        last, worded = worded, answer_wording.wording(question_id, clean(worded))
        after = read(question_id, worded)
        if (before and before.key) != (after and after.key):
            return plain
        if worded == last:
            return worded
    return plain
