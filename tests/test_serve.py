"""serve.sh: the command it would run, the process it looks after, and one real vLLM."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import pickle
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from stand_in import StandIn

from sonovqa import serving, serving_plan
from sonovqa.cli import UserError
from sonovqa.serving_plan import Plan, make_plan

ROOT = Path(__file__).resolve().parents[1]
KEYS = ("VLLM_API_KEY", "VLLM_CPU_KVCACHE_SPACE")


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)


def write(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def model_folder(folder: Path, pixels=(4096, 12288), dtype="bfloat16", longest=32768) -> Path:
    """A model folder as far as planning looks into it."""
    write(folder / "config.json", {"dtype": dtype, "text_config": {"max_position_embeddings": longest}})
    size = {"shortest_edge": pixels[0], "longest_edge": pixels[1]}
    write(folder / "processor_config.json", {"image_processor": {"patch_size": 16, "merge_size": 2, "size": size}})
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")  # a header without tensors
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    model_folder(tmp_path / "phantoms" / "merged")
    return tmp_path / "phantoms"


def add_adapter(run: Path, base: Path, rank=16, layer="visual.blocks.0.attn.qkv", pixels=(4096, 12288)) -> None:
    from safetensors.numpy import save_file

    adapter = model_folder(run / "adapter", pixels)
    write(adapter / "adapter_config.json", {"r": rank, "base_model_name_or_path": str(base)})
    save_file({f"base_model.model.model.{layer}.lora_A.weight": np.zeros((1, 1))}, adapter / "adapter_model.safetensors")


def value(plan: Plan, flag: str) -> str:
    return plan.command[plan.command.index(flag) + 1]


def test_plan_serves_merged_weights_on_loopback_within_bounds(run):
    plan = make_plan(run, device="gpu")
    assert (plan.name, plan.url) == ("phantoms", "http://127.0.0.1:8000/v1")
    assert value(plan, "--model") == str(run / "merged")
    assert value(plan, "--served-model-name") == "phantoms"
    assert value(plan, "--host") == "127.0.0.1"
    assert json.loads(value(plan, "--limit-mm-per-prompt")) == {"image": 1, "video": 0}
    assert value(plan, "--generation-config") == "vllm"
    assert json.loads(value(plan, "--structured-outputs-config")) == {"backend": "xgrammar", "disable_any_whitespace": True}
    assert value(plan, "--max-model-len") == "4096"  # 12 image tokens and 3,072 of text, in whole thousands
    assert "--enable-prefix-caching" in plan.command
    assert value(plan, "--allowed-media-domains").endswith(".invalid")  # the server cannot be made to fetch
    assert not {"--mm-processor-kwargs", "--enforce-eager", "--enable-lora"} & set(plan.command)


@pytest.mark.parametrize(("stored", "served"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "bfloat16")])
def test_cpu_plan_bounds_memory_and_takes_the_type_from_the_configuration(run, stored, served, monkeypatch):
    model_folder(run / "merged", dtype=stored)
    plan = make_plan(run, device="cpu")
    assert (value(plan, "--dtype"), plan.env["VLLM_CPU_KVCACHE_SPACE"]) == (served, "1")
    assert "--enforce-eager" in plan.command
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    assert make_plan(run, device="cpu").env["VLLM_CPU_KVCACHE_SPACE"] == "4"


def test_run_merged_folder_and_bare_model_have_the_right_name(run, tmp_path):
    assert make_plan(run / "merged", device="gpu").name == "phantoms"
    bare = model_folder(tmp_path / "my-model")
    assert make_plan(bare, device="gpu").name == "my-model"


@pytest.mark.parametrize(
    ("pixels", "longest", "expected"),
    [((4096, 512 * 384), 32768, "4096"), ((65536, 16777216), 262144, "19456"), ((4096, 12288), 2048, "2048")],
)
def test_context_follows_the_pixel_budget_within_the_models_limit(run, pixels, longest, expected):
    model_folder(run / "merged", pixels, longest=longest)
    assert value(make_plan(run, device="gpu"), "--max-model-len") == expected


def test_lora_plan(run, tmp_path):
    base = model_folder(tmp_path / "base", pixels=(65536, 16777216))
    add_adapter(run, base, rank=20)
    plan = make_plan(run, lora=True, device="gpu")
    assert value(plan, "--model") == str(base)
    assert value(plan, "--served-model-name") == "phantoms-base"
    assert value(plan, "--lora-modules") == f"phantoms={run / 'adapter'}"
    assert value(plan, "--max-lora-rank") == "32"
    assert "--enable-tower-connector-lora" in plan.command
    assert json.loads(value(plan, "--mm-processor-kwargs")) == {"size": {"shortest_edge": 4096, "longest_edge": 12288}}
    assert value(plan, "--max-model-len") == "4096", "the run's budget counts, not the base's"


def test_lora_plan_says_only_what_is_needed(run, tmp_path):
    add_adapter(run, model_folder(tmp_path / "base"), layer="language_model.layers.0.mlp.up_proj")
    plan = make_plan(run, lora=True, device="gpu")
    assert not {"--enable-tower-connector-lora", "--mm-processor-kwargs"} & set(plan.command)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "gpu-box", "127.0.0.1.example.org"])
def test_a_host_beyond_loopback_needs_a_key_which_is_never_shown(run, host, monkeypatch):
    with pytest.raises(UserError, match="needs a key"):
        make_plan(run, host=host, device="gpu")
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    plan = make_plan(run, host=host, device="gpu")
    assert "s3cret" not in plan.shown() + str(plan)


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]"), ("localhost", "localhost"), ("0.0.0.0", "127.0.0.1"), ("::", "[::1]")],
)
def test_url_is_one_a_client_here_can_reach(host, url):
    assert serving_plan.address(host) == url


@pytest.mark.parametrize(
    "word",
    ["--host", "--host=0.0.0.0", "--hos", "--port", "--api-key", "--api_key=x", "--model", "--served_model_name", "--config"],
)
def test_flags_that_would_undo_the_guards_are_refused(run, word):
    with pytest.raises(UserError) as mistake:
        make_plan(run, device="gpu", extra=(word, "x"))
    assert "\n" not in str(mistake.value)


def test_further_flags_pass_through_and_come_last(run):
    extra = ("--tensor-parallel-size", "4", "--max-model-len", "8192")
    assert make_plan(run, device="gpu", extra=extra).command[-4:] == list(extra)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda run: shutil.rmtree(run), "no such folder"),
        (lambda run: shutil.rmtree(run / "merged"), "holds neither merged/"),
        (lambda run: (run / "merged").rename(run / "merged.unchecked"), "the merge check of"),
        (lambda run: (run / "merged" / "model.safetensors").rename(run / "merged" / "pytorch_model.bin"), "pickled weights"),
        (lambda run: (run / "merged" / "model.safetensors").unlink(), "holds no weights"),
        (lambda run: (run / "merged" / "processor_config.json").unlink(), "lacks processor files"),
        (lambda run: (run / "merged" / "chat_template.jinja").unlink(), "no chat template"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(run, spoil, told):
    spoil(run)
    with pytest.raises(UserError, match=told) as mistake:
        make_plan(run, device="gpu")
    assert "\n" not in str(mistake.value)


def test_lora_without_an_adapter_or_with_too_high_a_rank(run, tmp_path):
    with pytest.raises(UserError, match="holds no adapter"):
        make_plan(run, lora=True, device="gpu")
    add_adapter(run, model_folder(tmp_path / "base"), rank=600)
    with pytest.raises(UserError, match="rank 600"):
        make_plan(run, lora=True, device="gpu")


def test_shown_command_is_what_a_shell_would_run(tmp_path):
    folder = model_folder(tmp_path / "a run's folder" / "merged").parent
    plan = make_plan(folder, device="cpu")
    done = subprocess.run(
        ["bash", "-c", plan.shown().replace("env ", "env -i printf '%s\\n' ", 1)], capture_output=True, text=True
    )
    words = done.stdout.splitlines()
    assert words == [*(f"{k}={v}" for k, v in plan.env.items()), *plan.command]


def shell(*words: str, **env: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in KEYS} | {"PYTHON": sys.executable} | env
    return subprocess.run(["bash", str(ROOT / "serve.sh"), *words], capture_output=True, text=True, env=env, cwd="/", timeout=120)


def test_serve_sh_dry_run_from_any_folder(run):
    done = shell(str(run), "--device", "gpu", "--port", "8123", "--dry-run", "--", "--data-parallel-size", "2")
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout.replace("\\\n", " "))
    assert words[-2:] == ["--data-parallel-size", "2"]
    assert words[words.index("--port") + 1] == "8123"
    assert not (run / "serve-8123.log").exists()


def test_serve_sh_mistakes_are_one_line_and_status_2(run):
    for words in ([str(run / "absent")], [str(run), "--host", "0.0.0.0", "--dry-run"], [str(run), "--no-such-flag"]):
        done = shell(*words)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1


def test_serve_sh_is_clean():
    subprocess.run(["bash", "-n", str(ROOT / "serve.sh")], check=True)
    if shellcheck := shutil.which("shellcheck"):
        subprocess.run([shellcheck, str(ROOT / "serve.sh")], check=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_port_in_use_and_ports_that_cannot_be_had():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="is in use"):
            serving.check_port("127.0.0.1", taken.getsockname()[1])
    for host, port in (("127.0.0.1", 0), ("127.0.0.1", 70000), ("192.0.2.1", 8000), ("no.such.invalid", 8000)):
        with pytest.raises(UserError):
            serving.check_port(host, port)
    serving.check_port("127.0.0.1", free_port())


#: Becomes healthy after a moment, and starts a child as vLLM does, whose id it writes down.
FAKE = textwrap.dedent("""
    import http.server, pathlib, subprocess, sys, time
    port, mode, note = int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
    note.write_text(str(child.pid))
    print("(EngineCore pid=7) INFO loading", flush=True)
    if mode == "dies":
        child.kill()
        sys.exit("Traceback\\n(EngineCore pid=7) ValueError: the model does not fit\\nRuntimeError: engine failed")
    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args): pass
        def do_GET(self):
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()
    time.sleep(0.5)
    server = http.server.HTTPServer(("127.0.0.1", port), Handler)
    if mode == "leaves":
        server.handle_request()
        child.kill()
        sys.exit(3)
    server.serve_forever()
""")


def fake_plan(folder: Path, mode: str = "stays") -> Plan:
    port = free_port()
    command = [sys.executable, "-c", FAKE, str(port), mode, str(folder / "child")]
    return Plan("fake", command, {}, "127.0.0.1", port, f"http://127.0.0.1:{port}/v1", folder / "serve.log")


def gone(pid: int) -> bool:
    """Whether a process ended (a zombie that nobody has waited for did)."""
    for _ in range(50):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    return False


def test_server_is_waited_for_and_leaves_no_child_behind(tmp_path):
    with serving.Server(fake_plan(tmp_path)) as server:
        assert 0.3 < server.wait_until_healthy(20) < 20
        assert serving.is_healthy(server.plan.url)
    assert gone(int((tmp_path / "child").read_text()))
    assert not serving.is_healthy(server.plan.url)


def test_server_that_dies_says_why(tmp_path):
    with pytest.raises(UserError, match="ended while starting; ValueError: the model does not fit"):
        serving.serve(fake_plan(tmp_path, "dies"), 20)


def test_server_that_stops_by_itself_is_an_error(tmp_path):
    with pytest.raises(UserError, match="stopped by itself with status 3"):
        serving.serve(fake_plan(tmp_path, "leaves"), 20)


def test_server_that_is_never_healthy_is_given_up_and_stopped(tmp_path):
    plan = fake_plan(tmp_path)
    with pytest.raises(UserError, match="not healthy after"):
        serving.serve(plan, 0.2)


def test_then_runs_once_healthy_and_its_status_is_passed_on(tmp_path):
    plan = fake_plan(tmp_path)
    ask = f"{sys.executable} -c \"import urllib.request as u; u.urlopen('{plan.url[:-3]}/health')\""
    assert serving.serve(plan, 20, f"{ask} && exit 7") == 7
    assert gone(int((tmp_path / "child").read_text()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("healthy", [True, False], ids=["healthy", "starting"])
def test_signals_stop_server_and_children(tmp_path, number, healthy):
    plan = fake_plan(tmp_path)
    code = "import pickle, sys; from sonovqa import serving; sys.exit(serving.serve(pickle.load(open(sys.argv[1], 'rb')), 20))"
    (tmp_path / "plan").write_bytes(pickle.dumps(plan))
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "plan"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        for _ in range(200):
            if (
                (tmp_path / "child").exists()
                and (tmp_path / "child").read_text()
                and (not healthy or serving.is_healthy(plan.url))
            ):
                break
            time.sleep(0.1)
        time.sleep(1.5 if healthy else 0)
        process.send_signal(number)
        told, _ = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "stopping vLLM" in told
    assert ("curl" in told) == healthy
    assert gone(int((tmp_path / "child").read_text()))


def example_plan(url: str, folder: Path) -> Plan:
    return Plan("run", [], {}, "127.0.0.1", 0, url, folder / "log")


def test_printed_examples_run_as_they_stand(tmp_path):
    Image.new("RGB", (40, 30), (9, 90, 200)).save(tmp_path / "image.png")
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")} | {"VLLM_API_KEY": "k3y"}
    with StandIn(key="k3y") as server:
        plan = example_plan(server.url, tmp_path)
        told = [
            subprocess.run(
                [sys.executable, "-c", serving.python_example(plan)], cwd=tmp_path, env=env, capture_output=True, text=True
            )
        ]
        if shutil.which("curl"):
            told.append(
                subprocess.run(["bash", "-c", serving.curl_example(plan)], cwd=tmp_path, env=env, capture_output=True, text=True)
            )
    for done in told:
        assert "answer to Assess the normality" in done.stdout, done.stderr
    first, *others = server.bodies
    assert first["messages"][1]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    assert first["temperature"] == 0
    assert all(other == first for other in others)


CLIENT = """
import io, json, os, sys
import openai
from PIL import Image
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
errors = sorted({r.error for r in replies if r.error})
try:
    engine.check()
    refused = ""
except Exception as fault:
    refused = str(fault)
told = {"model": engine.model, "replies": len(replies), "errors": errors, "refused": refused}
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
    assert told["json"] in ('{"normal":true}', '{"normal":false}')
    assert "refuses a request without a key" in told["refused"]
    assert "a-key-of-the-test" not in log + done.stdout + done.stderr
    assert "fetched" not in told["url"] and "domain" in told["url"].lower()
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), timeout=2):
        pass
