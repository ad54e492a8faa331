"""serve.sh with one real vLLM behind it."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shlex
import socket
import subprocess
import sys

import pytest
from conftest import ROOT
from keys_and_ports import KEYS, free_port, no_keys  # noqa: F401 - a fixture
from PIL import Image

CLIENT = """
import io, json, os, sys
import openai
from PIL import Image
import attacks
from sonovqa import chat
from sonovqa.endpoint import Endpoint
from sonovqa.engines import ImageRequest, LabelRequest

engine = Endpoint(sys.argv[1], retries=0)
engine.check()
stream = io.BytesIO()
Image.new("RGB", (128, 96), (80, 80, 80)).save(stream, "PNG")
prompts = tuple((f"Q{i}", f"Question {i}: what is seen?") for i in range(1, 9))
replies = list(engine.answer([ImageRequest(str(i), stream.getvalue(), None, prompts) for i in range(3)], 6))
closed = tuple((q, p, tuple(texts)) for q, p, texts in json.loads(sys.argv[2]))
weighed = list(engine.likelihoods([LabelRequest("0", stream.getvalue(), None, closed)]))
client = openai.OpenAI(base_url=engine.base_url, api_key=os.environ.pop("VLLM_API_KEY"))
asked = chat.openai_messages(stream.getvalue(), "Is it normal?")
schema = {"type": "object", "properties": {"normal": {"type": "boolean"}}, "required": ["normal"], "additionalProperties": False}
form = {"type": "json_schema", "json_schema": {"name": "q7", "schema": schema}}
said = client.chat.completions.create(model=engine.model, messages=asked, temperature=0, max_tokens=30, response_format=form)
asked[1]["content"][0]["image_url"]["url"] = "http://127.0.0.1:1/x.png"
try:
    client.chat.completions.create(model=engine.model, messages=asked, max_tokens=3)
    fetched = "fetched"
except openai.APIStatusError as fault:
    fetched = str(fault)
told = {"attacks": attacks.run(engine.base_url, engine.model, "a-key-of-the-test")}
errors = sorted({r.error for r in replies if r.error})
try:
    engine.check()
    refused = ""
except Exception as fault:
    refused = str(fault)
told |= {"model": engine.model, "replies": len(replies), "errors": errors, "refused": refused}
told |= {"weighed": {r.question_id: r.error or r.log_likelihoods for r in weighed}}
told |= {"json": said.choices[0].message.content, "url": fetched}
print(json.dumps(told))
"""
#: Answers of which some begin alike, to be weighed by vLLM and by the local engine.
CLOSED = [
    ["Q3", "Identify the imaging plane shown.", ["axial abdomen", "axial thorax", "sagittal NT", "oblique"]],
    ["Q5", "Estimate the gestational age based on visible features.", ["20-25 weeks", "8-13 weeks"]],
    ["Q7", "Assess the normality of this ultrasound image.", ["normal", "abnormal: thick nuchal translucency", "abnormal"]],
]


def weighed_here(model, processor) -> dict[str, tuple[float, ...]]:
    """What the local engine says to `CLOSED` about the client's image."""
    from sonovqa.engines import LabelRequest
    from sonovqa.generation import LocalEngine

    stream = io.BytesIO()
    Image.new("RGB", (128, 96), (80, 80, 80)).save(stream, "PNG")
    request = LabelRequest("0", stream.getvalue(), None, tuple((q, p, tuple(texts)) for q, p, texts in CLOSED))
    return {r.question_id: r.log_likelihoods for r in LocalEngine(model.eval(), processor).likelihoods([request])}


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_real_vllm_end_to_end(tmp_path, tokenizer):
    """A random tiny model behind real vLLM: name, key, answers and their likelihoods, JSON by schema, no fetching; then gone."""
    from sonovqa import tiny

    folder = tmp_path / "demo" / "merged"
    model, processor = tiny.make_model(tokenizer, "small"), tiny.make_processor(tokenizer)
    processor.chat_template = tiny.CHAT_TEMPLATE.replace("assistant '", "assistant\n'").replace("role + ' '", "role + '\n'")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    port = free_port()
    (tmp_path / "client.py").write_text(CLIENT)
    words = [sys.executable, str(tmp_path / "client.py"), f"http://127.0.0.1:{port}", json.dumps(CLOSED)]
    client = shlex.join(["env", f"PYTHONPATH={ROOT}:{ROOT / 'tests'}", *words])
    env = {k: v for k, v in os.environ.items() if k not in KEYS and not k.lower().endswith("_proxy")}
    words = ["bash", str(ROOT / "serve.sh"), str(folder.parent), "--port", str(port), "--wait", "400", "--then", client]
    env |= {"PYTHON": sys.executable, "VLLM_API_KEY": "a-key-of-the-test"}
    done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=500)
    log = (folder.parent / f"serve-{port}.log").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["model"], told["replies"]) == ("demo", 24)
    assert set(told["errors"]) <= {"the answer is empty"}  # a random model may say nothing but spaces
    here = weighed_here(model, processor)
    assert {q: pytest.approx(found, abs=0.02) for q, found in here.items()} == told["weighed"]
    assert told["json"] in ('{"normal":true}', '{"normal":false}')
    assert "refuses a request without a key" in told["refused"]
    assert "a-key-of-the-test" not in log + done.stdout + done.stderr
    assert "fetched" not in told["url"] and "domain" in told["url"].lower()
    attacks = told["attacks"]
    assert attacks["fetched"] == [], "the server was made to fetch"
    assert {name: status for name, status in attacks["refused"].items() if status < 400} == {}
    assert {path: status for path, status in attacks["without a key"].items() if status not in (401, 404)} == {}
    assert attacks["largest"]["said"] in (413, 0) and attacks["largest"]["unsaid"] in (411, 413, 0)
    assert attacks["health"] == 200
    assert attacks["listening"] and all(address in ("127.0.0.1", "::1") for address in attacks["listening"])
    assert attacks["command lines with the key"] == []
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), timeout=2):
        pass
