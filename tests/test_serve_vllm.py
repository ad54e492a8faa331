"""serve.sh with one real vLLM behind it: two adapters on a tiny base, every example of docs/serving.md, and the end."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import psutil
import pytest
from conftest import ROOT, noise_image
from doc_blocks import blocks
from keys_and_ports import KEYS, free_port, no_keys  # noqa: F401 - a fixture
from PIL import Image

from sonovqa import files, served_check, serving
from sonovqa.choice import Head, Label
from sonovqa.structured import TASKS

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
KEY = "a-key-of-the-test"
EXAMPLES = [block for block in blocks(ROOT / "docs" / "serving.md") if block.mark.startswith("example: ")]

CLIENT = """
import io, json, os, sys
import openai
from PIL import Image
from sonovqa import chat, choice, choosing
from sonovqa.endpoint import Endpoint
from sonovqa.engines import ImageRequest, LabelRequest

engine = Endpoint(sys.argv[1], "mine", retries=0)
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
asked[1]["content"][0]["image_url"]["url"] = "http://127.0.0.1:1/x.png"
try:
    client.chat.completions.create(model=engine.model, messages=asked, max_tokens=3)
    fetched = "fetched"
except openai.APIStatusError as fault:
    fetched = str(fault)
try:
    engine.check()
    refused = ""
except Exception as fault:
    refused = str(fault)
told = {"models": [m.id for m in client.models.list().data], "replies": len(replies), "refused": refused, "url": fetched}
told |= {"errors": sorted({r.error for r in replies if r.error})}
told |= {"weighed": {r.question_id: r.error or r.log_likelihoods for r in weighed}}
told |= {"chosen": [by_head.text, by_head.probabilities, by_head.error]}
print(json.dumps(told))
"""
#: Answers of which some begin alike, to be weighed by vLLM and by the local engine.
CLOSED = [
    ["Q3", "Identify the imaging plane shown.", ["axial abdomen", "axial thorax", "sagittal NT", "oblique"]],
    ["Q5", "Estimate the gestational age based on visible features.", ["20-25 weeks", "8-13 weeks"]],
    ["Q7", "Assess the normality of this ultrasound image.", ["normal", "abnormal: thick nuchal translucency", "abnormal"]],
]


def make_base(folder: Path) -> Path:
    """The shipped tiny model in fp32, so that vLLM and the local engine compute alike."""
    from sonovqa import merging, models

    tiny = models.locate("tiny")
    model, processor = merging.load_16_bit(tiny, None), models.load_processor(tiny)
    model.float().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def make_run(folder: Path, base: Path, data: Path, layers: str, seed: int):
    """A run as train.py leaves it, as far as serving goes: a random adapter, its rows and what it answers to them.

    Returns:
        The model with its adapter, and its processor.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    from sonovqa import merging, models

    torch.manual_seed(seed)
    model, processor = merging.load_16_bit(str(base), None), models.load_processor(str(base))
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, target_modules=layers, init_lora_weights=False)).eval()
    model.save_pretrained(folder / "adapter")
    processor.save_pretrained(folder / "adapter")
    items = [{"split": "train", "row": row, "branches": list(range(8))} for row in (0, 1, 2, 4)]
    run = {"run": folder.name, "arguments": {"data": str(data), "task": "all"}, "prompt_variant": "default", "data": "toy"}
    run |= {"check_items": items}
    files.write_json(folder / "plan.json", run)
    files.write_json(folder / "merge.json", {"answers": merging.greedy_answers(run, processor, model)})
    return model, processor


@pytest.fixture(scope="module")
def served(tmp_path_factory, data):
    """The server with adapters ``mine`` (vision and language) and ``words`` (language alone), once it says it is ready."""
    home = tmp_path_factory.mktemp("served")
    base = make_base(home / "tiny-fp32")
    demo = make_run(home / "mine", base, data, r".*(q_proj|v_proj|qkv|linear_fc1)", 1)
    make_run(home / "words", base, data, r".*language_model.*(q_proj|up_proj)", 2)
    (home / "client.py").write_text(CLIENT)
    (home / "docs").symlink_to(ROOT / "docs")
    noise_image(320, 240, 5).save(home / "scan.png")
    noise_image(320, 420, 6).save(home / "page.jpg")
    env = {k: v for k, v in os.environ.items() if k not in KEYS and not k.lower().endswith("_proxy")}
    env |= {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}
    (home / "key").write_text(KEY + "\n")
    port, log, said = free_port(), home / "serve.log", home / "said"
    words = ["bash", str(ROOT / "serve.sh"), "--adapters", f"mine={home / 'mine'}", f"words={home / 'words'}", "--log", str(log)]
    with open(said, "wb") as out:
        process = subprocess.Popen(
            [*words, "--port", str(port), "--wait", "1200", "--grace", "300"],
            stdout=out,
            stderr=out,
            env=env | {"VLLM_API_KEY_FILE": str(home / "key")},
        )
    try:
        while "ready: " not in said.read_text() and process.poll() is None:
            time.sleep(0.5)
        assert process.poll() is None, said.read_text() + (log.read_text()[-3000:] if log.exists() else "")
        url = f"http://127.0.0.1:{port}"
        yield SimpleNamespace(
            home=home, url=url, process=process, said=said, log=log, demo=demo, env=env | {"VLLM_API_KEY": KEY}, data=data
        )
    finally:
        process.terminate()
        process.wait(timeout=600)


def run(served, *words: str, timeout: float = 600) -> subprocess.CompletedProcess:
    return subprocess.run(words, cwd=served.home, env=served.env, capture_output=True, text=True, timeout=timeout)


def test_it_is_ready_once_both_adapters_answer_as_their_own(served):
    """vLLM's answers, with its adapters on vision tower and language model, are those of the local engine."""
    said = served.said.read_text()
    for name in ("mine", "words"):
        answers = files.read_json(served.home / name / "merge.json")["answers"]
        assert f"{name}: first answers after" in said
        assert f"{len(answers)} of {len(answers)} answers to 4 images are those of the merge check" in said, said
    assert "models: mine, words, and the base as tiny-fp32" in said
    assert "suggested: VLLM_CPU_KVCACHE_SPACE=" in said
    mine, other = (files.read_json(served.home / name / "merge.json")["answers"] for name in ("mine", "words"))
    assert served_check.compare(mine, other).share < served_check.BOUND, "or nothing above would tell the adapters apart"


def test_answers_likelihoods_keys_and_image_urls(served):
    from sonovqa.choosing import ChoiceEngine
    from sonovqa.engines import ImageRequest, LabelRequest
    from sonovqa.generation import LocalEngine

    model, processor = served.demo
    head = head_of(processor.tokenizer)
    done = run(served, sys.executable, "client.py", served.url, json.dumps(CLOSED), json.dumps(head.json()))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["models"] == ["tiny-fp32", "mine", "words"] and told["replies"] == 24
    assert set(told["errors"]) <= {"the answer is empty"}  # such a model may say nothing but spaces
    assert "refuses a request without a key" in told["refused"]
    assert "fetched" not in told["url"] and "domain" in told["url"].lower()
    stream = io.BytesIO()
    Image.new("RGB", (128, 96), (80, 80, 80)).save(stream, "PNG")
    request = LabelRequest("0", stream.getvalue(), None, tuple((q, p, tuple(texts)) for q, p, texts in CLOSED))
    here = {r.question_id: r.log_likelihoods for r in LocalEngine(model, processor).likelihoods([request])}
    assert {q: pytest.approx(found, abs=0.05) for q, found in here.items()} == told["weighed"]
    asked = ImageRequest("0", stream.getvalue(), None, (("Q7", "Is it normal?"),))
    (chosen,) = ChoiceEngine(model, processor, head).answer([asked], 1)
    assert told["chosen"] == [chosen.text, pytest.approx(chosen.probabilities, abs=0.02), None], "by the labels' tokens alone"


def head_of(tokenizer) -> Head:
    """Q7's labels by a choice head, "abnormal" by the first of its tokens."""
    tokens = [tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in ("normal", "abnormal")]
    return Head({"Q7": tuple(Label(name, name, token, name) for name, token in zip(("normal", "abnormal"), tokens, strict=True))})


@pytest.mark.parametrize("block", EXAMPLES, ids=[f"{block.mark[9:]}-{block.language}" for block in EXAMPLES])
def test_examples_of_the_page_run_as_they_stand(served, block):
    """The port alone is another. What comes back has the schema's form; nobody could ask a tiny model for the right content."""
    code = block.code.replace("http://127.0.0.1:8000", served.url)
    started = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
    if block.language == "javascript":
        if not shutil.which("node"):
            pytest.skip("there is no Node here")
        started["javascript"] = ["node", "--input-type=module", "-e"]
    done = run(served, *started[block.language], code)
    assert done.returncode == 0, done.stdout + done.stderr
    kind, shown = block.mark[9:], done.stdout
    if kind in ("report", "medications", "extract"):
        told = json.loads(shown)
        told = json.loads(told["choices"][0]["message"]["content"]) if "choices" in told else told
        told = told.get("report", told)
        for name in ("medications", "findings", "values") if kind == "extract" else (kind,):
            jsonschema.validate({name: told[name]} if kind == "extract" else told, TASKS[name].schema)
    elif kind == "choice":
        assert shown.strip() in ("left", "right", "unclear")
    elif kind == "metrics":
        assert "vllm:num_requests_running" in shown
    else:
        assert shown.strip() and ("[DONE]" in shown or "data:" not in shown)


def test_attacks_on_the_server_come_to_nothing(served):
    code = "import json, os, sys; sys.path.append(sys.argv[1]); import attacks\n"
    code += "print(json.dumps(attacks.run(sys.argv[2], 'mine', os.environ['VLLM_API_KEY'])))"
    done = run(served, sys.executable, "-c", code, str(ROOT / "tests"), f"{served.url}/v1")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["fetched"] == [], "the server was made to fetch"
    assert {name: status for name, status in told["refused"].items() if status < 400} == {}
    assert {path: status for path, status in told["without a key"].items() if status not in (401, 404)} == {}
    assert told["largest"] == {"said": 413, "unsaid": 411}
    assert told["health"] == 200
    assert told["listening"] and all(address in ("127.0.0.1", "::1") for address in told["listening"])
    assert told["interfaces"] == [["lo", "127.0.0.1"]]
    assert told["command lines with the key"] == []


def status_of(served, path: str, body: bytes | None = None, **headers: str) -> int:
    request = urllib.request.Request(served.url + path, body, headers)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=300) as response:
            return response.status
    except urllib.error.HTTPError as fault:
        return fault.code


def test_nothing_answers_without_the_key_which_stands_nowhere(served):
    chat = json.dumps({"model": "mine", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}).encode()
    sent = {"Content-Type": "application/json"}
    assert status_of(served, "/v1/chat/completions", chat, **sent) == 401
    for path in ("/invocations", "/tokenize", "/abort_requests", "/docs", "/openapi.json", "/version", "//v1/models"):
        assert status_of(served, path, chat if path != "/docs" else None, **sent, Authorization=f"Bearer {KEY}") == 404, path
    assert status_of(served, "/health") == status_of(served, "/metrics") == 200
    assert status_of(served, "/v1/models", Authorization=f"Bearer {KEY}") == 200
    listed = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if readable(path)]
    assert not [words for words in listed if KEY.encode() in words and b"pytest" not in words]
    assert KEY not in served.log.read_text() + served.said.read_text()


def readable(path: Path) -> bool:
    try:
        path.read_bytes()
        return True
    except OSError:  # it ended meanwhile
        return False


@contextlib.contextmanager
def frozen(processes: list[psutil.Process]):
    try:
        for process in processes:
            process.suspend()
        yield
    finally:
        for process in processes:
            process.resume()


def test_a_request_in_flight_finishes_when_the_server_is_stopped(served):
    """The last test: it stops the server, whose engine is frozen while the signal comes: a tiny model answers too fast."""
    children = psutil.Process(served.process.pid).children(recursive=True)
    engine = [one for one in children if "VLLM::" in " ".join(one.cmdline())]
    assert engine, "vLLM's engine is no longer a process of its own"
    body = {"model": "mine", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 400, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    request = urllib.request.Request(f"{served.url}/v1/chat/completions", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    request.add_header("Authorization", f"Bearer {KEY}")
    for _ in range(100):
        with urllib.request.urlopen(request, timeout=600) as response:
            first = response.readline()  # it is being answered
            with frozen(engine):
                if serving.in_flight(served.url) == 0:  # or was, on a machine that stalled here
                    continue
                served.process.send_signal(signal.SIGTERM)
                ends = time.monotonic() + 300
                while "requests in flight: 1;" not in served.said.read_text():
                    assert time.monotonic() < ends and served.process.poll() is None, served.said.read_text()
                    time.sleep(0.05)
            events = [first, *response]
            break
    else:
        pytest.fail("no request was in flight when the engine froze")
    assert served.process.wait(timeout=600) == 0
    told = [json.loads(event[6:]) for event in events if event.startswith(b"data: {")]
    assert told[-1]["usage"]["completion_tokens"] == 400 and events[-2] == b"data: [DONE]\n"
    said = served.said.read_text()
    assert "stopping vLLM" in said and "cut off" not in said
    with pytest.raises(OSError):
        status_of(served, "/health")
