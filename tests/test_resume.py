"""`train.py --resume`: a run killed again and again ends in the very weights and curve of one that was left alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import running
import torch
from conftest import ROOT
from holding_still import Hold
from safetensors.torch import load_file

import train
from sonovqa import files, resuming, training
from sonovqa.cli import UserError

STEPS = 9


def words(base: Path, data: Path, outputs: Path, name: str, *more: str) -> list[str]:
    """Dropout, two passes over the data with a shuffle each, steps that are no multiple of the checkpoints'."""
    harder = {"batch": 3, "steps": STEPS, "eval_every": 2, "dropout": 0.1, "schedule": "cosine", "max_images": 12}
    return running.words(base, data, outputs, name, *more, **harder)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the processes started here have: sums of another number of threads differ in their last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def undisturbed(base, data, tmp_path_factory) -> Path:
    """A run that was left alone."""
    outputs = tmp_path_factory.mktemp("undisturbed")
    train.main(words(base, data, outputs, "run"))
    return outputs / "run"


def started(*arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "train.py", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "500"} | environment,
        start_new_session=True,
    )


def stopped_at(hold: Hold, how: signal.Signals, *arguments: str) -> tuple[int, str]:
    """Run train.py until it stands still, send the signal to it and all it started; gives exit status and output."""
    process = started(*arguments, **hold.environment)
    hold.wait(process)
    os.killpg(process.pid, how)
    hold.let_go()  # what handles a signal goes on; the kernel hands it over before this file is seen
    said, _ = process.communicate(timeout=600)
    return process.returncode, said


def curve_of(run: Path) -> list[tuple]:
    curve = json.loads((run / "run.json").read_text())["training"]["curve"]
    return [(entry["step"], entry.get("loss"), entry.get("eval_loss"), entry.get("learning_rate")) for entry in curve]


def same_weights(left: Path, right: Path) -> bool:
    a, b = load_file(left), load_file(right)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_same_run(run: Path, undisturbed: Path) -> None:
    assert curve_of(run) == curve_of(undisturbed)
    assert [step for step, loss, *_ in curve_of(run) if loss is not None] == list(range(1, STEPS + 1))
    assert same_weights(run / "adapter" / "adapter_model.safetensors", undisturbed / "adapter" / "adapter_model.safetensors")
    assert same_weights(run / "merged" / "model.safetensors", undisturbed / "merged" / "model.safetensors")
    made, wanted = (json.loads((folder / "run.json").read_text())["training"] for folder in (run, undisturbed))
    for key in ("steps", "epochs", "loss", "best_validation_loss"):
        assert made[key] == pytest.approx(wanted[key], rel=1e-12), key
    answers = [each["answers_per_second"] * each["seconds"] for each in (made, wanted)]
    assert answers[0] == pytest.approx(answers[1], rel=0.01), "rates are of all sessions, whatever time each of them took"


def test_a_run_killed_again_and_again_ends_as_if_it_was_not(base, data, undisturbed, tmp_path):
    """SIGKILL before the first checkpoint, in the middle of writing one, between two, and while merging."""
    command, run = words(base, data, tmp_path, "run"), tmp_path / "run"
    at = lambda step: run / "checkpoints" / f"checkpoint-{step}"  # noqa: E731
    held = lambda number, where: Hold(where, tmp_path / f"held-{number}")  # noqa: E731
    stopped_at(held(1, r"^os.mkdir \S*/checkpoint-2 "), signal.SIGKILL, *command)
    assert (run / "checkpoints" / resuming.STARTED).exists() and resuming.stage(run) == "new"
    stopped_at(held(2, r"^open \S*/checkpoint-4/adapter_config.json w"), signal.SIGKILL, *command, "--resume")
    assert list(at(4).glob("*.safetensors")) and not resuming.is_whole(at(4)), "killed while writing it"
    _, said = stopped_at(held(3, r"^os.mkdir \S*/checkpoint-8 "), signal.SIGKILL, *command, "--resume")
    assert "going on from" in said and "checkpoint-2" in said, "the half-written one is not taken for a whole one"
    assert resuming.is_whole(at(6)) and not at(8).exists()
    stopped_at(held(4, r"^open \S*/\.merged\.unchecked\.[^/]*\.part/config.json w"), signal.SIGKILL, *command, "--resume")
    assert list(run.glob(".merged.unchecked.*"))
    assert resuming.stage(run) == "trained"
    done = started(*command, "--resume")
    said, _ = done.communicate(timeout=600)
    assert done.returncode == 0 and "merging only" in said and "step " not in said
    assert_same_run(run, undisturbed)
    assert json.loads((run / "run.json").read_text())["training"]["resumed_at"] == [2, 6]
    assert {path.name for path in run.iterdir()} == {"adapter", "merged", "checkpoints", "plan.json", "merge.json", "run.json"}


def test_ctrl_c_saves_the_step_at_hand_and_says_how_to_go_on(base, data, undisturbed, tmp_path):
    command, run = words(base, data, tmp_path, "run", "--workers", "2"), tmp_path / "run"
    status, said = stopped_at(Hold(r"^os.mkdir \S*/checkpoint-4 ", tmp_path / "held"), signal.SIGINT, *command)
    assert status == 130 and "Traceback" not in said
    assert said.count("stopping after this step") == 1, "its data workers, who get the signal too, are silent"
    assert said.strip().splitlines()[-1].startswith("stopped: what was finished is kept; go on with: python train.py --model")
    last = resuming.last_checkpoint(run / "checkpoints")
    assert 2 < resuming.number(last) < STEPS
    train.main([*command, "--resume"])
    assert_same_run(run, undisturbed)


@pytest.fixture
def interrupted(base, data, tmp_path, monkeypatch) -> Path:
    """A run that fell over right after its checkpoint at step 4."""
    monkeypatch.setattr("sonovqa.training.Progressing.on_save", falling(training.Progressing.on_save, after=4))
    with pytest.raises(Fall):
        train.main(words(base, data, tmp_path, "run"))
    monkeypatch.undo()
    return tmp_path / "run"


class Fall(Exception):
    """What a test makes a run fall over with."""


def falling(on_save, after: int):
    def saved(self, args, state, control, **named):
        on_save(self, args, state, control, **named)
        if state.global_step == after:
            raise Fall

    return saved


CHANGED = [
    (("--lr", "0.02"), "--lr was 0.01 and now is 0.02"),
    (("--batch", "2"), "--batch was 3 and now is 2"),
    (("--rank", "8", "--no-vision"), "--rank was 16 and now is 8, --vision was True and now is False"),
    (("--task", "Q2"), "--task was all and now is Q2"),
    (("--model", "tiny"), "--model was .* and now is tiny"),
    (("--epochs", "9"), "--epochs was 3.0 and now is 9.0"),
]


def test_another_command_does_not_go_on(interrupted, base, data, tmp_path):
    command = words(base, data, tmp_path, "run")
    for more, told in CHANGED:
        with pytest.raises(UserError, match=f"--resume; {told}; a run goes on only as it was started"):
            train.main([*command, "--resume", *more])
    shutil.copytree(data, tmp_path / "other")
    files.write_json(tmp_path / "other" / "dataset.json", {"fingerprint": "f" * 64})
    with pytest.raises(UserError, match="--data was toy and now is ffffffffffff; a run goes on only"):
        train.main([*words(base, tmp_path / "other", tmp_path, "run"), "--resume"])
    with pytest.raises(UserError, match="holds an unfinished run; add --resume"):
        train.main(command)


HOLDER = """
import sys
from pathlib import Path
from sonovqa import resuming
resuming.start(Path(sys.argv[1]), {})
print("holds", flush=True)
sys.stdin.read()
"""


def test_a_run_is_trained_by_one_process_at_a_time(base, data, tmp_path, monkeypatch):
    run, command = tmp_path / "run", words(base, data, tmp_path, "run")
    resuming.hold(run)
    assert not run.exists(), "asking leaves nothing behind"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(run)], cwd=ROOT, **pipes) as other:
        assert other.stdout.readline() == "holds\n"
        for more in ((), ("--resume",)):
            with pytest.raises(UserError, match=f"is being trained by process {other.pid}; .*; wait .* kill -INT {other.pid}$"):
                train.main([*command, *more])
        with pytest.raises(UserError, match="is being trained by"):
            resuming.start(run, {"another": "start"})
        assert resuming.started(run) == {}
        monkeypatch.setenv("RANK", "1")
        resuming.hold(run)  # of torchrun's processes the first one has it
        monkeypatch.delenv("RANK")
        other.kill()
    resuming.start(run, {})
    resuming.hold(run)  # it is this process's own now
    assert (run / "checkpoints" / resuming.HELD).read_text().strip() == str(os.getpid())


def test_a_moved_run_goes_on_and_is_not_done_twice(interrupted, base, data, undisturbed, tmp_path, capsys):
    """Fewer log lines, no tracker and another place do not change a run."""
    shutil.move(tmp_path / "run", tmp_path / "elsewhere" / "run")
    command = [*words(base, data, tmp_path / "elsewhere", "run"), "--resume"]
    train.main(command)
    assert_same_run(tmp_path / "elsewhere" / "run", undisturbed)
    capsys.readouterr()
    train.main(command)
    said = " ".join(capsys.readouterr().out.split())
    assert "is finished; nothing is left to do" in said and "loading" not in said


def test_an_adapter_on_a_quantised_base_is_trained_in_fp32_and_goes_on_so(base, data, tmp_path, monkeypatch):
    """TRL puts it into bf16, in which small updates are lost; PEFT loads a checkpoint's in fp32. (On a CPU bitsandbytes repacks
    4-bit weights when a model is first validated, so those go on a little differently.)"""
    more = ("--bits", "8", "--no-merge", "--steps", "4")
    train.main(words(base, data, tmp_path, "whole", *more))
    monkeypatch.setattr("sonovqa.training.Progressing.on_save", falling(training.Progressing.on_save, after=2))
    with pytest.raises(Fall):
        train.main(words(base, data, tmp_path, "run", *more))
    monkeypatch.undo()
    train.main([*words(base, data, tmp_path, "run", *more), "--resume"])
    runs = [tmp_path / name for name in ("run", "whole")]
    assert curve_of(runs[0]) == curve_of(runs[1])
    adapters = [load_file(run / "adapter" / "adapter_model.safetensors") for run in runs]
    assert {tensor.dtype for tensor in adapters[1].values()} == {torch.float32}
    assert all(torch.equal(adapters[0][name], tensor) for name, tensor in adapters[1].items())


def test_the_best_checkpoint_and_the_patience_outlive_a_resume(base, data, tmp_path, monkeypatch):
    """Steps too small to change the loss: the first stays the best, and two that are no better end the run."""
    more = ("--patience", "2", "--lr", "1e-12", "--schedule", "constant_with_warmup", "--eval-every", "1", "--no-merge")
    train.main(words(base, data, tmp_path, "whole", *more))
    whole = json.loads((tmp_path / "whole" / "run.json").read_text())["training"]
    best = min((entry["eval_loss"], entry["step"]) for entry in whole["curve"] if "eval_loss" in entry)[1]
    assert whole["steps"] == best + 2 < STEPS
    monkeypatch.setattr("sonovqa.training.Progressing.on_save", falling(training.Progressing.on_save, after=best + 1))
    with pytest.raises(Fall):
        train.main(words(base, data, tmp_path, "run", *more))
    monkeypatch.undo()
    train.main([*words(base, data, tmp_path, "run", *more), "--resume"])
    assert curve_of(tmp_path / "run") == curve_of(tmp_path / "whole")
    assert same_weights(*(tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("run", "whole")))


def test_a_run_killed_after_its_last_step_takes_no_further_one(base, data, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr("sonovqa.training.Progressing.on_save", falling(training.Progressing.on_save, after=STEPS))
    with pytest.raises(Fall):
        train.main(words(base, data, tmp_path, "run"))
    monkeypatch.undo()
    train.main([*words(base, data, tmp_path, "run"), "--resume"])
    assert_same_run(tmp_path / "run", undisturbed)


def test_checkpoints_with_something_missing_are_not_whole(tmp_path):
    for step, whole in ((2, True), (4, True), (10, False)):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "weights").write_bytes(b"0" * 100)
        if whole:
            resuming.mark_whole(checkpoint)
    os.truncate(tmp_path / "checkpoint-4" / "weights", 50)  # a disk that lost its last writes
    assert resuming.last_checkpoint(tmp_path).name == "checkpoint-2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2"]
    (tmp_path / "checkpoint-2" / "weights").unlink()  # a kill within its removal
    assert resuming.last_checkpoint(tmp_path) is None


def test_a_full_disk_is_one_line_and_keeps_the_checkpoints_before(base, data, tmp_path, monkeypatch):
    save = torch.save

    def full(value, path, *arguments, **named):
        if "checkpoint-4" in str(path):
            raise RuntimeError(
                "[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/1: file write failed"
            )
        save(value, path, *arguments, **named)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left on device"):
        train.main(words(base, data, tmp_path, "run"))
    assert resuming.number(resuming.last_checkpoint(tmp_path / "run" / "checkpoints")) == 2
