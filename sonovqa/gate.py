"""What stands in front of vLLM's server: the key for every path, and an upper bound for what a request may bring.

vLLM's own ``VLLM_API_KEY`` guards ``/v1`` and a few prefixes only; ``/invocations`` answers the same questions to everybody
(source: vLLM 0.32, ``entrypoints/launchers/cli_args.py``, note on ``api_key``). It also reads a request's body to its end,
however long it is. serve.sh puts this class in with ``--middleware sonovqa.gate.Gate``.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets

#: Answered without a key: load balancers ask it, and it tells no more than that the server is up.
OPEN = ("/health", "/ping")
LARGEST_BODY = 32 << 20  # bytes; an image file of 24 MB in base64, or eight of the usual ones
DROPPED = 16  # times as much is read and thrown away, so that the client hears why
#: The same for browsers' preflight requests, which carry no key; vLLM allows no other origin unless told to.
PREFLIGHT = "OPTIONS"


class Gate:
    """ASGI middleware: 401 without the key in ``VLLM_API_KEY`` (unset: no key is asked for), 413 for a body of too many bytes.

    A body is counted as it comes, so one that is longer than it said, or did not say, is cut off too. Nothing of it is decoded.

    Args:
        app: the ASGI application behind it. Source: ASGI 3.0, HTTP connection scope.
        largest: most bytes of a body.
    """

    def __init__(self, app, largest: int = LARGEST_BODY):
        self.app, self.largest = app, largest
        key = os.environ.get("VLLM_API_KEY")
        self._key = hashlib.sha256(key.encode()).digest() if key else None

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        if not self._may_pass(scope, headers):
            return await self._refuse(scope, send, 401, "Unauthorized: send the server's key as a bearer token")
        told = headers.get(b"content-length", b"0")
        if not told.isdigit() or int(told) > self.largest:
            return await self._too_large(receive, send)
        seen, answered = 0, False

        async def counted():
            nonlocal seen
            event = await receive()
            seen += len(event.get("body", b""))
            return event if seen <= self.largest else {"type": "http.disconnect"}

        async def noted(event):
            nonlocal answered
            if seen <= self.largest:
                answered = answered or event["type"] == "http.response.start"
                await send(event)

        try:
            await self.app(scope, counted, noted)
        except Exception:  # whatever the application makes of a client that seems to have left
            if seen <= self.largest:
                raise
        if seen > self.largest and not answered:
            await self._too_large(receive, send)

    def _may_pass(self, scope, headers: dict[bytes, bytes]) -> bool:
        if self._key is None or scope.get("method") == PREFLIGHT or scope["path"] in OPEN:
            return True
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and secrets.compare_digest(hashlib.sha256(given).digest(), self._key)

    async def _too_large(self, receive, send) -> None:
        """413, once the rest of the body was thrown away: a client still writing would see a broken connection instead."""
        dropped, more = 0, True
        while more and dropped < DROPPED * self.largest:
            event = await receive()
            dropped += len(event.get("body", b""))
            more = event["type"] == "http.request" and event.get("more_body", False)
        message = f"Request too large: {self.largest >> 20} MB are allowed; send a smaller image"
        await self._refuse({"type": "http"}, send, 413, message)

    async def _refuse(self, scope, send, status: int, message: str) -> None:
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        body = json.dumps({"error": {"message": message, "code": status}}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
