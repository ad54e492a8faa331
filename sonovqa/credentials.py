"""Keys and tokens: read from the environment, from nowhere else, and kept out of everything that is written or shown."""

from __future__ import annotations

import os
import re
from urllib.parse import urlsplit, urlunsplit

from sonovqa.cli import UserError

#: What a bearer token may hold (RFC 6750, section 2.1, and then some): visible ASCII, no space.
_SENDABLE = re.compile(r"[\x21-\x7e]+")
SHORTEST = 16  # characters of a key that others are kept out by; `openssl rand -hex 16` gives 32
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def key(*names: str) -> str | None:
    """The first of the environment's variables ``names`` that is set and not empty, or ``None``.

    Raises:
        UserError: if it holds what no HTTP header may, such as a line's end. The HTTP client would quote the whole header, key
            included, in its own error message, and that would end up in answers' errors and logs.
    """
    for name in names:
        if found := os.environ.get(name):
            if not _SENDABLE.fullmatch(found):
                raise UserError(
                    f"{name}; it holds a space, a line's end or another character that no HTTP header may; "
                    f"visible ASCII is allowed; set it anew: export {name}=$(tr -d '[:space:]' < FILE)"
                )
            return found
    return None


def unfit(name: str, key: str) -> str | None:
    """What is wrong with a key that a server here asks others for, for `cli.check`; ``None`` where nothing is.

    A short one can be guessed by whoever may ask often, and one with a space fits no header.
    """
    if len(key) >= SHORTEST and _SENDABLE.fullmatch(key):
        return None
    told = f"a key of {len(key)} characters" + ("" if _SENDABLE.fullmatch(key) else ", of which some fit no HTTP header")
    return f"{name}; {told}; {SHORTEST} or more of visible ASCII without a space; export {name}=$(openssl rand -hex 32)"


def hidden(text: str, key: str | None, longest: int) -> str:
    """A fault's text in one line of at most ``longest`` characters, without ``key``, which proxies send back in their errors.

    It is cut afterwards: the rest of a key that was cut in two would not be found.
    """
    line = " ".join(text.split())
    return (line.replace(key, "[key]") if key else line)[:longest]


def hub_fault(fault: Exception, longest: int) -> str:
    """The first line of what the Hugging Face hub's client says, `hidden` from it the token that it sent."""
    return hidden((str(fault).strip().splitlines() or [type(fault).__name__])[0], os.environ.get("HF_TOKEN"), longest)


def check_variable(flag: str, name: str) -> None:
    """Raise `UserError` unless ``name`` can name a variable: whoever gives the key itself must not read it back in an error."""
    if not _VARIABLE.fullmatch(name):
        raise UserError(f"{flag}; that is no variable's name; the name of one that holds the key is needed, such as MY_KEY")


def check_url(flag: str, url: str) -> None:
    """Raise `UserError` unless ``url`` is an HTTP address without user, password or query.

    An address is written into settings, reports and records, and stands in the process list; a key in it would too.
    """
    try:
        told = urlsplit(url)
        known = told.scheme in ("http", "https") and told.hostname and (told.port or True)
    except ValueError:  # such as a port that is no number
        raise UserError(f"{flag}; this is no URL; such as http://127.0.0.1:8000/v1") from None
    if "@" in told.netloc or told.query or told.fragment:
        raise UserError(f"{flag}; the URL holds a user, a password or a query; those would be written down with every result; "
                        "give the address alone, and the key in the environment: export VLLM_API_KEY=…")  # fmt: skip
    if not known:
        raise UserError(f"{flag}; {url!r} is no URL; such as http://127.0.0.1:8000/v1")


def without_userinfo(url: str) -> str:
    """An address without its user and password, for what is written down."""
    told = urlsplit(url)
    return urlunsplit(told._replace(netloc=told.netloc.rpartition("@")[2])) if "@" in told.netloc else url
