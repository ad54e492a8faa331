"""One model under several prompts, answers held against each other, ranking at fixed specificity, and runs that share some
questions only: figures against cases whose answer is known."""

from __future__ import annotations

import json

import numpy as np
import pytest
from evaluating import FakeEngine, a_run, data, no_report, perfect  # noqa: F401 - fixtures
from sklearn import metrics as reference

import evaluate
from sonovqa import (
    calibration,
    coherence,
    comparing,
    consistency,
    files,
    measures,
    predictions,
    prompt_variants,
    ranking,
    scoring,
)
from sonovqa.cli import UserError
from sonovqa.engines import Reply
from sonovqa.metrics import Resamples
from sonovqa.questions import QUESTIONS

Q7 = QUESTIONS["Q7"].prompts
RNG = np.random.default_rng(11)


class Prompted(FakeEngine):
    """`FakeEngine` whose rule sees the prompt too: ``rule(prompt, question_id, truth, number)``."""

    def answer(self, requests, max_new_tokens):
        for request in requests:
            for question_id, prompt in request.prompts:
                if self.stop_after is not None and len(self.asked) == self.stop_after:
                    raise KeyboardInterrupt
                self.asked.append((request.image_id, question_id, prompt))
                number = int(request.image_id.split("/")[1].split(".")[0])
                said = self.rule(prompt, question_id, self.truth[request.image_id, question_id], number)
                yield said if isinstance(said, Reply) else Reply(request.image_id, question_id, said, None, "stop", 3, 0.01)


@pytest.fixture
def ask(data, tmp_path, monkeypatch, capsys):  # noqa: F811
    def go(rule, *flags, stop_after=None):
        engine = Prompted(data, rule, stop_after)
        monkeypatch.setattr(evaluate, "open_engine", lambda args: engine)
        out = tmp_path / "prompts"
        evaluate.main(["prompts", "some/model", "--data", str(data), "--out", str(out), "--resamples", "100", *flags])
        return files.read_json(out / "prompts.json"), capsys.readouterr().out, engine

    return go


def saying(prompt, question_id, truth, number):
    """Right whatever it is asked, each time in the form that the prompt wants."""
    if question_id == "Q7" and prompt == Q7["simple"]:
        return "Yes." if truth == "normal" else "No."
    return prompt_variants.answer_for(question_id, truth, "structured") if prompt == Q7["structured"] else truth


def test_the_same_meaning_in_other_words_is_consistent(ask):
    made, shown, engine = ask(saying, "--task", "Q7", "--prompts", "simple", "structured")
    about = made["questions"]["Q7"]
    assert about["own"] == "default" and list(about["prompts"]) == ["default", "simple", "structured"]
    assert len(engine.asked) == 3 * 84
    for name in ("simple", "structured"):
        found = about["prompts"][name]
        assert found["agreement"]["value"] == 1.0 and found["agreement"]["n"] == 84 and found["agreement"]["groups"] == 42
        assert found["agreement_by_chance"] == pytest.approx((72 / 84) ** 2 + (12 / 84) ** 2, abs=1e-6)
        assert found["form"]["compliance"]["value"] == 1.0 and found["read"]["value"] == 1.0
        assert found["metrics"]["balanced accuracy"]["value"] == 1.0
        assert found["metrics"]["balanced accuracy"]["own"]["difference"] == 0
        assert found["metrics"]["balanced accuracy"]["majority"]["value"] == 0.5
    assert about["prompts"]["default"]["form"] is None and "agreement" not in about["prompts"]["default"]
    assert "Asked otherwise, 1.00" in shown and "0 of 2 prompts score clearly below" in shown


def test_meanings_that_change_with_the_prompt_are_counted(ask):
    def rule(prompt, question_id, truth, number):
        if prompt == Q7["paraphrase"]:
            return "abnormal" if number % 4 == 0 else "normal"
        return "certainly" if prompt == Q7["structured"] else truth

    made, shown, _ = ask(rule, "--task", "Q7", "--prompts", "paraphrase", "structured")
    found = made["questions"]["Q7"]["prompts"]
    differing = sum((number % 4 == 0) != (number % 7 == 0) for number in range(84))
    assert found["paraphrase"]["agreement"]["value"] == pytest.approx(1 - differing / 84, abs=1e-6)
    low, high = found["paraphrase"]["agreement"]["interval"]
    assert low < 1 - differing / 84 < high
    assert found["structured"]["agreement"]["value"] == 0 and found["structured"]["unread"] == 84, "unread agrees with nothing"
    assert found["structured"]["form"]["compliance"]["value"] == 0 and found["structured"]["read"]["value"] == 0
    assert made["overall"]["agreement"]["n"] == 168 and "2 of 2 prompts score clearly below the own one: Q7 paraphrase" in shown


def test_a_constant_answer_is_no_better_than_chance(ask):
    made, _, _ = ask(lambda *_: "normal", "--task", "Q7", "--prompts", "paraphrase")
    found = made["questions"]["Q7"]["prompts"]["paraphrase"]
    assert found["agreement"]["value"] == found["agreement_by_chance"] == 1.0 and found["distinct"] == 1


def test_the_same_gibberish_twice_is_no_agreement(ask):
    made, _, _ = ask(lambda *_: "certainly", "--task", "Q7", "--prompts", "paraphrase")
    found = made["questions"]["Q7"]["prompts"]["paraphrase"]
    assert found["agreement"]["value"] == found["agreement_by_chance"] == 0 and found["unread"] == 84


def test_failures_are_left_out_and_asked_again(ask):
    def failing(prompt, question_id, truth, number):
        if prompt == Q7["short"] and number % 3 == 0:
            image = ("Trans-thalamic", "Abdomen", "Femur")[number % 3]
            return Reply(f"{image}/{number:04d}.png", question_id, "", "HTTP 500")
        return truth

    made, _, _ = ask(failing, "--task", "Q7", "--prompts", "short")
    found = made["questions"]["Q7"]["prompts"]["short"]
    assert found["failed"] == 28 and found["agreement"]["n"] == 56 and found["agreement"]["value"] == 1.0
    made, _, engine = ask(saying, "--task", "Q7", "--prompts", "short")
    assert len(engine.asked) == 28 and made["questions"]["Q7"]["prompts"]["short"]["failed"] == 0


def test_stopped_it_goes_on_and_further_prompts_are_added(ask):
    with pytest.raises(KeyboardInterrupt):
        ask(saying, "--task", "Q7", "--prompts", "simple", stop_after=100)
    _, _, engine = ask(saying, "--task", "Q7", "--prompts", "simple")
    assert len(engine.asked) == 168 - 100
    _, _, engine = ask(saying, "--task", "Q7", "--prompts", "simple", "Q7=short")
    assert len(engine.asked) == 84 and {prompt for *_, prompt in engine.asked} == {Q7["short"]}


def test_all_prompts_there_are_by_default_and_each_once(ask):
    made, _, engine = ask(saying, "--max-images", "6")
    asked = {(q, prompt) for _, q, prompt in engine.asked}
    assert asked == {(q, text) for q in ("Q1", "Q2", "Q3", "Q5", "Q7") for text in QUESTIONS[q].prompts.values()}
    assert len(engine.asked) == 6 * len(asked) and list(made["questions"]) == ["Q1", "Q2", "Q3", "Q5", "Q7"]


def test_the_own_prompt_is_the_one_of_training():
    names = consistency.names_asked("Q7", ["default", "simple"], "structured")
    assert names == {"structured": {"Q7"}, "default": {"Q7"}, "simple": {"Q7"}}
    assert set(consistency.names_asked("all", ["simple"], "default")) == {"default", "simple"}, "Q7 only"
    with pytest.raises(UserError, match="nothing to compare"):
        consistency.names_asked("Q7", ["default"], "default")


def test_reports_are_held_against_each_other_by_section():
    def row(text, prompt="default"):
        reference = "## Imaging Plane\ntrans-thalamic\n\n## Normality Assessment\nnormal"
        about = {"image_id": "a", "group": "g", "category": "c", "question_id": "report", "question": "", "answer_type": ""}
        asked = {"prompt": prompt_variants.PROMPTS["report"][prompt], "context": None, "reference": reference}
        return about | asked | {"prediction": text, "error": None, "finish_reason": "stop"}

    rows = {"default": [row("## Imaging Plane\ntrans-thalamic\n\n## Normality Assessment\nnormal")],
            "structured": [row("Imaging Plane: transthalamic view\nNormality Assessment: abnormal", "structured")]}  # fmt: skip
    baselines = scoring.Baselines({"Q3": "axial abdomen"}, "the training split", None)
    made = consistency.measure(consistency.sides_of(rows), prompt_variants.variants("default"), baselines, 0, 0)
    prompts = {kind: about["prompts"]["structured"] for kind, about in made["questions"].items()}
    assert prompts["Q3"]["agreement"]["value"] == 1 and prompts["Q7"]["agreement"]["value"] == 0
    assert prompts["report"]["form"]["compliance"]["value"] == 0 and prompts["report"]["metrics"]["completeness"]["value"] == 1


# -------------------------------------------------------------------------------- answers that do not go together


def answered(**said: str) -> dict[str, str | None]:
    return coherence.rules({q: measures.read(q, text) for q, text in said.items()})


def test_rules_of_coherence():
    assert answered(Q7="normal", Q8="routine monitoring") == {coherence.RECOMMENDATION: None}
    assert "routine monitoring" in answered(Q7="abnormal: mass", Q8="routine monitoring")[coherence.RECOMMENDATION]
    assert answered(Q7="abnormal: mass", Q8="specialist referral") == {coherence.RECOMMENDATION: None}
    assert "FL cannot be measured" in answered(Q3="trans-thalamic", Q4="HC, FL")[coherence.MEASUREMENT]
    assert answered(Q3="trans-thalamic", Q4="HC, BPD", Q5="20-25 weeks") == {coherence.MEASUREMENT: None, coherence.AGE: None}
    assert "used at" in answered(Q3="mid-sagittal CRL", Q5="30-35 weeks")[coherence.AGE]
    assert answered(Q7="gibberish", Q8="routine monitoring", Q3="trans-thalamic") == {}, "nothing unread is held against anyone"


def answers_of(image: int, said: dict[str, str], meant: dict[str, str], error: str | None = None) -> list[dict]:
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


def test_separate_answers_are_held_against_each_other():
    meant = {"Q3": "trans-thalamic", "Q4": "HC, BPD", "Q5": "20-25 weeks", "Q7": "normal", "Q8": "routine monitoring"}
    wrong = meant | {"Q4": "FL", "Q7": "abnormal"}
    rows = [r for i in range(30) for r in answers_of(i, wrong if i < 6 else meant, meant)]
    rows += answers_of(30, meant, meant, error="HTTP 500")
    baselines = scoring.Baselines(scoring.majority_answers(rows), "the references themselves", None)
    about = scoring.score(rows, baselines, 200)["coherence"]
    assert about["coherent"]["value"] == pytest.approx(24 / 30) and about["coherent"]["n"] == about["images"] == 30
    assert about["coherent"]["references"]["value"] == 1.0 and about["coherent"]["references"]["difference"] == pytest.approx(
        -0.2
    )
    assert about["coherent"]["interval"][0] < 0.8 < about["coherent"]["interval"][1]
    assert about["rules"][coherence.MEASUREMENT] == about["rules"][coherence.RECOMMENDATION] == {"checked": 30, "broken": 6}
    assert about["rules"][coherence.AGE] == {"checked": 30, "broken": 0} and len(about["violations"]) == 12
    told = coherence.line(about)
    assert "Coherence: 0.80 [" in told and "of 30 images" in told and "references 1.00" in told and "6 of 30" in told


def test_what_the_references_contradict_too_is_told_apart():
    """Phantoms are of any age in any plane: by the rule of weeks their references contradict themselves."""
    meant = {"Q3": "mid-sagittal CRL", "Q5": "30-35 weeks", "Q4": "CRL"}
    rows = [r for i in range(10) for r in answers_of(i, meant | {"Q4": "FL" if i < 2 else "CRL"}, meant)]
    about = scoring.score(rows, scoring.Baselines({}, "", None), 0)["coherence"]
    assert about["coherent"]["value"] == about["coherent"]["references"]["value"] == 0
    assert about["beyond_references"]["value"] == 0.8


def test_no_coherence_where_nothing_is_tied():
    rows = [r for i in range(5) for r in answers_of(i, {"Q2": "breech"}, {"Q2": "breech"})]
    assert "coherence" not in scoring.score(rows, scoring.Baselines({}, "", None), 0)
    said, meant = {"Q7": "gibberish", "Q8": "gibberish"}, {"Q7": "normal", "Q8": "routine monitoring"}
    silent = scoring.score(answers_of(0, said, meant), scoring.Baselines({}, "", None), 0)["coherence"]
    assert silent["coherent"]["value"] is None and "in none of 1 images" in coherence.line(silent)


# -------------------------------------------------------------------------------- ranking at fixed specificity


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
