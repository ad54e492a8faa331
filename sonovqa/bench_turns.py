"""Benchmarks on one device take turns at it, so that what one of them times is not slowed by another.

Loading and compiling take minutes and hardly use a GPU, timed steps take seconds and need all of it. So processes load and
warm up side by side (`beside_others`), and while one is under the clock (`alone`) all others wait. Nothing is to be set:
whoever measures on the same device of the same machine takes part.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sonovqa import devices, files
from sonovqa.cli import console


@contextlib.contextmanager
def beside_others() -> Iterator[None]:
    """Load or warm up: at the same time as others do, not while one is timed."""
    with _held(fcntl.LOCK_SH):
        yield


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Be timed: no other benchmark on this device loads, warms up or is timed meanwhile."""
    with _held(fcntl.LOCK_EX):
        yield


def file() -> Path:
    """The lock file of this process's device: the first GPU that it may see, by the variable that says so. (To ask CUDA would
    take memory there, of those that only send requests to a server too.)"""
    device = devices.first_visible() or "none"
    return Path(tempfile.gettempdir()) / f"sonovqa-bench-{os.getuid()}-{files.sha256(device)[:16]}.lock"


@contextlib.contextmanager
def _held(how: int) -> Iterator[None]:
    # A lock ends with the process that holds it, however that ends; unlocking frees it for workers forked meanwhile as well.
    with open(file(), "w") as held:
        try:
            fcntl.flock(held, how | fcntl.LOCK_NB)
        except BlockingIOError:
            console.print("another benchmark measures on this device: waiting for its turn to end")
            fcntl.flock(held, how)
        try:
            yield
        finally:
            fcntl.flock(held, fcntl.LOCK_UN)
