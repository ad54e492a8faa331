"""What negation, doubt and mere mention do to the terms of an answer.

Source: Chapman et al., "A simple algorithm for identifying negated findings and diseases in discharge summaries"
(NegEx), J Biomed Inform 2001, with lists and clauses in place of its fixed window. The cues are data (`answers.toml`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sonovqa.answer_words import fillers

#: Kinds of cues, as the vocabulary's table ``negation`` names them.
CUES = (
    "before", "after", "hedge_before", "hedge_after", "mention_before", "whole_clause", "neutral", "terminators", "predicates",
    "past", "now",
)  # fmt: skip

_STATUS = {"no": ("before", "after"), "maybe": ("hedge_before", "hedge_after"), "mention": ("mention_before", None)}
_JOINING = frozenset(("and", "or", "nor", "&", "/", "+", "plus"))
_REACH = 6  # unknown words a cue may be away from what it denies; NegEx uses five


@dataclass(slots=True)
class Span:
    """A run of tokens read as one unit: a vocabulary term, a single unknown word, a number or a punctuation mark.

    Attributes:
        text: as it stands in the cleaned text (`word` forms joined by blanks for a term).
        kinds: kind -> canonical name for a term, empty for anything else.
        start: offset of the first character in the cleaned text.
        end: offset after the last.
        status: what scope found: any of ``no``, ``maybe``, ``mention``.
    """

    text: str
    kinds: dict[str, str]
    start: int
    end: int
    status: set[str] = field(default_factory=set)


def mark(spans: list[Span], content: tuple[str, ...]) -> None:
    """Set each term's status from the cues around it, clause by clause.

    A clause ends at a full stop, semicolon or a word such as "but". Before-cues reach forward and after-cues back over
    one item or one list ("no stomach, kidney or bladder"); a comma ends the reach unless a conjunction closes the list.
    """
    _mark_past(spans, content)
    clause: list[Span] = []
    for span in [*_without_asides(spans, content), Span(".", {}, 0, 0)]:
        if span.text in (".", ";", "!", "?") or "terminators" in span.kinds:
            _mark_clause(clause, content)
            clause = []
        else:
            clause.append(span)


def _mark_past(spans: list[Span], content: tuple[str, ...]) -> None:
    """Mark as mere mention what "was so", where the same sentence goes on to what is so now."""
    past: list[Span] | None = None
    for span in spans:
        if span.text in (".", ";", "!"):
            past = None
        elif "past" in span.kinds:
            past = []
        elif "now" in span.kinds and past:
            for earlier in past:
                earlier.status.add("mention")
            past = None
        elif past is not None and not set(span.kinds).isdisjoint(content):
            past.append(span)


def _without_asides(spans: list[Span], content: tuple[str, ...]) -> list[Span]:
    """The spans less every ", which …,", so that "the stomach, which is usually seen, is absent" is one clause."""
    kept, at = [], 0
    while at < len(spans):
        end = at + 1
        if spans[at].text == "," and [s.text for s in spans[end : end + 1]] == ["which"]:
            while end < len(spans) and spans[end].text not in (",", ".", ";"):
                end += 1
            if end < len(spans) and spans[end].text == ",":
                _mark_clause(spans[at + 2 : end], content)
                at = end + 1
                continue
        kept.append(spans[at])
        at += 1
    return kept


def _mark_clause(clause: list[Span], content: tuple[str, ...]) -> None:
    for at, span in enumerate(clause):
        if "whole_clause" in span.kinds:
            for item in clause:
                item.status.add("mention")
        for status, (before, after) in _STATUS.items():
            ahead, back = clause[at + 1 :], clause[:at][::-1]
            if after in span.kinds and _reach(back, content, True, status):
                continue
            if after in span.kinds and ahead and ahead[0].text == ":":  # "not seen: kidneys, bladder"
                for item in ahead:
                    item.status.add(status)
            elif before in span.kinds and not _reach(ahead, content, False, status) and _stands_last(ahead):
                _reach(back, content, True, status)


def _stands_last(ahead: list[Span]) -> bool:
    """Whether a cue closes its phrase: "kidneys: no", "the bladder is not, which …"."""
    return not ahead or ahead[0].text in (",", ")")


def _reach(spans: list[Span], content: tuple[str, ...], back: bool, status: str) -> bool:
    """Mark the item or list nearest to a cue; ``spans`` run away from it. Returns whether anything was marked."""
    closing = ("and", "or", "nor", "&", "/")
    marked = closed = False
    free = _REACH  # unknown words that may still be passed
    for at, span in enumerate(spans):
        if any(kind in span.kinds for kind in content):
            if back and marked and not set(spans[at - 1].kinds).isdisjoint(content):  # "…(BPD) AC not measurable"
                break
            span.status.add(status)
            marked, free = True, 1 if back else 0
        elif span.text in _JOINING:
            closed, free = closed or (marked and span.text in closing), _REACH  # not the "and" of "kidney small and not seen"
        elif span.text in (",", "(", ")"):
            if not at and not back:  # the "no" of "No, …" answers; it denies nothing
                break
            passed = marked if back else marked or free < _REACH  # "no ascites, stomach seen" denies no stomach
            if passed and not (closed if back else _list_goes_on(spans[at + 1 :], content)):
                break
            free = _REACH
        elif back and marked and span.text == ":":  # a heading: "non-standard plane: sagittal is not true"
            break
        elif not set(span.kinds).isdisjoint(("predicates", "before", "after")):
            if marked or "predicates" not in span.kinds:
                break
        elif span.text not in fillers():
            free -= 1
            if free < 0:
                break
    return marked


def _list_goes_on(spans: list[Span], content: tuple[str, ...]) -> bool:
    """Whether, after a comma, a list of terms goes on to "or": "…, kidney or bladder"."""
    for span in spans:
        if span.text in ("or", "nor"):
            return True
        if span.text != "," and span.text not in fillers() and set(span.kinds).isdisjoint(content):
            return False
    return False


def asserted(spans: list[Span], kind: str) -> list[Span]:
    """The spans of a kind that are said to be so: not denied, doubted or only mentioned."""
    return [span for span in spans if kind in span.kinds and not span.status]
