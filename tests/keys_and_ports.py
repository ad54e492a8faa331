"""What tests of serve.sh share: no keys and limits in the environment, and a free port."""

from __future__ import annotations

import socket

import pytest

KEYS = ("VLLM_API_KEY", "VLLM_CPU_KVCACHE_SPACE")


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
