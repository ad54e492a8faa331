"""The five commands of docs/serving.md, from a sheet to a page, as a newcomer runs them, at a smaller size.

In an empty folder with links to the scripts and the package of this checkout: neither a clone nor an installation is made.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT
from doc_blocks import blocks, commands
from keys_and_ports import KEYS, free_port, no_keys  # noqa: F401 - a fixture

from sonovqa import page

(PATH,) = [commands(block.code) for block in blocks(ROOT / "docs" / "serving.md") if block.mark == "path"]
SMALLER = {"--images 400": "--images 160", "--epochs 5": "--steps 24 --eval-every 12 --report-to none"}


def environment() -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if k not in KEYS and not k.lower().endswith("_proxy")}
    return env | {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}


def smaller(command: str, **ports: int) -> list[str]:
    for large, small in SMALLER.items():
        command = command.replace(large, small)
    return shlex.split(command.replace("127.0.0.1:8000", f"127.0.0.1:{ports.get('server')}"))


def answers(url: str) -> bool:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def started(words: list[str], home: Path, ready) -> subprocess.Popen:
    """A command that goes on, once ``ready(what it said)``."""
    said = home / f"said-{len(words)}"
    with open(said, "wb") as out:
        process = subprocess.Popen(words, cwd=home, env=environment(), stdout=out, stderr=out)
    for _ in range(800):
        if ready(said.read_text()):
            return process
        if process.poll() is not None:
            break
        time.sleep(0.5)
    process.terminate()
    process.wait(timeout=60)
    raise AssertionError(said.read_text())


def test_the_page_shows_five_commands_from_a_sheet_to_a_page():
    assert len(PATH) == 5
    starts = (
        "python prepare_dataset.py phantoms",
        "python prepare_dataset.py sheet",
        "python train.py",
        "bash serve.sh",
        "python -m",
    )
    assert all(command.startswith(start) for command, start in zip(PATH, starts, strict=True))


def test_what_comes_before_them_is_there_too(tmp_path):
    """Clone, install and activate, which come before, are there as written; nothing is cloned, and make only unrolls its rule."""
    clone, install = next(commands(b.code) for b in blocks(ROOT / "docs" / "serving.md") if b.mark == "set-up")
    assert clone == "git clone REPOSITORY sonovqa && cd sonovqa"
    made, activated = install.split(" && ")
    assert activated == ". .venv/bin/activate"
    done = subprocess.run([*made.split(), "--dry-run", "--always-make"], cwd=ROOT, capture_output=True, text=True)
    assert "-m venv .venv" in done.stdout and "pip install" in done.stdout, done.stderr


def test_the_page_command_of_the_readme_is_whole():
    """A command within a sentence is in no block that a test runs."""
    command = re.search(r"A page in the browser: `python -m sonovqa\.page ?([^`]*)`", (ROOT / "README.md").read_text())
    assert page.parse(command[1].split()).endpoint == "http://127.0.0.1:8000/v1"


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_sheet_to_served_model_to_page(tmp_path):
    for name in ("prepare_dataset.py", "train.py", "serve.sh", "sonovqa"):
        (tmp_path / name).symlink_to(ROOT / name)
    port = free_port()
    for command in PATH[:3]:
        done = subprocess.run(smaller(command), cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "data/mine/dataset.json").read_text())
    server = started([*smaller(PATH[3]), "--port", str(port)], tmp_path, lambda said: "ready: " in said)
    running = [server]
    try:
        said = (tmp_path / "said-5").read_text()
        assert "of 128 answers to 16 images are those of the merge check" in said
        if importlib.util.find_spec("sonovqa.page"):
            door = free_port()
            words = [*smaller(PATH[4], server=port), "--port", str(door)]
            running.append(started(words, tmp_path, lambda said: answers(f"http://127.0.0.1:{door}/")))
    finally:
        for process in reversed(running):
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)
    assert server.returncode == 0
