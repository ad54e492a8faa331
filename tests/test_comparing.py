"""Ranking at a fixed specificity, and runs held against each other: figures against cases whose answer is known."""

from __future__ import annotations

import json

import numpy as np
import pytest
from evaluating import answers_of, no_report  # noqa: F401 - a fixture
from sklearn import metrics as reference

import evaluate
from sonovqa import calibration, comparing, files, predictions, ranking
from sonovqa.cli import UserError
from sonovqa.metrics import Resamples

RNG = np.random.default_rng(11)


@pytest.mark.parametrize("specificity", ranking.SPECIFICITIES)
def test_sensitivity_at_a_specificity_is_a_point_of_the_roc_curve(specificity):
    truth = RNG.random(300) < 0.2
    score = np.round(RNG.normal(size=300) + truth, 1)  # rounded: ties
    false_alarms, found, _ = reference.roc_curve(truth, score, drop_intermediate=False)
    wanted = found[1 - false_alarms >= specificity - 1e-9].max()
    ours = ranking.sensitivity_at(specificity, truth, score, np.ones((1, 300)))[0]
    assert ours == pytest.approx(wanted) and 0 < ours < 1
    drawn = RNG.integers(300, size=300)  # a resample by weights is the resample by rows
    weights = np.bincount(drawn, minlength=300)[None]
    rows = ranking.sensitivity_at(specificity, truth[drawn], score[drawn], np.ones((1, 300)))
    assert ranking.sensitivity_at(specificity, truth, score, weights) == pytest.approx(rows)


def test_sensitivity_of_a_useless_score_is_nought_and_of_one_class_undefined():
    truth = np.array([True, False, False, False])
    assert ranking.sensitivity_at(0.9, truth, np.zeros(4), np.ones((1, 4)))[0] == 0, "one threshold: all or none"
    assert np.isnan(ranking.sensitivity_at(0.9, np.zeros(4, bool), np.arange(4), np.ones((1, 4)))[0])
    assert ranking.sensitivity_at(0.9, truth, np.array([1.0, 0.1, 0.2, 0.3]), np.ones((1, 4)))[0] == 1


def q7_rows(n: int = 120) -> tuple[list[dict], np.ndarray]:
    truth = np.arange(n) % 5 == 0
    rows = [r for i in range(n) for r in answers_of(i, {"Q7": "normal"}, {"Q7": "abnormal" if truth[i] else "normal"})]
    return rows, truth


def told_by(rows: list[dict], chance: np.ndarray) -> dict:
    keys = [(row["image_id"], row["question_id"]) for row in rows]
    return {key: {"probabilities": {"abnormal": p, "normal": 1 - p}, "mass": 1.0} for key, p in zip(keys, chance.tolist())}


def test_confidence_holds_sensitivity_at_specificity_with_interval(capsys):
    rows, truth = q7_rows()
    chance = np.clip(RNG.normal(0.3 + 0.3 * truth, 0.15), 0.01, 0.99)
    scores, draws = {"questions": {"Q7": {}}}, Resamples([r["group"] for r in rows], 200)
    calibration.add(scores, rows, told_by(rows, chance), None, draws)
    found = scores["questions"]["Q7"]["confidence"]
    values = [found[f"sensitivity at specificity {s:.2f}"]["value"] for s in ranking.SPECIFICITIES]
    assert values == sorted(values, reverse=True) and values[0] > values[-1]
    low, high = found["sensitivity at specificity 0.90"]["interval"]
    assert low < values[1] < high and found["sensitivity at specificity 0.90"]["groups"] == 60
    assert found["balanced accuracy"]["value"] == pytest.approx(reference.balanced_accuracy_score(truth, chance > 0.5), abs=1e-6)
    from sonovqa.cli import console

    calibration.show(scores, console)
    assert "sensitivity at specificity 0.95" in capsys.readouterr().out


def test_a_better_ranking_shows_in_the_paired_difference():
    rows, truth = q7_rows(400)
    noise = RNG.normal(0, 0.1, 400)
    blunt, sharp = (np.clip(0.4 + gap * truth + noise, 0.01, 0.99) for gap in (0.08, 0.16))
    draws = Resamples([r["group"] for r in rows], 300)
    made = calibration.differences("Q7", rows, rows, (told_by(rows, blunt), told_by(rows, sharp)), draws)
    figure = made["sensitivity at specificity 0.90"]
    assert set(made) == set(ranking.SCORES) and figure["difference"] > 0.1 and figure["interval"][0] > 0
    assert figure["second"] - figure["first"] == pytest.approx(figure["difference"]) and figure["n"] == 400
    assert calibration.differences("Q3", rows, rows, ({}, {}), draws) == {}


# -------------------------------------------------------------------------------- runs that share some questions only


def an_evaluation(folder, rows: list[dict], chance: np.ndarray | None = None):
    predictions.write(folder / "predictions.jsonl", rows)
    if chance is not None:
        lines = [{"image_id": i, "question_id": q, "error": None} | told for (i, q), told in told_by(rows, chance).items()]
        predictions.write(folder / "confidence.jsonl", lines)
    return folder


def test_compare_takes_what_both_were_asked_and_names_the_rest(tmp_path, capsys):
    meant = {"Q2": "breech", "Q3": "trans-thalamic", "Q7": "normal"}
    many = [r for i in range(40) for r in answers_of(i, meant | {"Q2": "cephalic" if i % 2 else "breech"}, meant)]
    single = [r for i in range(40) for r in answers_of(i, {"Q2": "breech"}, meant)]
    an_evaluation(tmp_path / "multi" / "eval-test", many)
    an_evaluation(tmp_path / "single" / "eval-test-Q2", single)
    paths, out = [str(tmp_path / name) for name in ("multi", "single")], tmp_path / "c.json"
    assert evaluate.main(["compare", *paths, "--resamples", "100", "--out", str(out)]) == 0
    (made,) = files.read_json(out)["comparisons"].values()
    assert list(made["questions"]) == ["Q2"] and made["questions"]["Q2"]["accuracy"]["difference"] == 0.5
    assert made["skipped"] == {"first": ["Q3", "Q7"], "second": []} and made["only_first"] == 80
    shown = " ".join(capsys.readouterr().out.split())
    assert f"Not compared, for only {paths[0]} was asked: Q3, Q7." in shown and "better on Q2" in shown
    an_evaluation(tmp_path / "single" / "eval-test-Q5", single)
    with pytest.raises(UserError, match=r"several evaluations; eval-test-Q2, eval-test-Q5"):
        comparing.folder_of(tmp_path / "single")


def test_compare_holds_a_report_against_separate_answers():
    meant = {"Q3": "trans-thalamic", "Q7": "normal"}
    separate = {(r["image_id"], r["question_id"]): r for r in answers_of(0, meant, meant)}
    text = "## Imaging Plane\ntrans-thalamic\n\n## Normality Assessment\nabnormal"
    whole = answers_of(0, {"report": text}, {"report": text.replace("abnormal", "normal")})
    made = comparing.compare(separate, {("0", "report"): whole[0]}, 0)
    differences = {kind: scores["accuracy"]["difference"] for kind, scores in made["questions"].items()}
    assert differences == {"Q3": 0.0, "Q7": -1.0} and made["skipped"] == {"first": [], "second": []}


def test_compare_knows_the_probabilities_of_both(tmp_path, capsys):
    rows, truth = q7_rows(200)
    for name, gap in (("plain", 0.05), ("weighted", 0.3)):
        an_evaluation(
            tmp_path / name, rows, np.clip(0.4 + gap * truth + np.random.default_rng(3).normal(0, 0.1, 200), 0.01, 0.99)
        )
    evaluate.main(["compare", str(tmp_path / "plain"), str(tmp_path / "weighted"), "--out", str(tmp_path / "c.json")])
    (made,) = json.loads((tmp_path / "c.json").read_text())["comparisons"].values()
    assert made["questions"]["Q7"]["sensitivity at specificity 0.90"]["interval"][0] > 0
    assert "sensitivity at specificity 0.90" in capsys.readouterr().out


def test_compare_knows_a_choice_run_s_probabilities_beside_generation_s(tmp_path):
    """A choice head's stand with its answers in predictions.jsonl, and no confidence.jsonl is written."""
    rows, truth = q7_rows(200)
    luck = np.random.default_rng(3).normal(0, 0.1, 200)
    likely = np.clip(0.4 + 0.3 * truth + luck, 0.01, 0.99)
    an_evaluation(tmp_path / "generated", rows, np.clip(0.4 + 0.05 * truth + luck, 0.01, 0.99))
    (tmp_path / "choice").mkdir()
    told = [row | {"probabilities": {"abnormal": p, "normal": 1 - p}} for row, p in zip(rows, likely.tolist(), strict=True)]
    (tmp_path / "choice" / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    (made,) = comparing.compare_with_first([tmp_path / "generated", tmp_path / "choice"], "test", 200, 1)
    found = made["questions"]["Q7"]
    assert found["AUROC"]["first"] < 0.8 < 0.95 < found["AUROC"]["second"] and found["AUROC"]["interval"][0] > 0
    assert {"average precision", "sensitivity at specificity 0.90"} <= set(found)


def test_compare_refuses_other_references(tmp_path):
    row = {"image_id": "a", "question_id": "Q7", "group": "a", "category": "", "error": None, "prediction": "normal"}
    row |= {"question": "", "answer_type": ""}
    first, second = ({("a", "Q7"): row | {"reference": text}} for text in ("normal", "abnormal"))
    with pytest.raises(UserError, match="the references differ"):
        comparing.compare(first, second)
    with pytest.raises(UserError, match="share no question"):
        comparing.compare(first, {})
