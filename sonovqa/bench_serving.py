"""A vLLM server as a benchmark needs it: started as serve.sh starts it, its memory watched."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sonovqa import devices, serving, serving_plan, serving_signals

SAMPLE_SECONDS = 1.0  # between two looks at a server's memory; summing its pages costs CPU time that it needs itself
_STATED = re.compile(r"Model loading took ([\d.]+) GiB")


@dataclass(frozen=True)
class Served:
    """A server that is healthy.

    Attributes:
        model: its name in the API.
        url: base URL.
        load_seconds: from its start until it was healthy, imports and warm-up included.
        memory: watches its processes.
        log: its output.
    """

    model: str
    url: str
    load_seconds: float
    memory: TreeMemory
    log: Path


@contextlib.contextmanager
def served(run: Path, lora: bool, log: Path, flags: tuple[str, ...] = (), wait: float = 1800.0) -> Iterator[Served]:
    """Serve a run or model folder on a free port of this machine for as long as the block lasts.

    Args:
        run, lora, flags: see `serving_plan.make_plan`; ``flags`` go to vLLM.
        log: file that takes vLLM's output.
        wait: most seconds until it must be healthy.

    Raises:
        UserError: if it cannot be started or does not become healthy.
    """
    plan = serving_plan.make_plan(run, lora, port=free_port(), extra=flags)
    plan = dataclasses.replace(plan, log=log)
    with serving_signals.stopping_on_signals(), serving.Server(plan) as server, TreeMemory(server.process.pid) as memory:
        yield Served(plan.name, plan.url, server.wait_until_healthy(wait), memory, log)


def free_port() -> int:
    """A TCP port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class TreeMemory(threading.Thread):
    """Watches the memory of a process and all its descendants: on a GPU box the device's, else main memory.

    Main memory is the proportional set size, in which a page that processes share counts once (Linux ``smaps_rollup``,
    summed by psutil); a sum of resident sets would count it in each. On a GPU it is what the device has in use over what
    it had before, by nvidia-smi: vLLM reserves most of the device for its KV cache, so beside it stands what its log states
    for weights (`stated_weights`).
    """

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.pid, self.peak, self.over = pid, 0, threading.Event()
        self.before = device_used()
        self.kind = "main memory of its processes" if self.before is None else "device memory in use"

    def __enter__(self) -> TreeMemory:
        self.start()
        return self

    def __exit__(self, *fault) -> None:
        self.over.set()
        self.join()

    def run(self) -> None:
        """Look once a second until told that it is over."""
        while not self.over.wait(SAMPLE_SECONDS):
            self.now()

    def now(self) -> int:
        """Bytes in use now."""
        used = device_used()
        used = _tree_bytes(self.pid) if used is None or self.before is None else used - self.before
        self.peak = max(self.peak, used)
        return used


def _tree_bytes(pid: int) -> int:
    import psutil

    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        whole = psutil.Process(pid)
        for process in (whole, *whole.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                total += process.memory_full_info().pss
    return total


def device_used() -> int | None:
    """Bytes in use on this process's GPU, by nvidia-smi; ``None`` where there is none. No CUDA context is made for it."""
    told = devices.ask_nvidia_smi("memory.used")
    try:
        return int(float(told[0][0]) * 2**20)
    except (ValueError, IndexError):
        return None


def device_processes() -> int:
    """How many processes compute on this process's GPU, by nvidia-smi; 0 where there is none."""
    told = devices.ask_nvidia_smi("uuid")
    return sum(uuid == told[0][0] for uuid, *_ in devices.computing_processes()) if told else 0


def stated_weights(log: Path) -> int | None:
    """Bytes that vLLM's log says its model took, ``None`` where it does not say (on CPUs it does not)."""
    told = _STATED.findall(log.read_text(errors="replace"))
    return round(float(told[-1]) * 2**30) if told else None
