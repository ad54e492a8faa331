"""evaluate.py run on a small made-up set, answered by an engine whose faults are known."""

from __future__ import annotations

import io

import datasets
import numpy as np
import pytest
from PIL import Image

import evaluate
from sonovqa import answers, files, report_html
from sonovqa.engines import Reply

PLANES = {"Trans-thalamic": "trans-thalamic", "Abdomen": "axial abdomen", "Femur": "longitudinal femur"}
WEEKS = ("15-20 weeks", "20-25 weeks", "30-35 weeks")
STRUCTURES = {"Trans-thalamic": "skull, thalami", "Abdomen": "stomach, spine", "Femur": "femur"}


def a_row(number: int, per_group: int = 2) -> dict:
    category = list(PLANES)[number % 3]
    stream = io.BytesIO()
    size = (48, 32) if number % 2 else (32, 32)
    Image.fromarray(np.random.default_rng(number).integers(0, 255, (*size[::-1], 3), np.uint8)).save(stream, "PNG")
    texts = {
        "Q1": STRUCTURES[category],
        "Q2": ("cephalic", "breech")[number // 3 % 2],
        "Q3": PLANES[category],
        "Q5": WEEKS[number // 2 % 3],
        "Q7": "abnormal" if number % 7 == 0 else "normal",
    }
    entries = [
        {"question_id": q, "question": "", "answer": answers.normalise(q, t), "label": answers.label(q, t), "answer_type": ""}
        for q, t in texts.items()
    ]
    return {
        "image": {"bytes": stream.getvalue(), "path": None}, "image_id": f"{category}/{number:04d}.png",
        "group": f"p{number // per_group}", "category": category, "questions": entries,
    }  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "small"
    ranges = {"train": range(200, 320), "validation": range(400, 410), "test": range(84)}
    splits = {
        name: datasets.Dataset.from_list([a_row(i) for i in numbers]).cast_column("image", datasets.Image())
        for name, numbers in ranges.items()
    }
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    files.write_json(folder / "dataset.json", {"fingerprint": "f" * 64})
    return folder


class FakeEngine:
    """Answers by a rule; counts what it is asked. ``rule(request, question_id, truth)`` gives a text or a `Reply`."""

    name = "fake"

    def __init__(self, data, rule, stop_after: int | None = None):
        rows = datasets.load_from_disk(str(data))["test"].remove_columns("image")
        self.truth = {(r["image_id"], q["question_id"]): q["answer"] for r in rows for q in r["questions"]}
        self.rule, self.stop_after, self.asked, self.limits = rule, stop_after, [], set()

    def answer(self, requests, max_new_tokens):
        self.limits.add(max_new_tokens)
        for request in requests:
            for question_id, _ in request.prompts:
                if self.stop_after is not None and len(self.asked) == self.stop_after:
                    raise KeyboardInterrupt
                self.asked.append((request.image_id, question_id))
                said = self.rule(request, question_id, self.truth.get((request.image_id, question_id)))
                yield said if isinstance(said, Reply) else Reply(request.image_id, question_id, said, None, "stop", 3, 0.01)


def perfect(request, question_id, truth):
    return truth if truth is not None else "normal"


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """`tests/test_report_html.py` looks at the report; drawing it here would only take time."""
    monkeypatch.setattr(report_html, "render", lambda *arguments: "")


@pytest.fixture
def run(data, tmp_path, monkeypatch, capsys):
    """Run evaluate.main with a fake engine; gives status, scores, output and the engine."""

    def go(rule, *flags, stop_after=None, out="eval"):
        engine = FakeEngine(data, rule, stop_after)
        monkeypatch.setattr(evaluate, "open_engine", lambda *args: engine)
        folder = tmp_path / out
        status = evaluate.main(["some/model", "--data", str(data), "--out", str(folder), "--resamples", "200", *flags])
        return status, files.read_json(folder / "scores.json"), capsys.readouterr().out, engine

    go.folder = tmp_path / "eval"
    return go


def a_run(trained_on, **changes) -> dict:
    """The record of a finished run that was trained on the data set in that folder."""
    run = {
        "arguments": {"data": str(trained_on), "model": "some/model", "task": "all"},
        "data": "f" * 64,
        "prompt_variant": "default",
    }
    return run | {"pixels": [4096, 12288]} | changes


def answers_of(image: int, said: dict[str, str], meant: dict[str, str], error: str | None = None) -> list[dict]:
    """Scored rows of one image: what was said to each question beside what was meant; two images a group."""
    about = {
        "image_id": str(image),
        "group": f"g{image // 2}",
        "category": "c",
        "question": "",
        "answer_type": "",
        "context": None,
    }
    return [about | {"question_id": q, "prompt": "", "reference": meant[q], "prediction": None if error else said[q],
                     "error": error, "finish_reason": "stop", "size": None} for q in said]  # fmt: skip
