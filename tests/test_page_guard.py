"""Who may ask the page, how much, how slowly and how many at once: keys, other sites, crowds, clients that stall."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time

import page_serving
import pytest
import stand_in
from keys_and_ports import no_keys  # noqa: F401 - a fixture
from page_serving import SURE, Running, arguments, png, script
from test_page_app import BYTES, KEY, client, upload

from sonovqa import page, page_app, page_guard
from sonovqa.cli import UserError


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


def test_wrong_keys_take_no_place_from_those_who_have_the_key(tmp_path, monkeypatch):
    monkeypatch.setattr(page_app, "WRONG_KEY_PAUSE", 0.0)
    monkeypatch.setattr(page_guard, "PARTING_SECONDS", 0.1)
    monkeypatch.setenv(page.KEY_NAME, KEY)
    json_kind = {"Content-Type": "application/json"}
    with client(tmp_path) as browser:
        gates = browser.page
        for content, status in ((b'{"key": "\\ud800"}', 403), (b'{"key": ["x"]}', 403), (b'"' + bytes(5000), 413)):
            assert browser.post("/api/key", content=content, headers=json_kind).status_code == status
        gates.uploading.inside = gates.answering.inside = gates.knocking.most  # the page is busy: the key is taken all the same
        assert browser.post("/api/key", json={"key": KEY}).status_code == 200
        gates.uploading.inside, gates.knocking.inside = 0, gates.knocking.most  # a rush of wrong keys
        assert browser.post("/api/key", content=b'"' + bytes(5000), headers=json_kind).status_code == 503  # before it is read
        assert upload(browser)


def test_a_session_is_for_https_only_behind_a_proxy_that_speaks_it(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="without a key"):
        arguments("http://127.0.0.1:1/v1", tmp_path, "--behind-tls")
    monkeypatch.setenv(page.KEY_NAME, KEY)
    cookies = []
    for more in ((), ("--behind-tls",)):
        with client(tmp_path, script, *more) as browser:
            cookies.append(browser.post("/api/key", json={"key": KEY}).headers["set-cookie"].split("; "))
    assert "Secure" not in cookies[0] and "Secure" in cookies[1]
    args = arguments("http://127.0.0.1:1/v1", tmp_path, "--host", "0.0.0.0", "--behind-tls")
    assert "unencrypted" not in page.greeting(args)


@pytest.mark.parametrize(("host", "name"), [("127.0.0.2", "127.0.0.2:8080"), ("::1", "[::1]:8080"), ("127.0.0.1", "localhost:1")])
def test_any_loopback_address_reaches_the_page(tmp_path, host, name):
    with client(tmp_path, script, "--host", host) as browser:
        assert browser.get("/", headers={"Host": name}).status_code == 200
        assert browser.get("/", headers={"Host": "evil.example"}).status_code == 400


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

    full = threading.Event()  # nobody is answered before somebody was turned away, however slowly they come

    def held(handler) -> None:
        assert full.wait(120)
        page_serving.told("normal", SURE)(handler)

    with (
        stand_in.StandIn(lambda prompt, attempt: held) as behind,
        Running(behind.url, tmp_path, "--no-labels", "--at-once", "8", "--in-flight", "4") as running,
    ):
        page.allow_many_connections()
        with httpx2.Client(base_url=running.url, trust_env=False) as one:
            name = one.post("api/images", content=png(), headers=BYTES).json()["image"]

        async def crowd() -> list:
            limits = httpx2.Limits(max_connections=None)

            async def one(many):
                reply = await many.post("api/answers", json={"image": name, "question": "Q7"})
                if reply.status_code == 503:
                    full.set()
                return reply

            async with httpx2.AsyncClient(base_url=running.url, limits=limits, timeout=600, trust_env=False) as many:
                return await asyncio.gather(*(one(many) for _ in range(1000)))

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
            told = httpx2.post(running.url + "api/images", content=content, headers=BYTES, trust_env=False, timeout=120)
            assert told.status_code == 413 and "at most 1 MB" in told.json()["error"]


def request(where: str, kind: str, body: bytes) -> bytes:
    head = f"POST /api/{where} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def line_to(running) -> socket.socket:
    """A connection; its limit only guards against hanging."""
    return socket.create_connection(("127.0.0.1", running.port), timeout=120)


@pytest.mark.parametrize("rest", [b"", b"G", b"POST /api/images HTTP/1.1\r\nHost: 127.0.0.1\r\n"])
def test_a_later_request_must_come_in_time_too(tmp_path, monkeypatch, rest):
    """The limit is generous until the connection is to be closed: no stall of the machine closes it before."""
    monkeypatch.setattr(page_guard, "HEAD_SECONDS", 600)
    with Running("http://127.0.0.1:1/v1", tmp_path) as running, line_to(running) as one:

        def served() -> bool:
            one.sendall(b"GET /files/icon.svg HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            return one.recv(100_000).startswith(b"HTTP/1.1 200")

        assert served()
        (line,) = running.server.server_state.connections
        line.loop.call_soon_threadsafe(line._close_if_silent, None)  # as the timer of the first request would, too late
        monkeypatch.setattr(page_guard, "HEAD_SECONDS", 0.1)
        assert served()
        one.sendall(rest)
        assert one.recv(100) == b""


def test_one_that_sends_no_request_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(page_guard, "HEAD_SECONDS", 0.1)
    with Running("http://127.0.0.1:1/v1", tmp_path) as running, line_to(running) as silent:
        assert silent.recv(100) == b""


def test_one_that_stops_in_mid_upload_is_given_up_and_told(tmp_path, monkeypatch):
    monkeypatch.setattr(page_guard, "PIECE_SECONDS", 0.1)
    with Running("http://127.0.0.1:1/v1", tmp_path) as running, line_to(running) as stalled:
        stalled.sendall(request("images", "application/octet-stream", bytes(9000))[:-8000])
        told = b""
        while b"took too long" not in told and (piece := stalled.recv(10_000)):
            told += piece
        assert b"408" in told.splitlines()[0] and b"took too long" in told


def test_one_that_does_not_read_its_answers_is_given_up(tmp_path, monkeypatch):
    import httpx2

    long = page_serving.told(("word" * 4000 + " ") * 1000, 0.5)  # 16 MB: more than the sockets between can hold
    with stand_in.StandIn(lambda prompt, attempt: long) as behind, Running(behind.url, tmp_path) as running:
        sent = httpx2.post(running.url + "api/images", content=png(), headers=BYTES, trust_env=False, timeout=120)
        monkeypatch.setattr(page_guard, "PIECE_SECONDS", 0.2)  # from here on nothing that is to go well waits for a piece
        with line_to(running) as deaf:
            told = json.dumps({"image": sent.json()["image"], "question": "Q1"}).encode()
            deaf.sendall(request("answers", "application/json", told))
            waited = time.monotonic()
            while not (running.page.answering.inside == 0 and behind.bodies) and time.monotonic() - waited < 120:
                time.sleep(0.02)
            assert behind.bodies and running.page.answering.inside == 0  # its place is free again
            while running.server.server_state.connections and time.monotonic() - waited < 120:
                time.sleep(0.02)
            assert not running.server.server_state.connections  # and so is the line, though what was written is still unread
            assert b'"answer"' not in b"".join(iter(lambda: deaf.recv(1 << 20), b""))  # it was cut off, not served in the end


def test_the_command_it_shows_for_marks_keeps_a_patient_in_one_split():
    args = page.parse(["--endpoint", "http://127.0.0.1:8000/v1"])
    told = "--images outputs/marks/images --out data/marks --group-column Patient"  # not into data/sheet, which may be another's
    assert told in page.greeting(args) and told in page.__doc__
