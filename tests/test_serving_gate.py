"""The gate before vLLM, by itself behind uvicorn as vLLM runs it: who is let in, and that a refusal arrives whole."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time

import pytest
from attacks import post, sent_in_chunks

from sonovqa import serving_gate, serving_origins
from sonovqa.serving_gate import LARGEST_BODY, Gate

uvicorn = pytest.importorskip("uvicorn")


async def answers(scope, receive, send) -> None:
    """What is behind the gate: it reads all and says 200."""
    while scope["type"] == "http" and (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


class Served:
    """The gate on a port of its own, with uvicorn's protocol ``http``."""

    def __init__(self, http: str = "auto", app=answers):
        self.server = uvicorn.Server(uvicorn.Config(Gate(app), http=http, log_level="critical", lifespan="off"))
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)

    def __enter__(self) -> Served:
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *fault) -> None:
        self.server.should_exit = True
        self.thread.join(timeout=120)
        self.socket.close()

    def said(self, path: str, method: str = "GET", **headers: str) -> tuple[int, str]:
        """Status and body of a request without one; ``_`` stands for the ``-`` of a header's name."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, response.read().decode()


@pytest.fixture(params=["httptools", "h11"])
def served(request, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "a-key")
    pytest.importorskip(request.param)
    with Served(request.param) as made:
        yield made


def test_a_body_too_large_or_of_unknown_length_is_answered_before_the_connection_ends(served):
    chat = f"{served.url}/v1/chat/completions"
    assert post(chat, {"x": " " * LARGEST_BODY}, None) == 413
    assert sent_in_chunks(chat, "a-key") == 411
    assert post(f"{served.url}/invocations", {"x": " " * (1 << 22)}, None) == 404
    assert post(chat, {"x": " " * (1 << 22)}, None) == 200


def test_a_client_that_waits_for_leave_to_send_is_refused_without_it(served):
    head = f"POST /v1/x HTTP/1.1\r\nHost: x\r\nContent-Length: {LARGEST_BODY + 1}\r\nExpect: 100-continue\r\n\r\n"
    with socket.create_connection(("127.0.0.1", served.port), timeout=120) as client:
        client.sendall(head.encode())
        assert client.recv(4096).startswith(b"HTTP/1.1 413")


def test_a_client_that_never_ends_is_left(served, monkeypatch):
    monkeypatch.setattr(serving_gate, "PARTING_SECONDS", 0.3)
    head = f"POST /v1/x HTTP/1.1\r\nHost: x\r\nContent-Length: {LARGEST_BODY + 1}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", served.port), timeout=120) as client:
        client.sendall(head.encode())
        told = b""
        while piece := client.recv(4096):  # until the server closes
            told += piece
    answer = json.loads(told.partition(b"\r\n\r\n")[2])
    assert answer["error"]["code"] == 413 and "send a smaller image" in answer["error"]["message"]


def test_without_a_key_only_this_machines_own_names_are_served(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with Served() as served:
        for name in ("localhost", "LOCALHOST:8000", "127.0.0.1", "127.1.2.3:80", "[::1]", "[::1]:8000"):
            assert served.said("/v1/models", Host=name) == (200, "ok"), name
        for name in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "192.168.1.4", ""):
            status, told = served.said("/v1/models", Host=name)
            assert status == 403 and "\n" not in told and json.loads(told)["error"]["code"] == 403, name
            assert served.said("/health", Host=name)[0] == served.said("/metrics", Host=name)[0] == 200


def test_with_a_key_any_name_will_do(served):
    assert served.said("/v1/models", Host="gpu-box.example") == (200, "ok")
    assert served.said("/tokenize", Host="gpu-box.example")[0] == 404


def test_a_path_is_looked_at_without_the_prefix_that_the_application_takes_off():
    """vLLM under ``--root-path /v1`` answers ``/v1/invocations`` to anybody: below its prefix that is no path of the API."""

    def status(path: str) -> int | None:
        told = serving_gate.refused({"path": path, "root_path": "/v1", "headers": []})
        return told and told[0]

    assert status("/v1/invocations") == 404 and status("/v1/v1/models") is None


CANCEL = "/v1/responses/x/cancel"  # of vLLM: takes a POST without a body, which a browser sends without asking first


def test_without_a_key_no_web_page_elsewhere_is_let_in(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.delenv(serving_gate.ORIGINS_NAME, raising=False)
    with Served() as served:
        own = f"http://127.0.0.1:{served.port}"
        for origin in ("https://evil.example", "null", "", f"http://localhost:{served.port}", own + "0", f"{own} {own}"):
            status, told = served.said(CANCEL, "POST", Origin=origin)
            assert status == 403 and "--allow-origin" in json.loads(told)["error"]["message"], origin
            assert served.said("/v1/chat/completions", "OPTIONS", Origin=origin)[0] == 403
        for site in ("cross-site", "same-site"):  # a plain GET, as of an image on the page
            assert served.said("/v1/models", Sec_Fetch_Site=site)[0] == 403
        assert served.said(CANCEL, "POST", Origin=own) == served.said(CANCEL, "POST") == (200, "ok")
        assert served.said("/v1/models", Sec_Fetch_Site="none") == (200, "ok")  # its address typed
        assert served.said("/health", Origin="https://evil.example")[0] == 200


def test_a_web_page_that_was_allowed_may_ask(monkeypatch):
    """Through the gate and vLLM's middleware for CORS, both with what serve.sh gives them."""
    cors = pytest.importorskip("starlette.middleware.cors").CORSMiddleware
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    origins = serving_origins.checked(["https://App.example:443/"])
    assert origins == ["https://app.example"]
    for name, value in serving_origins.environment(origins).items():
        monkeypatch.setenv(name, value)
    allowed = json.loads(serving_origins.flags(origins)[1])
    app = cors(answers, allow_origins=allowed, allow_methods=["*"], allow_headers=["*"])
    with Served(app=app) as served:
        before = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "content-type"}
        for origin, status in (("https://app.example", 200), ("https://evil.example", 403), ("http://app.example", 403)):
            assert served.said("/v1/chat/completions", "OPTIONS", Origin=origin, **before)[0] == status
            assert served.said(CANCEL, "POST", Origin=origin, Sec_Fetch_Site="cross-site")[0] == status


def test_a_web_page_that_may_ask_can_read_why_it_was_refused(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "a-key")
    monkeypatch.setenv(serving_gate.ORIGINS_NAME, "https://app.example")
    with Served() as served:
        for origin, leave in (("https://app.example", "https://app.example"), ("https://evil.example", None)):
            connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=120)
            connection.request("GET", "/tokenize", headers={"Origin": origin})
            response = connection.getresponse()
            assert (response.status, response.headers["Access-Control-Allow-Origin"]) == (404, leave)
            assert "no such path" in response.read().decode() and (response.headers["Vary"] == "Origin") == bool(leave)
