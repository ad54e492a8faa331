"""A stand-in for the Hugging Face hub: the calls that huggingface_hub 1.33 makes to push a model, with their checks.

Source: huggingface_hub's ``hf_api.py`` (create_repo, whoami, model_info), ``_commit_api.py`` (preupload, commit) and ``lfs.py``
(Git LFS batch API, https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md, "basic" transfer and verify).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

TOKEN = "hf_a-token-of-the-test"
BIG = (".safetensors", ".bin")


class Hub:
    """Repositories in memory: ``repos[id] = {"private": bool, "files": {name: bytes}, "commits": [messages]}``.

    ``who`` is what the token's owner is said to be; ``broken`` maps a part of a path to the status it is answered with.
    """

    def __init__(self):
        self.who = {"type": "user", "name": "me", "orgs": [{"name": "clinic", "roleInOrg": "write"},
                                                          {"name": "others", "roleInOrg": "read"}],
                    "auth": {"type": "access_token", "accessToken": {"displayName": "t", "role": "write"}}}  # fmt: skip
        self.repos: dict[str, dict] = {}
        self.licences: dict[str, str] = {}
        self.blobs: dict[str, bytes] = {}
        self.broken: dict[str, int] = {}
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                hub.answer(self, "GET", b"")

            def do_POST(self):
                hub.answer(self, "POST", self.body())

            def do_PUT(self):
                hub.answer(self, "PUT", self.body())

            def body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length", 0)))
                data = b""
                while size := int(self.rfile.readline(), 16):
                    data += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return data

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *fault) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, handler, method: str, data: bytes) -> None:
        path = handler.path.partition("?")[0]
        self.asked.append(f"{method} {path}")
        status = next((status for part, status in self.broken.items() if part in path), None)
        if status:
            return send(handler, status, {"error": "broken on purpose"})
        if method == "PUT":  # a signed URL of the storage: no token
            return self.store(handler, path, data)
        if handler.headers.get("Authorization") != f"Bearer {TOKEN}":
            return send(handler, 401, {"error": "Invalid username or password."})
        body = {} if path.endswith("/commit/main") or not data else json.loads(data)
        if path == "/api/whoami-v2":
            send(handler, 200, self.who)
        elif path == "/api/repos/create":
            self.create(handler, body)
        elif path == "/api/validate-yaml":
            self.validate(handler, body)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            modes = [{"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(BIG) else "regular", "shouldIgnore": False}
                     for f in body["files"]]  # fmt: skip
            send(handler, 200, {"files": modes} if found[1] in self.repos else {})
        elif found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self.batch(handler, body)
        elif path == "/verify":
            fits = len(self.blobs.get(body["oid"], b"")) == body["size"]
            send(handler, 200 if fits else 404, {})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self.commit(handler, found[1], [json.loads(line) for line in data.splitlines()])
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path):
            self.info(handler, found[1])
        else:
            send(handler, 404, {"error": "Not Found"})

    def create(self, handler, body: dict) -> None:
        name = f"{body['organization'] or self.who['name']}/{body['name']}"
        status = 409 if name in self.repos else 200
        self.repos.setdefault(name, {"private": body.get("visibility") == "private", "files": {}, "commits": []})
        send(handler, status, {"url": f"{self.url}/{name}", "error": "You already created this model repo"})

    def info(self, handler, name: str) -> None:
        if name in self.licences:
            return send(
                handler, 200, {"id": name, "private": False, "cardData": {"license": self.licences[name]}, "siblings": []}
            )
        if name not in self.repos:
            return send(handler, 404, {"error": "Repository not found"}, **{"X-Error-Code": "RepoNotFound"})
        repo = self.repos[name]
        send(handler, 200, {"id": name, "private": repo["private"], "siblings": [{"rfilename": n} for n in repo["files"]]})

    def validate(self, handler, body: dict) -> None:
        """As the hub does: the metadata must be YAML, a base model an id, a licence one word in lower case."""
        told = yaml.safe_load(body["content"].split("---")[1])
        errors = [f"{key} is wrong" for key, form in (("base_model", r"[\w.-]+/[\w.-]+"), ("license", r"[a-z0-9.-]+"))
                  if key in told and not re.fullmatch(form, str(told[key]))]  # fmt: skip
        errors += [] if isinstance(told.get("model-index", []), list) else ["model-index is no list"]
        send(handler, 400 if errors else 200, {"errors": [{"message": e} for e in errors], "warnings": []})

    def batch(self, handler, body: dict) -> None:
        def instructions(one: dict) -> dict:
            if one["oid"] in self.blobs:
                return one
            actions = {"upload": {"href": f"{self.url}/storage/{one['oid']}"}, "verify": {"href": f"{self.url}/verify"}}
            return one | {"actions": actions}

        assert body["operation"] == "upload" and body["hash_algo"] == "sha256"
        send(handler, 200, {"transfer": "basic", "objects": [instructions(one) for one in body["objects"]]})

    def store(self, handler, path: str, data: bytes) -> None:
        oid = path.rpartition("/")[2]
        fits = hashlib.sha256(data).hexdigest() == oid
        if fits:
            self.blobs[oid] = data
        send(handler, 200 if fits else 400, {})

    def commit(self, handler, name: str, lines: list[dict]) -> None:
        repo, (head, *rest) = self.repos[name], lines
        for line in rest:
            value = line["value"]
            assert line["key"] in ("file", "lfsFile")
            repo["files"][value["path"]] = self.blobs[value["oid"]] if "oid" in value else base64.b64decode(value["content"])
        repo["commits"].append(head["value"]["summary"])
        oid = f"{len(repo['commits']):040x}"
        send(handler, 200, {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{name}/commit/{oid}"})


def send(handler, status: int, value, **headers) -> None:
    data = json.dumps(value).encode()
    handler.send_response(status)
    for name, told in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
        handler.send_header(name, told)
    handler.end_headers()
    handler.wfile.write(data)
