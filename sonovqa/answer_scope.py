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
    "past", "now", "consequences", "exceptions", "reply_no", "reply_yes", "verbs", "excepts", "mention_after", "conditions",
    "closing", "against", "refutes",
)  # fmt: skip

_STATUS = {"no": ("before", "after"), "maybe": ("hedge_before", "hedge_after"), "mention": ("mention_before", "mention_after")}
_JOINING = frozenset(("and", "or", "nor", "&", "/", "+", "plus"))
_REACH = 6  # unknown words a cue may be away from what it denies; NegEx uses five
_ITEM = 3  # unknown words that one item of a list may have: "no cyst, soft tissue swelling or mass"
_DENYING = frozenset(("no", "not", "none", "nothing", "nil", "without", "neither", "never"))


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
    kept = [*_without_asides(spans, content), Span(".", {}, 0, 0)]
    for at, span in enumerate(kept):
        if span.text in (".", ";", "!", "?") or _ends_clause(span, clause, kept[at + 1 :]):
            _mark_clause(clause, content)
            if span.text == "?":
                _mark_question(clause, kept[at + 1 : -1], content)
            clause = []
        else:
            clause.append(span)


def _ends_clause(span: Span, clause: list[Span], ahead: list[Span]) -> bool:
    """Whether a word ends its clause.

    "Therefore" does not where it leads to a denial ("collapsed and therefore not seen"), and "other than" only does after
    one or after a verdict: "nothing other than the femur" names the femur.
    """
    if "consequences" in span.kinds:
        follows = next((s for s in ahead if s.text not in fillers()), None)
        return follows is None or "after" not in follows.kinds
    if "exceptions" in span.kinds:
        return any(s.text.split()[0] in _DENYING or "verdict" in s.kinds for s in clause)
    return "terminators" in span.kinds


def _mark_question(question: list[Span], ahead: list[Span], content: tuple[str, ...]) -> None:
    """What a question names is denied by "no", so by "yes", doubted without a reply, else only mentioned."""
    reply = ahead[0] if ahead else None
    alone = len(ahead) < 2 or not ahead[1].text[0].isalnum() or "predicates" in ahead[1].kinds
    if reply and "reply_yes" in reply.kinds:
        return
    denied = reply and "reply_no" in reply.kinds and alone
    for span in question:
        if not set(span.kinds).isdisjoint(content):
            span.status.add("no" if denied else "mention" if reply else "maybe")


def _mark_past(spans: list[Span], content: tuple[str, ...]) -> None:
    """Mark as mere mention what "was so", where the same sentence goes on to what is so now."""
    past: list[Span] | None = None
    still = False  # whether what is said is still of the past
    for span in spans:
        if span.text in (".", "!"):
            past = None
        elif "past" in span.kinds:
            past, still = [], True
        elif "now" in span.kinds and past:
            for earlier in past:
                earlier.status.add("mention")
            past = None
        elif span.text in ("is", "are"):
            still = False
        elif past is not None and still and not set(span.kinds).isdisjoint(content):
            past.append(span)


def _without_asides(spans: list[Span], content: tuple[str, ...]) -> list[Span]:
    """The spans less every ", which …," and ", for example,": "the stomach, which is usually seen, is absent" is one clause."""
    kept, at = [], 0
    while at < len(spans):
        end = at + 1
        if [s.text for s in spans[at : at + 3 : 2]] == [",", ","] and "mention_before" in spans[end].kinds:
            at += 3
            continue
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
        if "whole_clause" in span.kinds or ("conditions" in span.kinds and not at):
            for item in clause:
                item.status.add("mention")
        if not span.kinds:
            continue
        ahead, back = clause[at + 1 :], clause[:at][::-1]
        silent = _silent(span, ahead, content)
        for status, (before, after) in _STATUS.items():
            closing = status == "no" and "closing" in span.kinds and not ahead
            if (after in span.kinds or closing) and _reach(back, content, True, status):
                continue
            if after in span.kinds and ahead and ahead[0].text == ":":  # "not seen: kidneys, bladder"
                for item in ahead:
                    item.status.add(status)
            elif before in span.kinds and (silent or not _reach(ahead, content, False, status)) and _last(ahead, back, status):
                _reach(back, content, True, status)
        if "refutes" in span.kinds:
            for item in back:
                item.status -= {"maybe"} if "no" in item.status else set()


def _silent(span: Span, ahead: list[Span], content: tuple[str, ...]) -> bool:
    """Whether a cue says nothing of what follows: "No - normal", "remove artefacts and repeat the scan"."""
    if "reply_no" in span.kinds and ahead and ahead[0].text == "-" and ahead[0].start > span.end:
        return True
    return "against" in span.kinds and next((s.text for s in ahead if s.text == "and" or _holds(s, content)), "") == "and"


def _last(ahead: list[Span], back: list[Span], status: str) -> bool:
    """Whether a denial or doubt closes its phrase: "kidneys: no", "cysts: none seen", "the bladder is not, which …"."""
    if status == "mention":
        return False
    while status == "no" and ahead and ("predicates" in ahead[0].kinds or ahead[0].text in fillers()):
        ahead = ahead[1:]
    return (not ahead or ahead[0].text in (",", ")")) and not (back and back[0].text == ",")


def _reach(spans: list[Span], content: tuple[str, ...], back: bool, status: str) -> bool:
    """Mark the item or list nearest to a cue; ``spans`` run away from it. Returns whether anything was marked."""
    closing = ("and", "or", "nor", "&", "/")
    marked = closed = False
    free = _REACH  # unknown words that may still be passed
    for at, span in enumerate(spans):
        if _holds(span, content):
            if back and marked and not set(spans[at - 1].kinds).isdisjoint(content):  # "…(BPD) AC not measurable"
                break
            span.status.add(status)
            marked, free = True, 1 if back else 0
        elif span.text in _JOINING:
            closed, free = closed or (marked and span.text in closing), _REACH  # not the "and" of "kidney small and not seen"
        elif span.text == "(" and marked and _same(spans[at - 1], spans[at + 1 :]):
            continue  # "not the head circumference (HC)"
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
            goes_on = marked and not back and spans[at + 1 :] and spans[at + 1].text in (",", *_JOINING)  # "dilated loops, cysts"
            free -= not goes_on
            if free < 0:
                break
    return marked


def _holds(span: Span, content: tuple[str, ...]) -> bool:
    return not set(span.kinds).isdisjoint(content)


def _same(span: Span, ahead: list[Span]) -> bool:
    """Whether the next term stands for the same as this one."""
    return bool(ahead and span.kinds.items() & ahead[0].kinds.items())


def _list_goes_on(spans: list[Span], content: tuple[str, ...]) -> bool:
    """Whether, after a comma, a list goes on to "or": "…, kidney or bladder"; its items may be unknown, but hold no verb."""
    free = _ITEM
    for span in spans:
        if span.text in ("or", "nor"):
            return True
        if span.text == ",":
            free = _ITEM
        elif not set(span.kinds).isdisjoint(("verbs", "predicates", "before", "after", "hedge_before", "hedge_after")):
            return False
        elif span.text not in fillers() and set(span.kinds).isdisjoint(content):
            free -= 1
            if free < 0:
                return False
    return False


def asserted(spans: list[Span], kind: str) -> list[Span]:
    """The spans of a kind that are said to be so: not denied, doubted or only mentioned."""
    return [span for span in spans if kind in span.kinds and not span.status]
