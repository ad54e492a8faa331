"""What stands between the page and whoever sends it requests: who may ask, how much, how slowly and how many at once."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

COOKIE = "sonovqa-session"
SESSION_SECONDS = 12 * 3600  # a working day; then the key is asked for again
HEAD_SECONDS = 15  # until a request's headers must be whole, from the connection's start or the response before
PIECE_SECONDS = 20  # until the next piece of an upload must come, or the next piece of an answer be taken
PARTING_SECONDS = 5  # for which a client that was refused in mid-upload may go on sending into the void
BODY_SECONDS = 120  # until an upload must be whole: 20 MB at 1.4 Mbit/s

#: The page is files of its own and nothing else: no inline script or style, no other host, no frame around it.
#: Source: W3C Content Security Policy Level 3.
POLICY = "; ".join((
    "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self' blob:", "connect-src 'self'",
    "form-action 'self'", "base-uri 'none'", "frame-ancestors 'none'",
))  # fmt: skip
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-store",  # images of patients stay out of the browser's cache on disk
}


class Refusal(Exception):
    """A request that is not served: an HTTP status and words for the person in front of the page."""

    def __init__(self, status: int, words: str, retry_after: int | None = None):
        super().__init__(words)
        self.status, self.words, self.retry_after = status, words, retry_after

    def response(self) -> JSONResponse:
        """The refusal as JSON ``{"error": words}``."""
        wait = {"Retry-After": str(self.retry_after)} if self.retry_after else {}
        kind = Parting if self.status in (408, 413) else JSONResponse
        return kind({"error": self.words}, self.status, wait)


class Parting(JSONResponse):
    """A response to a request whose body was not read to its end: the connection stays open a little after it.

    Were it closed at once, what the client still sends would be answered by a reset, and the response lost with it.

    Source: RFC 9112, section 9.6, on closing a connection in stages.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PARTING_SECONDS):
                while (await receive()).get("more_body"):  # a disconnect has none
                    pass
        await send({"type": "http.response.body", "body": b""})


class Gate:
    """Lets ``most`` requests in at a time and turns away the rest at once, so that a rush cannot fill the memory."""

    def __init__(self, most: int):
        self.most, self.inside = most, 0

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Hold a place. Raises `Refusal` (503) if there is none."""
        if self.inside >= self.most:
            raise Refusal(503, "The page is busy: too many people are asking at once. Try again in a few seconds.", 5)
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1


async def read_body(request: Request, most: int, kind: str, seconds: float | None = None) -> bytes:
    """A request's body, counted as it comes.

    Args:
        most: bytes; more are refused by the ``Content-Length`` before anything is read, or as soon as they were sent.
        kind: the content type it must have. Neither that of JSON nor that of bytes can be sent by a form of another site.
        seconds: until it must be whole; ``None``: `BODY_SECONDS`.

    Raises:
        Refusal: 413 too large, 415 of another kind, 408 too slow.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip() != kind:
        raise Refusal(415, f"The page takes {kind} here.")
    too_large = Refusal(413, f"The file is too large: at most {most / 1e6:g} MB.")
    told = request.headers.get("content-length", "0")
    if not told.isdecimal() or int(told) > most:
        raise too_large
    body, pieces = bytearray(), request.stream()
    try:
        async with asyncio.timeout(BODY_SECONDS if seconds is None else seconds):
            while True:
                piece = await asyncio.wait_for(anext(pieces, None), PIECE_SECONDS)
                if piece is None:
                    return bytes(body)
                body += piece
                if len(body) > most:
                    raise too_large
    except TimeoutError:
        raise Refusal(408, "The upload took too long and was stopped. Check the connection and try again.") from None
    except ClientDisconnect:
        raise Refusal(400, "The upload broke off.") from None


class Sessions:
    """Cookies for those who gave the page's key: a time and its signature, so that nothing need be kept.

    Args:
        key: the page's key; ``None``: everybody is let in (on loopback only, see `page.check`).
    """

    def __init__(self, key: str | None):
        self.key = key.encode() if key else None

    def signed_in(self, cookie: str | None, now: float | None = None) -> bool:
        """Whether a cookie was given out less than `SESSION_SECONDS` ago for this key."""
        if self.key is None:
            return True
        made, _, signature = (cookie or "").partition(".")
        if not (made.isdecimal() and hmac.compare_digest(signature.encode(), self._signature(made).encode())):
            return False
        return 0 <= (time.time() if now is None else now) - int(made) <= SESSION_SECONDS

    def cookie_for(self, key: str) -> str | None:
        """A cookie's value, or ``None`` for a wrong key; compared in constant time.

        JSON can hold half a surrogate pair, which UTF-8 proper cannot encode: passed on, it is a wrong key like others.
        """
        if self.key is None or not hmac.compare_digest(key.encode(errors="surrogatepass"), self.key):
            return None
        made = str(int(time.time()))
        return f"{made}.{self._signature(made)}"

    def _signature(self, made: str) -> str:
        return base64.urlsafe_b64encode(hmac.digest(self.key or b"", f"sonovqa page {made}".encode(), hashlib.sha256)).decode()


def is_own(headers: Headers) -> bool:
    """Whether a request comes from this page itself and not from another site open in the same browser.

    A browser says so (``Sec-Fetch-Site``, or the ``Origin`` of every POST); what says neither is no browser and has no cookie.

    Source: OWASP Cross-Site Request Forgery Prevention, "Fetch Metadata" and "Verifying Origin".
    """
    if site := headers.get("sec-fetch-site"):
        return site == "same-origin"
    origin = headers.get("origin")
    return origin is None or urlsplit(origin).netloc == headers.get("host")


class Guard:
    """ASGI middleware: headers that hold the browser to this page, no requests from other sites, no reader that stalls."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            async with asyncio.timeout(PIECE_SECONDS):  # send() waits while the client does not read
                await send(message)

        if scope["method"] not in ("GET", "HEAD") and not is_own(Headers(scope=scope)):
            refusal = Refusal(403, "This request came from another site and was refused.")
            await refusal.response()(scope, receive, guarded)
            return
        with contextlib.suppress(TimeoutError):  # of guarded(): the connection is given up
            await self.app(scope, receive, guarded)


class Protocol(H11Protocol):
    """HTTP/1.1 that gives up clients which stall, where uvicorn would wait for ever.

    uvicorn has no limit for the first request's headers, and stops its keep-alive timer at the first byte of a later one.
    Closing a connection waits until the client has taken all that was written for it, which it may never do.
    """

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self.head_timer = self.loop.call_later(HEAD_SECONDS, self._close_if_silent, None)
        self.parting_timer = self.loop.call_later(PIECE_SECONDS, self._abort_if_stalled, None)

    def connection_lost(self, fault: Exception | None) -> None:
        self.head_timer.cancel()
        self.parting_timer.cancel()
        super().connection_lost(fault)

    def on_response_complete(self) -> None:
        self.head_timer.cancel()  # armed before the call below, which begins the next request where it came already
        self.head_timer = self.loop.call_later(HEAD_SECONDS, self._close_if_silent, self.cycle)
        super().on_response_complete()

    def _close_if_silent(self, last) -> None:
        """Close the connection if no request's headers became whole since the request ``last``."""
        if self.cycle is last and not self.transport.is_closing():
            self.transport.close()

    def _abort_if_stalled(self, before: int | None) -> None:
        """Cut the connection if it is being closed and none of the ``before`` bytes then unsent was taken since the last look."""
        unsent = self.transport.get_write_buffer_size() if self.transport.is_closing() else None
        if unsent is not None and unsent == before:
            self.transport.abort()
        else:
            self.parting_timer = self.loop.call_later(PIECE_SECONDS, self._abort_if_stalled, unsent)
