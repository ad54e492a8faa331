"""The command that serve.sh would run: which weights, which limits, which name, and what it refuses."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from conftest import ROOT
from keys_and_ports import KEYS, no_keys  # noqa: F401 - a fixture

from sonovqa import choice, families, serving, serving_plan
from sonovqa.cli import UserError
from sonovqa.serving_plan import Plan, make_plan


def write(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def model_folder(folder: Path, pixels=(4096, 12288), dtype="bfloat16", longest=32768, kind="qwen3_vl") -> Path:
    """A model folder as far as planning looks into it."""
    write(folder / "config.json", {"model_type": kind, "dtype": dtype, "text_config": {"max_position_embeddings": longest}})
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
    monkeypatch.setenv("VLLM_API_KEY", "s3cret" * 3)
    plan = make_plan(run, host=host, device="gpu")
    assert "s3cret" not in plan.shown() + str(plan)


@pytest.mark.parametrize("key", ["x", " ", "a b", "s3cret\n" * 3, "s3cret " * 3, "s3crét" * 3, "s" * 15])
@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1"])
def test_a_key_that_keeps_nobody_out_is_refused_and_not_shown(run, key, host, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", key)
    with pytest.raises(UserError, match=r"VLLM_API_KEY; a key of .*; 16 or more .*; export VLLM_API_KEY=") as mistake:
        make_plan(run, host=host, device="gpu")
    assert "\n" not in str(mistake.value) and not (len(key) > 3 and key.strip() in str(mistake.value))


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


@pytest.mark.parametrize(
    ("word", "way_out"),
    [
        ("--root-path", "take its prefix off"), ("--root_path=/v1", "take its prefix off"), ("--root", "take its prefix off"),
        ("--ssl-certfile", "a proxy with TLS"), ("--ssl-keyfile", "a proxy with TLS"), ("--uds", "on the socket"),
        ("--trust-remote-code", "a family that vLLM knows"), ("--allowed-origins", "--allow-origin URL"),
        ("--grpc-port", "leave it out"), ("--api-key", "export VLLM_API_KEY"), ("--middleware", "have a proxy do it"),
        ("--load-format", "auto and safetensors"), ("--load_format=pt", "auto and safetensors"), ("--load-f=pt", "auto and"),
        ("--enable-prompt-embeds", "images and text"), ("--enable-mm-embeds", "images and text"),
        ("--tool-parser-plugin", "that vLLM has"), ("--reasoning-parser-plugin=x.py", "that vLLM has"),
        ("--allowed-local-media-path", "in the request"), ("--kv-events-config.publisher", "leave it out"),
    ],
)  # fmt: skip
def test_flags_that_open_the_server_are_refused_with_the_way_out(run, word, way_out):
    with pytest.raises(UserError, match=f"after --; .*; .*{way_out}"):
        make_plan(run, device="gpu", extra=(word, "/v1"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--port", "99999"], "--port; 99999; 1 to 65535"),
        (["--port", "0"], "--port; 0; 1 to 65535"),
        (["--max-model-len", "-4"], "--max-model-len; -4; 1 token or more"),
        (["--max-model-len", "0"], "--max-model-len; 0; 1 token or more"),
        (["--wait", "nan"], "--wait; nan; seconds above 0"),
        (["--wait", "-1"], "--wait; -1.0; seconds above 0"),
        (["--", "foo"], "after --; foo; flags"),
    ],
)
def test_values_that_no_server_could_have_are_refused_in_a_dry_run(run, words, told):
    with pytest.raises(UserError, match=told):
        serving.main([str(run), "--device", "gpu", "--dry-run", *words])


def test_web_pages_that_may_ask_are_told_to_vllm_and_to_its_gate(run, monkeypatch):
    monkeypatch.setenv("SONOVQA_ALLOWED_ORIGINS", "https://evil.example")
    for origins, flag, told in (((), "[]", ""), (("http://[::1]:3000", "https://B"), '["http://[::1]:3000","https://b"]', None)):
        plan = make_plan(run, device="gpu", origins=origins)
        assert plan.command[plan.command.index("--allowed-origins") + 1] == flag
        assert plan.env["SONOVQA_ALLOWED_ORIGINS"] == ("http://[::1]:3000 https://b" if told is None else told)


@pytest.mark.parametrize(
    "origin",
    ["*", "null", "app.example", "https://", "https://*.a", "https://a/b", "https://u@a", "ftp://a", "https://a b", "http://a:x"],
)
def test_what_is_no_web_pages_origin_is_refused(run, origin):
    with pytest.raises(UserError) as mistake:
        make_plan(run, device="gpu", origins=(origin,))
    assert (
        str(mistake.value)
        == f"--allow-origin; {origin}; scheme, host and port of one web page's address; --allow-origin https://app.example"
    )


def test_further_flags_pass_through_and_come_last(run):
    extra = ("--tensor-parallel-size", "4", "--max-model-len", "8192", "--load-format", "safetensors", "--load-format=auto")
    extra += ("--reasoning-parser", "qwen3")
    assert make_plan(run, device="gpu", extra=extra).command[-len(extra) :] == list(extra)


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


@pytest.mark.parametrize("kind", ["mllama", "florence2"])
def test_families_that_vllm_does_not_serve_are_refused_with_a_way_out(run, kind, tmp_path):
    base = model_folder(tmp_path / "base", kind=kind)
    model_folder(run / "merged", kind=kind)
    add_adapter(run, base)
    for how in ({"run": run}, {"run": run, "lora": True}, {"run": None, "adapters": [f"A={run}"]}):
        with pytest.raises(UserError) as mistake:
            make_plan(**how, device="gpu")
        told = str(mistake.value)
        assert families.FAMILIES[kind].not_served in told and "python inference.py --run " in told and "\n" not in told


def test_every_choice_run_that_is_served_says_how_to_ask_it(run, tmp_path, capsys):
    head = choice.Head({"Q7": tuple(choice.Label(name, name, token, name) for name, token in (("normal", 5), ("abnormal", 6)))})
    base = model_folder(tmp_path / "base")
    served = []
    for name, kept in (("a", head.json()), ("b", None), ("c", head.json())):
        add_adapter(tmp_path / name, base)
        write(tmp_path / name / "run.json", {"head": kept})
        served.append(f"{name.upper()}={tmp_path / name}")
    with mock.patch.object(serving, "serve", return_value=0):
        serving.main(["--adapters", *served, "--device", "gpu"])
    told = capsys.readouterr().out
    assert f"--head {tmp_path / 'a'};" in told and f"--head {tmp_path / 'c'};" in told and f"--head {tmp_path / 'b'};" not in told
    assert told.count("The page (python -m sonovqa.page) cannot ask it") == 2
    write(run / "run.json", {"head": head.json()})
    with mock.patch.object(serving, "serve", return_value=0):
        serving.main([str(run), "--device", "gpu"])
    assert f"--head {run};" in capsys.readouterr().out, "a run without a merge check says so too"


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


def test_serve_sh_without_the_python_it_needs_says_make_install(run, tmp_path):
    bare = tmp_path / "bare-python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # -S: no installed packages
    bare.chmod(0o755)
    for python in ("python3.11x", str(tmp_path), str(bare)):
        done = shell(str(run), "--dry-run", PYTHON=python)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and python in done.stderr and "make install" in done.stderr
        assert done.stderr.count("\n") == 1
    assert shell(str(run), "--device", "gpu", "--dry-run", PYTHON=Path(sys.executable).name, PATH=on_path()).returncode == 0


def on_path() -> str:
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def test_serve_sh_is_clean():
    subprocess.run(["bash", "-n", str(ROOT / "serve.sh")], check=True)
    if shellcheck := shutil.which("shellcheck"):
        subprocess.run([shellcheck, str(ROOT / "serve.sh")], check=True)
