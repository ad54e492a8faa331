"""What a run's record says against its own evaluation: patients seen in training, other prompts or pixels, a better base."""

# ruff: noqa: F811 - tests take imported fixtures by their names

from __future__ import annotations

from evaluating import FakeEngine, a_run, data, no_report, perfect, run  # noqa: F401 - fixtures

import evaluate
from sonovqa import dataset, files, provenance


def test_patients_seen_in_training_are_said(data, tmp_path):
    raw = dataset.load_undecoded(data)
    about = {"fingerprint": "f" * 64}
    assert list(provenance.seen_in_training(a_run(data), about, "test", raw["test"])) == []
    (leak,) = provenance.seen_in_training(a_run(data), about, "test", raw["train"].select(range(4)))
    assert leak.serious and "2 of 2 test groups were seen in training" in leak.text
    other = a_run(data, data="e" * 64)  # trained on another set: images are compared by their bytes, not by names
    assert list(provenance.seen_in_training(other, about, "test", raw["test"])) == []
    (leak,) = provenance.seen_in_training(other, about, "test", raw["train"].select(range(4)))
    assert "4 of 4 test images were seen in training" in leak.text
    (gone,) = provenance.seen_in_training(a_run(tmp_path / "gone"), about, "test", raw["test"])
    assert not gone.serious and "not at" in gone.text


def test_prompts_and_pixels_unlike_training_are_said(data):
    run = a_run(data)
    assert list(provenance.unlike_training(run, "default", "all", (None, None))) == []
    assert list(provenance.unlike_training(run, "default", "all", (4096, 12288))) == []
    told = [f.kind for f in provenance.unlike_training(run, "simple", "all", (None, 99999))]
    assert told == ["prompt unlike training", "pixels unlike training"]
    q7 = a_run(data, arguments=run["arguments"] | {"task": "Q7"})
    assert [f.kind for f in provenance.unlike_training(q7, "default", "all", (None, None))] == ["task unlike training"]


def test_leaks_that_prepare_found_are_repeated():
    about = {"leakage": {"test_questions": 451, "test_questions_on_images_outside_test": 446, "groups": ["a"]}}
    first, second = provenance.leaks_of_data(about, "test")
    assert "446 of 451 test questions (98.9%)" in first.text and "1 groups" in second.text
    assert list(provenance.leaks_of_data(about, "train")) == []


def test_a_run_below_its_base_is_said(run, data, tmp_path, monkeypatch):
    """The base gets all right, the tuned run a quarter of Q2 wrong: found by itself where evaluate.py writes the base's."""
    monkeypatch.chdir(tmp_path)
    run(perfect, "--no-blind", out="outputs/model/eval-test")
    folder = tmp_path / "outputs" / "tuned"
    (folder / "merged").mkdir(parents=True)
    files.write_json(folder / "run.json", a_run(data))
    wrong = FakeEngine(data, lambda r, q, truth: "breech" if q == "Q2" else truth)
    monkeypatch.setattr(evaluate, "open_engine", lambda *args: wrong)
    evaluate.main(["outputs/tuned", "--data", str(data), "--no-blind", "--resamples", "200"])
    scores = files.read_json(folder / "eval-test" / "scores.json")
    (below,) = [f for f in scores["findings"] if f["kind"] == "below base" and f["serious"]]
    assert below["question"] == "Q2" and "accuracy 0.50 is below its own base's 1.00" in below["text"]
