"""Which web pages may ask a server from a browser: none, unless serve.sh is told of them (``--allow-origin``).

Both vLLM's rules of CORS and the gate before it are given the same list. The rules alone would let requests through that a
browser sends without asking first, and only keep their answers from the page (Fetch standard, "CORS-safelisted").
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from sonovqa import cli
from sonovqa.serving_gate import ORIGINS_NAME

FLAG = "--allow-origin"
NETWORK_LOCATION = re.compile(r"(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::\d+)?")  # no user, no wildcard, names in ASCII (xn--…)


def checked(origins: Sequence[str]) -> list[str]:
    """Origins as browsers write them: scheme, host and a port that is not the scheme's own, all in lower case.

    Source: Fetch standard, section 3.2 (the ``Origin`` header) and RFC 6454, section 6.2.

    Raises:
        UserError: for what is no origin, ``*`` and ``null`` among it: any page could then ask.
    """
    made, problems = [], []
    for told in origins:
        try:
            parts = urlsplit(told.strip().lower())
            port = "" if parts.port in (None, {"http": 80, "https": 443}.get(parts.scheme)) else f":{parts.port}"
            is_origin = NETWORK_LOCATION.fullmatch(parts.netloc) and parts.scheme in ("http", "https")
            is_origin = is_origin and not (parts.path.strip("/") or parts.query or parts.fragment)
        except ValueError:  # a port that is no number, or half an IPv6 address
            is_origin = False
        if is_origin:
            host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
            made.append(f"{parts.scheme}://{host}{port}")
        else:
            problems.append(f"{FLAG}; {told}; scheme, host and port of one web page's address; {FLAG} https://app.example")
    cli.check(problems)
    return made


def flags(origins: Sequence[str]) -> list[str]:
    """vLLM's flags. An empty list too is said: that nothing is allowed was not the default of every version."""
    return ["--allowed-origins", json.dumps(list(origins), separators=(",", ":"))]


def environment(origins: Sequence[str]) -> dict[str, str]:
    """What the gate reads; set even if empty, so that nothing of the caller's environment gets there."""
    return {ORIGINS_NAME: " ".join(origins)}
