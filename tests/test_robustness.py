"""Scores under worse pictures: what is changed, what is asked twice, what the record, table and plot say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sonovqa import asking, chat, dataset, files, predictions, robustness, robustness_report, scoring
from sonovqa.cli import UserError
from sonovqa.robustness import Condition, worsened


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base) -> list[Path]:
    """Two finished runs: folders with a record and merged weights."""
    root = tmp_path_factory.mktemp("runs")
    for name, augmentation in (("clean", "none"), ("augmented", "advanced")):
        shutil.copytree(base, root / name / "merged")
        files.write_json(root / name / "run.json", {"run": name, "arguments": {"augmentation": augmentation, "seed": 1}})
    return [root / "clean", root / "augmented"]


def arguments(runs: list[Path], data: Path, out: Path, *more: str) -> list[str]:
    given = [*map(str, runs), "--data", str(data), "--out", str(out), "--limit", "3", "--max-new-tokens", "4"]
    return [*given, "--resamples", "50", "--kinds", "noise", "gain", "--strengths", "2", "1", *more]


@pytest.fixture(scope="module")
def made(tmp_path_factory, runs, data) -> Path:
    out = tmp_path_factory.mktemp("robust") / "record.json"
    assert robustness.main(arguments(runs, data, out)) == 0
    return out


@pytest.mark.parametrize("kind", robustness.KINDS)
def test_worse_pictures_are_the_same_every_time_and_further_off_the_stronger(kind):
    blocks = np.random.default_rng(0).integers(60, 180, (8, 12), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    image = Image.fromarray(blocks).convert("RGB")
    off = []
    for strength in (0.0, 0.5, 1.0, 2.0):
        one, again = (worsened(image, kind, strength, "A/1.png", 3) for _ in range(2))
        assert one.tobytes() == again.tobytes() and one.size == image.size and one.mode == "RGB"
        off.append(np.abs(np.asarray(one, float) - np.asarray(image, float)).mean())
    assert off[0] == 0 and (np.diff(off) > 0.5).all()
    others = {worsened(image, kind, 1.0, f"A/{n}.png", 3).tobytes() for n in range(12)}
    assert len(others) == {"noise": 12, "blur": 1, "gain": 2}[kind]


def test_amounts_are_those_of_the_record():
    flat = Image.new("RGB", (200, 100), (120, 120, 120))
    noisy = np.asarray(worsened(flat, "noise", 1.5, "a"), float)
    assert noisy.std() == pytest.approx(1.5 * robustness.KINDS["noise"][0], rel=0.05) and (noisy[..., 0] == noisy[..., 1]).all()
    assert abs(int(np.asarray(worsened(flat, "gain", 1.0, "a"))[0, 0, 0]) - 120) == round(7 * 255 / 60)
    assert np.asarray(worsened(Image.new("RGB", (8, 8)), "gain", 4.0, "a")).max() == 0  # black stays black
    edge = np.zeros((100, 100), np.uint8)
    edge[:, 50:] = 255
    blurred = np.asarray(worsened(Image.fromarray(edge).convert("RGB"), "blur", 4.0, "a"), float)[50, :, 0] / 255
    assert np.square(np.arange(99) - 49).dot(np.diff(blurred)) == pytest.approx(4.0**2, rel=0.2)  # variance of the spread


def test_clean_requests_hold_the_files_and_worse_ones_do_not(data):
    raw = dataset.load_undecoded(data)["test"]
    items = asking.items_of(raw)
    clean, worse = (list(robustness.requests(raw, items, Condition("r", "noise", s), 0)) for s in (0.0, 1.0))
    assert [r.image for r in clean] == [row["image"]["bytes"] for row in raw]
    assert [r.prompts for r in clean] == [r.prompts for r in worse]
    for before, after in zip(clean, worse, strict=True):
        opened = chat.open_image(before.image)
        assert chat.open_image(after.image).tobytes() == worsened(opened, "noise", 1.0, before.image_id, 0).tobytes()


def test_record_table_and_plot(made, runs, data):
    record = files.read_json(made)
    points = [(one["run"], one["kind"], one["strength"]) for one in record["curves"]]
    steps = [("clean", 0.0), ("noise", 1.0), ("noise", 2.0), ("gain", 1.0), ("gain", 2.0)]
    assert points == [(str(run), *step) for run in runs for step in steps]
    assert [one["augmentation"] for one in record["runs"].values()] == ["none", "advanced"]
    assert record["measured"]["images"] == 3 and record["measured"]["questions"]["Q2"]["n"] == 3
    assert all(one["failed"] == 0 for one in record["curves"])
    # the runs' weights are the same, so nothing differs between them, and both are set against the first
    for one in record["curves"][5:]:
        assert one["against_first"]["overall"] == [0], "three patients are too few for an interval"
    assert not any("against_first" in one for one in record["curves"][:5])
    table = made.with_suffix(".md").read_text()
    lines = [line for line in table.splitlines() if line.startswith("| Q2, accuracy")]
    assert len(lines) == 4 and all(line.count("|") == lines[0].count("|") for line in table.splitlines() if line.startswith("|"))
    assert "strength 1 is 7 dB" in table and "| all but Q6, accuracy | gain | augmented |" in table
    drawing = made.with_suffix(".svg").read_text()
    assert drawing.count("<svg") == 1 and "augmented" in drawing and "strength of gain" in drawing
    assert made.stat().st_size < 20_000


def test_scores_are_those_of_the_predictions_on_disk(made, runs, data):
    record = files.read_json(made)
    folder = made.with_suffix("") / Condition(str(runs[0]), "gain", 2.0).folder
    rows = list(predictions.latest(predictions.read(folder / "predictions.jsonl")).values())
    train = asking.items_of(dataset.load_undecoded(data)["train"])
    wanted = scoring.score(rows, scoring.without_blind(train, train), 50, 42)["questions"]
    entry = next(one for one in record["curves"] if (one["kind"], one["strength"]) == ("gain", 2.0))
    for kind, found in wanted.items():
        value = found["metrics"][found["headline"]]["value"]
        assert (
            entry["questions"][kind] is None if value is None else entry["questions"][kind][0] == pytest.approx(value, abs=1e-4)
        )


def test_nothing_is_asked_twice_and_what_is_missing_is(made, runs, data, monkeypatch):
    before = json.loads(made.read_text())["curves"]
    loaded = []
    real = robustness._engine
    monkeypatch.setattr(robustness, "_engine", lambda args, run, raw: loaded.append(run) or real(args, run, raw))
    assert robustness.main(arguments(runs, data, made)) == 0
    assert not loaded and files.read_json(made)["curves"] == before
    path = made.with_suffix("") / Condition(str(runs[1]), "noise", 1.0).folder / "predictions.jsonl"
    kept = predictions.read(path)
    predictions.write(path, kept[:5])
    assert robustness.main(arguments(runs, data, made)) == 0
    assert loaded == [str(runs[1])] and files.read_json(made)["curves"] == before
    assert len(predictions.read(path)) == len(kept)


def test_answers_of_other_settings_are_refused(made, runs, data):
    with pytest.raises(UserError, match="seed was 42, now 7"):
        robustness.main(arguments(runs, data, made, "--seed", "7"))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--strengths", "0"], "above 0"),
        (["--limit", "0"], "--limit"),
        (["--out", "x.txt"], ".json"),
        (["--resamples", "-1"], "-1"),
    ],
)
def test_mistakes_are_told_at_once(runs, data, tmp_path, more, told):
    with pytest.raises(UserError, match=told):
        robustness.parse(arguments([*runs, Path("nowhere")], data, tmp_path / "a.json", *more))
    with pytest.raises(UserError, match="not a finished run; nowhere"):
        robustness.parse(arguments([*runs, Path("nowhere")], data, tmp_path / "a.json"))
    with pytest.raises(UserError, match="named twice"):
        robustness.parse(arguments([runs[0], runs[0]], data, tmp_path / "a.json"))


def row(image: int, question_id: str, reference: str, prediction: str | None = None, category: str = "Abdomen") -> dict:
    said = {"prediction": reference if prediction is None else prediction, "error": None, "finish_reason": "stop"}
    told = {"question": "", "answer_type": "", "prompt": "", "context": None, "size": None}
    return {"image_id": str(image), "group": f"g{image}", "category": category, "question_id": question_id,
            "reference": reference, **said, **told}  # fmt: skip


ROWS = [
    *(row(i, "Q3", "axial abdomen") for i in range(4)), row(4, "Q3", "oblique", "axial", "Non_standard_NT"),
    row(5, "Q3", "non-standard plane, axial", "axial abdomen"),
    *(row(i, "Q6", ("good", "low")[i % 2], "medium") for i in range(6)),
]  # fmt: skip


def test_edge_cases_stand_apart_and_quality_is_not_counted():
    assert robustness.slices(ROWS) == {"lowest quality": {"1", "3", "5"}, "non-standard views": {"4", "5"}}
    assert robustness.slices(ROWS[:1]) == {}
    majority = scoring.Baselines(scoring.majority_answers(ROWS), "the references themselves", None)
    found = robustness.compact(robustness.scored(ROWS, majority, 100, 0))
    assert found["overall"][0] == pytest.approx(4 / 6, abs=1e-4) and found["questions"]["Q6"][0] == 0
    assert found["slices"]["lowest quality"][0] == pytest.approx(2 / 3, abs=1e-4)
    assert found["slices"]["non-standard views"][0] == 0


def test_a_run_is_set_beside_the_first_by_paired_differences():
    better = [{**one, "prediction": one["reference"]} for one in ROWS]
    found = robustness.compact(robustness.beside(ROWS, better, 200, 0))
    value, low, high = found["overall"]
    assert value == pytest.approx(2 / 6, abs=1e-4) and 0 <= low <= value <= high <= 1
    assert found["questions"]["Q6"][0] == 1 and found["questions"]["Q3"][0] == pytest.approx(2 / 6, abs=1e-4)
    assert robustness.compact(robustness.beside(better, ROWS, 200, 0))["overall"][0] == -value


def test_a_score_that_is_not_defined_is_told_and_drawn_as_such(tmp_path):
    figure = {"score": "balanced accuracy", "n": 4, "groups": 2, "majority": None}
    record = {
        "runs": {"outputs/a": {}, "elsewhere/a": {}}, "data": {"name": "d", "fingerprint": "0123456789", "split": "test"},
        "kinds": {"blur": {"strength 1": 0.01, "unit": "heights"}}, "spoilt": "Q6",
        "measured": {"images": 4, "questions": {"Q7": figure}, "slices": {}},
        "curves": [{"run": run, "kind": kind, "strength": s, "questions": {"Q7": None}, "slices": {}}
                   for run in ("outputs/a", "elsewhere/a") for kind, s in (("clean", 0.0), ("blur", 1.0))],
    }  # fmt: skip
    robustness_report.write(record, tmp_path / "a.json")
    assert files.read_json(tmp_path / "a.json") == record
    assert "| Q7, balanced accuracy (n=4) | blur | elsewhere/a | - | - | - |" in (tmp_path / "a.md").read_text()
    assert "not defined" in (tmp_path / "a.svg").read_text()
    robustness_report.draw(record, tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size[0] > 200
