"""What is measured of each question: its answers read to meanings (`answers`), and the scores of those meanings."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from sonovqa import answers, extraction, metrics, overlap, prompt_variants
from sonovqa.metrics import Score, mean
from sonovqa.questions import QUESTIONS, REPORT_ID, TEXT_LABEL

Meaning = answers.Meaning
#: From the references' meanings and the answers', ``None`` where unread, to scores by name.
Measure = Callable[[Sequence[Meaning | None], Sequence[Meaning | None]], dict[str, Score]]
NEAR = 0.10  # a measured value within 10 % of the reference's counts as right in `within 10 %`
TOLERANCE = 0.05  # two numbers in free answers mean the same within 5 %
SETS = ("Q1", "Q4", "Q8")  # questions whose answer is a set of names
_WEEK_BINS = ("under 8", *answers.CANONICAL["Q5"])


def kind_of(row: dict) -> str:
    """What a row is tabled under: Q1 … Q8, ``report``, an extraction's question, else the answer type (``closed``, ``open``)."""
    question_id = row["question_id"]
    if question_id in QUESTIONS or question_id == REPORT_ID or _extracts(row):
        return question_id
    return row["answer_type"] or "open"


def _extracts(row: dict) -> bool:
    return row.get("answer_type") == extraction.ANSWER_TYPE


def order_of(kind: str) -> tuple[int, str]:
    """Sort key: Q1 … Q8, then closed, open and the report, then whatever else there is."""
    known = [*QUESTIONS, "closed", "open", REPORT_ID]
    return (known.index(kind) if kind in known else len(known), kind)


@functools.cache
def read(question_id: str, text: str, question: str = "") -> Meaning | None:
    """`answers.read`, each distinct text once."""
    return answers.read(question_id, text, question or None)


def meaning(row: dict, text: str) -> Meaning | None:
    """The meaning of ``text`` as an answer to the row's question, asked with the row's prompt; ``None`` if it cannot be read."""
    if _extracts(row):
        key = extraction.key_of(text)
        return None if key is None else Meaning(key, frozenset((key,)))
    if row.get("answer_type") == TEXT_LABEL:
        name = " ".join(text.split())
        return Meaning(name, frozenset((name,))) if name else None
    return read(row["question_id"], _understood(row, text), row.get("question") or "")


def _understood(row: dict, text: str) -> str:
    return prompt_variants.understood(row["question_id"], row.get("prompt") or "", text)


def key_of(row: dict, text: str) -> str:
    """A name for what ``text`` says, the same for equal meanings: Q5's bin, else the meaning's key; ``unread`` if unread."""
    found = meaning(row, text)
    if found is None:
        return "unread"
    return next(iter(found.labels)) if row["question_id"] == "Q5" else found.key


def names_in(row: dict, text: str) -> frozenset[str]:
    """What ``text`` is counted under: each structure, parameter or action it names, else its one name (`key_of`)."""
    found = meaning(row, text)
    return found.labels if found and found.labels and row["question_id"] in SETS else frozenset((key_of(row, text),))


def name_of(row: dict, text: str) -> str:
    """`key_of`, but a set of parameters without its values where the reference has none: "HC 175 mm" then says "HC"."""
    found = meaning(row, text)
    if row["question_id"] != "Q4" or found is None or not found.values or _has_values(row):
        return key_of(row, text)
    return ", ".join(answers.ordered("Q4", found.labels))


def _has_values(row: dict) -> bool:
    found = meaning(row, row["reference"])
    return bool(found and found.values)


@functools.cache
def _same(question_id: str, question: str, reference: str, text: str) -> bool:
    if not text.strip():
        return False
    expected, found = read(question_id, reference, question), read(question_id, text, question)
    if expected is None or found is None:  # no meaning to compare, so the wording has to do
        return answers.normalise(question_id, text) == answers.normalise(question_id, reference)
    if question_id == "Q5" or (question_id == "Q4" and not expected.values):
        return expected.labels == found.labels
    return expected.key == found.key or (
        (question_id == "Q4" or question_id not in QUESTIONS) and _numbers_agree(expected, found)
    )


def right(row: dict, text: str) -> bool:
    """Whether ``text`` says what the row's reference says: the same meaning, or where either is unread the same wording.

    Of Q5 the bin of weeks counts; values of Q4, where the reference has any, and numbers of free answers may differ by
    `TOLERANCE`. An extraction has to be right in every term and value.
    """
    if _extracts(row):
        return extraction.score(row["reference"], text)["combined"] == 1
    if row.get("answer_type") == TEXT_LABEL:
        return key_of(row, text) == key_of(row, row["reference"])
    return _same(row["question_id"], row.get("question") or "", row["reference"], _understood(row, text))


def agree(row: dict, other: dict) -> bool:
    """Whether two answers to one question about one image, asked with different prompts, mean the same.

    An unread answer agrees with nothing. Which of the two is right, if any, plays no part.
    """
    texts = [_understood(each, each["prediction"]) for each in (row, other)]
    question_id, question = row["question_id"], row.get("question") or ""
    if any(read(question_id, text, question) is None for text in texts):
        return False
    return _same(question_id, question, *texts) or _same(question_id, question, *reversed(texts))


def _numbers_agree(expected: Meaning, found: Meaning) -> bool:
    """Whether two answers differ in nothing but numbers that are near each other."""
    if not expected.values or [v.unit for v in expected.values] != [v.unit for v in found.values]:
        return False
    keys = []
    for one in (expected, found):
        key = one.key
        for value in one.values:
            key = key.replace(str(value), "#")
        keys.append(key)
    return keys[0] == keys[1] and all(map(_near, expected.values, found.values))


def measure(kind: str, rows: Sequence[dict], texts: Sequence[str]) -> dict[str, Score]:
    """All scores of one kind of question.

    Args:
        rows: the questions, each with its ``reference``.
        texts: the answer to each, the model's own or a baseline's.

    Returns:
        Scores by name. A row whose reference cannot be read takes part in ``accuracy`` and the wording scores only.
    """
    references = [row["reference"] for row in rows]
    scores = {"accuracy": mean([right(row, text) for row, text in zip(rows, texts, strict=True)])}
    if kind in _OWN:
        expected = [meaning(row, row["reference"]) for row in rows]
        scores |= _OWN[kind](expected, [meaning(row, text) for row, text in zip(rows, texts, strict=True)])
    if kind in extraction.QUESTIONS:
        scores |= extraction.measure(references, texts)
    elif kind not in QUESTIONS:
        scores |= _numbers(rows, texts)
    scores["exact match"] = mean([text.strip() == reference.strip() for text, reference in zip(texts, references, strict=True)])
    scores["normalised match"] = mean(
        [_bare(row, text) == _bare(row, row["reference"]) for row, text in zip(rows, texts, strict=True)]
    )
    return scores | overlap.wording(references, list(texts))


def _bare(row: dict, text: str) -> str:
    """A text in its canonical wording (`answers.normalise`), without case and final punctuation."""
    return answers.normalise(row["question_id"], text).casefold().rstrip(" .,;:!")


def headline(kind: str, scores: dict) -> str:
    """The score a question is judged by: F1 for sets, balanced accuracy for yes/no, `within 10 %` for values, `combined` for
    extractions, else accuracy.

    Accuracy too where that is not defined: no reference could be read, or none is positive.
    """
    if kind == "Q4" and "within 10 %" in scores:
        return "within 10 %"
    if "combined" in scores:
        return "combined"
    chosen = {"Q1": "F1", "Q4": "F1", "Q8": "F1", "Q7": "balanced accuracy"}.get(kind, "accuracy")
    return chosen if chosen in scores and math.isfinite(scores[chosen].value) else "accuracy"


def _numbers(rows: Sequence[dict], texts: Sequence[str]) -> dict[str, Score]:
    """``numbers right``: of free answers whose reference holds a number, those whose numbers are within `TOLERANCE` of it."""
    near = []
    for row, text in zip(rows, texts, strict=True):
        wanted, said = (found.values if found else () for found in (meaning(row, row["reference"]), meaning(row, text)))
        same = [v.unit for v in wanted] == [v.unit for v in said]
        near.append(float(same and all(map(_near, wanted, said))) if wanted else math.nan)
    return {"numbers right": mean(near)} if any(value == value for value in near) else {}


def _near(wanted: answers.Quantity, said: answers.Quantity) -> bool:
    return abs(wanted.value - said.value) <= TOLERANCE * abs(wanted.value)


def _sets(expected: Sequence[Meaning | None], found: Sequence[Meaning | None]) -> dict[str, Score]:
    """Precision, recall, F1 and F2 of Q1's structures, Q4's parameters or Q8's actions, averaged over images."""
    known = np.array([e is not None for e in expected], bool)
    scores = metrics.sets([e.labels if e else frozenset() for e in expected], [f.labels if f else None for f in found])
    return {name: score.only(known) for name, score in scores.items()}


def _orientation(expected: Sequence[Meaning | None], found: Sequence[Meaning | None]) -> dict[str, Score]:
    """Q2: each component, over the images whose reference names it."""
    return {name: _part(name, expected, found) for name in answers.COMPONENTS}


def _part(name: str, expected: Sequence[Meaning | None], found: Sequence[Meaning | None]) -> Score:
    wanted = [dict(e.parts).get(name) if e else None for e in expected]
    said = [dict(f.parts).get(name) if f else None for f in found]
    return mean([math.nan if w is None else float(w == s) for w, s in zip(wanted, said, strict=True)])


def _plane(expected: Sequence[Meaning | None], found: Sequence[Meaning | None]) -> dict[str, Score]:
    """Q3: the plane's family (axial, sagittal …), over the images whose reference has one."""
    return {"family": _part("family", expected, found)}


def _measurements(expected: Sequence[Meaning | None], found: Sequence[Meaning | None]) -> dict[str, Score]:
    """Q4: the set of parameters; where references hold values, the errors of those that were given, and how many were near.

    ``within 10 %`` counts a value that was not given as wrong; the errors are means over images whose answer gives one.
    """
    scores = _sets(expected, found)
    errors = [_errors(e, f) for e, f in zip(expected, found, strict=True)]
    if not any(wanted for wanted, _ in errors):
        return scores
    absolute = [np.mean([a for a, _ in given]) if given else math.nan for _, given in errors]
    relative = [np.mean([r for _, r in given]) if given else math.nan for _, given in errors]
    near = [sum(r <= NEAR for _, r in given) / wanted if wanted else math.nan for wanted, given in errors]
    given = [len(given) / wanted if wanted else math.nan for wanted, given in errors]
    return scores | {
        "within 10 %": mean(near),
        "values given": mean(given),
        "MAE (mm)": mean(absolute, higher=False, bounds=None),
        "relative error": mean(relative, higher=False, bounds=None),
    }


def _errors(expected: Meaning | None, found: Meaning | None) -> tuple[int, list[tuple[float, float]]]:
    """How many lengths the reference holds, and (absolute in mm, relative) error of those the answer gives too."""
    wanted = {v.name: v.value for v in expected.values if v.unit == "mm" and v.value} if expected else {}
    said = {v.name: v.value for v in found.values if v.unit == "mm"} if found else {}
    return len(wanted), [(abs(said[n] - w), abs(said[n] - w) / w) for n, w in wanted.items() if n in said]


def _weeks(expected: Sequence[Meaning | None], found: Sequence[Meaning | None]) -> dict[str, Score]:
    """Q5: within one bin, and the mean absolute error of the intervals' middles in weeks, over the answers that give one."""
    within, errors = [], []
    for e, f in zip(expected, found, strict=True):
        if e is None or e.weeks is None:
            within.append(math.nan)
            errors.append(math.nan)
            continue
        given = f is not None and f.weeks is not None
        within.append(float(given and abs(_bin(e) - _bin(f)) <= 1))
        errors.append(abs(sum(e.weeks) - sum(f.weeks)) / 2 if given else math.nan)
    return {"within one": mean(within), "MAE (weeks)": mean(errors, higher=False, bounds=None)}


def _bin(one: Meaning) -> int:
    return _WEEK_BINS.index(next(iter(one.labels)))


def _quality(expected: Sequence[Meaning | None], found: Sequence[Meaning | None]) -> dict[str, Score]:
    """Q6: within one level of good, medium, low."""
    levels = answers.CANONICAL["Q6"]

    def level(one: Meaning) -> int:
        return levels.index(next(iter(one.labels)))

    pairs = zip(expected, found, strict=True)
    near = [math.nan if e is None else float(f is not None and abs(level(e) - level(f)) <= 1) for e, f in pairs]
    return {"within one": mean(near)}


def _two_classes(positive: str, negative: str) -> Measure:
    """Sensitivity and the rest for one class against another, over images whose reference is one of the two."""
    classes = {positive: True, negative: False}

    def scores(expected: Sequence[Meaning | None], found: Sequence[Meaning | None]) -> dict[str, Score]:
        truth = [classes.get(e.key) if e else None for e in expected]
        rows = np.array([t is not None for t in truth], bool)
        if not rows.any():
            return {}
        made = metrics.binary([t is True for t in truth], [classes.get(f.key) if f else None for f in found])
        return {name: score.only(rows) for name, score in made.items()}

    return scores


def two_labels(names: Iterable[str]) -> tuple[str, str] | None:
    """``(positive, negative)`` of texts' labels where there are two: "yes" against "no", else the rarer one is positive.

    ``None`` for one label, and for three or more.
    """
    counts = Counter(names)
    if len(counts) != 2:
        return None
    rarer, other = sorted(counts, key=lambda name: (counts[name], name))
    return (other, rarer) if {rarer, other} == {"yes", "no"} and rarer == "no" else (rarer, other)


def _labels(expected: Sequence[Meaning | None], found: Sequence[Meaning | None]) -> dict[str, Score]:
    """Of texts with two labels, the scores of one class against the other."""
    classes = two_labels(one.key for one in expected if one)
    return _two_classes(*classes)(expected, found) if classes else {}


#: The scores that a kind of question has beside accuracy and wording.
_OWN: dict[str, Measure] = {
    "Q1": _sets,
    "Q2": _orientation,
    "Q3": _plane,
    "Q4": _measurements,
    "Q5": _weeks,
    "Q6": _quality,
    "Q7": _two_classes("abnormal", "normal"),
    "Q8": _sets,
    "closed": _two_classes("yes", "no"),
    TEXT_LABEL: _labels,
}
