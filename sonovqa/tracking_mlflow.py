"""A run's record in MLflow: parameters, metrics by step, files; runs of an experiment below one of its own."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from sonovqa import credentials, files

EXPERIMENT = "unsloth_vlm_ultrasound"
TRACKED = "mlflow.json"  # in a run's folder: which MLflow run is its own
KIND = {"mlflow.experimentKind": "finetuning"}  # with "Model training" chosen, MLflow's pages open it on its runs
PARENT = "mlflow.parentRunId"  # the tag by which MLflow's pages nest runs


def tracking_uri(outputs: Path) -> str:
    """Where MLflow writes: ``MLFLOW_TRACKING_URI`` from the environment, else a SQLite file under the outputs folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(outputs / 'mlflow.db').resolve()}"


def tracks_here(outputs: Path) -> bool:
    """Whether MLflow writes to files of this machine rather than to a server."""
    return urlsplit(tracking_uri(outputs)).scheme in ("sqlite", "file", "")


class MLflow:
    """One MLflow run: parameters, metrics by step, and run.json as an artefact.

    The id is kept in ``<outputs>/<name>/mlflow.json``: a resumed run goes on in its MLflow run, and `attach` finds it. With
    ``MLFLOW_PARENT_RUN_ID`` in the environment the run stands below that one, as `sonovqa.experiments` sets it.

    Args:
        outputs: the folder that holds all runs; the SQLite file lies in it.
        name: the run's name.
        params: the run's arguments; ``resume`` says that an earlier MLflow run is to go on.
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
        self._mlflow.log_metrics(numbers(values), step=step)

    def finish(self, record: Path, status: str = "FINISHED") -> None:
        """Attach run.json and close the run."""
        if record.exists():
            self._mlflow.log_artifact(str(record))
        self._mlflow.end_run(status)


def numbers(values: Mapping[str, object]) -> dict[str, float]:
    """The numeric ones of ``values``."""
    return {key: float(value) for key, value in values.items() if isinstance(value, int | float)}


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
    with _one_at_a_time(outputs) if local else contextlib.nullcontext():
        client = mlflow.MlflowClient(uri)
        found = client.get_experiment_by_name(EXPERIMENT)
        if found:
            return found.experiment_id
        place = (outputs / "mlflow").resolve().as_uri() if local else None  # a server knows where its artefacts go
        return client.create_experiment(EXPERIMENT, artifact_location=place, tags=KIND)


@contextlib.contextmanager
def _one_at_a_time(outputs: Path) -> Iterator[None]:
    """Only one process makes the SQLite file: of two that find none and make its tables, one fails."""
    with open(outputs / "mlflow.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # ends with the file
        yield
