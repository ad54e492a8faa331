"""SIGKILL while answers come in: the same command goes on, asks nothing twice that was written down, loses nothing."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import datasets
import openpyxl
import pytest
from conftest import ROOT, noise_image
from holding_still import Hold
from stand_in import StandIn

from sonovqa import predictions
from sonovqa.questions import QUESTIONS

IN_FLIGHT = 16


class Doling:
    """A script that gives as many answers as it was allowed and holds whatever else is asked, so that a kill finds it open."""

    def __init__(self):
        self.allowed = self.given = self.kills = 0
        self.change = threading.Condition()

    def __call__(self, prompt: str, attempt: int) -> str:
        with self.change:
            kills = self.kills
            self.change.wait_for(lambda: self.given < self.allowed or self.kills > kills)
            self.given += self.kills == kills  # else nobody is there any more to hear it
        return f"answer to {prompt}"

    def allow(self, answers: float) -> None:
        """So many in all, from now on."""
        with self.change:
            self.allowed = answers
            self.change.notify_all()

    def killed(self) -> None:
        """Whoever asked until now is gone."""
        with self.change:
            self.kills += 1
            self.change.notify_all()


def start(*words, **environment: str) -> subprocess.Popen:
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")} | {"OMP_NUM_THREADS": "1"} | environment
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, env=env, **streams)


def killed_at(answers: int, doling: Doling, path: Path, *words, lines: int = 0, hold: Hold | None = None) -> bytes:
    """Run a command and kill it with so many answers in all written down, and others open; gives what ``path`` then holds.

    Args:
        lines: in ``path`` besides those of answers.
        hold: where it then stands still, if no answer is open.
    """
    doling.allow(answers)
    process = start(*words, **(hold.environment if hold else {}))
    while process.poll() is None and not (path.exists() and path.read_bytes().count(b"\n") >= answers + lines):
        time.sleep(0.005)
    assert process.poll() is None, process.stdout.read().decode()
    if hold:
        hold.wait(process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    doling.killed()
    assert path.read_bytes().count(b"\n") == answers + lines
    return path.read_bytes()


def finish(*words) -> str:
    process = start(*words)
    said = process.communicate(timeout=600)[0].decode()
    assert process.returncode == 0, said
    return said


def asked_of(server: StandIn) -> Counter:
    """How often each image and prompt was asked for."""
    return Counter(json.dumps(body["messages"][1]["content"]) for body in server.bodies)


def check(server: StandIn, moments: list[bytes], final: bytes, questions: int) -> None:
    """All that was whole at a kill is still there, as it was; only what was in flight then was asked again."""
    for before in moments:
        whole = before[: before.rfind(b"\n") + 1]
        assert whole and final.startswith(whole)
    asked = asked_of(server)
    assert len(asked) == questions
    assert asked.total() <= questions + len(moments) * IN_FLIGHT


@pytest.fixture
def clinic(data, tmp_path) -> Path:
    """The shared data set with a real answer to Q7 for every image."""
    splits = datasets.load_from_disk(str(data))

    def answered(row: dict, number: int) -> dict:
        real = {"answer": ("normal", "abnormal")[number % 2]}
        return {"questions": [q | (real if q["question_id"] == "Q7" else {}) for q in row["questions"]]}

    for name in splits:
        plain = splits[name].cast_column("image", datasets.Image(decode=False))
        splits[name] = plain.map(answered, with_indices=True, features=plain.features).cast_column("image", datasets.Image())
    splits.save_to_disk(str(tmp_path / "set"))
    shutil.copy(data / "dataset.json", tmp_path / "set")
    return tmp_path / "set"


def test_an_evaluation_killed_twice(clinic, tmp_path):
    doling = Doling()
    with StandIn(doling) as server:
        out = tmp_path / "out"
        command = ("evaluate.py", "--endpoint", server.url, "--data", clinic, "--out", out, "--no-blind", "--resamples", 10)
        path = out / "predictions.jsonl"
        moments = [killed_at(count, doling, path, *command) for count in (1, 20)]
        doling.allow(math.inf)
        finish(*command)
        check(server, moments, path.read_bytes(), 32)
    rows = predictions.read(path)
    assert len({(row["image_id"], row["question_id"]) for row in rows}) == len(rows) == 32
    assert json.loads((out / "scores.json").read_text())["questions"]


def test_a_folder_killed_while_asking_and_while_writing_the_sheet(tmp_path):
    for number in range(5):
        (tmp_path / "scans").mkdir(exist_ok=True)
        noise_image(48, 40, number).save(tmp_path / "scans" / f"{number}.png")
    out, journal = tmp_path / "out.xlsx", tmp_path / "out.xlsx.answers.jsonl"
    doling, saving = Doling(), Hold(r"^open \S*/\.out\.xlsx\.[^/]*\.part w", tmp_path.with_name(f"{tmp_path.name}-held"))
    with StandIn(doling) as server:
        command = ("inference.py", "--endpoint", server.url, "--folder", tmp_path / "scans", "--out", out)
        moments = [killed_at(count, doling, journal, *command, lines=1) for count in (1, 20)]  # a line holds the settings
        moments.append(killed_at(40, doling, journal, *command, lines=1, hold=saving))
        assert len(list(tmp_path.glob(".out.xlsx.*.part"))) == 1
        assert not out.exists(), "killed while writing the sheet"
        finish(*command)
        check(server, moments, journal.read_bytes(), 40)
    _, *rows = openpyxl.load_workbook(out)["Answers"].iter_rows(values_only=True)
    assert [row[2] for row in rows] == ["answered"] * 5
    assert all(row[3:] == tuple(f"answer to {q.prompts['default']}" for q in QUESTIONS.values()) for row in rows)
    assert {path.name for path in tmp_path.iterdir()} == {"scans", out.name, journal.name}
