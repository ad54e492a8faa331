"""`train.py --report-to`: each tracker has the run's arguments, curve, record and scores, and goes on after a stop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import running
from conftest import ROOT

from sonovqa import experiments_records, files, tracking
from sonovqa.cli import UserError


def events(run: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / tracking.EVENTS), size_guidance={"tensors": 0})
    found.Reload()
    return found


def scored(run: Path) -> None:
    """An evaluation's files."""
    metrics = {"accuracy": {"value": 0.75}}
    scores = {"overall": {"metrics": metrics}, "questions": {"Q7": {"headline": "accuracy", "metrics": metrics}}}
    files.write_json(run / "eval-test" / "scores.json", scores)
    files.write_text(run / "eval-test" / "report.html", "<html></html>")


def test_tensorboard_shows_a_runs_curve_record_and_scores(base, data, tmp_path):
    made = running.run(base, data, tmp_path, "seen", "--no-merge", report_to="tensorboard")
    scored(tmp_path / "seen")
    experiments_records.track(tmp_path / "seen")
    found = events(tmp_path / "seen")
    assert [(point.step, pytest.approx(point.value, rel=1e-5)) for point in found.Scalars("loss")] == [
        (entry["step"], entry["loss"]) for entry in made["training"]["curve"] if "loss" in entry
    ]
    assert len(found.Scalars("eval_loss")) == 2 and found.Scalars("scores/Q7 accuracy")[0].value == 0.75
    told = {name: found.Tensors(name)[0].tensor_proto.string_val[0].decode() for name in found.Tags()["tensors"]}
    assert "| lr | 0.01 |" in told["arguments/text_summary"] and '"finished"' in told["run.json/text_summary"]
    assert not (tmp_path / "mlflow.db").exists(), "one tracker is told, not two"


def test_tensorboards_curve_of_a_resumed_run_has_every_step_once(tmp_path):
    first = tracking.start("tensorboard", tmp_path, "r", {"lr": 1})
    for step in (1, 2, 3):
        first.metrics({"loss": step, "note": "a word"}, step)
    checkpoint = tmp_path / "r" / "checkpoints" / "checkpoint-2"
    files.write_json(checkpoint / "trainer_state.json", {})
    tracking.resuming.mark_whole(checkpoint)
    again = tracking.start("tensorboard", tmp_path, "r", {"lr": 1, "resume": True})  # the first was killed
    again.metrics({"loss": 30}, 3)
    again.finish(tmp_path / "r" / "run.json")
    assert [(point.step, point.value) for point in events(tmp_path / "r").Scalars("loss")] == [(1, 1), (2, 2), (3, 30)]


WANDB = """
import sys
from pathlib import Path
from sonovqa import experiments_records, files, tracking
outputs = Path(sys.argv[1])
assert tracking.problems("wandb") == []
first = tracking.start("wandb", outputs, "r", {"lr": 0.25, "data": Path("data/x"), "resume": False})
first.metrics({"loss": 2.0, "note": "a word"}, 1)
kept = files.read_json(outputs / "r" / tracking.TRACKED)
first._run.finish()
again = tracking.start("wandb", outputs, "r", {"lr": 0.25, "resume": True})
again.metrics({"loss": 1.0}, 1)
files.write_json(outputs / "r" / "run.json", {"run": "r"})
again.finish(outputs / "r" / "run.json")
assert files.read_json(outputs / "r" / tracking.TRACKED) == kept
experiments_records.track(outputs / "r")
"""


def test_weights_and_biases_keeps_a_run_without_a_server(tmp_path):
    """Offline, in a process of its own: the files that `wandb sync` would send hold the run, and nothing that must stay."""
    scored(tmp_path / "r")
    env = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")} | {"WANDB_MODE": "offline"}
    done = subprocess.run(
        [sys.executable, "-c", WANDB, str(tmp_path)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kept = [path.read_bytes() for path in sorted((tmp_path / "r" / "wandb").glob("offline-run-*/*.wandb"))]
    run_id = json.loads((tmp_path / "r" / tracking.TRACKED).read_text())["run_id"]
    assert len(kept) == 3 and all(run_id.encode() in one for one in kept), "begun, resumed, scored: one run"
    whole = b"".join(kept)
    assert b"lr" in whole and b"loss" in whole and b"scores/Q7 accuracy" in whole and b"run.json" in whole
    assert b"report.html" not in whole and b"a word" not in whole


def test_weights_and_biases_without_a_login_is_said_before_training(base, data, tmp_path, monkeypatch, capsys):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(UserError, match=r"there is no login.*WANDB_MODE=offline"):
        running.run(base, data, tmp_path, "r", report_to="wandb")
    assert not (tmp_path / "r").exists()
    files.write_json(tmp_path / "seen" / tracking.TRACKED, {"run_id": "x"})
    tracking.attach(tmp_path / "seen", [], [], {"Q7 accuracy": 0.5})
    assert "were not sent: --report-to wandb; there is no login" in capsys.readouterr().out


def test_a_tracker_that_is_not_installed_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    for name in tracking.CHOICES[:-1]:
        assert tracking.start(name, tmp_path, "r", {}) is None
        assert f"pip install {tracking.INSTALL[name]}" in capsys.readouterr().out
    assert tracking.start("none", tmp_path, "r", {}) is None and not capsys.readouterr().out


def test_runs_that_start_together_make_one_database(tmp_path):
    """Each finds none; SQLite would let only the first of them make its tables."""
    code = "import pathlib, sys; from sonovqa import tracking_mlflow as t; print(t._experiment(pathlib.Path(sys.argv[1])))"
    env = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    words, how = [sys.executable, "-c", code, str(tmp_path)], {"cwd": ROOT, "env": env, "stdout": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(words, **how) for _ in range(3)]
    told = [process.communicate(timeout=600)[0].split()[-1:] for process in started]
    assert told[0] and told == [told[0]] * 3 and not any(process.returncode for process in started)
