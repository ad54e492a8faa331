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
from sonovqa import chat, choice, choosing
from sonovqa.endpoint import Endpoint
from sonovqa.engines import ImageRequest, LabelRequest

engine = Endpoint(sys.argv[1], retries=0)
engine.check()
stream = io.BytesIO()
Image.new("RGB", (128, 96), (80, 80, 80)).save(stream, "PNG")
prompts = tuple((f"Q{i}", f"Question {i}: what is seen?") for i in range(1, 9))
replies = list(engine.answer([ImageRequest(str(i), stream.getvalue(), None, prompts) for i in range(3)], 6))
closed = tuple((q, p, tuple(texts)) for q, p, texts in json.loads(sys.argv[2]))
head = choice.from_json(json.loads(sys.argv[3]))
chosen = choosing.ChoiceEndpoint(engine.base_url, engine.model, head=head, retries=0)
(by_head,) = chosen.answer([ImageRequest("0", stream.getvalue(), None, (("Q7", "Is it normal?"),))], 1)
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
errors = sorted({r.error for r in replies if r.error})
try:
    engine.check()
    refused = ""
except Exception as fault:
    refused = str(fault)
told = {"model": engine.model, "replies": len(replies), "errors": errors, "refused": refused}
told |= {"weighed": {r.question_id: r.error or r.log_likelihoods for r in weighed}}
told |= {"chosen": [by_head.text, by_head.probabilities, by_head.error], "json": said.choices[0].message.content, "url": fetched}
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


def head_of(tokenizer):
    """Q7's labels by a choice head, "abnormal" by the first of its tokens."""
    from sonovqa.choice import Head, Label

    tokens = [tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in ("normal", "abnormal")]
    return Head({"Q7": tuple(Label(*two, token, two[0]) for two, token in zip((("normal",) * 2, ("abnormal",) * 2), tokens))})


def chosen_here(model, processor, head) -> tuple[str, dict[str, float]]:
    """What the local engine says by that head about the client's image."""
    from sonovqa.choosing import ChoiceEngine
    from sonovqa.engines import ImageRequest

    stream = io.BytesIO()
    Image.new("RGB", (128, 96), (80, 80, 80)).save(stream, "PNG")
    asked = ImageRequest("0", stream.getvalue(), None, (("Q7", "Is it normal?"),))
    (reply,) = ChoiceEngine(model.eval(), processor, head).answer([asked], 1)
    return reply.text, reply.probabilities


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
    head = head_of(tokenizer)
    words = [sys.executable, str(tmp_path / "client.py"), f"http://127.0.0.1:{port}", json.dumps(CLOSED), json.dumps(head.json())]
    client = shlex.join(["env", f"PYTHONPATH={ROOT}", *words])
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
    text, chances = chosen_here(model, processor, head)
    assert told["chosen"] == [text, pytest.approx(chances, abs=0.01), None], "a choice by the labels' tokens alone"
    assert told["json"] in ('{"normal":true}', '{"normal":false}')
    assert "refuses a request without a key" in told["refused"]
    assert "a-key-of-the-test" not in log + done.stdout + done.stderr
    assert "fetched" not in told["url"] and "domain" in told["url"].lower()
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), timeout=2):
        pass
