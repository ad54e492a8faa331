"""The page's server, without a browser: answers and what they are worth, faults of the endpoint, uploads."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time

import httpx2
import page_serving
import pytest
import stand_in
from keys_and_ports import free_port, no_keys  # noqa: F401 - one is a fixture
from page_serving import ANSWERS, SURE, UNSURE, Running, arguments, bomb, png, script
from PIL import ImageFile
from starlette.testclient import TestClient

from sonovqa import chat, endpoint, page, page_answers, page_app, page_guard
from sonovqa.page_uploads import Shelf, read

KEY = "a-key-of-the-page-test"
BYTES = {"Content-Type": "application/octet-stream"}


@contextlib.contextmanager
def client(tmp_path, told=script, *more: str, url: str | None = None, **server):
    """A client of a page in front of a stand-in; loopback by name, as a browser would have it."""
    with stand_in.StandIn(told, **server) as behind:
        made = page.make(arguments(url or behind.url, tmp_path / "marks", *more))
        made.endpoint.backoff = 0.01
        with TestClient(made.application(), base_url="http://127.0.0.1", raise_server_exceptions=False) as browser:
            browser.page, browser.behind = made, behind
            yield browser


def upload(browser, data: bytes | None = None) -> str:
    return browser.post("/api/images", content=png() if data is None else data, headers=BYTES).json()["image"]


def ask(browser, **told) -> list[dict]:
    response = browser.post("/api/answers", json=told)
    assert response.status_code == 200, response.text
    return [json.loads(line) for line in response.text.splitlines()]


def test_eight_answers_stream_in_pieces_each_with_its_probability(tmp_path):
    with client(tmp_path) as browser:
        events = ask(browser, image=upload(browser))
    whole = {event["question"]: event for event in events if "answer" in event}  # the last of each
    assert {question_id: event["answer"] for question_id, event in whole.items()} == ANSWERS
    pieces = [event["piece"] for event in events if event["question"] == "Q2" and "piece" in event]
    assert pieces == ["cephalic, ", "axial"]
    assert whole["Q1"]["confidence"] == pytest.approx(SURE) and whole["Q8"]["confidence"] == pytest.approx(UNSURE)
    assert whole["Q7"]["confidence"] == pytest.approx(SURE / (SURE + 2 * 0.001)) and whole["Q7"]["of"] == "this label"
    assert [name for name, _ in whole["Q7"]["others"]] == ["abnormal", "unclear"]
    assert all(name.endswith(" weeks") for name, _ in whole["Q5"]["others"]) and len(whole["Q5"]["others"]) == 2


def test_prompts_are_those_of_the_one_builder_image_first_and_nothing_can_be_fetched(tmp_path):
    data = png()
    with client(tmp_path, script, "--no-labels") as browser:
        name = upload(browser, data)
        ask(browser, image=name, context="Pixel size: 0.1 mm")
        ask(browser, image=name, turns=["What ? is https://example.org/x.png", "it is", "And ? this"])
        sent = browser.behind.bodies
        assert browser.post("/api/answers", json={"image": "https://example.org/x.png"}).status_code == 410
    wanted = [chat.openai_messages(data, chat.prompt_for(q, ""), "Pixel size: 0.1 mm", "image/png") for q in ANSWERS]
    assert sorted(json.dumps(body["messages"]) for body in sent[:8]) == sorted(map(json.dumps, wanted))
    assert [turn["role"] for turn in sent[8]["messages"]] == ["system", "user", "assistant", "user"]
    urls = [part["image_url"]["url"] for body in sent for part in body["messages"][1]["content"] if part["type"] == "image_url"]
    assert len(urls) == 9 and all(url.startswith("data:image/png;base64,") for url in urls)


@pytest.mark.parametrize(
    ("turns", "words"),
    [(["a", "b"], "A conversation is"), (["a"] * 27, "At most 24 texts go along"), (["x" * 9000], "A question has at most 8000"),
     (["a", "x" * 9000, "b"], "Of what was said before")],
)  # fmt: skip
def test_each_limit_of_a_conversation_has_words_of_its_own(turns, words):
    with pytest.raises(page_guard.Refusal, match=words):
        page_app.checked_turns(turns)


def test_an_image_is_put_into_words_once_however_many_questions_wait(tmp_path, monkeypatch):
    """Eight questions and some 40 wordings of labels: each with a text of its own would hold a large image fifty times."""
    made, data_url = [], chat.data_url
    monkeypatch.setattr(chat, "data_url", lambda *image: made.append(image) or data_url(*image))
    with client(tmp_path) as browser:
        name = upload(browser)
        ask(browser, image=name)
        ask(browser, image=name, turns=["And ? this"])
        held = browser.page.shelf.held[name]
        assert len(browser.behind.bodies) > 20 and len(made) == 1
    assert held.size == len(held.data) + len(held.url.removeprefix("data:image/png;base64,"))


def test_a_server_that_tells_no_probabilities_leaves_the_confidence_open(tmp_path):
    with client(tmp_path, lambda prompt, attempt: "normal") as browser:
        last = ask(browser, image=upload(browser), question="Q7")[-1]
    assert last["answer"] == "normal" and last["confidence"] is None


def test_labels_that_hold_little_of_the_probability_are_not_compared():
    wordings = {"normal": ("normal",), "abnormal": ("abnormal",)}
    rare = [math.log(1e-6), math.log(1e-9)]
    assert page_answers.compared(wordings, rare, "normal", "it looks fine to me", 0.01, {}) == {}
    found = page_answers.compared(wordings, rare, "normal", "it looks fine to me", 0.8, {})
    assert found["confidence"] == pytest.approx(1, abs=1e-6)
    likely = page_answers.compared(wordings, [math.log(0.6), math.log(0.3)], "normal", "normal", 0.6, {})
    assert likely["confidence"] == pytest.approx(2 / 3)


def test_a_label_likelier_than_the_answers_own_is_among_the_others():
    """The answer is the likeliest wording; of another label two wordings together are likelier."""
    wordings = {"20-25": ("20-25 weeks",), "15-20": ("15-20 weeks", "18-20 weeks")}
    found = [math.log(p) for p in (0.4, 0.3, 0.2)]
    told = page_answers.compared(wordings, found, "20-25", "20-25 weeks", 0.4, {"15-20": "15-20 weeks"})
    assert told["confidence"] == pytest.approx(0.4 / 0.9) and told["others"] == [
        ["15-20 weeks", pytest.approx(0.5 / 0.9, abs=1e-4)]
    ]


def test_no_fault_of_the_endpoint_shows_its_key(tmp_path, monkeypatch):
    """A proxy sends the headers back in its errors; a long one is cut in mid key."""
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    echoes = ((503, f"Authorization: Bearer {KEY}"), (400, "x" * 283 + KEY))
    with client(tmp_path, lambda prompt, attempt: echoes[attempt - 1]) as browser:
        events = ask(browser, image=upload(browser), question="Q1")
    with client(tmp_path, models=(f"Bearer {KEY}", "other")) as browser:
        problem = browser.get("/api/status").json()["problem"]
    assert [list(event) for event in events] == [["again"], ["error"]]
    for told in (events[0]["again"], events[1]["error"], problem):
        assert "[key]" in told and KEY[:8] not in told


def test_a_model_that_takes_no_max_tokens_is_asked_in_its_own_terms(tmp_path):
    refusal = {"message": "Use max_completion_tokens", "param": "max_tokens", "code": "unsupported_parameter"}

    def refusing(prompt: str, attempt: int):
        if "max_tokens" in browser.behind.bodies[-1]:
            return lambda handler: stand_in.send(handler, 400, {"error": refusal})
        return page_serving.told("normal", SURE)

    with client(tmp_path, refusing, "--no-labels") as browser:
        events = ask(browser, image=upload(browser), question="Q7")
        first, second = browser.behind.bodies
    assert events[-1]["answer"] == "normal" and not any("again" in event for event in events)
    assert second["max_completion_tokens"] == first["max_tokens"] and second["stream"] and second["logprobs"]


def test_a_reader_who_leaves_in_mid_stream_leaves_nothing_behind(tmp_path, capfd):
    slow = page_serving.told("one two three four five six seven", SURE, pause=0.1)
    with stand_in.StandIn(lambda prompt, attempt: slow) as behind, Running(behind.url, tmp_path, "--no-labels") as running:
        name = httpx2.post(running.url + "api/images", content=png(), headers=BYTES, trust_env=False).json()["image"]
        for more in ({}, {"question": "Q1"}, {"turns": ["Which plane is this?"]}):
            with httpx2.stream("POST", running.url + "api/answers", json={"image": name} | more, trust_env=False) as reply:
                assert next(reply.iter_bytes())
        waited = time.monotonic()
        while running.page.answering.inside and time.monotonic() - waited < 120:
            time.sleep(0.02)
        assert running.page.answering.inside == 0
    assert "Traceback" not in capfd.readouterr().err


def test_events_can_be_closed_and_faults_are_not_swallowed(tmp_path, monkeypatch):
    async def closed(endpoint) -> None:
        events = endpoint.eight(None, None)
        assert (await anext(events))["piece"] == "x"
        await events.aclose()

    async def stalled(endpoint) -> None:
        async def send(message) -> None:
            if message.get("body"):
                raise TimeoutError  # as Guard's, which expects this one back

        scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
        await page_app.EventStream(endpoint.eight(None, None), page_guard.Gate(1))(scope, asyncio.Event().wait, send)

    async def whole(endpoint) -> list:
        return [event async for event in endpoint.eight(None, None)]

    async def standard(image, question_id, context):
        yield {"piece": "x"}
        if question_id == "Q3":
            raise RuntimeError("a fault of the page's own")

    endpoint = page_answers.PageEndpoint("http://127.0.0.1:1/v1")
    monkeypatch.setattr(endpoint, "standard", standard)
    asyncio.run(closed(endpoint))
    with pytest.raises(TimeoutError):
        asyncio.run(stalled(endpoint))
    with pytest.raises(RuntimeError, match="of the page's own"):
        asyncio.run(whole(endpoint))


def test_a_server_that_came_up_a_moment_ago_is_asked(tmp_path):
    """The page was told a moment before that there is none, and keeps that for `FRESH_SECONDS` for those who only look."""
    port = free_port()
    made = page.make(arguments(f"http://127.0.0.1:{port}/v1", tmp_path / "marks"))
    with TestClient(made.application(), base_url="http://127.0.0.1") as browser:
        assert "cannot be used" in asyncio.run(made.endpoint.problem())
        made.endpoint.checking = asyncio.Lock()  # of this test's loop until now
        with stand_in.StandIn(script, port=port):
            assert ask(browser, image=upload(browser), question="Q2")[-1]["answer"] == ANSWERS["Q2"]


def test_an_answer_cut_at_its_limit_says_so(tmp_path):
    def cut(handler):
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.end_headers()
        page_serving.said(handler, "normal and", -0.1, "length")
        handler.close_connection = True

    with client(tmp_path, lambda prompt, attempt: cut) as browser:
        assert ask(browser, image=upload(browser), question="Q1")[-1]["cut"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"), (b"%PDF-1.7 no image", "not an image that can be read"), (png()[:-800], "truncated"),
        (bomb(), "larger than 64 megapixels"), (png(8, 8), "smaller than 16 pixels"),
    ],
    ids=["empty", "no image", "truncated", "bomb", "tiny"],
)  # fmt: skip
def test_what_is_no_usable_image_is_refused_in_words(tmp_path, monkeypatch, data, words):
    decoded, load = [], ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: decoded.append(image.size) or load(image))
    with client(tmp_path) as browser:
        response = browser.post("/api/images", content=data, headers=BYTES)
    assert response.status_code == 422 and words in response.json()["error"]
    assert max((width * height for width, height in decoded), default=0) < 10_000  # the bomb is refused by its header


def test_an_image_that_no_request_could_hold_is_refused_at_once(tmp_path, monkeypatch):
    """Not by the model's server, forty times over, after it was sent whole each time."""
    monkeypatch.setattr(endpoint, "LARGEST_URL", 4000)
    with client(tmp_path) as browser:
        response = browser.post("/api/images", content=png(), headers=BYTES)
        assert response.status_code == 422 and not browser.page.shelf.held
    assert "too large for the model's server" in response.json()["error"]


def test_uploads_are_counted_before_and_while_they_come(tmp_path, monkeypatch):
    monkeypatch.setattr(page_guard, "PARTING_SECONDS", 0.1)
    pulled = []

    def endless():
        for _ in range(1000):
            pulled.append(1)
            yield bytes(100_000)

    with client(tmp_path, script, "--largest-file", "0.5") as browser:
        told = browser.post("/api/images", content=bytes(600_000), headers=BYTES)
        streamed = browser.post("/api/images", content=endless(), headers=BYTES)  # chunked: no Content-Length
        other = browser.post("/api/images", content=png(), headers={"Content-Type": "multipart/form-data"})
        assert not browser.page.shelf.held
    assert told.status_code == streamed.status_code == 413 and "at most 0.5 MB" in told.json()["error"]
    assert other.status_code == 415


def test_images_held_are_bounded_and_one_no_longer_held_is_asked_for_again(tmp_path):
    async def fill() -> Shelf:
        shelf = Shelf(2 * read(png(64, 48, 1)).size + 100)
        names = [(await shelf.add(png(64, 48, seed)))[0] for seed in range(5)]
        assert list(shelf.held) == names[-len(shelf.held) :] and len(shelf.held) == 2
        return shelf

    shelf = asyncio.run(fill())
    with pytest.raises(page_guard.Refusal, match="no longer holds") as refusal:
        shelf.get("never given")
    assert refusal.value.status == 410


def test_what_the_model_sees_is_what_the_page_shows(tmp_path):
    import io

    from PIL import Image

    stream = io.BytesIO()
    Image.new("L", (40, 30), 90).save(stream, "TIFF")
    with client(tmp_path) as browser:
        shown = browser.get(f"/api/images/{upload(browser, stream.getvalue())}")
    assert shown.headers["content-type"] == "image/png" and shown.content == read(stream.getvalue()).seen
