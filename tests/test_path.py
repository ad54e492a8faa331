"""The whole path as a user walks it, by command line: phantoms -> train -> evaluate, with the shipped tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from sonovqa import files, phantoms, tiny


def command(*words, status: int = 0) -> str:
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Path:
    """Data set, base scores and a run tuned for a minute."""
    home = tmp_path_factory.mktemp("path")
    command("prepare_dataset.py", "phantoms", "--images", 420, "--size", "400x300", "--out", home / "set")
    command(
        "train.py",
        "--data",
        home / "set",
        "--model",
        "tiny",
        "--outputs",
        home,
        "--run",
        "tuned",
        "--steps",
        120,
        "--batch",
        12,
        "--accumulate",
        1,
        "--lr",
        4e-3,
        "--schedule",
        "cosine",
        "--eval-every",
        60,
        "--report-to",
        "none",
    )
    command("evaluate.py", "tiny", "--data", home / "set", "--no-blind", "--out", home / "base")
    command("evaluate.py", home / "tuned", "--data", home / "set", "--base", home / "base", "--out", home / "scores")
    return home


def test_tuning_beats_majority_blind_and_base(walked):
    """With a fifth of the demo's images and steps, so with a part of its margins."""
    base, tuned = (json.loads((walked / name / "scores.json").read_text()) for name in ("base", "scores"))
    for question in ("Q2", "Q3"):
        mine, before = (scores["questions"][question]["metrics"]["accuracy"] for scores in (tuned, base))
        assert mine["value"] > mine["majority"]["value"] + 0.2, question
        assert mine["value"] > mine["blind"]["value"] + 0.2, question
        assert mine["value"] > before["value"] + 0.05, question


def test_merge_check_of_a_run_that_learnt_something(walked):
    check = json.loads((walked / "tuned" / "run.json").read_text())["merge_check"]
    assert check["top_agreement"] >= 0.99 and check["mean_kl"] < 0.01 and check["least_share"] > 0.9 and check["positions"] > 200


def test_the_shipped_model_says_what_it_learnt_from():
    about = files.read_json(tiny.SHIPPED / "tiny.json")
    assert about["recipe"] == json.loads(json.dumps(about["recipe"])) and about["recipe"]["seed"] == tiny.Recipe().seed
    assert about["recipe"] == json.loads(json.dumps(vars(tiny.Recipe())))
    assert "for this alone" in about["learnt_from"]


def test_tiny_never_learnt_from_a_data_sets_patients():
    """Its phantoms are drawn by another seed path: none of them is an image of the demo's or of any default data set."""
    recipe = tiny.Recipe(images=300)
    learnt = {spec.seed for spec in tiny.lesson_specs(recipe)}
    assert not learnt & {phantom.spec.seed for seed in (0, 42) for phantom in phantoms.plan(300, seed)}
