"""An endpoint under load: users at once, waits, faults by kind, and what keeps vLLM's caches out of the measurement."""

from __future__ import annotations

import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from stand_in import StandIn, event, stream

from sonovqa import bench_caches, bench_crowd, bench_images, bench_load, bench_records, bench_streaming, cli
from sonovqa.bench_caches import BOTH, IMAGE, NONE, Fresh
from sonovqa.bench_streaming import IMAGE_FIRST, QUESTION_FIRST
from sonovqa.cli import UserError

PROMPTS = [prompt for _, prompt in bench_images.PROMPTS]


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    for name in ("VLLM_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def load(server: StandIn, record, *words: str) -> int:
    parser = cli.Parser()
    bench_load.add_arguments(parser)
    words = ("--endpoint", server.url, "--size", "32x24", "--record", str(record), *words)
    return bench_load.run(parser.parse_args(words))


def asked(server: StandIn) -> list[dict]:
    """Bodies of the measured requests: the warm-up's image is another."""
    warm = bench_images.warm_up(bench_images.noise(1, (32, 24), 0), 1)
    url = bench_streaming.messages_of(warm, IMAGE_FIRST)[0][1]["content"][0]
    return [body for body in server.bodies if url not in body["messages"][1]["content"]]


def row_of(record) -> dict:
    (row,) = bench_records.rows(record)
    return row


def test_so_many_users_ask_at_once_and_every_question_once(tmp_path):
    """Six users: nobody is answered before six ask, four times over."""
    six_at_once = threading.Barrier(6)

    def slow(prompt, attempt):
        if len(server.bodies) > 24 + 2 * len(PROMPTS):  # what one user and both warm-ups ask
            six_at_once.wait(120)
        return "a few words"

    with StandIn(slow) as server:
        assert load(server, tmp_path / "r.json", "--users", "1", "6", "--rows", "3") == 0
    one, six = bench_records.rows(tmp_path / "r.json")
    assert server.most_open == 6
    assert [row["users"] for row in (one, six)] == [1, 6]
    assert one["answered"] == six["answered"] == 24
    for row in (one, six):
        assert row["answers_per_second"] == pytest.approx(24 / row["wall_seconds"], abs=0.001)
    bodies = asked(server)[:24]
    assert len({str(body["messages"]) for body in bodies}) == 24
    assert [body["messages"][1]["content"][1]["text"] for body in bodies] != PROMPTS * 3, "questions are to be mixed"


class Clock:
    """Stands in for the module ``time`` where waits are taken: it goes on when it is told, and counts who looked at it."""

    def __init__(self):
        self.now, self.looks, self.change, self.patience = 0.0, 0, threading.Condition(), 60

    def perf_counter(self) -> float:
        with self.change:
            self.looks += 1
            self.change.notify_all()
            return self.now

    def pass_(self, seconds: float, after: int) -> None:
        """Let time pass once it was looked at so often; if it never is, the figures come out wrong."""
        with self.change:
            if not self.change.wait_for(lambda: self.looks >= after, self.patience):
                self.patience = 0
            self.now += seconds


def test_waits_and_first_tokens_are_what_the_user_saw(tmp_path, monkeypatch):
    """A user looks at the clock at the start, at the first token and at the end: three times a question."""
    clock = Clock()
    monkeypatch.setattr(bench_streaming, "time", clock)

    def slowly(handler):
        begun = clock.looks  # one user: nobody else looks
        clock.pass_(0.25, begun)
        stream(handler, "first", cut_after=1)
        clock.pass_(0.75, begun + 1)
        event(handler, {"delta": {"content": " second"}, "finish_reason": "stop"})

    with StandIn(lambda prompt, attempt: slowly) as server:
        load(server, tmp_path / "r.json", "--users", "1", "--rows", "1")
    row = row_of(tmp_path / "r.json")
    assert set(row["first_token"].values()) == {0.25} and set(row["seconds"].values()) == {1.0}
    assert list(row["seconds"]) == ["min", "mean", "median", "p95", "p99", "max"]


def test_faults_are_counted_by_kind_and_retries_apart(tmp_path):
    def script(prompt, attempt):
        if prompt == PROMPTS[0] and attempt > 1:  # the first was the warm-up
            return 400, f"refused, for the {attempt}th time"
        return 503 if prompt == PROMPTS[1] and attempt == 2 else "normal"

    with StandIn(script) as server:
        assert load(server, tmp_path / "r.json", "--users", "1", "--rows", "2") == 0
    row = row_of(tmp_path / "r.json")
    assert row["errors"] == {"HTTP 400": 2}
    assert row["retries"] == {"HTTP 503": 1}
    assert (row["requests"], row["answered"]) == (16, 14)


def reset(handler) -> None:
    """Half an answer, then the connection is torn down, as by a server that was killed."""
    stream(handler, "half an", cut_after=1)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.shutdown(socket.SHUT_RD)
    handler.connection.close()


@pytest.mark.parametrize("fault", [reset, lambda handler: stream(handler, "half an answer", cut_after=1), ""])
@pytest.mark.parametrize("again", [True, False])
def test_broken_streams_are_tried_again_and_never_answers(fault, again, tmp_path):
    def script(prompt, attempt):
        broken = prompt == PROMPTS[2] and (attempt == 2 if again else attempt > 1)
        return fault if broken else "normal"

    with StandIn(script) as server:
        load(server, tmp_path / "r.json", "--users", "3", "--rows", "1", "--retries", "1")
    row = row_of(tmp_path / "r.json")
    assert sum(row["retries"].values()) == 1
    assert sum(row["errors"].values()) == (0 if again else 1)
    assert row["answered"] == (8 if again else 7)


def test_nobody_there_any_more_is_exit_1(tmp_path):
    with StandIn(lambda prompt, attempt: 404) as server:
        assert load(server, tmp_path / "r.json", "--users", "1", "--rows", "1") == 1
    row = row_of(tmp_path / "r.json")
    assert row["errors"] == {"HTTP 404": 8}
    assert row["seconds"] is None and row["first_token"] is None


class AnyOrder(StandIn):
    """Takes a turn's text and image in any order, and remembers it."""

    kinds: list

    def answer(self, handler, body: dict) -> None:
        content = body["messages"][1]["content"]
        self.kinds.append([part["type"] for part in content])
        content.sort(key=lambda part: part["type"] == "text")
        super().answer(handler, body)


def test_question_first_puts_the_text_before_the_image(tmp_path):
    with AnyOrder() as server:
        server.kinds = []
        load(server, tmp_path / "r.json", "--users", "1", "--rows", "1", "--order", IMAGE_FIRST, QUESTION_FIRST, "--no-stream")
    assert server.kinds == [["image_url", "text"]] * 16 + [["text", "image_url"]] * 16
    assert [row["order"] for row in bench_records.rows(tmp_path / "r.json")] == [IMAGE_FIRST, QUESTION_FIRST]
    assert bench_records.rows(tmp_path / "r.json")[0]["tokens_per_second"] > 0


def test_users_spread_over_processes_ask_everything_once(tmp_path):
    with StandIn() as server:
        load(server, tmp_path / "r.json", "--users", "3", "--rows", "2", "--clients", "2")
    assert row_of(tmp_path / "r.json")["answered"] == 16
    assert len({str(body["messages"]) for body in asked(server)}) == len(asked(server)) == 16


def test_same_command_goes_on_after_the_rows_that_are_there(tmp_path):
    with StandIn() as server:
        load(server, tmp_path / "r.json", "--users", "1", "--rows", "1")
        before = len(server.bodies)
        load(server, tmp_path / "r.json", "--users", "1", "2", "--rows", "1")
        assert len(server.bodies) == 2 * before
        with pytest.raises(UserError, match="settings"):
            load(server, tmp_path / "r.json", "--users", "1", "--rows", "1", "--new-tokens", "3")


def test_an_image_s_questions_follow_one_another():
    talks = [[f"{image} {n}"] for image in "abc" for n in range(8)]
    drawn = bench_crowd.mixed(talks, bench_crowd.BY_IMAGE, 1)
    first = [next(drawn)[0] for _ in range(24)]
    assert [first[i : i + 8] for i in (0, 8, 16)] == [[f"{first[i][0]} {n}" for n in range(8)] for i in (0, 8, 16)]
    assert sorted(first) == [talk[0] for talk in talks]


def test_key_comes_from_the_named_variable_only(tmp_path, monkeypatch):
    with StandIn(key="secret") as server:
        with pytest.raises(UserError, match="MY_KEY is not set"):
            load(server, tmp_path / "r.json", "--users", "1", "--rows", "1", "--api-key-env", "MY_KEY")
        monkeypatch.setenv("VLLM_API_KEY", "secret")
        monkeypatch.setenv("MY_KEY", "wrong")
        with pytest.raises(UserError, match="MY_KEY"):
            load(server, tmp_path / "r.json", "--users", "1", "--rows", "1", "--api-key-env", "MY_KEY")
        monkeypatch.setenv("MY_KEY", "secret")
        assert load(server, tmp_path / "r.json", "--users", "1", "--rows", "1", "--api-key-env", "MY_KEY") == 0
    assert "secret" not in (tmp_path / "r.json").read_text()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--users", "0"), "--users; 0"),
        (("--users", "9", "--requests", "8"), "fewer than --users 9"),
        (("--users", "1", "--clients", "2"), "more than --users 1"),
        (("--users", "1", "--ignore-eos"), "not vLLM"),
        (("--users", "1", "--caches", "none"), "not vLLM"),
    ],
)
def test_wrong_arguments_are_one_line(words, told, tmp_path):
    with StandIn() as server, pytest.raises(UserError, match=told):
        load(server, tmp_path / "r.json", *words)
    assert not server.bodies


@pytest.mark.parametrize(("kept", "salts", "images"), [(BOTH, 1, 1), (IMAGE, 3, 1), (NONE, 3, 3)])
def test_caches_hold_what_they_are_allowed_to(kept, salts, images):
    """Requests of one salt share prefixes in vLLM; an image's uuid is its name in both caches."""
    talk = bench_streaming.messages_of(bench_images.noise(1, (32, 24), 0), QUESTION_FIRST)[0]
    client = Fresh("http://127.0.0.1:1/v1", "m", kept=kept, ignore_eos=True)
    made = [client._request(talk, 5) for _ in range(3)]
    assert len({request["extra_body"]["cache_salt"] for request in made}) == salts
    assert len({request["messages"][1]["content"][1]["uuid"] for request in made}) == images
    assert all(request["extra_body"]["ignore_eos"] for request in made)
    assert "uuid" not in str(talk), "what another level asks must not be marked"
    other = Fresh("http://127.0.0.1:1/v1", "m", kept=kept)._request(talk, 5)
    assert other["messages"][1]["content"][1]["uuid"] not in str(made)
    assert other["extra_body"].keys() == {"cache_salt"}


def test_other_servers_are_asked_as_always():
    talk = bench_streaming.messages_of(bench_images.noise(1, (32, 24), 0), IMAGE_FIRST)[0]
    request = Fresh("http://127.0.0.1:1/v1", "m", ignore_eos=True, vllm=False)._request(talk, 5)
    assert request == {"model": "m", "messages": talk, "max_tokens": 5, "temperature": 0.0}


METRICS = """# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 100.0
vllm:prefix_cache_queries_total{engine="1",model_name="m"} 60.0
# TYPE vllm:prefix_cache_hits_total counter
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 70.0
vllm:prefix_cache_hits_total{engine="1",model_name="m"} 50.0
vllm:external_prefix_cache_hits_total{engine="0",model_name="m"} 999.0
"""


def test_hit_rates_are_differences_of_vllms_counters(monkeypatch):
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            body = {"/metrics": METRICS}[self.path].encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

    monkeypatch.setattr(bench_caches, "SETTLING", 0.0)
    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    assert bench_caches.is_vllm(url)
    after = bench_caches.counters(url)
    server.shutdown()
    server.server_close()
    assert after == {"prefix_queries": 160.0, "prefix_hits": 120.0}
    before = {"prefix_queries": 60.0, "prefix_hits": 60.0}
    assert bench_caches.hit_rates(before, after) == {"prefix": 0.6, "image": None}
    assert bench_caches.counters(url) == {} and not bench_caches.is_vllm(url), "it is gone now"


def test_a_client_process_that_cannot_start_is_told_at_once(capfd):
    level = bench_crowd.Level({"base_url": "http://127.0.0.1:9/v1"}, {"seed": 0, "no": 1}, IMAGE_FIRST, "questions", 2, 2, 2, 1)
    started = time.monotonic()
    with pytest.raises(UserError, match="a client process died; see above"):
        bench_crowd._apart(level, lambda one: None)
    assert time.monotonic() - started < bench_crowd.START_SECONDS / 5 and "TypeError" in capfd.readouterr().err
