"""What a sweep takes for finished: runs, evaluations and comparisons of the very arguments that its commands have now."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import train
from sonovqa import families, files, resuming
from sonovqa.cli import UserError
from sonovqa.experiments_blocks import Command
from sonovqa.experiments_done import check_same

BASE = ("train.py", "--data", "d", "--model", "tiny", "--run", "a")


def trained(*more: str, model: str = "tiny", told: bool = True) -> Path:
    """Leave the run.json that train.py would, without training; ``told``: it also says what the run was started with."""
    args = train.parse([*BASE[1:], *more, "--model", model])
    families.fill_in(args, families.of_model("tiny"), True)
    started = {name: value for name, value in vars(args).items() if name not in resuming.FREE}
    args.steps, args.eval_every, args.optimizer = args.steps or 120, args.eval_every or 12, args.optimizer or "adamw_torch"
    run = {"arguments": vars(args), "data": "0" * 64, "processes": 1} | ({"started_with": started} if told else {})
    files.write_json(Path("outputs/a/run.json"), json.loads(json.dumps(run, default=str)))
    return Path("outputs/a/run.json")


def refusal(path: Path, *words: str) -> str:
    with pytest.raises(
        UserError, match=r"^outputs/a was made by another command; .*; delete it, or set RUNS or DATA$"
    ) as refused:
        check_same(Command((*BASE, *words)), path)
    return str(refused.value)


UNLIKE = [
    (("--epochs", "1", "--rank", "4"), (), "--rank was 4, not 16; --epochs was 1.0, not 3.0"),
    (("--max-images", "50", "--augmentation", "advanced"), (), "--max-images was 50, not unset; --augmentation was advanced"),
    (("--question-weights", "Q7=4"), ("--question-weights", "Q7=1", "Q5=9"), "--question-weights was Q7=4, not Q7=1 Q5=9"),
    (("--question-weights", "Q7=4"), (), "--question-weights was Q7=4, not unset"),
    (("--no-merge",), ("--merge",), "--no-merge was given"),
    (("--no-vision",), (), "--no-vision was given"),
    ((), ("--no-vision",), "--no-vision was not given"),
    ((), ("--model", "elsewhere/tiny"), "--model was tiny, not elsewhere/tiny"),
    ((), ("--head", "choice"), "--head was generate, not choice"),
]


@pytest.mark.parametrize("told", [True, False], ids=["says what it was started with", "of before"])
@pytest.mark.parametrize("before, now, why", UNLIKE)
def test_a_run_of_other_flags_is_refused_also_where_the_command_leaves_them_out(before, now, why, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert why in refusal(trained(*before, told=told), *now)


def test_a_run_knows_how_long_it_was_to_train_and_by_how_many_processes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "--steps was 7, not unset" in refusal(trained("--steps", "7"))
    path = trained()
    files.write_json(path, files.read_json(path) | {"processes": 2})
    assert "by 2 processes, not 1" in refusal(path)


@pytest.mark.parametrize("told", [True, False])
def test_what_train_py_fills_in_and_what_changes_no_weight_is_no_difference(told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = trained("--no-merge", told=told)
    for words in (("--no-merge",), ("--no-merge", "--rank", "16", "--report-to", "none", "--workers", "2")):
        assert check_same(Command((*BASE, *words)), path)
    (path.parent / "merged").mkdir()  # by sonovqa.merging, afterwards
    assert check_same(Command(BASE), path)
    about = files.read_json(path)
    for name in ("head", "patience"):  # a version without these flags
        del about["arguments"][name], about.get("started_with", about["arguments"] | {name: 0})[name]
    files.write_json(path, about)
    assert check_same(Command(BASE), path) and "--head was generate" in refusal(path, "--head", "choice")


def test_a_model_that_is_not_on_this_machine_leaves_open_what_its_family_fills_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = trained(model="some/Other-8B")
    assert check_same(Command((*BASE, "--model", "some/Other-8B")), path)
    assert "--rank was 16, not 8" in refusal(path, "--model", "some/Other-8B", "--rank", "8")


def test_a_command_that_its_script_would_not_take_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"train\.py cannot be called so; unrecognized arguments: --epoch 3; its own flags"):
        check_same(Command((*BASE, "--epoch", "3")), trained())
    assert capsys.readouterr().err == ""


def test_a_data_set_of_other_flags_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("prepare_dataset.py", "phantoms", "--out", "d", "--images", "30")
    about = {"images": 30, "source": "phantoms", "seed": 42, "abnormal_rate": 0.2, "size": [800, 600]}
    files.write_json(Path("d/dataset.json"), {"arguments": about})
    assert check_same(Command((*words, "--abnormal-rate", "0.2")), Path("d/dataset.json"))
    with pytest.raises(UserError, match=r"d was made by another command; --abnormal-rate was 0.2, not 0.05; delete it"):
        check_same(Command(words), Path("d/dataset.json"))
