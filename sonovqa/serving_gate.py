"""What a request meets before vLLM does: only the API, health and metrics are there, and no body is larger than an image may be.

vLLM asks for its key under ``/v1``, ``/v2``, ``/inference`` and ``/cohere`` only. ``/invocations`` (SageMaker's name for chat
completions), ``/tokenize``, ``/abort_requests``, ``/scale_elastic_ep`` and others answer anybody (vLLM 0.32,
``entrypoints/serve/middleware/authenticate.py``), so a server that listens beyond this machine would be open in spite of its
key. And without a key, where only this machine reaches it, any web page open in a browser here could ask: its own name can be
made to mean 127.0.0.1 (DNS rebinding), and then it asks its own origin, which no rule of CORS forbids. Under its true name CORS
keeps answers from it and the JSON of most requests, but not every request: so whoever comes from another origin is turned away
here too. With a key neither matters, as no browser sends that by itself. vLLM takes this class as
``--middleware sonovqa.serving_gate.Gate``. Nothing of the project is imported here.
"""

from __future__ import annotations

import asyncio
import json
import os
import re

#: Paths that need no key: whether the server lives, and counts of what it did. Neither tells what was asked.
OPEN = frozenset({"/health", "/metrics"})
API = "/v1/"  # vLLM itself asks for the key below it
LARGEST_BODY = 64 * 2**20  # bytes: an image of 48 MB in base64
PARTING_SECONDS = 10  # a client has these to send what nobody reads; its answer would be lost if the connection were cut before
ORIGINS_NAME = "SONOVQA_ALLOWED_ORIGINS"  # environment: web pages that may ask, separated by spaces
ELSEWHERE = (b"cross-site", b"same-site")  # of Sec-Fetch-Site; another port of this machine is the same site
#: This machine's own names as Host gives them. Browsers always send one, and a web page cannot choose it.
HERE = re.compile(rb"(?:localhost|127(?:\.\d{1,3}){3}|\[::1\])(?::\d*)?", re.IGNORECASE)


class Gate:
    """ASGI middleware. Source of the protocol: https://asgi.readthedocs.io/en/latest/specs/www.html.

    Whether there is a key is what ``VLLM_API_KEY``, from which vLLM takes its own, says when the server starts; which web pages
    may ask, `ORIGINS_NAME` (`serving_origins`).
    """

    def __init__(self, app):
        self.app, self.has_key = app, bool(os.environ.get("VLLM_API_KEY"))
        self.origins = frozenset(os.environ.get(ORIGINS_NAME, "").split())

    async def __call__(self, scope, receive, send) -> None:
        """Pass a request on, or answer as OpenAI's API does: 403 (called by a strange name, or from a strange page), 404 (no such
        path), 411 (length not told) or 413 (too large).
        """
        refusal = refused(scope, self.has_key, self.origins) if scope["type"] in ("http", "websocket") else None
        if refusal is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            origin = dict(scope["headers"]).get(b"origin", b"")
            page = origin if origin.decode("ascii", "replace") in self.origins else None
            await refuse(receive, send, *refusal, page)


async def refuse(receive, send, status: int, message: str, page: bytes | None = None) -> None:
    """Answer at once, then read what is still being sent and forget it, for at most `PARTING_SECONDS`.

    ``page`` is the ``Origin`` of a web page that may ask: without leave to read it (CORS) its script would not learn why.

    A connection closed on bytes that nobody has read is reset, and the client loses the answer (RFC 9112, section 9.6). Reading
    first would ask a client that waits for ``100 Continue`` for all of a body that is not wanted.
    """
    body = json.dumps({"error": {"message": message, "type": "invalid_request_error", "code": status}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
    headers += [(b"access-control-allow-origin", page), (b"vary", b"Origin")] if page else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    try:
        async with asyncio.timeout(PARTING_SECONDS):
            while (await receive()).get("more_body"):  # a disconnect has none
                pass
    except TimeoutError:
        pass
    await send({"type": "http.response.body", "body": b""})


def refused(scope: dict, has_key: bool = True, origins: frozenset[str] = frozenset()) -> tuple[int, str] | None:
    """Status and message for a request that is not let in, ``None`` for one that is.

    Args:
        scope: an ASGI connection scope; of a body only the length its header tells is looked at.
        has_key: whether vLLM asks for a key; if not, Host must be a name of this machine's own, and no web page may ask but
            those of ``origins``.
    """
    path = scope["path"].removeprefix(scope.get("root_path", ""))  # as vLLM looks at it before it asks for the key
    if path in OPEN:
        names = []
    elif path.startswith(API):
        names = [] if has_key else [value for name, value in scope["headers"] if name.lower() == b"host"]
    else:
        return 404, f"no such path; {path[:80]}; /v1/…, /health and /metrics are served"
    if strange := [name for name in names if not HERE.fullmatch(name)]:
        told = strange[0][:80].decode("ascii", "replace")
        return 403, f"no name of this machine; {told}; localhost and 127.0.0.1 are served; others need VLLM_API_KEY"
    headers = {name.lower(): value for name, value in scope["headers"]}
    if names and (page := foreign(headers, origins)):
        return 403, f"a web page elsewhere; {page}; none may ask without a key; start ./serve.sh with --allow-origin ITS_ADDRESS"
    length = headers.get(b"content-length", b"")
    if b"transfer-encoding" in headers:
        return 411, "a body sent in chunks; its length is needed beforehand; send Content-Length"
    if length.isdigit() and int(length) > LARGEST_BODY:
        told = f"{int(length) / 1e6:.0f} MB; at most {LARGEST_BODY / 1e6:.0f} MB, an image of {LARGEST_BODY * 0.75 / 1e6:.0f} MB"
        return 413, f"the request is too large; {told}; send a smaller image"
    return None


def foreign(headers: dict[bytes, bytes], origins: frozenset[str]) -> str | None:
    """The web page of another site that a request comes from, in words; ``None`` where it comes from none, or may.

    Browsers name the page (``Origin``) in all requests but plain GETs, and say of those whether they come from elsewhere
    (``Sec-Fetch-Site``). What says neither is no browser.

    Source: OWASP Cross-Site Request Forgery Prevention, "Verifying Origin" and "Fetch Metadata".
    """
    origin = headers.get(b"origin")
    if origin is None:
        return "an address that the browser does not tell" if headers.get(b"sec-fetch-site") in ELSEWHERE else None
    told = origin.decode("ascii", "replace")
    own = headers.get(b"host", b"").decode("ascii", "replace").lower()
    return None if told in origins or told.lower() in (f"http://{own}", f"https://{own}") else told[:80] or "an empty Origin"
