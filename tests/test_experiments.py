"""Every block of experiments.md, run with a handful of steps on one tiny base and one small data set."""

from __future__ import annotations

import gc
import importlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import closed_set
import pytest
from conftest import ROOT

import evaluate
import prepare_dataset
import train
from sonovqa import bench_train, experiments, experiments_blocks, experiments_records, files, phantoms, records, tables
from sonovqa.experiments_blocks import Command
from sonovqa.experiments_sweep import DONE
from sonovqa.splits import assign

PAGE = ROOT / "experiments.md"
#: Everything that experiments.md lets one set, so small that a block takes seconds.
KNOBS = {
    "DATA": "data/small", "RARE": "data/small", "MORE": "data/small", "SETS": "data/small data/closed", "RAD": "data/closed",
    "RUNS": "t", "SEEDS": "1",
    "MODELS": "base", "IMAGES": "6", "LIMIT": "2", "SIZES": "2B", "WEIGHTS": "weights", "PROCESSOR": "base", "SIZE_PX": "64x48",
    "TRAIN": "--steps 2 --batch 2 --accumulate 1 --eval-every 2 --no-merge --report-to none",
    "PAIRS": "8", "LAYERS": "all no-mlp", "STEPS": "--steps 1 --warmup 1 --prepared 1 --rank 2", "BITS": "16", "ROWS": "1",
    "EVAL": "--adapter --resamples 20 --max-new-tokens 3",
    "ANSWER": "--engines shared",
}  # fmt: skip
SCRIPTS = {"train.py": train, "evaluate.py": evaluate, "prepare_dataset.py": prepare_dataset}


@pytest.fixture(scope="module")
def home(tmp_path_factory, base) -> Iterator[Path]:
    """A folder to work in: `data/small`, the tiny base, and the outputs of all blocks."""
    home = tmp_path_factory.mktemp("experiments")
    (home / "base").symlink_to(base)
    small = ["phantoms", "--images", "40", "--size", "96x72", "--abnormal-rate", "0.4", "--ratios", "60/20/20"]
    prepare_dataset.main([*small, "--images-per-patient", "2", "--out", str(home / "data" / "small"), "--workers", "1"])
    closed_set.write(home / "data" / "closed")
    gc.collect()
    gc.freeze()  # every training collects garbage twice: what all modules have made is no part of it
    yield home
    gc.unfreeze()


@pytest.fixture
def at_home(home, monkeypatch):
    """`home` as the working folder with the knobs set; measured in this process, and reports left to their own tests."""
    monkeypatch.chdir(home)
    for name, value in (KNOBS | {"MODEL": "base"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(bench_train.bench_steps, "in_process", lambda function, work: function(work))
    monkeypatch.setattr(evaluate.report_html, "render", lambda *_: "<html></html>")
    return home


def here(command: Command, environment) -> int:
    """Run a command in this process, where torch is loaded already; real architectures give way to the tiny base."""
    if command.script == "sonovqa.architectures":
        shutil.copytree("base", command.words[3], dirs_exist_ok=True)
        return 0
    module = SCRIPTS.get(command.script) or importlib.import_module(command.script)
    words = list(command.words[2 if command.words[0] == "-m" else 1 :])
    if command.script == "prepare_dataset.py":  # the page's sets are drawn small
        words[words.index("--images") + 1], words[words.index("--size") + 1] = "30", "96x72"
    if command.script == "sonovqa.bench" and words[0] == "train":
        words += ["--steps", "1", "--warmup", "1", "--prepared", "1"]
        words[words.index("--pairs") + 1] = "16"
    return module.main(words) or 0


@pytest.mark.parametrize("name", experiments_blocks.names(PAGE))
def test_a_block_runs_as_it_stands(name, at_home, monkeypatch):
    commands = experiments_blocks.commands(PAGE, name)
    outcomes = experiments.perform(name, commands, here)
    assert {one.status for one in outcomes} == {DONE}, [(one.command.text, one.why) for one in outcomes if one.status != DONE]
    for run in tables.runs_of(commands):
        made = experiments_records.record_of(run)
        assert len(files.json.dumps(made, indent=2)) < tables.LARGEST
    monkeypatch.setattr(tables, "RECORDS", at_home / "records")
    monkeypatch.setattr(tables, "ROOT", at_home)
    monkeypatch.setattr(tables, "PAGE", at_home / "experiments.md")
    shutil.copy(PAGE, at_home / "experiments.md")
    tables.show(name, commands)
    tables.keep(name, commands)
    if name == "data":  # drawn smaller than the page says, so not what its commands would make
        return
    again = experiments.perform(name, commands, lambda command, environment: pytest.fail(f"run twice: {command.text}"))
    assert all(one.why == "finished before" for one in again)


def test_pages_counts_of_the_test_split_are_those_of_its_command():
    given = prepare_dataset.parse(list(experiments_blocks.commands(PAGE, "data")[0].words[1:]))
    drawn = phantoms.plan(given.images, given.seed, given.abnormal_rate, images_per_patient=given.images_per_patient)
    rows = [row for row in drawn if row.status == "complete"]
    strata = [(row.spec.category, "abnormal" if row.spec.abnormal else "normal") for row in rows]
    split = assign([row.patient for row in rows], strata, given.ratios, given.seed)
    test = [row for row, home in zip(rows, split, strict=True) if home == 2]
    abnormal = [row for row in test if row.spec.abnormal]
    patients = [len({row.patient for row in some}) for some in (test, abnormal)]
    told = f"{len(test):,} images of {patients[0]} patients, {len(abnormal)} of them abnormal, of {patients[1]} patients"
    assert told in " ".join(PAGE.read_text().split())
    assert len(abnormal) >= 200 and patients[1] >= 60


def test_sets_of_experiment_7_share_no_image_with_the_test_split_and_differ_by_findings_alone():
    given = [prepare_dataset.parse(list(one.words[1:])) for one in experiments_blocks.commands(PAGE, "data")]
    drawn = [phantoms.plan(one.images, one.seed, one.abnormal_rate, images_per_patient=one.images_per_patient) for one in given]
    fixed, rare, more = ([row.spec for row in rows] for rows in drawn)
    assert not {spec.seed for spec in fixed} & {spec.seed for spec in rare}
    assert [vars(spec) | {"abnormal": 0} for spec in rare] == [vars(spec) | {"abnormal": 0} for spec in more]
    assert all(new.abnormal for old, new in zip(rare, more, strict=True) if old.abnormal)
    assert 4 * sum(spec.abnormal for spec in rare) < sum(spec.abnormal for spec in more)
    assert all(Path(command.words[3]).parent == Path("data") for command in experiments_blocks.commands(PAGE, "data"))


def test_variables_reach_every_training():
    os.environ["MODEL"], before = "some/Other-8B", os.environ.get("MODEL")
    try:
        commands = experiments_blocks.commands(PAGE, "3")
    finally:
        os.environ.pop("MODEL") if before is None else os.environ.update(MODEL=before)
    trained = [command for command in commands if command.run]
    assert {command.value("--model") for command in trained} == {"some/Other-8B"} and len(trained) == 15
    assert all(command.run.name.startswith("Other-8B-3-") for command in trained)
    assert [command.words[3] for command in commands if command.script == "prepare_dataset.py"] == ["data/phantoms"]
    assert records.ROOT == ROOT
