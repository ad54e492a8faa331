"""What can go wrong between a client and an OpenAI-compatible server: what may pass, what is no answer, and each in one line."""

from __future__ import annotations

from sonovqa import credentials

#: HTTP statuses worth another try: the server was busy, restarting or behind an overloaded proxy.
PASSING = frozenset({408, 409, 425, 429})
#: vLLM answers a race for its tokenizer with HTTP 400; the next try goes through. Source: DESIGN.md, seen at 128 in flight.
ALREADY_BORROWED = "Already borrowed"
FINISHED = ("stop", "length")
#: How the error of a request begins that got no answer at all, as if nobody were there.
UNREACHED = ("connection failed", "no answer in time")
#: How it begins where no request will be answered either: the key or the model is not the server's (any more).
REFUSED = ("HTTP 401", "HTTP 403", "HTTP 404")


class IncompleteError(Exception):
    """The server answered with status 200 and no usable answer: empty, cut off, or not a chat completion."""


def check_finished(reason: str | None, empty: bool) -> None:
    """Raise `IncompleteError` for an answer that is empty or did not come to its end."""
    if reason not in FINISHED:
        raise IncompleteError(f"the answer was not finished ({reason})" if reason else "the answer was cut off")
    if empty:
        raise IncompleteError("the answer is empty")


def may_pass(fault: Exception) -> bool:
    """Whether the same request may succeed later. Anything that is not an HTTP status (connection, time, cut) may."""
    status = getattr(fault, "status_code", None)
    return status is None or status in PASSING or status >= 500 or (status == 400 and ALREADY_BORROWED in str(fault))


def in_words(fault: Exception, key: str | None = None) -> str:
    """A fault in one line, the server's own message where it sent one; without the ``key``, which some servers and proxies
    send back with a request's headers."""
    import openai

    if isinstance(fault, openai.APITimeoutError | TimeoutError):
        return "no answer in time"
    if isinstance(fault, openai.APIConnectionError):
        told = str(fault.__cause__ or fault).strip() or type(fault.__cause__).__name__
        return f"connection failed ({told.replace(key, '[key]') if key else told})"
    body = getattr(fault, "body", None)
    message = body.get("message") if isinstance(body, dict) else None
    status = getattr(fault, "status_code", None)
    line = credentials.hidden(str(message or fault), key, 300)
    if status is None:
        return line
    return f"HTTP {status}: {line if message else fault.response.reason_phrase}"
