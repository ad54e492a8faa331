"""The page's server, without a browser: answers and what they are worth, uploads, who is let in, what is refused."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import socket
import time

import page_serving
import pytest
import stand_in
from keys_and_ports import no_keys  # noqa: F401 - a fixture
from page_serving import ANSWERS, SURE, UNSURE, Running, arguments, bomb, png, script
from starlette.testclient import TestClient

from sonovqa import chat, page, page_answers, page_app, page_guard
from sonovqa.cli import UserError
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
    assert whole["Q7"]["labels"][0][0] == "normal" and len(whole["Q7"]["labels"]) == 3


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


def test_a_server_that_tells_no_probabilities_leaves_the_confidence_open(tmp_path):
    with client(tmp_path, lambda prompt, attempt: "normal") as browser:
        last = ask(browser, image=upload(browser), question="Q7")[-1]
    assert last["answer"] == "normal" and last["confidence"] is None


def test_labels_that_hold_little_of_the_probability_are_not_compared():
    wordings = {"normal": ("normal",), "abnormal": ("abnormal",)}
    rare = [math.log(1e-6), math.log(1e-9)]
    assert page_answers.compared(wordings, rare, "normal", "it looks fine to me", 0.01) == {}
    found = page_answers.compared(wordings, rare, "normal", "it looks fine to me", 0.8)
    assert found["confidence"] == pytest.approx(1, abs=1e-6)
    likely = page_answers.compared(wordings, [math.log(0.6), math.log(0.3)], "normal", "normal", 0.6)
    assert likely["confidence"] == pytest.approx(2 / 3)


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
def test_what_is_no_usable_image_is_refused_in_words(tmp_path, data, words):
    started = time.monotonic()
    with client(tmp_path) as browser:
        response = browser.post("/api/images", content=data, headers=BYTES)
    assert response.status_code == 422 and words in response.json()["error"]
    assert time.monotonic() - started < 5  # the bomb is refused by its header


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
        shelf = Shelf(2 * len(png(64, 48, 1)) + 100)
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


@pytest.mark.parametrize("path", ["/", "/files/page.js", "/api/status", "/nothing", "/files/index.html", "/files/..%2fpage.py"])
def test_every_response_holds_the_browser_to_the_page(tmp_path, path):
    with client(tmp_path) as browser:
        response = browser.get(path)
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self';" in policy and "unsafe" not in policy
    assert response.headers["x-content-type-options"] == "nosniff" and response.headers["cache-control"] == "no-store"
    assert response.status_code == (200 if path in ("/", "/files/page.js", "/api/status") else 404)


def test_files_of_the_page_fetch_nothing_from_elsewhere():
    for path in page_app.FILES.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text and "https:" not in text and "//cdn" not in text, path
        assert " style=" not in text and " onclick=" not in text, path  # the policy would refuse them


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}, {"Origin": "null"}],
)
def test_requests_of_other_sites_are_refused(tmp_path, headers):
    with client(tmp_path) as browser:
        name = upload(browser)
        response = browser.post("/api/marks", json={"image": name, "marks": {}}, headers=headers)
        form = browser.post("/api/marks", data={"image": name})  # what a form of another site can send
        renamed = browser.get("/api/status", headers={"Host": "evil.example"})  # DNS rebinding
    assert response.status_code == 403 and "another site" in response.json()["error"]
    assert form.status_code == 415 and renamed.status_code == 400


@pytest.mark.parametrize(
    "told",
    [
        [], {"image": 5}, {"turns": []}, {"turns": ["a", "b"]}, {"turns": ["x" * 9000]}, {"turns": [""]}, {"question": "Q9"},
        {"context": "x" * 300}, {"context": ["x"]},
    ],
)  # fmt: skip
def test_requests_of_another_form_are_refused(tmp_path, told):
    with client(tmp_path) as browser:
        told = {"image": upload(browser)} | told if isinstance(told, dict) else told
        assert browser.post("/api/answers", json=told).status_code in (400, 410)
        nested = browser.post("/api/answers", content=b"[" * 100_000, headers={"Content-Type": "application/json"})
        assert nested.status_code == 400 and not browser.behind.bodies


def test_beyond_loopback_a_key_is_demanded_and_a_weak_one_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="without a key"):
        arguments("http://127.0.0.1:1/v1", tmp_path, "--host", "0.0.0.0")
    monkeypatch.setenv(page.KEY_NAME, "short")
    with pytest.raises(UserError, match="16 or more"):
        arguments("http://127.0.0.1:1/v1", tmp_path, "--host", "0.0.0.0")
    monkeypatch.setenv(page.KEY_NAME, KEY)
    args = arguments("http://127.0.0.1:1/v1", tmp_path, "--host", "0.0.0.0")
    assert KEY not in page.greeting(args) + repr(args) and "unencrypted" in page.greeting(args)


def test_with_a_key_nothing_is_told_before_it_is_given(tmp_path, monkeypatch, caplog, capfd):
    monkeypatch.setattr(page_app, "WRONG_KEY_PAUSE", 0.0)
    monkeypatch.setenv(page.KEY_NAME, KEY)
    caplog.set_level(logging.DEBUG)
    with client(tmp_path) as browser:
        for method, path in (("GET", "/api/status"), ("POST", "/api/images"), ("POST", "/api/answers"), ("POST", "/api/marks")):
            assert browser.request(method, path).status_code == 401
        assert "asks for a key" in browser.get("/").text
        wrong = browser.post("/api/key", json={"key": "wrong"})
        assert wrong.status_code == 403 and "not the page's key" in wrong.json()["error"]
        right = browser.post("/api/key", json={"key": KEY})
        assert {"HttpOnly", "SameSite=strict"} <= set(right.headers["set-cookie"].split("; "))
        assert browser.get("/api/status").status_code == 200 and "Eight answers" in browser.get("/").text
    written = capfd.readouterr()
    assert KEY not in caplog.text + written.out + written.err + right.headers["set-cookie"] + right.text


def test_sessions_end_and_cannot_be_made_up():
    sessions = page_guard.Sessions(KEY)
    cookie = sessions.cookie_for(KEY)
    made, _, signature = cookie.partition(".")
    assert sessions.signed_in(cookie) and sessions.cookie_for("x") is None and sessions.cookie_for("ключ") is None
    assert not sessions.signed_in(cookie, int(made) + page_guard.SESSION_SECONDS + 1)
    others = page_guard.Sessions("another").cookie_for("another")
    assert not any(map(sessions.signed_in, (f"{int(made) + 5}.{signature}", f"{made}.", "", None, "x.y", others)))


def test_a_thousand_at_once_are_answered_or_told_to_wait_and_the_page_stays_up(tmp_path):
    import httpx2

    slow = page_serving.told("normal", SURE, pause=0.02)
    with (
        stand_in.StandIn(lambda prompt, attempt: slow) as behind,
        Running(behind.url, tmp_path, "--no-labels", "--at-once", "8", "--in-flight", "4") as running,
    ):
        page.allow_many_connections()
        with httpx2.Client(base_url=running.url, trust_env=False) as one:
            name = one.post("api/images", content=png(), headers=BYTES).json()["image"]

        async def crowd() -> list:
            limits = httpx2.Limits(max_connections=None)
            async with httpx2.AsyncClient(base_url=running.url, limits=limits, timeout=60, trust_env=False) as many:
                asked = (many.post("api/answers", json={"image": name, "question": "Q7"}) for _ in range(1000))
                return await asyncio.gather(*asked)

        replies = asyncio.run(crowd())
        answered = [reply for reply in replies if reply.status_code == 200]
        turned_away = [reply for reply in replies if reply.status_code == 503]
        assert len(answered) + len(turned_away) == 1000 and len(answered) >= 8 and turned_away
        assert all('"answer": "normal"' in reply.text for reply in answered)
        assert all("page is busy" in reply.json()["error"] and reply.headers["retry-after"] for reply in turned_away)
        assert behind.most_open <= 4 and running.page.answering.inside == 0
        with httpx2.Client(base_url=running.url, trust_env=False) as one:
            assert one.get("api/status").json()["problem"] is None


def test_a_large_upload_hears_why_it_was_refused_while_it_still_sends(tmp_path):
    import httpx2

    def endless():
        for _ in range(300):
            yield bytes(100_000)

    with stand_in.StandIn(script) as behind, Running(behind.url, tmp_path, "--largest-file", "1") as running:
        for content in (endless(), bytes(30_000_000)):
            told = httpx2.post(running.url + "api/images", content=content, headers=BYTES, trust_env=False, timeout=30)
            assert told.status_code == 413 and "at most 1 MB" in told.json()["error"]


def request(where: str, kind: str, body: bytes) -> bytes:
    head = f"POST /api/{where} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def test_slow_clients_are_given_up(tmp_path, monkeypatch):
    """One that sends no request, one that stops in mid-upload, one that does not read its answers."""
    monkeypatch.setattr(page_guard, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(page_guard, "PIECE_SECONDS", 0.3)
    monkeypatch.setattr(page_guard, "PARTING_SECONDS", 0.3)
    long = page_serving.told(("word" * 4000 + " ") * 1000, 0.5)  # 16 MB: more than the sockets between can hold
    with stand_in.StandIn(lambda prompt, attempt: long) as behind, Running(behind.url, tmp_path) as running:
        silent, stalled = (socket.create_connection(("127.0.0.1", running.port), timeout=20) for _ in range(2))
        stalled.sendall(request("images", "application/octet-stream", bytes(9000))[:-8000])
        assert silent.recv(100) == b""
        told = stalled.recv(10_000)
        assert b"408" in told.splitlines()[0] and b"took too long" in told + stalled.recv(10_000)
        import httpx2

        name = httpx2.post(running.url + "api/images", content=png(), headers=BYTES, trust_env=False).json()["image"]
        deaf = socket.create_connection(("127.0.0.1", running.port), timeout=20)
        deaf.sendall(request("answers", "application/json", json.dumps({"image": name, "question": "Q1"}).encode()))
        waited = time.monotonic()
        while not (running.page.answering.inside == 0 and behind.bodies) and time.monotonic() - waited < 20:
            time.sleep(0.05)
        assert behind.bodies and running.page.answering.inside == 0  # its place is free again, though it still holds the line
        assert b'"answer"' not in b"".join(iter(lambda: deaf.recv(1 << 20), b""))  # it was cut off, not served in the end
        for one in (silent, stalled, deaf):
            one.close()
