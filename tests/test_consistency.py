"""One model under several prompts, and its answers held against each other: figures against cases whose answer is known."""

from __future__ import annotations

import pytest
from evaluating import FakeEngine, answers_of, data, no_report  # noqa: F401 - fixtures

import evaluate
from sonovqa import (
    coherence,
    consistency,
    files,
    measures,
    prompt_variants,
    scoring,
)
from sonovqa.cli import UserError
from sonovqa.engines import Reply
from sonovqa.questions import QUESTIONS

Q7 = QUESTIONS["Q7"].prompts


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
        monkeypatch.setattr(evaluate, "open_engine", lambda *args: engine)
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
