"""Finds the longest term of the vocabulary at each place of an answer."""

from __future__ import annotations

from collections.abc import Iterable

from sonovqa.answer_scope import CUES, Span, mark
from sonovqa.answer_words import TOKEN, VOCABULARY, clean, inside_words, known_words, word


class Terms:
    """Finds vocabulary terms, the longest first, in cleaned text.

    Args:
        tables: kind -> {canonical name: wordings}. A wording may belong to several kinds but, within a kind, to one
            name only.
        beside: terms that are no content but keep their words from being read as shorter terms.
        more_cues: kind of cue -> terms that are such cues in this question only.

    Raises:
        ValueError: if one wording stands for two names of a kind.
    """

    def __init__(
        self,
        tables: dict[str, dict[str, Iterable[str]]],
        beside: Iterable[str] = (),
        more_cues: dict[str, Iterable[str]] | None = None,
    ):
        self._first: dict[str, dict[tuple[str, ...], dict[str, str]]] = {}
        self.content = tuple(tables)
        cues = {kind: {kind: [*VOCABULARY["negation"][kind], *(more_cues or {}).get(kind, ())]} for kind in CUES}
        for kind, table in {**tables, **cues, "beside": {"beside": beside}}.items():
            for name, wordings in table.items():
                for text in wordings:
                    self._add(kind, name, text)
        self._longest = {first: max(map(len, rest)) for first, rest in self._first.items()}

    def _add(self, kind: str, name: str, text: str) -> None:
        words = tuple(w for w, _, _ in _tokens(clean(text)) if w != "-")
        words = tuple(w for at, w in enumerate(words) if not at or w not in inside_words())
        kinds = self._first.setdefault(words[0], {}).setdefault(words, {})
        if kinds.setdefault(kind, name) != name:
            raise ValueError(f"answers.toml: {text!r} stands for both {kinds[kind]!r} and {name!r} ({kind})")

    def spans(self, text: str) -> list[Span]:
        """The cleaned text as spans from left to right, each marked with what negation and doubt do to it."""
        tokens = _tokens(text)
        found, at = [], 0
        while at < len(tokens):
            size, kinds = self._match(tokens, at)
            words = " ".join(t[0] for t in tokens[at : at + size])
            found.append(Span(words, kinds, tokens[at][1], tokens[at + size - 1][2]))
            at += size
        mark(found, self.content)
        return found

    def _match(self, tokens: list[tuple[str, int, int]], at: int) -> tuple[int, dict[str, str]]:
        """Number of tokens of the longest term that begins at ``at`` and its kinds; 1 and none if there is no term."""
        rest = self._first.get(tokens[at][0])
        best: tuple[int, dict[str, str]] = (1, {})
        if rest is None:
            return best
        words, longest, position = [], self._longest[tokens[at][0]], at
        while position < len(tokens) and len(words) < longest:
            text = tokens[position][0]
            position += 1
            if words and (text in inside_words() or (text == "-" and _glued(tokens, position - 1))):
                continue
            words.append(text)
            if tuple(words) in rest:
                best = (position - at, rest[tuple(words)])
        return best


def _tokens(text: str) -> list[tuple[str, int, int]]:
    """The words of cleaned text with their offsets; "re" makes one with the next where that is a known word ("re measure")."""
    tokens: list[tuple[str, int, int]] = []
    for found in TOKEN.finditer(text):
        plain = word(found[0])
        tokens.append((plain, found.start(), found.end()))
        prefix = 3 if len(tokens) > 2 and tokens[-2][0] == "-" else 2
        if len(tokens) >= prefix and tokens[-prefix][0] == "re" and word(f"re{plain}") in known_words():
            tokens[-prefix:] = [(word(f"re{plain}"), tokens[-prefix][1], found.end())]
    return tokens


def _glued(tokens: list[tuple[str, int, int]], at: int) -> bool:
    """Whether the hyphen at ``at`` joins two words without blanks, as in "trans-thalamic"."""
    return at + 1 < len(tokens) and tokens[at - 1][2] == tokens[at][1] and tokens[at][2] == tokens[at + 1][1]
