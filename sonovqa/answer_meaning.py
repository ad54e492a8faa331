"""What an answer can mean: `Meaning`, the canonical labels of each question, and the terms that stand for them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from sonovqa.answer_numbers import AGE, Quantity
from sonovqa.answer_terms import Terms
from sonovqa.answer_words import VOCABULARY, named, word

NOT_ASSESSABLE = "not assessable"
COMPONENTS = ("presentation", "view", "side")


@dataclass(frozen=True)
class Meaning:
    """What an answer says, free of its wording.

    Attributes:
        key: two answers to one question mean the same if, and only if, their keys are equal.
        labels: Q1 structures, Q4 parameters, Q8 actions; the single label of the other questions.
        parts: named components: Q2 ``presentation``, ``view``, ``side`` (those said); Q3 ``plane``, ``family``, and
            ``("standard", "no")`` for a plane said not to be the standard one.
        weeks: Q5's interval (low, high) in weeks.
        values: Q4's parameters that have a number, lengths in mm; the numbers of other answers.
    """

    key: str
    labels: frozenset[str]
    parts: tuple[tuple[str, str], ...] = ()
    weeks: tuple[float, float] | None = None
    values: tuple[Quantity, ...] = ()


def ordered(question_id: str, labels: Iterable[str]) -> list[str]:
    """Labels in the vocabulary's order, which is the order in which a list is written."""
    rank = _ranks(question_id)
    return sorted(labels, key=lambda name: (rank.get(name, len(rank)), name))


@functools.cache
def _ranks(question_id: str) -> dict[str, int]:
    table = {"Q1": "structures", "Q4": "parameters", "Q8": "actions"}[question_id]
    return {name: at for at, name in enumerate(VOCABULARY[table])}


def _tables(question_id: str) -> dict[str, dict[str, Iterable[str]]]:
    """Kind -> {canonical name: wordings} of what one question can be answered with."""
    v = VOCABULARY
    if question_id == "Q1":
        several = {kind: {name: [name] for name in v[kind]["structure"]} for kind in ("together", "ambiguous")}
        return {"structure": named(v["structures"]), **several}
    if question_id == "Q2":
        tables = {kind: named(table) for kind, table in v["orientation"].items() if kind not in ("either", "between", "parts")}
        return tables | {"view": _sections(tables["view"])}
    if question_id == "Q3":
        planes = v["planes"].items()
        return {
            "plane": _sections(named({plane: entry["names"] for plane, entry in planes})),
            "level": {plane: entry.get("levels", ()) for plane, entry in planes},
            "family": _sections(named(v["families"])),
            "finer": _sections(named({name: entry["names"] for name, entry in v["subfamilies"].items()})),
            "standard": v["standard"],
            "structure": named(v["structures"]),
            "region": {text: [text] for _, entry in planes for text in entry.get("regions", ())},
        }
    if question_id == "Q4":
        together = {name: [name] for name in v["together"]["parameter"]}
        return {"parameter": named(v["parameters"]), "together": together, "measured": v["measured"]}
    if question_id == "Q6":
        return {"level": named(v["quality"])} | {kind: {kind: words} for kind, words in v["quality_words"].items()}
    if question_id == "Q7":
        words = {"deviation": {"": v["deviations"]["words"]}, "sign": {"": v["normal_signs"]["words"]}}
        return {"verdict": named(v["normality"]), "finding": named(v["findings"]), **words}
    return {"action": named(v["actions"])}


def _sections(table: dict[str, Iterable[str]]) -> dict[str, Iterable[str]]:
    """A table with "AC section", "AC cut" … wherever it has "AC plane"."""
    words = VOCABULARY["plane_words"]["words"]
    more = {name: [text.rpartition(" ") for text in texts] for name, texts in table.items()}
    return {
        name: [*texts, *(f"{head} {word}" for head, _, last in more[name] if head and last in words for word in words)]
        for name, texts in table.items()
    }


@functools.cache
def terms(question_id: str) -> Terms:
    """The terms of one of Q1 … Q8.

    Longer terms of other questions stand beside them, so that "head circumference" is no head and "recommend an anomaly
    scan" no anomaly.
    """
    tables = _tables(question_id)
    own = {text for table in tables.values() for texts in table.values() for text in texts}
    others = [VOCABULARY["actions"]] if question_id in ("Q1", "Q7") else []
    if question_id == "Q1":
        others += [VOCABULARY["parameters"], VOCABULARY["orientation"]["presentation"]]
        others += [{plane: entry["names"]} for plane, entry in VOCABULARY["planes"].items()]
    beside = {text for table in others for texts in named(table).values() for text in texts} - own
    if question_id in ("Q2", "Q3", "Q4"):
        tables["none"] = {NOT_ASSESSABLE: VOCABULARY["not_assessable"]["words"]}
    doubts = VOCABULARY["normality"]["unclear"] if question_id == "Q7" else ()
    relations = VOCABULARY["plane_relations"]["words"] if question_id == "Q3" else ()
    more = VOCABULARY["actions_cues"] if question_id == "Q8" else {}
    return Terms(tables, beside, {"hedge_before": doubts, "hedge_after": doubts, "mention_before": relations, **more})


@functools.cache
def between_words() -> frozenset[str]:
    """Words that may stand between "spine" and "left"."""
    return frozenset(word(w) for w in VOCABULARY["orientation"]["between"])


def set_meaning(question_id: str, labels: Iterable[str], values: tuple[Quantity, ...] = ()) -> Meaning:
    """The meaning of a set of labels, with the values that go with them; an empty set reads "none"."""
    said = ordered(question_id, set(labels))
    numbers = [str(q) for q in sorted(values)]
    return Meaning("; ".join([", ".join(said) or "none", *numbers]), frozenset(said), values=values)


def bin_of(weeks: tuple[float, float]) -> str:
    """The bin that holds the middle of an interval in weeks: "8-13", … "35-38", "38+"; "under 8" below the first.

    A middle on a boundary belongs to the upper bin.
    """
    middle, edges = sum(weeks) / 2, AGE["bins"]
    if middle < edges[0]:
        return f"under {edges[0]}"
    for low, high in itertools.pairwise(edges):
        if middle < high:
            return f"{low}-{high}"
    return f"{edges[-1]}+"


def single(label: str, parts: tuple[tuple[str, str], ...] = ()) -> Meaning:
    """The meaning of an answer that has one label."""
    return Meaning(label, frozenset((label,)), parts)
