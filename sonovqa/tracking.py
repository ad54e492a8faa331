"""Who is told of a run while it goes on, ``--report-to``: MLflow, TensorBoard or Weights & Biases.

All of them get arguments, metrics by step, run.json and, after an evaluation, its scores. MLflow and TensorBoard write to
files of this machine unless the environment says otherwise; Weights & Biases sends to its server unless
``WANDB_MODE=offline``. run.json has everything they are told, so none of them is needed.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from sonovqa import files, resuming, tracking_mlflow
from sonovqa.cli import console
from sonovqa.tracking_mlflow import numbers

MLFLOW, TENSORBOARD, WANDB, NONE = CHOICES = ("mlflow", "tensorboard", "wandb", "none")
EVENTS = "tensorboard"  # in a run's folder: its event files
TRACKED = "wandb.json"  # in a run's folder: which run of Weights & Biases is its own
INSTALL = {MLFLOW: "mlflow", TENSORBOARD: "tensorboard", WANDB: "wandb"}


class Tracker(Protocol):
    """What train.py tells of a run."""

    def metrics(self, values: Mapping[str, object], step: int) -> None:
        """Log the numeric ones of ``values`` at ``step``."""

    def finish(self, record: Path) -> None:
        """Hand over run.json and close the run."""


def start(where: str, outputs: Path, name: str, params: dict) -> Tracker | None:
    """The tracker of a run; ``None`` for ``none``, or, with a line that says so, where its package is not installed.

    Args:
        where: one of `CHOICES`.
        outputs: the folder that holds all runs.
        name: the run's name.
        params: its arguments; ``resume`` says that an earlier run of this name is to go on.
    """
    if where == NONE:
        return None
    if importlib.util.find_spec(INSTALL[where]) is None:
        console.print(
            f"{where} is not installed: this run is recorded in run.json only (pip install {INSTALL[where]})", soft_wrap=True
        )
        return None
    return {MLFLOW: tracking_mlflow.MLflow, TENSORBOARD: TensorBoard, WANDB: WandB}[where](outputs, name, params)


def problems(where: str) -> list[str]:
    """What keeps a run from being tracked, found before it is trained: Weights & Biases without a login asks at the terminal."""
    if where != WANDB or importlib.util.find_spec("wandb") is None or os.environ.get("WANDB_MODE", "online") != "online":
        return []
    import wandb

    if wandb.login(prompt=False):  # looks for a key, asks nobody
        return []
    told = "--report-to wandb; there is no login; WANDB_API_KEY or one kept by `wandb login` is needed"
    return [f"{told}; run `wandb login`, or set WANDB_MODE=offline to send nothing"]


def attach(run: Path, artefacts: list[Path], images: list[Path], scores: Mapping[str, float]) -> None:
    """Tell of an evaluation, to each tracker that knows the run.

    Args:
        run: its folder.
        artefacts: files that may go to a server.
        images: files that hold images: they stay on this machine.
        scores: figures by name.
    """
    if (run / tracking_mlflow.TRACKED).exists():
        here = tracking_mlflow.tracks_here(run.parent)
        tracking_mlflow.attach(run, [*artefacts, *(images if here else ())], scores)
    if (run / EVENTS).is_dir() and importlib.util.find_spec(TENSORBOARD):
        TensorBoard.attach(run, scores)
    if (run / TRACKED).exists() and importlib.util.find_spec("wandb"):
        if lacking := problems(WANDB):
            console.print(f"the scores of {run} were not sent: {'; '.join(lacking)}", soft_wrap=True)
        else:
            WandB.attach(run, artefacts, scores)


def attempt(what: str, function: Callable, *arguments):
    """Call what tells a tracker of a sweep; where it fails, one line says so, and everything is in files all the same.

    Args:
        what: is told, such as ``the scores of outputs/a``.
        function, arguments: the call.

    Returns:
        What the call does, ``None`` if it failed.
    """
    try:
        return function(*arguments)
    except Exception as fault:  # every tracker, server and database has faults of its own, and none is worth a sweep
        told = re.sub(r"//[^/@\s]*@", "//", " ".join(str(fault).split()))[:300]  # without a password in an address
        console.print(f"no tracker was told of {what}: {type(fault).__name__}: {told}", markup=False, soft_wrap=True)
        return None


class TensorBoard:
    """Event files in ``<outputs>/<name>/tensorboard``; ``tensorboard --logdir outputs`` shows all runs. Arguments as of `start`.

    Source: torch.utils.tensorboard.
    """

    def __init__(self, outputs: Path, name: str, params: dict):
        from torch.utils.tensorboard import SummaryWriter

        last = resuming.last_checkpoint(outputs / name / "checkpoints") if params.get("resume") else None
        # What was logged after the checkpoint is logged again: `purge_step` takes it out of the curves.
        gone_on = resuming.number(last) + 1 if last else None
        self._writer = SummaryWriter(str(outputs / name / EVENTS), purge_step=gone_on)
        if last is None:
            told = "\n".join(f"| {key} | {value} |" for key, value in params.items() if value is not None)
            self._writer.add_text("arguments", f"| argument | value |\n| --- | --- |\n{told}")

    def metrics(self, values: Mapping[str, object], step: int) -> None:
        """See `Tracker`."""
        for key, value in numbers(values).items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def finish(self, record: Path) -> None:
        """See `Tracker`."""
        if record.exists():
            self._writer.add_text("run.json", f"```json\n{record.read_text(encoding='utf-8')}\n```")
        self._writer.close()

    @staticmethod
    def attach(run: Path, scores: Mapping[str, float]) -> None:
        """Scores of an evaluation, at step 0 of ``scores/…``: they belong to the end of the run."""
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(run / EVENTS)) as writer:
            for key, value in scores.items():
                writer.add_scalar(f"scores/{key}", value, 0)


class WandB:
    """A run of Weights & Biases. Arguments as of `start`.

    Its id is kept in ``<outputs>/<name>/wandb.json``, so that a resumed run and an evaluation go on in it. Neither code, git
    state nor what the console shows is sent.
    """

    def __init__(self, outputs: Path, name: str, params: dict):
        folder = outputs / name
        folder.mkdir(parents=True, exist_ok=True)
        kept = files.read_json(folder / TRACKED) if params.get("resume") and (folder / TRACKED).exists() else {}
        given = {key: str(value) for key, value in params.items() if value is not None}
        self._run = self._open(folder, name=name, id=kept.get("run_id"), config=given, resume="allow" if kept else None,
                               group=os.environ.get("WANDB_RUN_GROUP"))  # fmt: skip
        self._run.define_metric("step")
        # A resumed run logs some steps again, which the run's own counter would refuse.
        self._run.define_metric("*", step_metric="step")
        files.write_json(folder / TRACKED, {"run_id": self._run.id})

    @staticmethod
    def _open(folder: Path, **named):
        import wandb

        quiet = wandb.Settings(console="off", disable_git=True, disable_code=True, silent=True)
        return wandb.init(project=tracking_mlflow.EXPERIMENT, dir=str(folder), settings=quiet, **named)

    def metrics(self, values: Mapping[str, object], step: int) -> None:
        """See `Tracker`."""
        self._run.log(numbers(values) | {"step": step})

    def finish(self, record: Path) -> None:
        """See `Tracker`."""
        if record.exists():
            self._run.save(str(record), base_path=str(record.parent), policy="now")
        self._run.finish()

    @classmethod
    def attach(cls, run: Path, artefacts: list[Path], scores: Mapping[str, float]) -> None:
        """Scores of an evaluation into the run's summary, files beside run.json."""
        opened = cls._open(run, id=files.read_json(run / TRACKED)["run_id"], resume="allow")
        opened.summary.update({f"scores/{key}": value for key, value in scores.items()})
        for path in artefacts:
            opened.save(str(path), base_path=str(path.parent.parent), policy="now")
        opened.finish()
