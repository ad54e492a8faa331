"""A sweep that a signal ends: Ctrl-C, kill, a closed terminal; no command is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from sonovqa import experiments_blocks, experiments_sweep

pytestmark = pytest.mark.usefixtures("hangs_up")

#: A command that ends in order, which takes it half a second.
CHILD = """
import signal, sys, time
def stop(*_):
    open("stopped", "a").write("once ")
    time.sleep(0.5)
    sys.exit(130)
signal.signal(signal.SIGINT, stop)
open("ready", "w").close()
time.sleep(600)
"""


@contextlib.contextmanager
def sweep_of_a_child(folder: Path):
    """A sweep in a process of its own with `CHILD` under way."""
    (folder / "child.py").write_text(CHILD)
    code = "from sonovqa import experiments as e; from sonovqa.experiments_blocks import Command\n"
    code += "try: e.perform('x', [Command(('child.py',))])\nexcept KeyboardInterrupt: print('ended', flush=True)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    given = {"cwd": folder, "env": environment, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen([sys.executable, "-c", code], **given) as parent:
        try:
            wait_for(folder / "ready")
            yield parent
        finally:
            parent.kill()


def wait_for(path: Path) -> None:
    end = time.monotonic() + 300
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.02)
    assert path.exists()


def test_ctrl_c_reaches_a_command_once_and_its_end_is_awaited(tmp_path):
    with sweep_of_a_child(tmp_path) as parent:
        os.killpg(parent.pid, signal.SIGINT)  # as a terminal does it
        assert parent.communicate(timeout=300)[0].strip().endswith("ended")
    assert (tmp_path / "stopped").read_text() == "once "


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_kill_and_a_closed_terminal_end_the_command_as_ctrl_c_does(tmp_path, number):
    with sweep_of_a_child(tmp_path) as parent:
        parent.send_signal(number)
        assert parent.communicate(timeout=300)[0].strip().endswith("ended")
    assert (tmp_path / "stopped").read_text() == "once "


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_sweep_that_dies_without_a_word_leaves_no_command_behind(tmp_path):
    with sweep_of_a_child(tmp_path) as parent:
        parent.kill()
        wait_for(tmp_path / "stopped")


def test_nohup_keeps_its_word_and_handlers_come_back():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt), experiments_sweep.ended_as_by_ctrl_c():
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == before[signal.SIGTERM]
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before[signal.SIGHUP])


def test_a_command_started_from_a_background_job_can_be_stopped(tmp_path, monkeypatch):
    """A shell's `&` has Ctrl-C's signal ignored, and so would every process below it."""
    (tmp_path / "child.py").write_text("import signal, sys; sys.exit(signal.getsignal(signal.SIGINT) == signal.SIG_IGN)")
    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert experiments_sweep.Processes()(experiments_blocks.Command(("child.py",)), {}) == 0
    finally:
        signal.signal(signal.SIGINT, before)
