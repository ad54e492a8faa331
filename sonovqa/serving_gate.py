"""What a request meets before vLLM does: only the API, health and metrics are there, and no body is larger than an image may be.

vLLM asks for its key under ``/v1``, ``/v2``, ``/inference`` and ``/cohere`` only. ``/invocations`` (SageMaker's name for chat
completions), ``/tokenize``, ``/abort_requests``, ``/scale_elastic_ep`` and others answer anybody (vLLM 0.32,
``entrypoints/serve/middleware/authenticate.py``), so a server that listens beyond this machine would be open in spite of its
key. vLLM takes this class as ``--middleware sonovqa.serving_gate.Gate``. Nothing of the project is imported here.
"""

from __future__ import annotations

import json

#: Paths that need no key: whether the server lives, and counts of what it did. Neither tells what was asked.
OPEN = frozenset({"/health", "/metrics"})
API = "/v1/"  # vLLM itself asks for the key below it
LARGEST_BODY = 64 * 2**20  # bytes: an image of 48 MB in base64


class Gate:
    """ASGI middleware. Source of the protocol: https://asgi.readthedocs.io/en/latest/specs/www.html."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        """Pass a request on, or answer 404 (no such path), 411 (length not told) or 413 (too large) as OpenAI's API does."""
        refusal = refused(scope) if scope["type"] in ("http", "websocket") else None
        if refusal is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            status, message = refusal
            body = json.dumps({"error": {"message": message, "type": "invalid_request_error", "code": status}}).encode()
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
            ]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body})


def refused(scope: dict) -> tuple[int, str] | None:
    """Status and message for a request that is not let in, ``None`` for one that is.

    Args:
        scope: an ASGI connection scope; of a body only the length its header tells is looked at.
    """
    path = scope["path"]
    if path not in OPEN and not path.startswith(API):
        return 404, f"no such path; {path[:80]}; /v1/…, /health and /metrics are served"
    headers = {name.lower(): value for name, value in scope["headers"]}
    length = headers.get(b"content-length", b"")
    if b"transfer-encoding" in headers:
        return 411, "a body sent in chunks; its length is needed beforehand; send Content-Length"
    if length.isdigit() and int(length) > LARGEST_BODY:
        told = f"{int(length) / 1e6:.0f} MB; at most {LARGEST_BODY / 1e6:.0f} MB, an image of {LARGEST_BODY * 0.75 / 1e6:.0f} MB"
        return 413, f"the request is too large; {told}; send a smaller image"
    return None
