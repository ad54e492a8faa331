"""docs/serving.md: every command can be run, every flag is one of vLLM's, every request is what the module makes."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from doc_blocks import blocks, commands
from keys_and_ports import KEYS, no_keys  # noqa: F401 - a fixture
from test_serving_plan import add_adapter, model_folder

from sonovqa import serving_examples, structured, torchvision_ops
from sonovqa.serving_plan import Plan

PAGE = ROOT / "docs" / "serving.md"


@pytest.fixture(scope="module", autouse=True)
def no_torchcodec():
    """Hidden as vllm_server does it in its own process, and there again for the tests after these: datasets asks for it."""
    torchvision_ops.hide_unloadable("torchcodec")
    yield
    if "torchcodec" in sys.modules and sys.modules["torchcodec"] is None:
        del sys.modules["torchcodec"]


def served() -> list[str]:
    """The page's commands of serve.sh, each after what its block exports."""
    found = []
    for block in blocks(PAGE):
        lines = commands(block.code) if block.mark in ("dry-run", "path") else []
        exports = [line for line in lines if line.startswith("export ")]
        found += ["\n".join([*exports, line]) for line in lines if "serve.sh" in line]
    return found


SERVED = served()


def planned(command: str, folder: Path) -> list[str]:
    """The words that a command of the page would start vLLM with."""
    head, dashes, extra = command.partition(" -- ")
    told = f"{head} --device gpu --dry-run{dashes}{extra}"
    env = {k: v for k, v in os.environ.items() if k not in KEYS} | {"PYTHON": sys.executable}
    link = folder / "serve.sh"
    if not link.exists():
        link.write_text(f'exec bash {ROOT / "serve.sh"} "$@"\n')
    done = subprocess.run(["bash", "-c", told], capture_output=True, text=True, env=env, cwd=folder, timeout=600)
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout.replace("\\\n", " "))
    return words[words.index("sonovqa.vllm_server") + 1 :]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the page's commands find their runs."""
    home = tmp_path_factory.mktemp("page")
    base = model_folder(home / "base")
    for name in ("mine", "other"):
        model_folder(home / "outputs" / name / "merged")
        add_adapter(home / "outputs" / name, base)
    return home


@pytest.mark.parametrize("command", SERVED)
def test_commands_of_the_page_can_be_run_and_vllm_knows_their_flags(folder, command):
    words = planned(command, folder)
    assert "--host" in words and "--api-key" not in words
    if importlib.util.find_spec("vllm") is None:
        return
    from sonovqa import vllm_server

    flags = vllm_server.read_flags(words)
    extra = shlex.split(command.partition(" -- ")[2])
    for name, value in zip(extra[::2], extra[1::2], strict=True):
        assert str(getattr(flags, name[2:].replace("-", "_"))) == value, "a flag that vLLM reads as something else"
    assert flags.shutdown_timeout == 20 and flags.middleware == ["sonovqa.serving_gate.Gate"]
    assert [module.name for module in flags.lora_modules or ()] == (["A", "B"] if "--adapters" in command else [])


def test_no_example_puts_the_key_on_a_command_line():
    """Whoever may list processes would read it there; what bash expands within <(…) stands on none."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    shell = [block.code for page in pages for block in blocks(page) if block.language == "bash"]
    plan = Plan("run", [], {}, "127.0.0.1", 0, "http://127.0.0.1:8000/v1", ROOT)
    asking = [code for code in (*shell, serving_examples.curl_example(plan)) if "Bearer" in code]
    assert len(asking) == 4
    for code in asking:
        assert "Bearer $" not in code and "-H @<(printf 'Authorization: Bearer %s' \"$VLLM_API_KEY\")" in code


def test_the_page_shows_all_that_is_promised():
    told = " ".join(SERVED)
    for flag in ("--tensor-parallel-size", "--data-parallel-size", "--api-server-count", "ray", "--adapters", "--host 0.0.0.0"):
        assert flag in told
    examples = {
        (block.mark.removeprefix("example: "), block.language) for block in blocks(PAGE) if block.mark.startswith("example")
    }
    for kind in ("report", "extract", "text"):
        assert {(kind, "python"), (kind, "javascript"), (kind, "bash")} <= examples


@pytest.mark.parametrize("name", list(structured.TASKS))
def test_requests_beside_the_page_are_what_the_module_makes(name):
    stored = (ROOT / "docs" / "requests" / f"{name}.json").read_text()
    way_out = f"python -m sonovqa.structured request {name} > docs/requests/{name}.json"
    assert json.loads(stored) == structured.request(structured.TASKS[name]), way_out


def test_several_http_processes_are_started_and_not_ignored(monkeypatch):
    """vLLM's api_server module takes ``--api-server-count`` and starts one process whatever it says."""
    pytest.importorskip("vllm")
    from vllm.entrypoints.cli import serve

    from sonovqa import vllm_server

    started = []
    monkeypatch.setattr(serve, "run_multi_api_server", lambda flags: started.append(flags.api_server_count))
    vllm_server.serve(["--model", "any/model", "--api-server-count", "4"])
    assert started == [4]
