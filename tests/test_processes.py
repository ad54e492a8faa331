"""torchrun with two processes on the CPU: the same run as one process with the same total batch."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
import torch._dynamo
from conftest import ROOT
from datasets import DatasetDict, concatenate_datasets
from holding_still import Hold
from running import losses_of, words
from safetensors.torch import load_file

import train
from sonovqa import cli, devices, resuming, training

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def ended(*command: str, **environment: str) -> subprocess.CompletedProcess:
    """A command run to its end, with a thread a process."""
    env = os.environ | ONE_THREAD | environment
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, timeout=900)


def launched(*command: str) -> tuple[dict, str]:
    """Run train.py by a launcher or by Python; its record and what it said."""
    done = ended(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "broadcast_buffers" not in done.stderr, "accelerate's use of an old name concerns nobody here"
    folder = Path(command[command.index("--outputs") + 1]) / command[command.index("--run-name") + 1]
    return json.loads((folder / "run.json").read_text()), done.stdout


def uneven(data: Path, folder: Path) -> Path:
    """The set with a fifth validation row: with two processes one of them has nothing left to validate."""
    splits = DatasetDict.load_from_disk(data)
    splits["validation"] = concatenate_datasets([splits["validation"], splits["test"].select([0])])
    splits.save_to_disk(folder)
    shutil.copy(data / "dataset.json", folder)
    return folder


def test_two_processes_give_the_run_of_one(base, data, tmp_path):
    """Fifteen training rows and five to validate: neither divides by two processes' batches, and no row counts twice."""
    data, more = uneven(data, tmp_path / "uneven"), ("--no-checkpointing", "--max-images", "15")
    one, _ = launched(sys.executable, "train.py", *words(base, data, tmp_path, "one", *more, batch=4))
    two, said = launched(*TORCHRUN, "train.py", *words(base, data, tmp_path, "two", *more, batch=2))
    assert two["processes"] == 2 and one["processes"] == 1
    assert losses_of(two) == pytest.approx(losses_of(one), rel=1e-5)
    assert two["training"]["best_validation_loss"] == pytest.approx(one["training"]["best_validation_loss"], rel=1e-5)
    left, right = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    worst = max(((left[name] - right[name]).norm() / left[name].norm()).item() for name in left)
    assert worst < 1e-3, "Adam divides by the root of small squares, so rounding grows"
    assert left.keys() == right.keys() and all(torch.isfinite(tensor).all() for tensor in right.values())
    assert said.count("step     1  loss") == 1 and said.count("merge check passed") == 1, "one of them prints"
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == sorted(p.name for p in (tmp_path / "one").iterdir())


def test_two_processes_killed_go_on_as_one_run(base, data, tmp_path):
    """With dropout and two passes over the data, each shuffled: the weights and losses of a run that was left alone."""
    more = {"batch": 2, "steps": 8, "eval_every": 3, "dropout": 0.1, "max_images": 12}
    whole, killed = (
        (*TORCHRUN, "train.py", *words(base, data, tmp_path, name, "--no-merge", **more)) for name in ("whole", "killed")
    )
    alone, _ = launched(*whole)
    hold = Hold(r"^os.mkdir \S*/checkpoint-6 ", tmp_path / "held")
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    with subprocess.Popen(killed, cwd=ROOT, env=os.environ | ONE_THREAD | hold.environment, **pipes) as first:
        hold.wait(first)
        for process in (psutil.Process(first.pid), *psutil.Process(first.pid).children(recursive=True)):
            process.kill()
    resumed, said = launched(*killed, "--resume")
    assert resumed["training"]["resumed_at"] == [3] and "checkpoint-3" in said
    assert losses_of(resumed) == losses_of(alone)
    left, right = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "killed"))
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("way", ["whole", "cut"])
def test_blocks_that_are_compiled_anew_in_the_backward_pass(way):
    """As Unsloth's are: compiled, checkpointed, under DDP. Once "cut" runs, torch has mended it: `keep_blocks_whole` can go."""
    done = ended(*TORCHRUN, "tests/compiled_blocks.py", way, PYTHONPATH=str(ROOT))
    if way == "cut":
        assert done.returncode and "CheckpointError" in done.stderr, done.stderr[-2000:]
    else:
        assert done.returncode == 0, done.stderr[-3000:]


def test_training_of_several_processes_keeps_blocks_whole(monkeypatch, tmp_path):
    monkeypatch.setattr(torch._dynamo.config, "optimize_ddp", True)
    args = train.parse(["--data", "unread", "--eval-every", "1", "--optimizer", "adamw_torch"])
    training.configure(args, tmp_path, validate=False, steps=1)
    assert torch._dynamo.config.optimize_ddp
    monkeypatch.setattr(devices, "processes", lambda: 2)
    training.configure(args, tmp_path, validate=False, steps=1)
    assert not torch._dynamo.config.optimize_ddp


def test_a_mistake_of_all_processes_is_said_once(tmp_path):
    done = ended(*TORCHRUN, "train.py", "--data", str(tmp_path / "none"), "--model", "tiny", "--run-name", "r")
    assert done.returncode and done.stderr.count("\nerror: ") + done.stderr.startswith("error: ") == 1, done.stderr[-2000:]


def test_a_mistake_of_one_process_is_said_too(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(cli, "FIRST_SPEAKS", 0.01)
    before = signal.getsignal(signal.SIGTERM)

    def mistaken():
        raise cli.UserError("its own disk is full")

    with pytest.raises(SystemExit) as left:
        cli.run(mistaken)
    signal.signal(signal.SIGTERM, before)
    assert left.value.code == 2 and capsys.readouterr().err == "error: its own disk is full\n"


def test_several_processes_are_told_to_go_on_as_many(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = ["train.py", "--data", "my set", "--run-name", "r", "--resume"]
    assert resuming.way_on(words) == "go on with: torchrun --nproc_per_node=2 train.py --data 'my set' --run-name r --resume"
    monkeypatch.delenv("WORLD_SIZE")
    assert resuming.way_on(words[:3]) == "go on with: python train.py --data 'my set' --resume"
