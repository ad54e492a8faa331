"""The JSON of an answer: found in a code fence, between sentences or behind a thought, and read whole or not at all."""

from __future__ import annotations

import json
import re

from sonovqa import answer_words

#: Levels of lists and objects; an extraction has three. Python's own limit is the depth of the caller's stack.
DEEPEST = 50
_OPENER = re.compile(r"[{\[]")
#: How an extraction begins, or would if it had not been cut off there. Any other bracket is one of the prose: "[see below]".
_BEGINS = re.compile(r"""\{\s*(?:["'}]|\Z)|\[\s*(?:[{\["'\]]|\Z)""")
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"?|[{}\[\]]', re.DOTALL)


def parse(text: str):
    """The JSON object or list that ``text`` answers with, or ``None`` if there is none, or one that is cut short.

    Of several the last that says anything counts: a model that corrects itself does so at the end. A thought
    (``<think>…</think>``) is no answer. JSON that is whole but wrong (a comma too many) is passed over with all that it holds: an
    inner object would be a part taken for the whole.
    """
    text, decoder = answer_words.own_turn(text), json.JSONDecoder()
    found, at = [], 0
    while opener := _OPENER.search(text, at):
        start = opener.start()
        try:
            value, at = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            at = start + 1
            if _BEGINS.match(text, start):
                at, _ = _extent(text, start)
                if at is None:
                    return None
            continue
        if _extent(text, start)[1] <= DEEPEST and not _is_reference(value):
            found.append(value)
    return next((value for value in reversed(found) if _says(value)), found[-1] if found else None)


def _extent(text: str, start: int) -> tuple[int | None, int]:
    """Where the bracket at ``start`` is closed, ``None`` if it is not, and how deep brackets are nested in it."""
    depth = deepest = 0
    for token in _TOKEN.finditer(text, start):
        if token[0] in ("{", "["):
            depth += 1
            deepest = max(depth, deepest)
        elif token[0] in ("}", "]"):
            depth -= 1
            if not depth:
                return token.end(), deepest
    return None, deepest


def _is_reference(value) -> bool:
    """Whether it is a list of bare numbers: "page [1]" in a sentence; a number without a name or unit extracts nothing."""
    return isinstance(value, list) and bool(value) and all(isinstance(entry, int | float) for entry in value)


def _says(value) -> bool:
    """Whether anything is filled in: neither an empty list nor a form repeated, ``[{"name": "", "value": 0}]``."""
    if isinstance(value, dict | list):
        return any(map(_says, value.values() if isinstance(value, dict) else value))
    return bool(value.strip()) if isinstance(value, str) else bool(value)
