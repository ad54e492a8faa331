"""A stand-in for an OpenAI-compatible server, which misbehaves as it is told."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """With room for as many connections at once as a web server's: socketserver's own is 5."""

    request_queue_size = 2048


class StandIn:
    """An OpenAI-compatible server in a thread. ``script(prompt, attempt)`` says what becomes of each request:

    a string is the answer, a number an HTTP status, a tuple a status with its message, and a callable does as it likes
    with the handler.
    """

    def __init__(self, script=lambda prompt, attempt: f"answer to {prompt}", models=("run",), key=None, port=0):
        self.script, self.models, self.key = script, models, key
        self.attempts: dict[str, int] = {}
        self.bodies: list[dict] = []
        self.open = self.most_open = 0
        self.lock = threading.Lock()
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                if stand_in.refuses(self):
                    return
                if self.path != "/v1/models":
                    send(self, 404, {"detail": "Not Found"})
                    return
                send(self, 200, {"object": "list", "data": [{"id": m, "object": "model"} for m in stand_in.models]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if not stand_in.refuses(self):
                    stand_in.answer(self, body)

        self.server = Server(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *fault):
        self.server.shutdown()
        self.server.server_close()

    def refuses(self, handler) -> bool:
        wrong = self.key is not None and handler.headers.get("Authorization") != f"Bearer {self.key}"
        if wrong:
            send(handler, 401, {"error": "Unauthorized"})
        return wrong

    def answer(self, handler, body: dict) -> None:
        prompt = body["messages"][-1]["content"]
        prompt = prompt if isinstance(prompt, str) else prompt[-1]["text"]
        with self.lock:
            self.bodies.append(body)
            self.attempts[prompt] = attempt = self.attempts.get(prompt, 0) + 1
            self.open += 1
            self.most_open = max(self.most_open, self.open)
        try:
            told = self.script(prompt, attempt)
            if callable(told):
                told(handler)
            elif isinstance(told, str):
                (stream if body.get("stream") else complete)(handler, told)
            else:
                status, message = told if isinstance(told, tuple) else (told, "no")
                send(handler, status, {"error": {"message": message, "code": status}})
        finally:
            with self.lock:
                self.open -= 1


def send(handler, status: int, value, **headers) -> None:
    data = json.dumps(value).encode()
    handler.send_response(status)
    for name, told in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
        handler.send_header(name, told)
    handler.end_headers()
    handler.wfile.write(data)


def complete(handler, text: str, reason: str = "stop") -> None:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
    usage = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
    head = {"id": "x", "object": "chat.completion", "created": 0, "model": "run"}
    send(handler, 200, head | {"choices": [choice], "usage": usage})


def stream(handler, text: str, cut_after: int | None = None) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", "text/event-stream")
    handler.send_header("Connection", "close")
    handler.end_headers()
    words = text.split(" ")
    pieces = [word + " " * (i < len(words) - 1) for i, word in enumerate(words)][:cut_after]
    for piece in pieces:
        event(handler, {"delta": {"content": piece}, "finish_reason": None})
    if cut_after is None:
        event(handler, {"delta": {}, "finish_reason": "stop"})
        handler.wfile.write(b"data: [DONE]\n\n")
    handler.close_connection = True


def event(handler, choice: dict) -> None:
    chunk = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "run", "choices": [{"index": 0, **choice}]}
    handler.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
    handler.wfile.flush()


def cut(handler) -> None:
    """Promise more bytes than are sent, then hang up."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"id": "x", "choices": [{"message": {"content": "norm')
    handler.close_connection = True
