"""The choice head: which token stands for a label, the loss over them, and a run trained, merged, evaluated and asked by it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import closed_set
import pytest
import torch
from conftest import noise_image
from running import losses_of, pushed, run
from safetensors.torch import load_file

import evaluate
import inference
from sonovqa import answering, batching, choice, choosing, dataset, files, losses, models, planning, weighting
from sonovqa.choice import Head, Label
from sonovqa.cli import UserError
from sonovqa.engines import ImageRequest, LabelRequest, Reply

Q6 = (("good", "good"), ("medium", "routine monitoring"), ("low", "thalami, falx"))


def split_of(*questions: tuple[str, str, str]) -> dict:
    """Rows of one question each: ``(question_id, answer, answer_type)``."""
    rows = [[{"question_id": q, "question": "Is it?", "answer": a, "label": a, "answer_type": t}] for q, a, t in questions]
    return {"questions": rows}


def test_labels_are_those_of_the_training_split_by_their_first_tokens(tokenizer):
    split = split_of(("Q7", "abnormal: mass", ""), ("Q7", "normal", ""), ("7", "yes", "closed"), ("8", "no", "closed"),
                     ("9", "Maybe", "closed"),
                     ("Q6", "good", ""), ("Q1", "femur", ""))  # fmt: skip
    head = choice.of_training(split, tokenizer, "all")
    names = {kind: [label.name for label in labels] for kind, labels in head.sets.items()}
    assert names == {"Q7": ["normal", "abnormal"], "closed": ["yes", "no"]}, "Q6 has one label only, unclear is never right"
    first = {label.answer: tokenizer(label.answer, add_special_tokens=False)["input_ids"][0] for label in head.sets["Q7"]}
    assert {label.answer: label.token for label in head.sets["Q7"]} == first and "abnormal" in first
    assert choice.from_json(json.loads(json.dumps(head.json()))) == head
    assert head.place("closed", "no") == (1, head.tokens.index(head.sets["closed"][1].token))
    assert head.place("Q7", "unclear") == (0, None)
    with pytest.raises(UserError, match="asks no closed question"):
        choice.of_training(split, tokenizer, "Q1")
    with pytest.raises(UserError, match="one label only"):
        choice.of_training(split, tokenizer, "Q6")


def test_letters_stand_for_labels_that_begin_alike_and_too_many_are_refused(tokenizer):
    ages = ["20-25 weeks", "25-30 weeks", "8-13 weeks"]
    tokens, spelt = choice.tokens_of(ages, tokenizer)
    assert spelt == ["A", "B", "C"] and [tokenizer.decode([token]) for token in tokens] == spelt
    assert choice.tokens_of(["yes", "no"], tokenizer)[0] == [tokenizer(t)["input_ids"][0] for t in ("yes", "no")]
    with pytest.raises(UserError, match="60 labels, some of which begin with the same token"):
        choice.tokens_of([f"1{n}" for n in range(60)], tokenizer)


@pytest.fixture(scope="module")
def small(base):
    torch.manual_seed(3)
    loaded = models.load_for_training(str(base), 16)
    return loaded.model.double(), loaded.processor


@pytest.fixture(scope="module")
def head(tokenizer) -> Head:
    """Q7 by its words and Q6 by letters, which share no label: some tokens are no label of a question."""
    token = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"][0]  # noqa: E731
    return Head({
        "Q6": tuple(Label(name, name, token(letter), letter) for (name, _), letter in zip(Q6, "ABC")),
        "Q7": (Label("normal", "normal", token("normal"), "normal"), Label("abnormal", "abnormal", token("a"), "a")),
    })  # fmt: skip


def batch_of(model, processor, head: Head, shared: bool, places: list) -> dict:
    """Two images with the same two closed questions, sharing their image or not; `places` of the four labels."""
    encoder = batching.Encoder(processor, model, head=head)
    prompts = ("Assess the image quality.", "Assess the normality of this ultrasound image.")
    images = [noise_image(96, 64, seed) for seed in (1, 2)]
    asked = [[encoder.branch_of({"prompt": p, "place": places[2 * i + k]}, 1.0 + k) for k, p in enumerate(prompts)]
             for i in range(2)]  # fmt: skip
    if not shared:
        images, asked = [images[i // 2] for i in range(4)], [[asked[i // 2][i % 2]] for i in range(4)]
    prefixes, vision = encoder.prefixes(images, [None] * len(images))
    return encoder.batch(prefixes, asked, {key: v.double() if v.is_floating_point() else v for key, v in vision.items()})


def test_the_loss_is_that_of_a_softmax_over_the_labels_at_the_last_prompt_token(small, head):
    model, processor = small
    places = [head.place("Q6", "low"), head.place("Q7", "normal"), head.place("Q6", "good"), head.place("Q7", "abnormal")]
    batch = batch_of(model, processor, head, False, places)
    assert batch["label_rows"].tolist() == list(head.tokens) and int((batch["labels"] != -100).sum()) == 4
    logits, targets, weights = losses.answer_logits(model, batch)
    ends = (batch["segments"] >= 0).sum(1) - 1  # the last token of each row is the last of its prompt
    inputs = {k: v for k, v in batch.items() if k not in losses._NOT_FOR_MODEL}
    inputs["attention_mask"] = losses.attention_mask(batch["segments"])
    whole = model(**inputs).logits[torch.arange(4), ends]
    for i, (kind, name) in enumerate((("Q6", "low"), ("Q7", "normal"), ("Q6", "good"), ("Q7", "abnormal"))):
        rows = [label.token for label in head.sets[kind]]
        chance = whole[i, rows].softmax(-1)[[label.name for label in head.sets[kind]].index(name)]
        loss = losses.weighted_sum(logits[i : i + 1], targets[i : i + 1], torch.ones(1)).item()
        assert math.exp(-loss) == pytest.approx(chance.item(), rel=1e-9)
    assert weights.tolist() == [1.0, 2.0, 1.0, 2.0]
    assert losses.answer_of_token(batch).tolist() == [0, 1, 2, 3], "focal loss is of each choice"
    assert "forward" not in model.get_output_embeddings().__dict__, "the head is itself again"


def test_shared_prefix_gives_the_loss_and_the_gradients_of_separate_rows(small, head):
    model, processor = small
    places = [head.place("Q6", "medium"), head.place("Q7", "normal"), head.place("Q6", "low"), head.place("Q7", "abnormal")]
    found = []
    for shared in (True, False):
        model.zero_grad()
        loss = losses.weighted_sum(*losses.answer_logits(model, batch_of(model, processor, head, shared, places)))
        loss.backward()
        found.append((loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-10)
    for name, grad in found[0][1].items():
        assert (grad - found[1][1][name]).abs().max() <= 1e-7 * max(1.0, grad.abs().max()), name
    rows = model.get_input_embeddings().weight.grad.abs().sum(1)[list(head.tokens)]
    assert bool((rows > 0).all()), "the labels' own rows of the tied head learn too"


def test_a_label_that_training_did_not_hold_is_no_target(small, data, tokenizer):
    model, processor = small
    split = dataset.load_undecoded(data)["train"]
    encoder = batching.encoder_for(processor, model, choice.of_training(split, tokenizer, "all"))
    how = ("train", encoder, "all", "default", True, 4096)
    plan = planning.plan_split(split, *how)
    assert plan.questions == 3 * 16, "the open question is not learnt"
    encoder.head = Head(encoder.head.sets | {"Q6": (encoder.head.sets["Q6"][0], Label("never", "never", 5, "!"))})
    fewer = planning.plan_split(split, *how)
    assert fewer.questions == 2 * 16 + 8 and {tuple(item["branches"]) for item in fewer.items} == {(0, 1, 2), (1, 2)}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return closed_set.write(tmp_path_factory.mktemp("data") / "closed")


@pytest.fixture(scope="module")
def chosen(base, data, tmp_path_factory) -> Path:
    """A finished choice run over all closed questions of the small set, class weights on."""
    outputs = tmp_path_factory.mktemp("outputs")
    how = ("--head", "choice", "--balance", "loss", "--balance-question", "Q6", "--focal", "1")
    run(base, data, outputs, "choice", *how, steps=12, eval_every=6)
    return outputs / "choice"


def test_a_choice_run_learns_is_merged_and_says_what_it_is(chosen):
    record = json.loads((chosen / "run.json").read_text())
    assert record["head"]["kind"] == "choice" and record["merge_check"]["wrong"] == []
    assert losses_of(record)[-1] < losses_of(record)[0] and (chosen / "merged").is_dir()
    plan = json.loads((chosen / "plan.json").read_text())
    assert len(plan["live"]) == record["merge_check"]["positions"] >= 16
    stored = load_file(chosen / "adapter" / "adapter_model.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in stored.items() if "lora_B" in name)


def test_engine_gives_the_heads_probabilities_batched_or_not(chosen, data):
    model, processor = models.load_for_inference(str(chosen / "merged"))
    engine = answering.engine_of(chosen, model, processor)
    assert isinstance(engine, choosing.ChoiceEngine) and engine.name.startswith("local")
    raw = dataset.load_undecoded(data)["test"]
    prompts = (("Q6", "Quality?"), ("Q7", "Normal?"), ("17", "Is it dark?"), ("Q1", "List."))
    requests = [ImageRequest(row["image_id"], row["image"]["bytes"], None, prompts) for row in raw]
    together = list(engine.answer(requests, 5))
    alone = list(answering.engine_of(chosen, model, processor, 1, share=False).answer(requests, 5))
    for one, other in zip(together, alone, strict=True):
        if one.question_id == "Q1":
            assert one.error == choice.NOT_ITS_OWN and one.text == "" and one.probabilities is None
            continue
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-4) and one.new_tokens == 0
        assert sum(one.probabilities.values()) == pytest.approx(1, abs=1e-5)
        best = max(one.probabilities, key=one.probabilities.get)
        assert one.text == engine.head.answer_of("closed" if one.question_id == "17" else one.question_id, best)
    names = tuple(label.answer for label in engine.head.sets["Q6"])
    (told,) = engine.likelihoods([LabelRequest("a", requests[0].image, None, (("Q6", "Quality?", ("other", *names)),))])
    assert told.log_likelihoods[0] == choosing.NEVER
    assert sum(map(math.exp, told.log_likelihoods[1:])) == pytest.approx(1, abs=1e-4)
    (broken,) = engine.answer([ImageRequest("b", b"no image", None, prompts[:1])], 5)
    assert "not readable" in broken.error


def test_evaluation_reads_the_probabilities_and_asks_for_nothing_else(chosen, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(choosing.ChoiceEngine, "likelihoods", lambda *_: pytest.fail("asked again"))
    out = tmp_path / "e"
    assert evaluate.main([str(chosen), "--data", str(data), "--confidence", "--out", str(out), "--resamples", "0"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "questions are not asked: the run's choice head was not trained" in said
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    kinds = set(choice.of_run(files.read_json(chosen / "run.json")).sets)
    assert {row["question_id"] for row in rows} == {"17", "Q6", "Q7"} and all(row["probabilities"] for row in rows)
    scores = files.read_json(out / "scores.json")["questions"]
    assert all(scores[kind]["confidence"]["mass"] == 1.0 for kind in kinds) and not (out / "confidence.jsonl").exists()
    greys = [json.loads(line) for line in (out / "blind.jsonl").read_text().splitlines()]
    assert greys and all(row["error"] is None for row in greys), "questions about grey images are told by their wording"


def test_inference_answers_by_the_head_and_refuses_what_it_does_not_know(base, chosen, data, tmp_path, capsys):
    words = ["--run", str(chosen), "--data", str(data), "--question"]
    inference.main([*words, "Q6", "--json"])
    (answer,) = json.loads(capsys.readouterr().out)["answers"]
    assert answer["answer"] in answer["probabilities"]
    assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-4)
    inference.main([*words, "Q6"])
    assert capsys.readouterr().out.startswith(f"{answer['answer']} (")
    inference.main(["--run", str(pushed(chosen, tmp_path / "hub", base)), "--adapter", *words[2:], "Q6"])
    assert capsys.readouterr().out.startswith(f"{answer['answer']} ("), "what was pushed to a hub knows its labels too"
    with pytest.raises(UserError, match="was not trained on this question"):
        inference.main([*words, "Q1"])
    with pytest.raises(UserError, match=r"--folder asks Q1 … Q8"):
        inference.main(["--run", str(chosen), "--folder", str(tmp_path), "--out", str(tmp_path / "x.xlsx")])


def test_a_report_has_no_labels(base, data, tmp_path):
    with pytest.raises(UserError, match="a report has no labels"):
        run(base, data, tmp_path, "report", "--head", "choice", "--task", "report")


def test_weights_count_a_choice_as_one_token():
    samples = [weighting.Sample(0, "a", "Q7", "normal", 1), weighting.Sample(1, "b", "Q7", "abnormal", 1)] * 2
    for mean in weighting.MEANS:
        assert len(set(weighting.weigh(samples, weighting.Weighting(mean=mean)))) == 1


def test_a_question_is_known_by_its_id_or_its_wording(head):
    default = "Assess the normality of this ultrasound image."
    assert choosing.kind_of(head, "Q7", "anything") == choosing.kind_of(head, "f00d", default) == "Q7"
    assert choosing.kind_of(head, "Q1", "x") is None and choosing.kind_of(head, "report", "x") is None
    other = Head({"closed": (Label("yes", "yes", 1, "yes"), Label("no", "no", 2, "no"))})
    assert choosing.kind_of(other, "17", "Is there a mass?") == "closed"
    assert choosing.kind_of(other, "18", "Is it left or right?") is None
    assert choosing.softmax({"a": -900.0, "b": -900.0}) == {"a": 0.5, "b": 0.5}
    assert Reply("a", "Q7", "x").probabilities is None


@pytest.mark.parametrize("name", ["run.json", choice.FILE, f"adapter/{choice.FILE}"])
def test_a_head_in_a_file_that_was_cut_off_is_one_line(tmp_path, name):
    (tmp_path / "adapter").mkdir()
    (tmp_path / name).write_text('{"head": {')
    with pytest.raises(UserError, match="no whole JSON"):
        choice.behind(tmp_path)
