"""evaluate.py with engines whose faults are known: what is asked, what is written, what the first lines say."""

from __future__ import annotations

import io
import json
import random

import datasets
import numpy as np
import pytest
from PIL import Image

import evaluate
from sonovqa import answers, asking, dataset, files, predictions, provenance, report_html
from sonovqa.cli import UserError
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
        self.rule, self.stop_after, self.asked = rule, stop_after, []

    def answer(self, requests, max_new_tokens):
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
        monkeypatch.setattr(evaluate, "open_engine", lambda args: engine)
        folder = tmp_path / out
        status = evaluate.main(["some/model", "--data", str(data), "--out", str(folder), "--resamples", "200", *flags])
        return status, files.read_json(folder / "scores.json"), capsys.readouterr().out, engine

    go.folder = tmp_path / "eval"
    return go


def test_perfect_answers_beat_both_baselines(run):
    status, scores, shown, _ = run(perfect, "--strict")
    assert status == 0 and scores["verdict"].startswith("Above the majority and the blind answer")
    for about in scores["questions"].values():
        figure = about["metrics"]["accuracy"]
        assert figure["value"] == 1.0 and figure["n"] == 84 and figure["groups"] == 42
        assert figure["interval"][0] == pytest.approx(0.025 ** (1 / 42), abs=1e-5) and figure["interval"][1] == 1.0
        assert figure["majority"]["value"] < 0.95 and figure["blind"]["difference_interval"][0] > 0
    assert scores["questions"]["Q3"]["majority_answer"] in PLANES.values() and scores["majority_of"] == "the training split"
    assert "balanced accuracy ↑" in shown and "Q5" in shown and "[0.9" in shown
    assert scores["speed"]["answers_per_second"] > 0 and scores["data"]["fingerprint"] == "f" * 64


def test_majority_comes_from_the_training_split(run, data):
    train = datasets.load_from_disk(str(data))["train"].remove_columns("image")
    said = [q["answer"] for r in train for q in r["questions"] if q["question_id"] == "Q7"]
    _, scores, _, _ = run(perfect)
    about = scores["questions"]["Q7"]
    assert about["majority_answer"] == max(set(said), key=said.count) == "normal"
    assert about["metrics"]["accuracy"]["majority"]["value"] == pytest.approx(72 / 84, abs=1e-6)
    assert about["metrics"]["balanced accuracy"]["majority"]["value"] == 0.5


def test_one_answer_to_every_image_is_said_first(run):
    _, scores, shown, _ = run(lambda r, q, truth: "trans-thalamic" if q == "Q3" else perfect(r, q, truth))
    assert scores["verdict"] == "Not above its baselines on 1 of 5 questions: Q3."
    first = shown.splitlines()[:3]
    assert "Q3: every one of 84 images gets the same answer, “trans-thalamic”" in " ".join(first)
    assert scores["questions"]["Q3"]["answers"]["predicted"]["entropy_bits"] == 0


def test_normal_for_all_is_not_praised(run):
    status, scores, shown, _ = run(lambda r, q, truth: "normal" if q == "Q7" else perfect(r, q, truth), "--strict")
    q7 = scores["questions"]["Q7"]["metrics"]
    assert q7["accuracy"]["value"] > 0.85 and q7["sensitivity"]["value"] == 0 and q7["sensitivity"]["n"] == 12
    assert status == 1 and "“abnormal” 0 of 12" in shown


def test_random_answers_are_not_above_the_majority(run):
    pick = random.Random(4)
    pools = {"Q1": STRUCTURES, "Q3": PLANES}
    choices = {"Q2": ["cephalic", "breech"], "Q5": WEEKS, "Q7": ["normal", "abnormal"]}
    choices |= {q: list(v.values()) for q, v in pools.items()}
    _, scores, _, _ = run(lambda r, q, truth: pick.choice(choices.get(q, ["normal"])))
    assert scores["verdict"].startswith("Not above its baselines on 5 of 5")


def test_failures_are_listed_and_never_scored(run):
    def rule(request, question_id, truth):
        if truth is not None and hash_of(request.image_id, question_id) % 5 == 0:
            return Reply(request.image_id, question_id, "", "HTTP 500")
        return perfect(request, question_id, truth)

    status, scores, shown, engine = run(rule, "--strict")
    failed = scores["overall"]["failed"]
    assert status == 1 and 0.1 < failed / 420 < 0.3
    assert f"{failed} of 420 requests" in shown and "HTTP 500" in shown
    for about in scores["questions"].values():
        assert about["metrics"]["accuracy"]["value"] == 1.0 and about["metrics"]["accuracy"]["n"] == 84 - about["failed"]
    _, scores, _, again = run(perfect)  # the same command asks the failed ones again, and only them
    assert len(again.asked) == failed and scores["overall"]["failed"] == 0


def hash_of(*parts: str) -> int:
    return int(files.sha256(*parts)[:8], 16)


def test_stopped_in_the_middle_it_goes_on(run):
    with pytest.raises(KeyboardInterrupt):
        run(perfect, stop_after=100)
    path = run.folder / "predictions.jsonl"
    with open(path, "ab") as stream:
        stream.write(b'{"image_id": "Abdomen/00')  # killed within a line
    _, scores, _, engine = run(perfect)
    asked = [key for key in engine.asked if not key[0].startswith("grey/")]
    assert len(asked) == len(set(asked)) == 420 - 100
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({(r["image_id"], r["question_id"]) for r in rows}) == len(rows) == 420
    _, _, _, engine = run(perfect)
    assert engine.asked == []  # nothing left: the model is not even loaded


def test_blind_is_asked_once_for_each_prompt_and_size(run):
    greys = {}

    def rule(request, question_id, truth):
        if truth is None:
            image = Image.open(io.BytesIO(request.image)).convert("RGB")
            low, high = image.convert("L").getextrema()
            greys.setdefault((image.size, question_id), []).append((low, high))
            return "breech"
        return truth

    _, scores, _, _ = run(rule)
    assert sorted({size for size, _ in greys}) == [(32, 32), (48, 32)]
    assert len(greys) == 2 * 5 and all(len(seen) == 1 and seen[0][0] == seen[0][1] for seen in greys.values())
    assert 100 < greys[next(iter(greys))][0][0] < 155  # the mean of noise
    assert scores["questions"]["Q2"]["metrics"]["accuracy"]["blind"]["value"] == 0.5


def test_no_blind_says_so(run):
    _, scores, shown, engine = run(perfect, "--no-blind")
    assert not scores["blind"] and "--no-blind" in " ".join(shown.split()) and len(engine.asked) == 420
    assert any(f["kind"] == "no blind" for f in scores["findings"])


def test_other_settings_do_not_mix(run):
    run(perfect, "--no-blind")
    with pytest.raises(UserError, match=r"max_new_tokens was 128, now 64.*--fresh"):
        run(perfect, "--max-new-tokens", "64")
    _, _, _, engine = run(perfect, "--max-new-tokens", "64", "--fresh", "--no-blind")
    assert len(engine.asked) == 420


def test_max_images_are_drawn_across_categories(run):
    _, scores, _, engine = run(perfect, "--max-images", "9", "--no-blind")
    images = {image for image, _ in engine.asked}
    assert len(images) == 9 and {image.split("/")[0] for image in images} == set(PLANES)
    assert sorted(images) != [f"{list(PLANES)[i % 3]}/{i:04d}.png" for i in range(9)]


def test_report_is_scored_by_section(run, data):
    reports = {r["image_id"]: r for r in datasets.load_from_disk(str(data))["test"].remove_columns("image")}

    def rule(request, question_id, truth):
        report = reports.get(request.image_id)
        if report is None:
            return "## Imaging Plane\nlongitudinal femur"
        said = {q["question_id"]: q["answer"] for q in report["questions"]}
        return f"**Fetal Orientation:** {said['Q2']}\n\n## Imaging Plane\n{said['Q3']}\n\n7. Normality Assessment: {said['Q7']}"

    _, scores, shown, engine = run(rule, "--task", "report", "--max-images", "12")
    assert len([1 for image, _ in engine.asked if not image.startswith("grey/")]) == 12
    values = {kind: about["metrics"]["accuracy"]["value"] for kind, about in scores["questions"].items()}
    assert values == {"Q1": 0.0, "Q2": 1.0, "Q3": 1.0, "Q5": 0.0, "Q7": 1.0}
    assert scores["report"]["metrics"]["completeness"]["value"] == pytest.approx(3 / 5)
    assert scores["questions"]["Q3"]["metrics"]["accuracy"]["blind"]["value"] == pytest.approx(1 / 3)
    assert "completeness" in shown


def test_answers_cut_at_the_limit_are_said(run):
    def rule(request, question_id, truth):
        return Reply(request.image_id, question_id, (truth or "normal")[:4], None, "length", 128, 0.1)

    _, scores, _, _ = run(rule)
    kinds = {f["kind"] for f in scores["findings"]}
    assert {"cut", "stop short"} <= kinds


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": \n{"c": 2}\n')
    with pytest.raises(UserError, match="line 2"):
        predictions.read(path)
    path.write_bytes(b'{"a": 1}\n{"b": ')
    assert predictions.read(path) == [{"a": 1}]


def test_two_evaluations_never_write_one_file(tmp_path):
    with predictions.Log(tmp_path / "p.jsonl"), pytest.raises(UserError, match="another evaluation"):
        predictions.Log(tmp_path / "p.jsonl")


def test_a_failure_never_replaces_an_answer():
    answer = {"image_id": "a", "question_id": "Q1", "error": None, "prediction": "x"}
    failure = answer | {"error": "HTTP 500", "prediction": None}
    assert predictions.latest([answer, failure]) == {("a", "Q1"): answer}
    assert predictions.latest([failure, answer]) == {("a", "Q1"): answer}


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "name either RUN_OR_MODEL or --endpoint"),
        (["m", "--endpoint", "http://h/v1"], "name either"),
        (["m", "--batch-images", "0", "--resamples", "-1"], "--batch-images must be at least 1"),
        (["m", "--adapter"], "adapter/ folder"),
    ],
)
def test_mistakes_are_one_line_each(flags, told, data):
    with pytest.raises(UserError, match=told):
        evaluate.main([*flags, "--data", str(data)])


def test_rotated_images_get_a_grey_one_of_the_size_shown(tmp_path):
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(stream, "JPEG", exif=exif)
    raw = [{"image": {"bytes": stream.getvalue(), "path": None}}]
    assert asking.image_sizes(raw, [0]) == {0: (30, 40)}


def a_run(trained_on, **changes) -> dict:
    """The record of a finished run that was trained on the data set in that folder."""
    run = {
        "arguments": {"data": str(trained_on), "model": "some/model", "task": "all"},
        "data": "f" * 64,
        "prompt_variant": "default",
    }
    return run | {"pixels": [4096, 12288]} | changes


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
    monkeypatch.setattr(evaluate, "open_engine", lambda args: wrong)
    evaluate.main(["outputs/tuned", "--data", str(data), "--no-blind", "--resamples", "200"])
    scores = files.read_json(folder / "eval-test" / "scores.json")
    (below,) = [f for f in scores["findings"] if f["kind"] == "below base" and f["serious"]]
    assert below["question"] == "Q2" and "accuracy 0.50 is below its own base's 1.00" in below["text"]


def test_an_endpoint_answers_and_its_failures_stay_failures(data, tmp_path, monkeypatch, capsys):
    from stand_in import StandIn

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with StandIn(lambda prompt, attempt: "normal") as server:
        url = server.url
        flags = ["--data", str(data), "--task", "Q7", "--max-images", "12", "--out", str(tmp_path / "e"), "--resamples", "50"]
        assert evaluate.main(["--endpoint", url, *flags]) == 0
    scores = files.read_json(tmp_path / "e" / "scores.json")
    assert scores["arguments"]["model"] == "run" and scores["questions"]["Q7"]["n"] == 12
    assert scores["questions"]["Q7"]["metrics"]["sensitivity"]["value"] in (0.0, None)
    assert scores["speed"]["engine"].startswith("run at http://127.0.0.1") and scores["speed"]["peak_memory_bytes"] is None
