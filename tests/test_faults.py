"""An endpoint that is killed, comes back, changes its key, drips, or is asked a thousand things at once: nothing is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT
from endpoint_asking import Hasty, ask, engine, only, picture
from keys_and_ports import free_port
from stand_in import StandIn
from test_killed import finish, start

from sonovqa import asking, chat, dataset, predictions
from sonovqa.cli import UserError
from sonovqa.endpoint import Endpoint
from sonovqa.engines import EngineError

#: A server in a process of its own, which can be killed. It opens its port once it is told to, gives as many answers (or
#: words of one) as it was allowed, and holds all others until it is killed.
SERVER = """
import sys, threading, time
from stand_in import StandIn, event

port, allowed, kind, key = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
left = threading.Semaphore(allowed)

def answer(prompt, attempt):
    left.acquire()
    return f"answer to {prompt}"

def words(prompt, attempt):
    def stream(handler):
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.end_headers()
        for i in range(12):
            left.acquire()
            event(handler, {"delta": {"content": f"word{i} "}, "finish_reason": None})
        event(handler, {"delta": {}, "finish_reason": "stop"})
        handler.close_connection = True
    return stream

sys.stdin.readline()
with StandIn(words if kind == "stream" else answer, key=key or None, port=port):
    time.sleep(3600)
"""
ALL = 10_000  # answers: more than anybody asks for


class Killable:
    """The server on a port of its own, to be killed with SIGKILL and started again at the same address."""

    def __init__(self, kind: str = "answers"):
        self.port, self.kind, self.process, self.next = free_port(), kind, None, None
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def prepare(self, allowed: int = ALL, key: str = "") -> None:
        """A process that only has to open its port: whoever asks again and again need not wait for Python to start."""
        words = [sys.executable, "-c", SERVER, str(self.port), str(allowed), self.kind, key]
        environment = os.environ | {"PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"}
        self.next = subprocess.Popen(words, stdin=subprocess.PIPE, env=environment)

    def start(self, allowed: int = ALL, key: str = "") -> None:
        """Start what was prepared, or prepare it now."""
        if self.next is None:
            self.prepare(allowed, key)
        self.process, self.next = self.next, None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        while self.process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=60):
                return
            time.sleep(0.02)
        raise AssertionError("the stand-in did not start")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close()

    def leave(self) -> None:
        for process in filter(None, (self.process, self.next)):
            process.kill()
            process.wait()
            process.stdin.close()


@pytest.fixture
def server(monkeypatch):
    for name in ("VLLM_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    made = []

    def make(*options, **named) -> Killable:
        made.append(Killable(*options, **named))
        return made[-1]

    yield make
    for one in made:
        one.leave()


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(lines_: int, path: Path, process) -> None:
    while lines(path) < lines_:
        assert process.poll() is None, process.stdout.read().decode()
        time.sleep(0.005)


def test_server_killed_under_an_evaluation_and_back_within_its_retries(server, data, tmp_path):
    """Whoever evaluates does not notice: every question is answered, none failed, none asked for twice in the file."""
    one = server()
    one.start(allowed=5)
    one.prepare()
    out = tmp_path / "out"
    command = ("evaluate.py", "--endpoint", one.url, "--data", data, "--out", out, "--no-blind", "--resamples", 0)
    process = start(*command)
    wait_for(5, out / "predictions.jsonl", process)
    one.kill()
    assert lines(out / "predictions.jsonl") == 5 and process.poll() is None, "others were open"
    time.sleep(1.5)  # so that the first tries after it come to nothing
    assert lines(out / "predictions.jsonl") == 5 and process.poll() is None
    one.start()
    assert process.wait(600) == 0, process.stdout.read().decode()
    process.stdout.close()
    rows = predictions.read(out / "predictions.jsonl")
    assert len({(row["image_id"], row["question_id"]) for row in rows}) == len(rows) == 32
    assert all(row["error"] is None and row["prediction"] == f"answer to {row['prompt']}" for row in rows)


def asked(data: Path, out: Path, url: str) -> dict:
    """What `evaluate.py --endpoint` does with the test split, with an endpoint of little patience."""
    raw = dataset.load_undecoded(data)["test"]
    made = Endpoint(url, "run", in_flight=4, timeout=60.0, retries=1, backoff=0.01)
    return asking.ask_all(raw, asking.items_of(raw), out, lambda: (made, 0.0), False, 20)[0]


def test_server_that_stays_away_ends_it_in_one_line_and_the_same_call_goes_on(server, data, tmp_path, monkeypatch):
    monkeypatch.setattr(asking, "MOST_UNREACHED", 5)
    one = server()
    one.start()
    path, heard = tmp_path / "predictions.jsonl", []
    whole = asking.Patience.heard

    def killing(self, error):
        heard.append(error)
        if len(heard) == 10:
            one.kill()
        whole(self, error)

    monkeypatch.setattr(asking.Patience, "heard", killing)
    with pytest.raises(UserError, match=r"has gone away.*start the server again") as mistake:
        asked(data, tmp_path, one.url)
    assert "\n" not in str(mistake.value)
    answered = [row for row in predictions.read(path) if row["error"] is None]
    assert len(answered) >= 10 and lines(path) < 32
    monkeypatch.setattr(asking.Patience, "heard", whole)
    one.start()
    rows = asked(data, tmp_path, one.url)
    assert len(rows) == 32 and all(row["error"] is None for row in rows.values())
    again = predictions.read(path)
    assert again[: len(answered)] == answered or all(row in again for row in answered)
    assert sum(row["error"] is None for row in again) == 32, "nothing that was answered was asked again"


def test_server_that_comes_back_with_another_key_is_given_up_and_the_right_key_goes_on(server, data, tmp_path, monkeypatch):
    monkeypatch.setattr(asking, "MOST_UNREACHED", 5)
    monkeypatch.setenv("VLLM_API_KEY", "the-old-key")
    one = server()
    one.start(key="the-new-key")
    with pytest.raises(UserError, match=r"refuses all that is asked.*HTTP 401.*VLLM_API_KEY") as mistake:
        asked(data, tmp_path, one.url)
    assert "the-old-key" not in str(mistake.value) and lines(tmp_path / "predictions.jsonl") < 32
    monkeypatch.setenv("VLLM_API_KEY", "the-new-key")
    rows = asked(data, tmp_path, one.url)
    assert len(rows) == 32 and all(row["error"] is None for row in rows.values())


def test_server_killed_in_mid_stream_and_back(server):
    one = server(kind="stream")
    one.start(allowed=5)
    one.prepare()
    pieces = Endpoint(one.url, "run", timeout=60.0, retries=5, backoff=0.2).stream(chat.openai_messages(picture(), "p"), 20)
    said = [next(pieces) for _ in range(3)]
    one.kill()
    one.start()
    assert "".join([*said, *pieces]) == "".join(f"word{i} " for i in range(12)), "no word twice, none left out"


def test_server_killed_in_mid_stream_for_good_is_a_fault_not_a_short_answer(server):
    one = server(kind="stream")
    one.start(allowed=5)
    pieces = Endpoint(one.url, "run", timeout=60.0, retries=1, backoff=0.01).stream(chat.openai_messages(picture(), "p"), 20)
    next(pieces)
    one.kill()
    with pytest.raises(EngineError, match="connection"):
        list(pieces)


def test_a_thousand_requests_at_once(monkeypatch):
    """All open together, each answered with its own answer; the server turns some away first, as vLLM does when it is full.

    The server holds what comes until all 1,000 are there: how fast the machine opens them decides nothing.
    """
    all_there = threading.Event()

    def full(prompt, attempt):
        if one.open == 1000:
            all_there.set()
        all_there.wait(300)
        return 503 if attempt <= 20 else f"answer to {prompt}"

    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with StandIn(full) as one:
        replies = ask(engine(one, in_flight=1000, timeout=600.0), *(f"{n}" for n in range(8)), images=125)
    assert len(replies) == 1000
    assert all(reply.error is None and reply.text == f"answer to {int(q[1:]) - 1}" for (_, q), reply in replies.items())
    assert one.most_open == 1000
    assert sum(one.attempts.values()) == 1160


def test_server_that_drips_is_not_waited_for():
    """A byte now and then, until the client has gone: each comes long before the limit between two bytes."""
    gone = threading.Event()

    def drip(handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        handler.close_connection = True  # once it ends, whoever still waits hears of it
        with contextlib.suppress(OSError):
            for _ in range(1200):  # a minute: longer than anybody should wait
                handler.wfile.write(b" ")
                handler.wfile.flush()
                if gone.wait(0.05):
                    return

    with StandIn(lambda prompt, attempt: drip) as one:
        reply = only(ask(Hasty(one.url, "run", {"p": 0.4}, retries=1, backoff=0.01), "p"))
        gone.set()
    assert reply.error == "no answer in time (tried 2 times)"


def test_evaluation_killed_and_its_server_too(server, data, tmp_path):
    one = server()
    one.start(allowed=8)
    out = tmp_path / "out"
    command = ("evaluate.py", "--endpoint", one.url, "--data", data, "--out", out, "--no-blind", "--resamples", 0)
    process = start(*command)
    wait_for(8, out / "predictions.jsonl", process)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    one.kill()
    before = (out / "predictions.jsonl").read_bytes()
    assert before.count(b"\n") == 8, "others were open"
    one.start()
    finish(*command)
    assert (out / "predictions.jsonl").read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert len(predictions.latest(predictions.read(out / "predictions.jsonl"))) == 32
