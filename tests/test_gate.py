"""What stands in front of vLLM, without vLLM: keys, bodies, and an application that must not notice otherwise."""

from __future__ import annotations

import asyncio

import pytest

from sonovqa.gate import Gate

KEY = "the-server's-key"


async def echo(scope, receive, send) -> None:
    """Answers with how many bytes it was sent; gives up, as Starlette does, when its client leaves."""
    count, more = 0, True
    while more:
        event = await receive()
        if event["type"] == "http.disconnect":
            raise ConnectionError("the client left")
        count, more = count + len(event["body"]), event.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(count).encode()})


def ask(gate: Gate, path="/v1/chat/completions", pieces=(b"x",), key=None, length=None, method="POST", kind="http") -> tuple:
    """The status, or a websocket's closing code, and the body of the answer."""
    headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
    headers += [(b"content-length", str(length).encode())] if length is not None else []
    events = [{"type": "http.request", "body": piece, "more_body": i + 1 < len(pieces)} for i, piece in enumerate(pieces)]
    said = []

    async def receive():
        return events.pop(0) if events else {"type": "http.disconnect"}

    async def send(event):
        said.append(event)

    asyncio.run(gate({"type": kind, "path": path, "headers": headers, "method": method}, receive, send))
    return said[0].get("status", said[0].get("code")), b"".join(event.get("body", b"") for event in said)


@pytest.fixture
def keyed(monkeypatch) -> Gate:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    return Gate(echo, largest=100)


@pytest.mark.parametrize("path", ["/v1/models", "/invocations", "/metrics", "/", "//health", "/health/x", "/Health", "/docs"])
def test_every_path_but_the_health_check_needs_the_key(keyed, path):
    assert ask(keyed, path)[0] == 401
    assert ask(keyed, path, key=KEY[:-1])[0] == ask(keyed, path, key=KEY + "x")[0] == ask(keyed, path, key="")[0] == 401
    assert ask(keyed, path, key=KEY) == (200, b"1")
    assert ask(keyed, "/health") == (200, b"1")


def test_websockets_need_it_too_and_preflight_requests_carry_none(keyed):
    assert ask(keyed, kind="websocket")[0] == 1008
    assert ask(keyed, method="OPTIONS")[0] == 200


def test_without_a_key_in_the_environment_none_is_asked_for(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert ask(Gate(echo))[0] == 200


@pytest.mark.parametrize(
    ("pieces", "length", "status"),
    [((b"x" * 100,), 100, 200), ((b"x" * 101,), 101, 413), ((b"x" * 60,) * 2, None, 413), ((b"x" * 60,) * 2, 10, 413),
     ((b"x",), "-1", 413), ((b"x",), "1e9", 413), ((b"x" * 50,) * 2, None, 200)],
)  # fmt: skip
def test_bodies_are_bounded_whatever_they_say_of_themselves(keyed, pieces, length, status):
    told, body = ask(keyed, pieces=pieces, key=KEY, length=length)
    assert told == status
    assert b"too large" in body if status == 413 else body == str(sum(map(len, pieces))).encode()


def test_faults_of_the_application_stay_its_own(keyed):
    async def broken(scope, receive, send):
        raise RuntimeError("a fault of its own")

    keyed.app = broken
    with pytest.raises(RuntimeError):
        ask(keyed, key=KEY)
