"""Words of an answer: the vocabulary file, cleaned text, and the one form in which a word is compared.

The vocabulary is data (`answers.toml`), for a sonographer to edit.
"""

from __future__ import annotations

import functools
import re
import tomllib
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

VOCABULARY: dict = tomllib.loads(Path(__file__).with_name("answers.toml").read_text(encoding="utf-8"))

#: Tokens of cleaned text: numbers, words and single punctuation marks.
TOKEN = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+(?:'[^\W\d_]+)?|<=|>=|[^\w\s]")
#: Another spelling of a single word -> the right one.
SPELLING: dict[str, str] = {other: right for right, others in VOCABULARY["spelling"].items() for other in others}

_PLAIN = str.maketrans(dict(zip("’‘“”–—‐‑−_", "''\"\"----- ", strict=True)))
_JOINED = re.compile(rf"\b(?:{'|'.join(sorted(VOCABULARY['joined'], key=len, reverse=True))})\b")
_BULLET = re.compile(r"^[^\S\n]*(?:[-*•·]\s+(?![\d\s])|\d+[.)]\s+)", re.MULTILINE)
_DOTTED = re.compile(
    rf"\b(?:{'|'.join(VOCABULARY['abbreviated']['words'])})\.|\blong\.(?= (?:{'|'.join(VOCABULARY['abbreviated']['long'])})\b)"
)


#: A heading ticked off: "normal (y/n): n", "bladder: -", "cysts: 0", "stomach (+)".
_TICKED = re.compile(
    r"\(?\b(?:y ?/ ?n|yes ?/ ?no)\b\)?[\s:=?]*\b(?P<sign>y|n|yes|no)\b"
    r"|(?<=[a-z]) ?(?:\((?P<sign2>[+-])\)|: ?(?P<sign3>[+-]|0)(?= ?(?:[,;!?]|\.(?!\d)|$)))"
)
_PAIR = re.compile(r"\b(left|right|internal|external) ?[&+/] ?(?=(?:left|right|internal|external)\b)")
#: Characters of an answer that are read; one that goes on longer is a model that does not stop.
LONGEST = 4000
#: Marks of a chat template: what stands between turns, and what encloses a model's thinking.
_MARK = r"<\|[\w ]{1,30}\|>|</?s>|<(?:start|end)_of_turn>|\[/?INST\]"
_OPENING = re.compile(r"(?:\s|<s>|(?:<\|im_start\|>|<start_of_turn>)\s*(?:assistant|model)\b|<\|assistant\|>)*", re.IGNORECASE)
_END = re.compile(_MARK, re.IGNORECASE)
_THOUGHT = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)|\A.*?</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
_REMAINS = re.compile(rf"{_MARK}|</?think(?:ing)?>", re.IGNORECASE)


def has_remains(text: str) -> bool:
    """Whether an answer holds marks of a chat template (``<|im_end|>``, ``</s>`` …) or thinking (``<think>…</think>``).

    Such an answer is read without them (`answer_part`); they are a fault of how the answer was made, to be reported.
    """
    return bool(_REMAINS.search(str(text)))


def own_turn(text: str) -> str:
    """What of a model's output is its answer: no thinking, nothing after the end of its turn. A thought cut short leaves ""."""
    text = _THOUGHT.sub(" ", str(text))
    return _END.split(text[_OPENING.match(text).end() :], maxsplit=1)[0].strip()


def answer_part(text: str) -> str:
    """The first `LONGEST` characters of `own_turn`."""
    text = own_turn(text)
    return text if len(text) <= LONGEST else (text[:LONGEST].rsplit(None, 1) or [""])[0]


def one_line(text: str) -> str:
    """Text on one line: ``;`` for blank lines, and for every line end of a bulleted or numbered list; else single blanks.

    A dash that happens to begin one line of running text is no bullet: a list has two, or begins the text or after ":".
    """
    whole = str(text).strip()
    bullets = list(_BULLET.finditer(whole))
    if len(bullets) > 1 or (bullets and whole[: bullets[0].start()].rstrip()[-1:] in ("", ":")):
        lines = (_BULLET.sub("", line) for line in whole.splitlines())
        return " ".join(" ; ".join(filter(str.strip, lines)).split())
    return " ".join(re.sub(r"\n\s*\n", " ; ", whole).split())


def clean(text: str) -> str:
    """The answer in lower case on one line with plain quotes and dashes, without markdown, abbreviations' full stops, n't."""
    text = unicodedata.normalize("NFKC", one_line(answer_part(text))).translate(_PLAIN).casefold()
    text = re.sub(r"[*`#]+", " ", text)
    text = re.sub(r"\b(?:[a-z]\.){2,}", lambda found: found[0].replace(".", ""), text)  # i.v.c. -> ivc
    text = re.sub(r"\b(?:can|could) ?(?:not|n't)\b|\bcan't\b|\bcouldn't\b", "cannot", text)
    text = _DOTTED.sub(lambda found: found[0][:-1], text)
    text = re.sub(r"\bw/(o\b)?(?=[\sa-z]|$)", lambda found: " without " if found[1] else " with ", text)
    text = re.sub(r"(?<!\w)\?\s*(?=\w)", "query ", text)  # "?cyst", not the end of a question
    text = re.sub(r"(?<![\w.,])\.(?=\d)", "0.", text)  # .18
    text = re.sub(r"\b(\d+) and a half\b", r"\1.5", text)
    text = _TICKED.sub(lambda found: f": {'no' if found[found.lastgroup][0] in 'n-0' else 'yes'} ", text)
    text = _PAIR.sub(r"\1 and ", text)  # left & right ventricle
    text = re.sub(r"(?<=\d)(mm|cm)(?=[a-z]{2})", r"\1 ", text)  # bpd47mmhc175mm
    text = re.sub(r"\b(is|are|was|were|do|does|did|has|have|should|would)n't\b", r"\1 not", text)
    text = _JOINED.sub(lambda found: VOCABULARY["joined"][found[0]], text)
    return " ".join(text.split())


def singular(word: str) -> str:
    """The word without a plural -s; only ever compared with other words so treated, so it need not be a word."""
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    return word[:-1] if len(word) > 3 and word[-1] == "s" and word[-2] not in "siu" else word


def named(table: dict[str, Iterable[str]]) -> dict[str, tuple[str, ...]]:
    """A table of the vocabulary with each name among its own wordings."""
    return {name: (name, *others) for name, others in table.items()}


@functools.cache
def _domain_words() -> tuple[str, ...]:
    """Long words of the vocabulary's terms: what a typing error may be mended to."""
    v = VOCABULARY
    tables = [v[name] for name in ("structures", "parameters", "actions", "findings", "normality", "quality", "families")]
    tables += [v["orientation"]["presentation"], v["orientation"]["view"]]
    tables += [{plane: entry["names"]} for plane, entry in v["planes"].items()]
    return tuple(sorted(w for w in _words_in(tables) if len(w) >= 7))


@functools.cache
def known_words() -> frozenset[str]:
    """Every word of the vocabulary file but the misspelt ones: none of them is a typing error."""
    return frozenset(_words_in({name: table for name, table in VOCABULARY.items() if name != "spelling"}))


def _words_in(value) -> set[str]:
    """The singular words of every string in nested tables, their names included."""

    def strings(inner) -> Iterator[str]:
        if isinstance(inner, str):
            yield inner
        elif isinstance(inner, dict | list):
            for item in [*inner, *inner.values()] if isinstance(inner, dict) else inner:
                yield from strings(item)

    return {singular(w) for text in strings(value) for w in TOKEN.findall(clean(text))}


@functools.lru_cache(maxsize=65536)
def word(raw: str) -> str:
    """The form in which a word is compared: spelling table, one typing error mended in long words, singular.

    An error is mended only towards a single word of the vocabulary with the same first letter (so that un-, a-, in- and
    non- are never added or lost), and never in a word listed under ``typing.keep``.
    """
    from rapidfuzz.distance import OSA

    raw = SPELLING.get(raw, raw)
    bare = singular(raw)
    if len(bare) < 7 or bare in VOCABULARY["typing"]["keep"] or bare in known_words():
        return bare
    near = [w for w in _domain_words() if w[0] == bare[0] and OSA.distance(bare, w, score_cutoff=1) <= 1]
    return near[0] if len(near) == 1 else bare


@functools.cache
def inside_words() -> frozenset[str]:
    """Words that may stand inside a term without being part of it: articles, adverbs, auxiliaries."""
    return frozenset(VOCABULARY["negation"]["inside"])


@functools.cache
def fillers() -> frozenset[str]:
    """Words without meaning of their own, in the form of `word`."""
    return frozenset(word(w) for w in VOCABULARY["fillers"]["words"])
