"""The server that serve.sh looks after: its port, its start and its end, and the examples printed for its clients."""

from __future__ import annotations

import os
import pickle
import pty
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from conftest import ROOT
from keys_and_ports import free_port, no_keys  # noqa: F401 - a fixture
from PIL import Image
from stand_in import StandIn

from sonovqa import serving, serving_examples
from sonovqa.cli import UserError
from sonovqa.serving_plan import Plan

pytestmark = pytest.mark.usefixtures("hangs_up")


def test_port_in_use_and_ports_that_cannot_be_had():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="is in use"):
            serving.check_port("127.0.0.1", taken.getsockname()[1])
    for host in ("192.0.2.1", "no.such.invalid"):
        with pytest.raises(UserError):
            serving.check_port(host, 8000)
    serving.check_port("127.0.0.1", free_port())


#: Starts a child as vLLM does, whose id it writes down; is healthy once there is a file ``go``.
FAKE = textwrap.dedent("""
    import http.server, pathlib, subprocess, sys, time
    port, mode, note = int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
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
    while not note.with_name("go").exists():
        time.sleep(0.02)
    server = http.server.HTTPServer(("127.0.0.1", port), Handler)
    if mode == "leaves":
        server.handle_request()
        child.kill()
        sys.exit(3)
    server.serve_forever()
""")


def fake_plan(folder: Path, mode: str = "stays", healthy: bool = True) -> Plan:
    """Of a server that becomes healthy, or does not before `let_be_healthy`."""
    port = free_port()
    if healthy:
        let_be_healthy(folder)
    command = [sys.executable, "-c", FAKE, str(port), mode, str(folder / "child")]
    return Plan("fake", command, {}, "127.0.0.1", port, f"http://127.0.0.1:{port}/v1", folder / "serve.log")


def let_be_healthy(folder: Path) -> None:
    (folder / "go").touch()


def gone(pid: int) -> bool:
    """Whether a process ended (a zombie that nobody has waited for did), which a busy machine may take its time for."""
    for _ in range(1200):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    return False


def test_server_is_waited_for_and_leaves_no_child_behind(tmp_path, monkeypatch):
    asked, real = [], serving.is_healthy

    def is_healthy(url: str) -> bool:
        asked.append(real(url))
        let_be_healthy(tmp_path)  # from now on: it was asked too early at least once
        return asked[-1]

    monkeypatch.setattr(serving, "is_healthy", is_healthy)
    with serving.Server(fake_plan(tmp_path, healthy=False)) as server:
        assert 0 < server.wait_until_healthy(300) < 300
        assert asked == [False] * (len(asked) - 1) + [True] and len(asked) > 1
        assert serving.is_healthy(server.plan.url)
    assert gone(int((tmp_path / "child").read_text()))
    assert not serving.is_healthy(server.plan.url)


def test_server_that_dies_says_why(tmp_path):
    with pytest.raises(UserError, match="ended while starting; ValueError: the model does not fit"):
        serving.serve(fake_plan(tmp_path, "dies"), 300)


def test_server_that_stops_by_itself_is_an_error(tmp_path):
    with pytest.raises(UserError, match="stopped by itself with status 3"):
        serving.serve(fake_plan(tmp_path, "leaves"), 300)


def test_server_that_is_never_healthy_is_given_up_and_stopped(tmp_path):
    plan = fake_plan(tmp_path, healthy=False)
    with pytest.raises(UserError, match="not healthy after"):
        serving.serve(plan, 0.2)


def test_then_runs_once_healthy_and_its_status_is_passed_on(tmp_path):
    plan = fake_plan(tmp_path)
    ask = f"{sys.executable} -c \"import urllib.request as u; u.urlopen('{plan.url[:-3]}/health')\""
    assert serving.serve(plan, 300, f"{ask} && exit 7") == 7
    assert gone(int((tmp_path / "child").read_text()))


def serving_words(plan: Plan, folder: Path) -> list[str]:
    """The command that serves a plan in a process of its own."""
    code = "import pickle, sys; from sonovqa import serving; sys.exit(serving.serve(pickle.load(open(sys.argv[1], 'rb')), 300))"
    (folder / "plan").write_bytes(pickle.dumps(plan))
    return [sys.executable, "-c", code, str(folder / "plan")]


def serving_process(words: list[str], folder: Path) -> subprocess.Popen:
    """The command under way; what it prints is in ``said``."""
    with open(folder / "said", "wb") as said:
        return subprocess.Popen(words, cwd=ROOT, stdout=said, stderr=subprocess.DEVNULL)


def wait_for(folder: Path, healthy: bool = True) -> None:
    """Until the server has started its child and, if ``healthy``, the greeting is in ``said``, after which serve.sh waits."""
    note = folder / ("said" if healthy else "child")
    for _ in range(3000):
        if note.exists() and ("curl" in note.read_text() if healthy else note.read_text()):
            return
        time.sleep(0.1)
    raise AssertionError(f"not in five minutes; {note.name}: {note.read_text() if note.exists() else None}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("healthy", [True, False], ids=["healthy", "starting"])
def test_signals_stop_server_and_children(tmp_path, number, healthy):
    plan = fake_plan(tmp_path, healthy=healthy)
    process = serving_process(serving_words(plan, tmp_path), tmp_path)
    try:
        wait_for(tmp_path, healthy)
        process.send_signal(number)
        process.wait(timeout=300)
    finally:
        process.kill()
    told = (tmp_path / "said").read_text()
    assert process.returncode == 0
    assert "stopping vLLM" in told
    assert ("curl" in told) == healthy
    assert gone(int((tmp_path / "child").read_text()))


@pytest.mark.parametrize("keeper", ["a signal comes before it", "it cannot be started"])
def test_nothing_is_left_of_a_start_that_is_broken_off(tmp_path, monkeypatch, keeper):
    """Between vLLM and its keeper nobody would stop vLLM: a signal waits until both are there."""
    popen, started = subprocess.Popen, []

    def starting(words, **options):
        if started and keeper == "it cannot be started":
            raise OSError("Cannot allocate memory")
        started.append(popen(words, **options))
        if len(started) == 1 and keeper == "a signal comes before it":
            signal.raise_signal(signal.SIGINT)
        return started[-1]

    monkeypatch.setattr(serving.subprocess, "Popen", starting)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises((KeyboardInterrupt, OSError)), serving.Server(fake_plan(tmp_path)):
            pass
    finally:
        signal.signal(signal.SIGINT, before)
    assert all(process.poll() is not None for process in started)
    assert len(started) == (2 if keeper == "a signal comes before it" else 1)


def test_a_killed_process_takes_its_server_with_it(tmp_path):
    """Nobody can handle SIGKILL; the out-of-memory killer sends it too."""
    plan = fake_plan(tmp_path)
    process = serving_process(serving_words(plan, tmp_path), tmp_path)
    wait_for(tmp_path)
    process.kill()
    process.wait()
    assert gone(int((tmp_path / "child").read_text()))
    assert not serving.is_healthy(plan.url)


def test_a_terminal_that_closes_stops_server_and_children(tmp_path):
    plan = fake_plan(tmp_path)
    words = ["env", f"PYTHONPATH={ROOT}", *serving_words(plan, tmp_path)]
    process, terminal = pty.fork()
    if process == 0:
        os.execvp(words[0], words)
    said = b""
    while b"curl" not in said:  # the greeting, after which serve.sh waits; an error if it ends before
        said += os.read(terminal, 4096)
    assert serving.is_healthy(plan.url)
    os.close(terminal)
    os.waitpid(process, 0)
    assert gone(int((tmp_path / "child").read_text()))
    assert not serving.is_healthy(plan.url)


def ignores(process: subprocess.Popen, number: signal.Signals) -> bool:
    """Whether the kernel throws a signal to the process away: neither it nor a handler ends the process."""
    (mask,) = [line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if line.startswith("SigIgn")]
    return bool(int(mask.split()[1], 16) & 1 << number - 1)


def test_nohup_keeps_a_server_running(tmp_path):
    plan = fake_plan(tmp_path)
    words = ["nohup", *serving_words(plan, tmp_path)]
    process = serving_process(words, tmp_path)
    try:
        wait_for(tmp_path)
        assert ignores(process, signal.SIGHUP), "or it would end, at once or later"
        process.send_signal(signal.SIGHUP)
        assert serving.is_healthy(plan.url)
    finally:
        process.terminate()
        process.wait()
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
                [sys.executable, "-c", serving_examples.python_example(plan)],
                cwd=tmp_path,
                env=env,
                capture_output=True,
                text=True,
            )
        ]
        if shutil.which("curl"):
            told.append(
                subprocess.run(
                    ["bash", "-c", serving_examples.curl_example(plan)], cwd=tmp_path, env=env, capture_output=True, text=True
                )
            )
    for done in told:
        assert "answer to Assess the normality" in done.stdout, done.stderr
    first, *others = server.bodies
    assert first["messages"][1]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    assert first["temperature"] == 0
    assert all(other == first for other in others)
