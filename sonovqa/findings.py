"""What a reader must know before believing a score: one sentence each with its figure, the gravest first.

A finding is serious, and ends `evaluate.py --strict` with 1, or it is a caution, which never does:

- always serious: what `provenance` finds shared with training or unlike it, ``nothing scored``, ``constant``, ``unrelated``,
  ``recall near zero``, ``no ranking``, ``not above baseline``; of more than `RARE` of the answers ``unread``,
  ``references unread``, ``cut``, ``repetition``, ``non-words``, ``remains``, ``stop short``;
- serious above `RARE` of the rows, else a caution: ``failed``, ``unmatched``, ``missing``, ``no probabilities``, and
  ``repeated``, of which the rows count whose last answer says something else;
- ``few groups``: serious where the whole evaluation has fewer than `metrics.FEWEST_GROUPS`, a caution below `FEW_GROUPS` and
  where that is true of one question only; ``below base``: serious where the interval leaves no doubt; ``not held out``:
  serious for the training split;
- cautions: ``no positive``, ``one reference``, ``no blind``, ``no category``, ``little mass``.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from sonovqa import answer_limits, answer_words, measures
from sonovqa.metrics import FEWEST_GROUPS

#: Shares above which failed, unread, cut or garbled answers are said aloud (issue 5: "above 1 %").
RARE = 0.01
#: A class is "hardly ever found" below this recall, if the references hold it at least this often.
LOW_RECALL, ENOUGH = 0.05, 5
#: Intervals from fewer groups are too narrow (percentile bootstrap; Cameron, Gelbach & Miller, 2008).
FEW_GROUPS = 20
#: Answers that vary too little, or tell too little of the category. Thresholds by 75 evaluations of a tiny model: the least
#: that still found something in the images (0.34 against a majority of 0.15) is above the last two, those that said one
#: thing below all three. Shares and bits of fewer rows differ by as much by chance.
SHARE_ABOVE, ENTROPY_SHARE, BITS_SHARE, ENOUGH_TO_VARY = 0.25, 0.5, 0.25, 30
ENTROPY_GAP = 0.3  # bits by which the entropies differ at least: half of next to nothing is no finding


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or (``serious`` false) that a reader should bear in mind.

    Attributes:
        kind: what is wrong, one word or two; tests and ``--strict`` go by it.
        question: the question it is about, or ``None`` for all.
        figure: the figure in the sentence.
        text: the sentence.
    """

    kind: str
    question: str | None
    figure: float
    text: str
    serious: bool = True

    def json(self) -> dict:
        return asdict(self)


def find(scores: Mapping, rows: Sequence[dict]) -> list[Finding]:
    """All findings of an evaluation, in the order in which a reader should hear them.

    Args:
        scores: what `scoring.score` returned.
        rows: the predictions it was computed from.
    """
    questions = scores["questions"]
    found = [*failures(scores, rows)]
    for check in (unread, constant, unfound, not_above, cut, unrelated):
        for kind, about in questions.items():
            found += check(kind, about)
    found += garbled(rows)
    found += cautions(scores)
    return sorted(found, key=lambda f: not f.serious)


def failures(scores: Mapping, rows: Sequence[dict]) -> Iterable[Finding]:
    """Requests that gave no answer."""
    asked, failed = scores["overall"]["asked"], scores["overall"]["failed"]
    if failed:
        reason, _ = Counter(short(str(row["error"]), 120) for row in rows if row["error"] is not None).most_common(1)[0]
        text = f"{failed} of {asked} requests ({failed / asked:.1%}) failed and are not scored; most often: {reason}"
        yield Finding("failed", None, failed / asked, text, failed / asked > RARE)
    if not asked - failed:
        yield Finding("nothing scored", None, 0.0, f"nothing is scored: none of {asked} requests gave an answer")


def constant(kind: str, about: Mapping) -> Iterable[Finding]:
    """Answers that hardly vary between images while the references do."""
    said, meant = about["answers"]["predicted"], about["answers"]["reference"]
    if about["n"] < ENOUGH or meant["distinct"] < 2 or said["commonest"] == "unread":  # `unread` says that
        return
    told = f"“{short(said['commonest'])}”"
    if said["distinct"] == 1:
        text = f"{kind}: every one of {about['n']} images gets the same answer, {told}; {meant['distinct']} different are right"
        yield Finding("constant", kind, 1.0, text)
        return
    by_chance = math.sqrt(2 / about["n"])  # twice the largest standard error of a difference of two shares
    monotonous = meant["entropy_bits"] - said["entropy_bits"] > ENTROPY_GAP and about["n"] >= ENOUGH_TO_VARY
    monotonous = monotonous and said["entropy_bits"] < ENTROPY_SHARE * meant["entropy_bits"]
    if monotonous or said["share"] - meant["share"] > max(SHARE_ABOVE, by_chance):
        how = "hardly depend on the image" if monotonous or said["share"] > 0.8 else "vary too little between images"
        text = (
            f"{kind}: answers {how}: {said['share']:.0%} are {told}; the references' commonest is "
            f"{meant['share']:.0%} (entropy {said['entropy_bits']:.2f} against {meant['entropy_bits']:.2f} bits)"
        )
        yield Finding("constant", kind, said["share"], text)


def unfound(kind: str, about: Mapping) -> Iterable[Finding]:
    """Classes, or members of sets, that are hardly ever found."""
    if len(about["answers"]["recall"]) < 2:
        return
    missed = [(label, r["found"], r["n"]) for label, r in about["answers"]["recall"].items()
              if r["n"] >= ENOUGH and r["found"] < LOW_RECALL * r["n"]]  # fmt: skip
    if missed:
        shown = ", ".join(f"“{short(label)}” {hits} of {n}" for label, hits, n in missed[:3])
        more = f" and {len(missed) - 3} more" if len(missed) > 3 else ""
        yield Finding("recall near zero", kind, missed[0][1] / missed[0][2], f"{kind}: hardly ever found: {shown}{more}")


def not_above(kind: str, about: Mapping) -> Iterable[Finding]:
    """A score whose paired difference to a baseline may be nothing, or less.

    Where all references are the same nothing can be above the majority; there the score has to be clearly below it. From too
    few groups only a difference of nothing or less is told (`unjudged` tells the rest).
    """
    if not about["n"]:
        return
    one_reference = about["answers"]["reference"]["distinct"] < 2
    name = about["headline"]
    figure = about["metrics"][name]
    beaten_by = []
    for baseline, words in (("majority", "the majority answer's"), ("blind", "its own blind answer's")):
        other = figure.get(baseline)
        if other is None or other["value"] is None or not other["n"]:
            continue
        low, high = other["difference_interval"] or (other["difference"],) * 2
        if high < 0 if one_reference else low <= 0 or other["difference"] <= 0:
            span = f", difference {other['difference']:+.2f}{_span(other['difference_interval'])}"
            beaten_by.append((other["difference"], f"{words} {other['value']:.2f}{span}"))
    if beaten_by and figure["value"] is not None:
        text = f"{kind}: {name} {figure['value']:.2f} is not above {' nor '.join(t for _, t in beaten_by)} (n={figure['n']})"
        yield Finding("not above baseline", kind, min(d for d, _ in beaten_by), text)


def unjudged(kind: str, about: Mapping) -> Iterable[Finding]:
    """A score above the majority's of which too few groups leave open whether that is more than chance."""
    figure = about["metrics"][about["headline"]]
    if about["n"] and figure["carriers"] < FEWEST_GROUPS and (figure["majority"]["difference"] or 0) > 0:
        whose = " of the rarer class" if figure["carriers"] < figure["groups"] else ""
        text = f"{kind}: {about['headline']} rests on {counted(figure['carriers'], 'group')}{whose}: it may be chance"
        yield Finding("few groups", kind, figure["carriers"], text, False)


def unread(kind: str, about: Mapping) -> Iterable[Finding]:
    """Answers and references whose meaning could not be read."""
    for name, words in (("unread", "answers"), ("references_unread", "references")):
        share = about[name] / about["n"] if about["n"] else 0
        if share > RARE:
            text = f"{kind}: {about[name]} of {about['n']} {words} ({share:.1%}) could not be read; they are never guessed"
            yield Finding(name.replace("_", " "), kind, share, text)


def cut(kind: str, about: Mapping) -> Iterable[Finding]:
    """Answers that the token limit ended."""
    share = about["cut"] / about["n"] if about["n"] else 0
    if share > RARE:
        yield Finding("cut", kind, share, f"{kind}: {answer_limits.cut_in_words(about['cut'], about['n'])}")


def unrelated(kind: str, about: Mapping) -> Iterable[Finding]:
    """Answers that tell little or nothing of the image's category where the references do."""
    said, meant = about["answers"]["predicted"], about["answers"]["reference"]
    if about["n"] < ENOUGH_TO_VARY or meant["category_bits"] <= 0.2:
        return
    share = said["category_bits"] / meant["category_bits"]
    if share < 0.1 or (share < BITS_SHARE and meant["category_bits"] > 0.5):
        how = "next to nothing" if share < 0.1 else "little"
        text = (
            f"{kind}: answers have {how} to do with the image's category: {said['category_bits']:.2f} bits of mutual "
            f"information against the references' {meant['category_bits']:.2f}"
        )
        yield Finding("unrelated", kind, said["category_bits"], text)


def garbled(rows: Sequence[dict]) -> Iterable[Finding]:
    """Repetition, non-words, remains of a chat template, and answers that stop in the middle."""
    texts = [(row["prediction"], row["reference"] or "") for row in rows if row["error"] is None]
    for kind, test, words in (
        ("repetition", lambda t, _: repeats(t), "repeat themselves"),
        ("non-words", lambda t, _: nonsense(t), "hold strings that are no words"),
        ("remains", lambda t, _: answer_words.has_remains(t), "hold a chat template's marks or thinking, and are read without"),
        ("stop short", stops_short, "are no more than the beginning of their reference, as if cut"),
    ):
        hits = [text for text, reference in texts if test(text, reference)]
        if texts and len(hits) > RARE * len(texts):
            text = f"{len(hits)} of {len(texts)} answers ({len(hits) / len(texts):.1%}) {words}, such as “{short(hits[0])}”"
            yield Finding(kind, None, len(hits) / len(texts), text)


def repeats(text: str) -> bool:
    """Whether a text goes round in circles: three words four times over, or a length that packs to a fifth."""
    words = text.lower().split()
    runs = Counter(zip(words, words[1:], words[2:]))
    if runs and max(runs.values()) >= 4:
        return True
    data = text.encode()
    return len(data) >= 200 and len(zlib.compress(data)) * 5 < len(data)


def nonsense(text: str) -> bool:
    """Whether a text holds undecodable characters or strings that no language spells."""
    if "\ufffd" in text or re.search(r"[\x00-\x08\x0b-\x1f]", text):
        return True
    return any(len(w) > 30 or (len(w) > 5 and not re.search(r"[aeiouyAEIOUY]", w)) or re.search(r"(.)\1{3}", w)
               for w in re.findall(r"[A-Za-z]+", text))  # fmt: skip


def stops_short(text: str, reference: str) -> bool:
    """Whether an answer is a proper beginning of its reference and ends within a word or a list."""
    text, reference = text.strip().lower(), reference.strip().lower()
    if not 0 < len(text) < len(reference) or not reference.startswith(text):
        return False
    return text.endswith((",", "-")) or (text[-1].isalnum() and reference[len(text)].isalnum())


def cautions(scores: Mapping) -> Iterable[Finding]:
    """Not wrong, but to be borne in mind."""
    kinds = scores["questions"].items()
    same = [kind for kind, about in kinds if about["n"] and about["answers"]["reference"]["distinct"] == 1]
    lone = [
        kind for kind, about in kinds if kind not in same and about["metrics"].get("sensitivity", {"value": 0})["value"] is None
    ]
    if lone:
        text = f"{', '.join(lone)}: no reference is positive, so sensitivity cannot be measured"
        yield Finding("no positive", None, len(lone), text, False)
    if same:
        text = f"{', '.join(same)}: all references are the same, so a score there says nothing"
        yield Finding("one reference", None, len(same), text, False)
    groups = scores["intervals"]["groups"]
    yield from few_groups(groups)
    if groups >= FEWEST_GROUPS:
        for kind, about in kinds:
            yield from unjudged(kind, about)
    if not scores["blind"]:
        text = "the model was not asked blind, so nothing here shows that it looked at the images"
        yield Finding("no blind", None, 0, text, False)


def few_groups(groups: int) -> Iterable[Finding]:
    """Too few groups for good intervals, or, which is serious, for any interval and any verdict better or worse."""
    if 0 < groups < FEWEST_GROUPS:
        text = f"only {counted(groups, 'group')}: too few for an interval, and to say what is better or worse"
        yield Finding("few groups", None, groups, text)
    elif 0 < groups < FEW_GROUPS:
        text = f"only {counted(groups, 'group')}: intervals from fewer than {FEW_GROUPS} are too narrow"
        yield Finding("few groups", None, groups, text, False)


def describe(found: Sequence[Finding], scores: Mapping) -> str:
    """The first line in words: whether the scores can be believed at all."""
    serious = [f for f in found if f.serious]
    kinds = list(scores["questions"])
    beaten = [f.question for f in serious if f.kind == "not above baseline"]
    beaten.sort(key=measures.order_of)
    if beaten:
        return f"Not above its baselines on {len(beaten)} of {len(kinds)} questions: {', '.join(beaten)}."
    if serious:
        return f"{len(serious)} thing{'s' if len(serious) > 1 else ''} to know before reading the scores:"
    blind = " and the blind" if scores["blind"] else ""
    unclear = sorted((f.question for f in found if f.kind == "few groups" and f.question), key=measures.order_of)
    differing = {kind for kind in kinds if scores["questions"][kind]["answers"]["reference"]["distinct"] > 1}
    if unclear and differing <= set(unclear):
        return f"Too few groups to tell whether {', '.join(unclear)} is above the majority answer; nothing suspicious found."
    apart = f", too few groups to tell on {', '.join(unclear)}" if unclear else ""
    return f"Above the majority{blind} answer wherever references differ{apart}; nothing suspicious found."


def digest(found: Sequence[Finding]) -> list[Finding]:
    """Findings for a small space: of three or more of one kind the first in full, the other questions by name."""
    kinds = Counter(f.kind for f in found)
    out: list[Finding] = []
    for finding in found:
        others = [f.question for f in found if f.kind == finding.kind and f is not finding]
        if kinds[finding.kind] < 3 or None in others:
            out.append(finding)
        elif not any(f.kind == finding.kind for f in out):
            out.append(replace(finding, text=f"{finding.text}; likewise {', '.join(map(str, others))}"))
    return out


def printable(text: str) -> str:
    """A text on one line and without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text)


def counted(number: int, thing: str) -> str:
    """``1 group``, ``2 groups``."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def short(text: str | None, most: int = 60) -> str:
    """No more than so many characters of a text, `printable`."""
    text = printable(text or "")
    return text if len(text) <= most else text[: most - 1] + "…"


def _span(interval: Sequence[float] | None) -> str:
    return f" [{interval[0]:+.2f}, {interval[1]:+.2f}]" if interval else ""
