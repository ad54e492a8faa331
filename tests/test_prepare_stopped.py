"""prepare_dataset.py stopped, killed, run twice at once or out of disk: a whole data set, or the one before."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys

import pytest
from clinic import clinic, picture, prepare, rows_of
from conftest import ROOT
from holding_still import Hold

from sonovqa import dataset, images
from sonovqa.cli import UserError


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    clinic(tmp_path)
    calls = []

    def stops_after(limit):
        def check(path):
            calls.append(path)
            if len(calls) > limit:
                raise KeyboardInterrupt
            return images.Checked(**{**real(path).__dict__})

        return check

    real = images.check_image
    monkeypatch.setattr(images, "check_image", stops_after(12))
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path)
    assert not (tmp_path / "data").exists()
    with open(tmp_path / ".data.checked.jsonl", "a") as journal:
        journal.write('{"path": "half a li')
    changed = tmp_path / "images" / "Abdomen" / "img_000.png"
    picture(changed, 500)
    calls.clear()
    monkeypatch.setattr(images, "check_image", stops_after(100))
    data, _ = prepare(tmp_path)
    assert len(calls) == 9 and changed in calls and len(rows_of(data)) == 20
    assert not (tmp_path / ".data.checked.jsonl").exists()


def complete(line: bytes) -> bool:
    return line.startswith(b"{") and line.endswith(b"}\n")


def test_a_killed_run_goes_on_to_the_same_data_set(tmp_path):
    """SIGKILL at several moments, the writing among them; what is there in the end is what an undisturbed run makes."""
    clinic(tmp_path, patients=150)
    _, undisturbed = prepare(tmp_path)
    shutil.rmtree(tmp_path / "data")
    command = [
        sys.executable,
        "prepare_dataset.py",
        "sheet",
        str(tmp_path / "annotations.xlsx"),
        "--images",
        str(tmp_path / "images"),
    ]
    journal, out = tmp_path / ".data.checked.jsonl", tmp_path / "data"
    moments = [  # where it stands still, and how much it has checked by then
        (r"^open \S*/images/Abdomen/img_004\.png", 4),
        (r"^open \S*/images/Abdomen/img_150\.png", 150),
        (r"^open \S*/\.data\.[^/]*\.part/train/dataset_info\.json w", 300),
        (r"^open \S*/\.data\.[^/]*\.part/test/dataset_info\.json w", 300),
    ]
    for number, (at, checked) in enumerate(moments):
        hold = Hold(at, tmp_path.with_name(f"{tmp_path.name}-held-{number}"))
        run = subprocess.Popen(
            [*command, "--out", str(out), "--workers", "1"], cwd=ROOT, env=os.environ | hold.environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        hold.wait(run)
        run.kill()
        run.wait()
        assert not out.exists() and sum(map(complete, journal.read_bytes().splitlines(keepends=True))) == checked
        split = "train" if "train" in at else "test"
        assert len(list(tmp_path.glob(f".data.*.part/{split}/*.arrow"))) == ("part" in at), "killed while writing it"
    _, again = prepare(tmp_path)
    assert again == undisturbed
    assert sorted(path.name for path in tmp_path.iterdir()) == [".data.lock", "annotations.xlsx", "data", "images"]


def test_a_set_that_was_being_replaced_is_put_back(tmp_path):
    clinic(tmp_path)
    _, before = prepare(tmp_path)
    os.rename(tmp_path / "data", tmp_path / ".data.x1.part.old")  # as a kill between two renames leaves it
    (tmp_path / ".data.x1.part").mkdir()
    with pytest.raises(UserError):
        prepare(tmp_path, "--group-column", "Doctor")
    assert json.loads((tmp_path / "data" / "dataset.json").read_text()) == before


def test_two_runs_at_once(tmp_path):
    clinic(tmp_path)
    with dataset.claimed(tmp_path / "data"), pytest.raises(UserError, match="another run"):
        prepare(tmp_path)
    prepare(tmp_path)


def test_a_lock_opened_before_the_holder_ended_is_the_one_the_next_run_takes(tmp_path):
    with contextlib.ExitStack() as waiting:
        with dataset.claimed(tmp_path / "data"):
            opened = waiting.enter_context(open(tmp_path / ".data.lock", "w"))  # by a run about to lock it
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(UserError, match="another run"), dataset.claimed(tmp_path / "data"):
            pytest.fail("two runs hold one data set")


def test_a_full_disk_leaves_the_old_data_set(tmp_path, monkeypatch):
    clinic(tmp_path)
    _, before = prepare(tmp_path)
    from datasets.arrow_writer import ArrowWriter

    def full(self, row):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ArrowWriter, "write", full)
    with pytest.raises(OSError, match="No space left"):
        prepare(tmp_path, "--seed", 7)
    assert json.loads((tmp_path / "data" / "dataset.json").read_text()) == before
    assert sorted(path.name for path in tmp_path.iterdir() if "part" in path.name) == []


def test_load_says_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match="no data set there"):
        dataset.load(tmp_path)
    clinic(tmp_path)
    prepare(tmp_path)
    (tmp_path / "data" / "train" / "data-00000-of-00001.arrow").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot be read"):
        dataset.load(tmp_path / "data")
