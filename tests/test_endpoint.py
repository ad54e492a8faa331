"""The endpoint engine against a stand-in server that misbehaves on purpose."""

from __future__ import annotations

import threading
import time

import pytest
from endpoint_asking import Hasty, ask, engine, only, picture
from stand_in import StandIn, complete, cut, send, stream

from sonovqa import chat, endpoint
from sonovqa.cli import UserError
from sonovqa.endpoint import Endpoint
from sonovqa.engines import EngineError, ImageRequest

KEYS = ("VLLM_API_KEY", "OPENAI_API_KEY")


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)


def test_every_reply_reaches_its_question_when_answers_come_back_out_of_order():
    later = threading.Event()

    def slow_first(prompt, attempt):
        if prompt == "one":
            later.wait(60)
        elif prompt == "two" and attempt == 2:  # the fifth to be asked: one of the first four has its answer
            later.set()
        return f"answer to {prompt}"

    with StandIn(slow_first) as server:
        replies = ask(engine(server, in_flight=4), "one", "two", "three", images=6)
    assert len(replies) == 18
    wanted = {"Q1": "answer to one", "Q2": "answer to two", "Q3": "answer to three"}
    assert all(reply.text == wanted[question_id] and reply.error is None for (_, question_id), reply in replies.items())
    asked = [(f"a/{n}.png", f"Q{q}") for n in range(4) for q in (1, 2, 3)]
    assert list(replies)[: len(asked)] != asked


def test_request_is_greedy_and_image_first():
    with StandIn() as server:
        reply = only(ask(engine(server), "is it normal?"))
    body = server.bodies[0]
    assert (body["temperature"], body["max_tokens"], body["model"]) == (0.0, 20, "run")
    assert body["messages"] == chat.openai_messages(picture(), "is it normal?")
    assert (reply.finish_reason, reply.new_tokens) == ("stop", 3)
    assert reply.seconds > 0


def test_in_flight_is_reached_and_never_passed():
    reached = threading.Event()

    def slow(prompt, attempt):
        if server.open == 5 or not reached.wait(60):  # the latter: it never is, and nobody else need wait for it
            reached.set()
        time.sleep(0.01)  # a sixth has time to come
        return "yes"

    with StandIn(slow) as server:
        assert len(ask(engine(server, in_flight=5), "a", "b", images=12)) == 24
    assert server.most_open == 5


def test_images_are_read_as_needed():
    """A data set must not be pulled into memory: images are read no further ahead than the open questions reach."""
    read = []

    def requests():
        for number in range(40):
            read.append(number)
            yield ImageRequest(f"a/{number}", picture(), None, (("Q1", "p"), ("Q2", "q")))

    with StandIn() as server:
        ahead = [len(read) - count // 2 for count, _ in enumerate(engine(server, in_flight=4).answer(requests(), 5), 1)]
    assert max(ahead) <= 4


@pytest.mark.parametrize(
    "fault",
    [429, 500, 503, 408, (400, "Already borrowed"), "", "  \n", cut, lambda handler: complete(handler, "norm", "abort"),
     lambda handler: send(handler, 200, {"choices": []}), lambda handler: send(handler, 200, ["no completion"])],
    ids=["429", "500", "503", "408", "borrowed", "empty", "blank", "cut", "aborted", "no choices", "nonsense"],
)  # fmt: skip
def test_passing_faults_are_tried_again_and_named_if_they_stay(fault):
    with StandIn(lambda prompt, attempt: fault if attempt < 3 or prompt == "never" else "normal") as server:
        replies = ask(engine(server), "later", "never")
    later, never = replies["a/0.png", "Q1"], replies["a/0.png", "Q2"]
    assert (later.text, later.error) == ("normal", None)
    assert never.text == ""
    assert "tried 4 times" in never.error
    assert server.attempts == {"later": 3, "never": 4}


@pytest.mark.parametrize("status", [400, 404, 422])
def test_refused_request_fails_at_once_with_the_servers_words(status):
    with StandIn(lambda prompt, attempt: (status, "prompt is too long")) as server:
        reply = only(ask(engine(server), "p"))
    assert reply.text == ""
    assert str(status) in reply.error
    assert "prompt is too long" in reply.error
    assert server.attempts == {"p": 1}


def test_slow_server_times_out_and_one_failure_spoils_no_other():
    over = threading.Event()

    def stuck(prompt, attempt):
        if prompt == "stuck":
            over.wait(60)
        return "yes"

    with StandIn(stuck) as server:
        replies = ask(Hasty(server.url, "run", {"stuck": 0.2}, retries=1, backoff=0.01), "stuck", "fine")
        over.set()
    assert replies["a/0.png", "Q1"].error == "no answer in time (tried 2 times)"
    assert replies["a/0.png", "Q2"].text == "yes"


def test_server_that_is_down_gives_failures_not_exceptions():
    with StandIn() as server:
        pass
    reply = only(ask(engine(server, retries=1), "p"))
    assert reply.text == ""
    assert reply.error.startswith("connection failed")


def test_retry_after_is_honoured_up_to_a_limit(monkeypatch):
    def busy(told):
        return lambda handler: send(handler, 429, {"error": {"message": "busy"}}, **{"Retry-After": told})

    pauses = []

    async def noted(seconds):
        pauses.append(seconds)

    monkeypatch.setattr(endpoint.asyncio, "sleep", noted)
    with StandIn(lambda prompt, attempt: [busy("7"), busy("9000"), "yes"][attempt - 1]) as server:
        assert only(ask(engine(server), "p")).text == "yes"
    assert pauses == [7.0, endpoint.LONGEST_PAUSE]


def test_back_off_grows_and_is_spread():
    waits = [[Endpoint("http://h")._pause(attempt, TimeoutError()) for _ in range(200)] for attempt in (1, 2, 3)]
    for attempt, told in enumerate(waits):
        assert 0.25 * 2**attempt <= min(told) < max(told) <= 0.5 * 2**attempt
        assert max(told) - min(told) > 0.1 * 2**attempt


def test_unreadable_image_fails_without_a_request():
    with StandIn() as server:
        replies = ask(engine(server), "p", "q", image=b"not an image")
    assert all(reply.error.startswith("image not readable") for reply in replies.values())
    assert len(replies) == 2
    assert server.bodies == []


def test_leaving_early_cancels_what_is_open():
    arrived, release, released = threading.Event(), threading.Event(), []

    def held(prompt, attempt):
        if prompt == "held":
            arrived.set()
            released.append(release.wait(120))
        else:
            arrived.wait(120)
        return "yes"

    with StandIn(held) as server:
        answers = engine(server, timeout=300.0).answer([ImageRequest("a", picture(), None, (("Q1", "quick"), ("Q2", "held")))], 5)
        assert next(answers).question_id == "Q1" and arrived.is_set()
        answers.close()
        assert released == [], "closed before it was answered"
        release.set()


def test_check_settles_on_the_only_model():
    with StandIn(models=("outputs-run",)) as server:
        made = Endpoint(server.url.removesuffix("/v1"))
        made.check()
    assert made.model == "outputs-run"
    assert made.name == f"outputs-run at {server.url}"


@pytest.mark.parametrize(
    ("served", "model", "told"),
    [(("a", "b"), None, "serves several models"), (("a", "b"), "c", "does not serve 'c'"), ((), None, "served: nothing")],
)
def test_check_lists_what_is_served(served, model, told):
    with StandIn(models=served) as server, pytest.raises(UserError) as mistake:
        Endpoint(server.url, model).check()
    assert told in str(mistake.value)
    assert all(name in str(mistake.value) for name in served)
    assert "\n" not in str(mistake.value)


def test_check_says_down_wrong_key_and_no_api(monkeypatch):
    with StandIn(key="secret") as server:
        with pytest.raises(UserError, match="refuses a request without a key"):
            Endpoint(server.url).check()
        monkeypatch.setenv("OPENAI_API_KEY", "wrong")
        with pytest.raises(UserError, match="refuses the key") as mistake:
            Endpoint(server.url).check()
        assert "wrong" not in str(mistake.value)
        monkeypatch.setenv("VLLM_API_KEY", "secret")
        Endpoint(server.url).check()
        with pytest.raises(UserError, match=r"not an OpenAI-compatible API.*HTTP 404"):
            Endpoint(server.url.removesuffix("v1") + "elsewhere").check()
    with pytest.raises(UserError, match="no answer from the endpoint"):
        Endpoint(server.url).check()


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/v1", "", "http://"])
def test_what_is_no_url_is_refused(url):
    with pytest.raises(UserError, match="is no URL"):
        Endpoint(url)


def test_stream_yields_pieces():
    with StandIn(lambda prompt, attempt: "normal fetal brain") as server:
        pieces = list(engine(server).stream(chat.openai_messages(picture(), "p"), 20))
    assert pieces == ["normal ", "fetal ", "brain"]


def test_broken_stream_goes_on_where_it_stopped():
    text = "normal fetal brain"
    with StandIn(lambda prompt, attempt: text if attempt > 1 else lambda handler: stream(handler, text, 2)) as server:
        pieces = list(engine(server).stream(chat.openai_messages(picture(), "p"), 20))
    assert "".join(pieces) == text
    assert server.attempts == {"p": 2}


def test_stream_that_stays_broken_or_changes_is_an_error():
    def broken(handler):
        stream(handler, "normal fetal brain", 2)

    with StandIn(lambda prompt, attempt: broken) as server, pytest.raises(EngineError, match="cut off"):
        list(engine(server, retries=1).stream(chat.openai_messages(picture(), "p"), 20))
    with StandIn(lambda prompt, attempt: "abnormal" if attempt > 1 else broken) as server:
        answer = engine(server).stream(chat.openai_messages(picture(), "p"), 20)
        assert [next(answer), next(answer)] == ["normal ", "fetal "]
        with pytest.raises(EngineError, match="began differently"):
            next(answer)


@pytest.mark.parametrize(("fault", "told"), [((400, "too long"), "too long"), ("", "empty"), (500, "HTTP 500|500")])
def test_stream_faults_are_one_line(fault, told):
    with StandIn(lambda prompt, attempt: fault) as server, pytest.raises(EngineError, match=told) as error:
        list(engine(server, retries=1).stream(chat.openai_messages(picture(), "p"), 20))
    assert "\n" not in str(error.value)
