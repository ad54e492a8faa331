"""vLLM's caches in a benchmark: kept from helping where they would not help a user, and asked how often they did.

vLLM keeps the KV cache of prefixes and the pixels of images it has processed. A benchmark that asks the same questions
twice (another number of users, another order) would find everything there and measure nothing. A request's
``cache_salt`` keeps prefixes apart, an image's ``uuid`` the images, without a change to a pixel or a token.
"""

from __future__ import annotations

import functools
import json
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Sequence

from sonovqa import credentials, endpoint_cost, files
from sonovqa.endpoint import KEY_NAMES, Endpoint

BOTH, IMAGE, NONE = KEPT = ("both", "image", "none")
#: vLLM's counters, in tokens (prefix) and images; source: vLLM's v1/metrics/loggers.py.
COUNTERS = {"prefix": "vllm:prefix_cache", "image": "vllm:mm_cache"}
SETTLING = 0.5  # seconds: vLLM counts a step after its answers leave


class Fresh(Endpoint):
    """An endpoint that, where it is vLLM, has nothing in its caches but what this object's own requests put there.

    Args:
        kept: `BOTH` caches help its requests among each other, as in real use; `IMAGE`: only that of images, as if vLLM had
            been started without a prefix cache; `NONE`.
        ignore_eos: every answer has exactly the tokens asked for, on vLLM.
        vllm: whether it is vLLM (`is_vllm`); other servers are asked as always.
        salt: the mark of its requests; objects of one salt share what the caches hold.
        rest: see `endpoint.Endpoint`.
    """

    def __init__(self, *rest, kept: str = BOTH, ignore_eos: bool = False, vllm: bool = True, salt: str | None = None, **named):
        super().__init__(*rest, extra={"ignore_eos": True} if ignore_eos and vllm else None, **named)
        self.kept, self.vllm, self.salt = kept, vllm, salt or secrets.token_hex(8)

    def _request(self, messages: list[dict], max_new_tokens: int) -> dict:
        request = super()._request(messages, max_new_tokens)
        if not self.vllm:
            return request
        once = secrets.token_hex(8)
        salted = [self._apart(turn, once) if isinstance(turn["content"], list) else turn for turn in messages]
        extra = self.extra | {"cache_salt": self.salt if self.kept == BOTH else once}
        return request | {"messages": salted, "extra_body": extra}

    def _apart(self, turn: dict, once: str) -> dict:
        """A turn whose images vLLM takes for others than it has seen (`NONE`: before this request)."""
        mark = once if self.kept == NONE else self.salt
        parts = [
            part | {"uuid": f"{mark}-{_name_of(part['image_url']['url'])}"} if part["type"] == "image_url" else part
            for part in turn["content"]
        ]
        return turn | {"content": parts}


@functools.lru_cache(maxsize=512)
def _name_of(url: str) -> str:
    return files.sha256(url)[:16]


def is_vllm(url: str, keys: Sequence[str] = KEY_NAMES) -> bool:
    """Whether the server at a base URL is vLLM: others need not know ``ignore_eos``, ``cache_salt`` and ``uuid``.

    Args:
        keys: variables of the environment of which the first that is set holds the server's key.
    """
    return "vllm:" in _get(url, "/metrics", keys)  # serve.sh lets /metrics through, not /version


def version(url: str, keys: Sequence[str] = KEY_NAMES) -> str | None:
    """The version that a vLLM server at a base URL says it is; ``None`` if it does not say (`serve.sh` lets nobody ask).

    Args:
        keys: as for `is_vllm`.
    """
    try:
        return str(json.loads(_get(url, "/version", keys))["version"])
    except (ValueError, KeyError, TypeError):
        return None


def counters(url: str, keys: Sequence[str] = KEY_NAMES) -> dict[str, float]:
    """vLLM's cache counters so far, summed over its engines and after `SETTLING`; empty where the server shows none.

    Args:
        keys: as for `is_vllm`.
    """
    from prometheus_client.parser import text_string_to_metric_families

    time.sleep(SETTLING)
    wanted = {f"{name}_{what}_total": f"{cache}_{what}" for cache, name in COUNTERS.items() for what in ("hits", "queries")}
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(_get(url, "/metrics", keys)):
        for sample in family.samples:
            if sample.name in wanted:
                found[wanted[sample.name]] = found.get(wanted[sample.name], 0.0) + sample.value
    return found


def hit_rates(before: dict[str, float], after: dict[str, float]) -> dict[str, float | None]:
    """Hit rate of each cache between two looks at `counters`; ``None`` where it was not asked or is not shown."""
    rates = {}
    for cache in COUNTERS:
        hits, queries = (after.get(f"{cache}_{what}", 0.0) - before.get(f"{cache}_{what}", 0.0) for what in ("hits", "queries"))
        rates[cache] = round(hits / queries, 4) if queries > 0 else None
    return rates


def _get(url: str, path: str, keys: Sequence[str]) -> str:
    """A page beside ``/v1``; empty if there is none. As with `Endpoint`, no proxy is on the way to this machine."""
    key, direct = credentials.key(*keys), [] if endpoint_cost.is_elsewhere(url) else [urllib.request.ProxyHandler({})]
    try:
        asked = urllib.request.Request(url.removesuffix("/v1") + path, headers={"Authorization": f"Bearer {key}"} if key else {})
        with urllib.request.build_opener(*direct).open(asked, timeout=10) as response:
            return response.read().decode(errors="replace")
    except (urllib.error.URLError, OSError, ValueError):
        return ""
