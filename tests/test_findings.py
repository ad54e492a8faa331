"""What findings say of evaluations whose fault is known, and that they do not cry wolf."""

from __future__ import annotations

import random

import pytest

from sonovqa import comparing, findings, scoring

PLANES = ("trans-thalamic", "trans-cerebellar", "axial abdomen", "longitudinal femur", "sagittal cervix", "mid-sagittal CRL")


def a_row(number: int, question_id: str, reference: str, prediction: str, group: str | None = None) -> dict:
    return {
        "image_id": f"{number % 6}/{number}.png", "group": group or f"p{number}", "category": f"c{PLANES.index(reference)}"
        if reference in PLANES else "", "question_id": question_id, "question": "", "answer_type": "", "prompt": question_id,
        "context": None, "reference": reference, "prediction": prediction, "error": None, "finish_reason": "stop", "size": None,
    }  # fmt: skip


def judged(pairs, question_id: str, group=lambda n: None, majority: str | None = None, resamples: int = 200):
    """Scores, findings and the first line, of (reference, answer) pairs."""
    rows = [a_row(n, question_id, reference, said, group(n)) for n, (reference, said) in enumerate(pairs)]
    common = {question_id: majority} if majority else scoring.majority_answers(rows)
    scores = scoring.score(rows, scoring.Baselines(common, "the references themselves", None), resamples)
    found = findings.find(scores, rows)
    return scores["questions"][question_id], found, findings.describe(found, scores)


def serious(found) -> set[str]:
    return {f.kind for f in found if f.serious}


def test_four_fifths_the_same_answer_is_said():
    pick = random.Random(1)
    pairs = [(PLANES[n % 6], PLANES[0] if pick.random() < 0.78 else PLANES[n % 6]) for n in range(420)]
    about, found, first = judged(pairs, "Q3")
    assert about["metrics"]["accuracy"]["value"] > 0.3 and "not above baseline" not in serious(found)
    assert {"constant", "unrelated"} <= serious(found) and "nothing suspicious" not in first
    (said,) = (f.text for f in found if f.kind == "constant")
    assert "answers hardly depend on the image: 8" in said and "the references' commonest is 17%" in said


@pytest.mark.parametrize("n", [12, 60, 420])
@pytest.mark.parametrize("wrong", [0.0, 0.2, 0.4])
def test_mistakes_that_are_spread_out_are_not_called_the_same_answer(n, wrong):
    for seed in range(5):
        pick = random.Random(seed)
        pairs = [(PLANES[i % 6], pick.choice(PLANES) if pick.random() < wrong else PLANES[i % 6]) for i in range(n)]
        _, found, _ = judged(pairs, "Q3", resamples=0)
        assert not {"constant", "unrelated"} & serious(found)


def test_few_rows_differ_by_chance():
    pairs = [("good", "good")] * 5 + [("low", "good")] * 3 + [("low", "low")] * 2
    _, found, _ = judged(pairs, "Q6")
    assert "constant" not in serious(found)


@pytest.mark.parametrize(("kind", "reference", "said"), [("Q7", "normal", ["abnormal"]), ("Q6", "good", ["low", "medium"])])
def test_wrong_on_every_image_is_not_above_anything(kind, reference, said):
    about, found, first = judged([(reference, said[n % len(said)]) for n in range(60)], kind)
    assert about["headline"] == "accuracy" and about["metrics"]["accuracy"]["value"] == 0
    assert "not above baseline" in serious(found) and first.startswith("Not above its baselines on 1 of 1")
    _, found, first = judged([(reference, reference)] * 60, kind)
    assert not serious(found) and {"one reference"} <= {f.kind for f in found}


def test_without_a_positive_reference_accuracy_is_what_counts():
    pairs = [("normal", "normal")] * 15 + [("normal", "unclear")] * 30 + [("unclear", "normal")] * 15
    about, found, _ = judged(pairs, "Q7")
    assert about["headline"] == "accuracy" and about["metrics"]["accuracy"]["value"] == 0.25
    assert "not above baseline" in serious(found)


def test_one_patient_gives_no_verdict():
    pairs = [("good", "good")] * 5 + [("low", "low")] + [("low", "good")] * 4
    about, found, first = judged(pairs, "Q6", lambda n: "p")
    figure = about["metrics"]["accuracy"]
    assert figure["value"] == 0.6 and figure["interval"] is None and figure["majority"]["difference_interval"] is None
    (few,) = (f for f in found if f.kind == "few groups")
    assert few.serious and few.text.startswith("only 1 group:") and not first.startswith("Above")


def test_two_groups_of_the_rarer_class_leave_it_open():
    pairs = [("abnormal", "abnormal")] * 2 + [("normal", "normal")] * 198
    _, found, first = judged(pairs, "Q7")
    assert not serious(found) and first.startswith("Too few groups to tell whether Q7 is above the majority answer")
    pairs = [("abnormal", "normal")] * 2 + [("normal", "normal")] * 198
    assert "not above baseline" in serious(judged(pairs, "Q7")[1]), "what is not above needs no interval"


def test_compare_gives_no_verdict_on_one_image(capsys):
    from sonovqa.cli import console

    one, other = ({("i", "Q2"): a_row(0, "Q2", "cephalic", said)} for said in ("breech", "cephalic"))
    made = comparing.compare(one, other, 200)
    figure = made["questions"]["Q2"]["accuracy"]
    assert figure["difference"] == 1 and figure["interval"] is None
    assert comparing.verdict(made, "base", "tuned") == "tuned against base: too few groups to tell on Q2."
    comparing.show(made, "base", "tuned", console)
    assert "only 1 group: too few for an interval" in capsys.readouterr().out


def test_values_beside_the_parameters_asked_for_are_no_miss():
    asked = ("HC, BPD", "AC", "FL")
    said = {"HC, BPD": "HC 175 mm, BPD 47 mm", "AC": "AC 20 cm", "FL": "FL 31 mm"}
    about, found, _ = judged([(asked[n % 3], said[asked[n % 3]]) for n in range(60)], "Q4")
    assert about["metrics"]["accuracy"]["value"] == 1 and not serious(found)
    assert about["answers"]["recall"]["HC"] == {"found": 20, "n": 20} and not about["answers"]["confused"]
    assert about["answers"]["predicted"]["distinct"] == 3


def test_a_member_of_many_sets_that_is_never_found_is_said():
    sets = ("skull, placenta", "femur, placenta", "stomach, spine, placenta", "cervix", "heart, spine")
    pairs = [(sets[n % 5], sets[n % 5].replace(", placenta", "")) for n in range(50)]
    about, found, _ = judged(pairs, "Q1")
    (told,) = (f for f in found if f.kind == "recall near zero")
    assert told.text == "Q1: hardly ever found: “placenta” 0 of 30"
    about, found, _ = judged([(sets[n % 5], sets[n % 5] + ", skin") for n in range(50)], "Q1")
    assert "recall near zero" not in serious(found) and about["answers"]["recall"]["femur"] == {"found": 10, "n": 10}


def test_remains_of_a_chat_template_are_said_once():
    texts = ("good<|im_end|>", "<think>The edges are sharp.</think>good", "low<|eot_id|>")
    _, found, _ = judged([("low" if n % 3 == 2 else "good", texts[n % 3]) for n in range(60)], "Q6")
    (told,) = (f for f in found if f.kind == "remains")
    assert told.serious and told.text.startswith("60 of 60 answers (100.0%) hold a chat template's marks or thinking")
    assert "remains" not in serious(judged([("good", "good, p < 0.05 </br>")] * 30 + [("low", "low")] * 30, "Q6")[1])


def test_control_characters_of_an_answer_do_not_reach_the_terminal():
    _, found, _ = judged([("good", "\x1b[31mgood\x1b]0;x\x07")] * 30 + [("low", "\x1b[31mgood")] * 30, "Q6")
    assert not any("\x1b" in f.text or "\x07" in f.text for f in found) and "non-words" in serious(found)
