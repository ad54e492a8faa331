"""evaluate.py with engines whose faults are known: what is asked, what is written, what the first lines say."""

# ruff: noqa: F811 - tests take imported fixtures by their names

from __future__ import annotations

import argparse
import io
import json
import random

import datasets
import pytest
from evaluating import PLANES, STRUCTURES, WEEKS, FakeEngine, a_row, data, no_report, perfect, run  # noqa: F401 - fixtures
from PIL import Image

import evaluate
from sonovqa import answering, asking, files
from sonovqa.cli import UserError
from sonovqa.engines import Reply


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


@pytest.mark.parametrize(("flags", "limit"), [((), 2048), (("--max-new-tokens", "64"), 64)])
def test_the_limit_goes_by_what_is_asked_unless_given(tmp_path, monkeypatch, flags, limit):
    entry = {"question_id": "findings", "question": "List them.", "answer": '{"findings": []}', "label": ""}
    rows = [a_row(n) | {"questions": [entry | {"answer_type": "extraction"}]} for n in range(4)]
    split = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(str(tmp_path / "pages"))
    files.write_json(tmp_path / "pages" / "dataset.json", {"fingerprint": "p"})
    engine, out = FakeEngine(tmp_path / "pages", lambda *asked: '{"findings": []}'), tmp_path / "eval"
    monkeypatch.setattr(evaluate, "open_engine", lambda *args: engine)
    words = ["m", "--data", str(tmp_path / "pages"), "--resamples", "0", *flags]
    assert evaluate.main([*words, "--out", str(out)]) == 0 and evaluate.prompts([*words, "--out", str(tmp_path / "all")]) == 0
    assert engine.limits == {limit} and files.read_json(out / "settings.json")["max_new_tokens"] == limit
    assert files.read_json(out / "scores.json")["arguments"]["max_new_tokens"] == limit


def test_answers_cut_at_the_limit_are_said(run):
    def rule(request, question_id, truth):
        return Reply(request.image_id, question_id, (truth or "normal")[:4], None, "length", 128, 0.1)

    _, scores, _, _ = run(rule)
    kinds = {f["kind"] for f in scores["findings"]}
    assert {"cut", "stop short"} <= kinds


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "name either RUN_OR_MODEL or --endpoint"),
        (["m", "--endpoint", "http://h/v1"], "name either"),
        (["m", "--batch-images", "0", "--resamples", "-1"], "--batch-images 0; must be 1 or more"),
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


@pytest.mark.parametrize(("split", "serious"), [("train", True), ("validation", False), ("test", None)])
def test_answers_made_elsewhere_to_a_split_that_is_not_held_out(data, tmp_path, split, serious):
    rows = datasets.load_from_disk(str(data))[split].remove_columns("image")
    said = ((r["image_id"], {q["question_id"]: q["answer"] for q in r["questions"]}["Q3"]) for r in rows)
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(json.dumps({"image_id": i, "question_id": "report", "prediction": f"Q3: {t}"}) for i, t in said))
    assert evaluate.main(["score", str(path), "--data", str(data), "--split", split, "--resamples", "0", "--gallery", "0"]) == 0
    scores = files.read_json(path.with_suffix(".scores") / "scores.json")
    assert [f["serious"] for f in scores["findings"] if f["kind"] == "not held out"] == ([] if serious is None else [serious])
    assert not scores["unmatched"] and scores["questions"]["Q3"]["metrics"]["accuracy"]["value"] == 1.0


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


def test_an_adapter_that_a_run_does_not_keep_is_not_replaced_by_its_merged_weights(tmp_path):
    """A fully trained run has none: its merged weights must not be scored under the adapter's name."""
    (tmp_path / "merged").mkdir()
    (tmp_path / "run.json").write_text("{}")
    asked = argparse.Namespace(run=str(tmp_path), adapter=True)
    with pytest.raises(UserError, match="has no adapter/"):
        answering.model_of(asked)
    asked.adapter = False
    assert answering.model_of(asked) == (str(tmp_path / "merged"), None)
