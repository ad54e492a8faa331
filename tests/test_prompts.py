"""Prompt variants: names, forms, what short answers say, what is trained on and what a run is asked with by default."""

from __future__ import annotations

import pytest
from evaluating import FakeEngine, a_run, data, no_report, perfect  # noqa: F401 - fixtures

import evaluate
from sonovqa import answers, asking, chat, confidence, dataset, files, measures, predictions, prompt_variants, provenance
from sonovqa.cli import UserError
from sonovqa.questions import QUESTIONS, REPORT_PROMPTS

Q7 = QUESTIONS["Q7"].prompts


def test_every_question_has_a_paraphrase_and_all_prompts_are_told_apart():
    every = [text for prompts in prompt_variants.PROMPTS.values() for text in prompts.values()]
    assert len(every) == len(set(every)), "the name of a prompt is found by its text"
    assert all({"default", "paraphrase"} <= set(prompts) for prompts in prompt_variants.PROMPTS.values())
    assert {"simple", "detailed", "clinical", "structured"} <= set(Q7) and Q7["simple"] == "Is this ultrasound normal?"
    assert all(set(q.forms) | set(q.says) <= set(q.prompts) for q in QUESTIONS.values())


def test_a_line_names_one_prompt_for_all_or_one_a_question():
    assert set(prompt_variants.variants("default").values()) == {"default"}
    clinical = prompt_variants.variants("clinical")
    assert {clinical[q] for q in QUESTIONS} == {"clinical"} and clinical["report"] == "default", "it has none, so its default"
    some = prompt_variants.variants("Q7=structured, Q2=short")
    assert (some["Q7"], some["Q2"], some["Q1"]) == ("structured", "short", "default")
    both = prompt_variants.variants("short,Q7=simple")
    assert (both["Q7"], both["Q2"]) == ("simple", "short")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("fancy", "no question has a prompt named 'fancy'; default, paraphrase, short"),
        ("Q9=short", "'Q9' is no question; Q1, Q2"),
        ("Q2=structured", "Q2 has no prompt named 'structured'; default, paraphrase, short, clinical are allowed"),
        ("short,clinical", "one name stands for all"),
        ("", "no question has a prompt named ''"),
    ],
)
def test_an_unknown_name_lists_those_allowed(line, told):
    with pytest.raises(UserError, match=told):
        prompt_variants.variants(line)


def test_a_name_that_changes_nothing_of_the_task_is_refused(data):  # noqa: F811
    with pytest.raises(UserError, match="--task Q2 has no such prompt; clinical, default, paraphrase, short"):
        evaluate.main(["some/model", "--data", str(data), "--task", "Q2", "--prompts", "simple"])
    prompt_variants.check("simple", "all")
    prompt_variants.check("default", "Q2")


def test_prompts_of_a_row_follow_the_line():
    entry = {"question": "", "label": "", "answer_type": ""}
    row = {"questions": [entry | {"question_id": q, "answer": "normal"} for q in ("Q2", "Q7")]}
    row["questions"].append({"question_id": "yn1", "question": "Is it a boy?", "answer": "yes", "answer_type": "closed"})
    asked = {t["question_id"]: t["prompt"] for t in chat.tasks_of(row, "all", "Q7=simple")}
    assert asked == {"Q2": QUESTIONS["Q2"].prompts["default"], "Q7": "Is this ultrasound normal?", "yn1": "Is it a boy?"}
    (report,) = chat.tasks_of(row, "report", "paraphrase")
    assert report["prompt"] == REPORT_PROMPTS["paraphrase"]


@pytest.mark.parametrize("stored", ["normal", "abnormal", "abnormal: mass", "unclear", "thick nuchal translucency"])
def test_the_structured_form_is_trained_kept_and_read_back(stored):
    told = prompt_variants.answer_for("Q7", stored, "structured")
    form = prompt_variants.form_of("Q7", Q7["structured"])
    assert prompt_variants.in_form(form, told) and told.split(".")[0] == answers.label("Q7", stored).upper()
    assert prompt_variants.understood("Q7", Q7["structured"], told) == answers.label("Q7", stored)
    assert ("mass" in told) == ("mass" in stored), "what is wrong stays, as the reasoning"
    for line in ("default", "simple", "Q2=short"):
        assert prompt_variants.answer_for("Q7", stored, line) == stored
    assert prompt_variants.answer_for("Q2", "breech", "structured") == "breech"


@pytest.mark.parametrize(
    ("name", "text", "meant"),
    [
        ("simple", "Yes.", "normal"),
        ("simple", "No", "abnormal"),
        ("simple", "no, there is a mass", "abnormal"),
        ("simple", "No abnormality is seen.", "normal"),
        ("simple", "Yes, it looks normal.", "normal"),
        ("clinical", "None.", "normal"),
        ("clinical", "No", "normal"),
        ("clinical", "Yes: ventriculomegaly", "abnormal"),
        ("structured", "NORMAL. A small mass cannot be excluded from one image.", "normal"),
        ("structured", "**UNCLEAR** because the image is dark; what is seen is normal", "unclear"),
        ("structured", "Answer: ABNORMAL\nThe skull is normal.", "abnormal"),
        ("structured", "it looks normal", "normal"),
        ("default", "Yes.", None),
    ],
)
def test_an_answer_is_read_as_an_answer_to_its_prompt(name, text, meant):
    row = {"question_id": "Q7", "question": "", "prompt": Q7[name], "reference": meant or "normal"}
    found = measures.meaning(row, text)
    assert (found.key if found else None) == meant
    assert measures.right(row, text) == (meant is not None)


@pytest.mark.parametrize(
    ("question_id", "name", "good", "bad"),
    [
        ("Q7", "structured", "ABNORMAL. mass", "abnormal: mass"),
        ("Q7", "structured", "**NORMAL**\nNothing is seen.", "Answer: NORMAL"),
        ("Q7", "simple", "Yes, it is.", "The image is normal."),
        ("Q7", "short", "abnormal: mass", "it is abnormal"),
        ("Q1", "short", "stomach, spine, umbilical vein", "The image shows the stomach, the spine and the vein."),
        ("Q4", "short", "HC 180.5 mm, BPD 47.1 mm", "HC: 180 mm; BPD: 47 mm"),
        ("Q5", "short", "20-25 weeks", "about the 22nd week"),
        ("Q5", "short", "38+ weeks", "38"),
        ("Q6", "short", "Good", "The quality is good."),
        ("Q2", "short", "cephalic, axial, occiput left", "The fetus is cephalic and is seen in an axial section."),
    ],
)
def test_forms_tell_answers_apart(question_id, name, good, bad):
    form = prompt_variants.form_of(question_id, QUESTIONS[question_id].prompts[name])
    assert prompt_variants.in_form(form, f" {good}\n") and not prompt_variants.in_form(form, bad)


def test_no_form_where_none_is_asked_for():
    assert prompt_variants.form_of("Q7", Q7["detailed"]) is None and prompt_variants.form_of("yn1", "Is it a boy?") is None
    form = prompt_variants.form_of("report", REPORT_PROMPTS["structured"])
    titled = "\n".join(f"## {q.title}\nx" for q in QUESTIONS.values())
    assert prompt_variants.in_form(form, titled) and not prompt_variants.in_form(form, titled.replace("Imaging Plane", ""))


def test_label_probabilities_know_the_form_that_was_asked_for(data):  # noqa: F811
    train = asking.items_of(dataset.load_undecoded(data)["train"], "Q7", "structured")
    wordings = confidence.Labels(prompt_variants.wordings(train, "structured")).of_id("Q7")
    assert {"normal", "NORMAL"} <= set(wordings["normal"]) and "ABNORMAL" in wordings["abnormal"]
    train = asking.items_of(dataset.load_undecoded(data)["train"], "Q7", "simple")
    wordings = confidence.Labels(prompt_variants.wordings(train, "simple")).of_id("Q7")
    assert "Yes" in wordings["normal"] and "No" in wordings["abnormal"]


def test_references_stay_as_stored_under_every_prompt(data):  # noqa: F811
    split = dataset.load_undecoded(data)["test"]
    plain, structured = (asking.items_of(split, "Q7", line) for line in ("default", "structured"))
    assert [item.reference for item in plain] == [item.reference for item in structured]
    assert {item.prompt for item in structured} == {Q7["structured"]}


@pytest.fixture
def tuned(data, tmp_path, monkeypatch):  # noqa: F811
    """A run that was trained with the structured prompt, and an evaluation of it with further flags."""
    folder = tmp_path / "tuned"
    (folder / "merged").mkdir(parents=True)
    files.write_json(folder / "run.json", a_run(data, prompt_variant="Q7=structured"))

    def go(*flags):
        engine = FakeEngine(data, lambda r, q, truth: prompt_variants.answer_for(q, truth, "structured"))
        monkeypatch.setattr(evaluate, "open_engine", lambda *args: engine)
        evaluate.main([str(folder), "--data", str(data), "--no-blind", "--resamples", "20", *flags])
        rows = predictions.read(folder / "eval-test" / "predictions.jsonl")
        return files.read_json(folder / "eval-test" / "scores.json"), rows

    return go


def test_a_run_is_asked_with_the_prompts_it_was_trained_with(tuned):
    scores, rows = tuned()
    assert {row["prompt"] for row in rows if row["question_id"] == "Q7"} == {Q7["structured"]}
    assert scores["questions"]["Q7"]["metrics"]["accuracy"]["value"] == 1.0
    assert scores["arguments"]["prompt"] == "Q7=structured"
    assert not [f for f in scores["findings"] if f["kind"] == "prompt unlike training"]


def test_other_prompts_than_in_training_are_said(tuned):
    scores, rows = tuned("--prompts", "Q7=structured,Q2=short")
    assert {row["prompt"] for row in rows if row["question_id"] == "Q2"} == {QUESTIONS["Q2"].prompts["short"]}
    (found,) = [f for f in scores["findings"] if f["kind"] == "prompt unlike training"]
    assert (
        found["serious"] and "Q2 with its prompt “short”, trained with “default”" in found["text"] and "Q7" not in found["text"]
    )


def test_the_same_prompts_under_another_line_are_not_unlike_training(data):  # noqa: F811
    run = a_run(data, prompt_variant="simple")
    assert list(provenance.unlike_training(run, "Q7=simple", "all", (None, None))) == []
    assert list(provenance.unlike_training(run, "default", "Q2", (None, None))) == [], "of Q2 the two lines ask the same"
    assert len(list(provenance.unlike_training(run, "default", "Q7", (None, None)))) == 1
