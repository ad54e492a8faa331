"""What somebody who means ill would try on a running vLLM server; imported by the client of test_serve_vllm.py."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import socket
import threading
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import psutil
from PIL import Image

from sonovqa.serving_gate import LARGEST_BODY

#: Paths of vLLM that must tell nobody anything without the key.
GUARDED = ("/invocations", "/v1/chat/completions", "/tokenize", "/version", "/openapi.json", "/v1/models", "/load")


class Listener:
    """A socket on loopback that notes what anybody sends to it: whoever connects was made to fetch."""

    def __enter__(self) -> Listener:
        self.heard: list[str] = []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.socket.accept()
                connection.settimeout(1)
                with contextlib.suppress(OSError):
                    self.heard.append(connection.recv(200).decode(errors="replace").partition("\r\n")[0])
                connection.close()

    def __exit__(self, *fault) -> None:
        self.socket.close()


def post(url: str, body: dict, key: str | None) -> int:
    """The status that a POST is answered with."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=600) as response:
            return response.status
    except urllib.error.HTTPError as fault:
        return fault.code


def status_of(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=300) as response:
            return response.status
    except urllib.error.HTTPError as fault:
        return fault.code


def sent_in_chunks(url: str, key: str) -> int:
    """The status for a body of more than is allowed that does not say how long it is."""
    told = urlsplit(url)
    connection = http.client.HTTPConnection(told.hostname, told.port, timeout=300)
    pieces = (b" " * (1 << 20) for _ in range((LARGEST_BODY >> 20) + 8))
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    connection.request("POST", told.path, pieces, headers, encode_chunked=True)
    return connection.getresponse().status


def data_url(data: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def bomb(side: int = 12_000) -> bytes:
    """144 megapixels of one colour in a few kilobytes."""
    stream = io.BytesIO()
    Image.new("1", (side, side)).save(stream, "PNG")
    return stream.getvalue()


def bad_parts(port: int) -> dict[str, dict]:
    """Parts of a message, by name, none of which may be answered."""
    here = f"127.0.0.1:{port}/x.png"
    urls = {
        "plain": f"http://{here}", "upper case": f"HTTP://{here}", "name": f"http://localhost:{port}/x.png",
        "user": f"http://none.invalid@{here}", "backslash": f"http://127.0.0.1:{port}\\@none.invalid/x.png",
        "backslash first": f"http://none.invalid\\@{here}", "fragment": f"http://127.0.0.1:{port}#@none.invalid/x.png",
        "number": f"http://2130706433:{port}/x.png", "file": "file:///etc/hostname", "file of a host": "file://localhost/etc/hostname",
        "bare path": "/etc/hostname", "no image": data_url(b"no image at all"), "bomb": data_url(bomb()),
    }  # fmt: skip
    parts = {name: {"type": "image_url", "image_url": {"url": url}} for name, url in urls.items()}
    parts |= {kind: {"type": kind, kind: {"url": f"http://{here}"}} for kind in ("video_url", "audio_url")}
    return parts | {"tensor": {"type": "image_embeds", "image_embeds": base64.b64encode(b"\x80\x04.").decode()}}


def processes(port: int) -> set[psutil.Process]:
    """The server on ``port`` and all processes that it started."""
    words = ("sonovqa.vllm_server", str(port))
    servers = [one for one in psutil.process_iter(["cmdline"]) if all(word in (one.info["cmdline"] or ()) for word in words)]
    return {one for server in servers for one in (server, *server.children(recursive=True))}


def listening(port: int) -> list[str]:
    """Addresses on which they listen."""
    sockets = [one for process in processes(port) for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    return sorted({one.laddr.ip for one in sockets})


def interfaces(port: int) -> list[tuple[str, ...]]:
    """What their environment says of the interface to talk on among themselves. Where the machine's name means 127.0.0.1, as it
    often does, `listening` would look well without it. A process that gave itself a title, as vLLM's workers do, has written it
    over the environment it started with, so that nobody else can read that.
    """
    names, found = ("GLOO_SOCKET_IFNAME", "VLLM_HOST_IP"), [one.environ() for one in processes(port)]
    return sorted({tuple(env.get(name, "") for name in names) for env in found if "PATH" in env})


def run(url: str, model: str, key: str) -> dict:
    """Try everything on the server at base URL ``url``."""
    root, chat = url.removesuffix("/v1"), f"{url}/chat/completions"
    with Listener() as listener:
        refused = {
            name: post(chat, {"model": model, "max_tokens": 2, "messages": [{"role": "user", "content": [part]}]}, key)
            for name, part in bad_parts(listener.port).items()
        }
    said = [{"role": "user", "content": "x"}]
    refused["template"] = post(chat, {"model": model, "messages": said, "chat_template": "{{ 1 }}"}, key)
    refused["path as a model"] = post(chat, {"model": "/etc", "messages": said}, key)
    refused["adapter"] = post(f"{url}/load_lora_adapter", {"lora_name": "x", "lora_path": "/tmp"}, key)
    posts = {path: post(root + path, {"model": model, "messages": said}, None) for path in GUARDED}
    gets = {f"GET {path}": status_of(root + path) for path in GUARDED}
    wrong = {"wrong key": post(chat, {"model": model, "messages": said}, key[:-1])}
    return {
        "fetched": listener.heard,
        "refused": refused,
        "without a key": posts | gets | wrong,
        "largest": {"said": post(chat, {"x": " " * LARGEST_BODY}, key), "unsaid": sent_in_chunks(chat, key)},
        "health": status_of(f"{root}/health"),
        "listening": listening(urlsplit(url).port),
        "interfaces": interfaces(urlsplit(url).port),
        "command lines with the key": [
            p.pid for p in psutil.process_iter(["cmdline"]) if key in " ".join(p.info["cmdline"] or ())
        ],
    }
