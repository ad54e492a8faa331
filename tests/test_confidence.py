"""Label probabilities and what is made of them: likelihoods, ranking, calibration, abstention, what to label next, BERTScore."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from conftest import ROOT, noise_image
from evaluating import FakeEngine, data, no_report, perfect  # noqa: F401 - fixtures
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as reference
from stand_in import StandIn, send
from tiny_families import FAMILIES

import evaluate
from sonovqa import answers, asking, calibration, chat, confidence, endpoint_likelihoods, files, most_useful, ranking
from sonovqa.batching import Encoder
from sonovqa.bertscore import BertScore
from sonovqa.cli import UserError
from sonovqa.endpoint import Endpoint
from sonovqa.engines import LabelReply, LabelRequest
from sonovqa.generation import LocalEngine, stream
from sonovqa.metrics import Resamples

RNG = np.random.default_rng(3)
CLOSED = (
    ("Q3", "Identify the imaging plane shown.", ("axial abdomen", "axial thorax", "oblique")),
    ("Q7", "Is it normal?", ("normal", "abnormal: cardiomegaly")),
)


def png(seed: int = 1) -> bytes:
    stream_ = io.BytesIO()
    noise_image(96, 64, seed).save(stream_, "PNG")
    return stream_.getvalue()


def alone(model, processor, image, prompt: str, answer: str) -> float:
    """The likelihood of one answer by itself: an ordinary forward pass over the whole conversation."""
    encoder = Encoder(processor, model)
    inputs = dict(encoder.inputs([encoder.template.prefix(None) + encoder.template.branch(prompt)], [image]))
    told = torch.tensor([encoder.branch(prompt, answer).ids[encoder.branch(prompt).asked :]])
    if encoder.starts:
        inputs["decoder_input_ids"] = torch.cat([torch.tensor([encoder.starts]), told], 1)
    else:
        inputs["input_ids"] = torch.cat([inputs["input_ids"], told], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        for key in {"mm_token_type_ids", "token_type_ids"} & set(inputs):
            inputs[key] = torch.cat([inputs[key], torch.zeros_like(told)], 1)
        for key in {"cross_attention_mask"} & set(inputs):
            inputs[key] = torch.cat([inputs[key], inputs[key][:, -1:].expand(-1, told.shape[1], -1, -1)], 1)
    with torch.inference_mode():
        logits = model(**inputs).logits[0, -told.shape[1] - 1 : -1].log_softmax(-1)
    return float(logits.gather(1, told[0][:, None]).sum())


@pytest.mark.parametrize("family", FAMILIES)
def test_one_shared_pass_equals_each_answer_by_itself(family, tokenizer):
    torch.manual_seed(1)
    model, processor = FAMILIES[family](tokenizer)
    model = model.double().eval()
    replies = list(LocalEngine(model, processor).likelihoods([LabelRequest("a", png(), None, CLOSED)]))
    for reply, (question_id, prompt, texts) in zip(replies, CLOSED, strict=True):
        expected = [alone(model, processor, chat.open_image(png()), prompt, text) for text in texts]
        assert reply.question_id == question_id and reply.log_likelihoods == pytest.approx(expected, abs=1e-6)
    (broken,) = LocalEngine(model, processor).likelihoods([LabelRequest("a", b"no image", None, CLOSED[:1])])
    assert broken.log_likelihoods == () and "not readable" in broken.error


def test_stream_stops_generating_when_its_reader_leaves(tokenizer):
    model, processor = FAMILIES["qwen3_vl"](tokenizer)
    steps = []
    model.register_forward_hook(lambda *_: steps.append(1))
    model.generation_config.eos_token_id = None
    pieces = stream(model.eval(), processor, chat.messages(noise_image(96, 64, 3), "Is it normal?"), 1500)
    next(pieces)
    pieces.close()
    stopped_at = len(steps)
    assert stopped_at < 1000 and len(steps) == stopped_at


def test_wordings_of_a_label_add_up_and_the_mass_says_what_is_left():
    wordings = {"normal": ("normal",), "abnormal": ("abnormal", "abnormal: cardiomegaly")}
    found, mass = confidence.probabilities([math.log(0.3), math.log(0.1), math.log(0.2)], wordings)
    assert found == pytest.approx({"normal": 0.5, "abnormal": 0.5}) and mass == pytest.approx(0.6)
    far, mass = confidence.probabilities([-900.0, -901.0, -2000.0], wordings)
    assert far["normal"] == pytest.approx(1 / (1 + math.exp(-1))) and mass == 0.0


def item(question_id: str, text: str, answer_type: str = "", question: str = "") -> asking.Item:
    return asking.Item(0, "i", "g", "c", None, question_id, question, answer_type, "p", text)


def test_labels_are_the_canonical_ones_in_the_words_of_the_training_split():
    labels = confidence.Labels([item("Q7", "abnormal: cardiomegaly"), item("Q7", "normal"), item("Q3", "axial thorax")])
    assert labels.of(item("Q7", "")) == {
        "normal": ("normal",), "abnormal": ("abnormal: cardiomegaly", "abnormal"), "unclear": ("unclear",)
    }  # fmt: skip
    assert set(labels.of(item("Q6", ""))) == {"good", "medium", "low"}
    assert list(labels.of(item("Q5", ""))) == list(answers.CANONICAL["Q5"])
    assert labels.of(item("17", "yes", "closed", "Is there a fracture?")) == {"yes": ("yes",), "no": ("no",)}
    assert not labels.of(item("18", "left", "closed", "Is it left or right?")) and not labels.of(item("Q1", "femur"))


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.9])), min_size=4, max_size=40))
def test_ranking_scores_equal_scikit_learn(rows):
    truth, score = np.array([r[0] for r in rows]), np.array([r[1] for r in rows])
    weights = np.stack([np.ones(len(rows)), np.random.default_rng(0).integers(0, 4, len(rows))])
    ours = ranking.auroc(truth, score, weights), ranking.average_precision(truth, score, weights)
    for row, weight in enumerate(weights):
        if len({bool(t) for t, w in zip(truth, weight, strict=True) if w}) < 2:
            continue
        assert ours[0][row] == pytest.approx(reference.roc_auc_score(truth, score, sample_weight=weight))
        assert ours[1][row] == pytest.approx(reference.average_precision_score(truth, score, sample_weight=weight))


def test_calibration_error_is_nought_for_honest_and_large_for_boastful_probabilities():
    chance = RNG.random(20000)
    came = (RNG.random(20000) < chance).astype(float)
    assert calibration.calibration_error(chance, came).value < 0.02
    assert calibration.calibration_error(np.full(1000, 0.99), (RNG.random(1000) < 0.5).astype(float)).value > 0.4
    assert len(calibration.reliability(np.full(100, 0.2), came[:100])) == 1, "equal probabilities share a bin"
    bins = calibration.reliability(chance[:500], came[:500])
    assert [one["n"] for one in bins] == [50] * 10


def test_equally_sure_answers_are_right_as_often_whatever_their_order():
    right = np.repeat([1.0, 0.0], 50)
    for order in (right, right[::-1]):
        assert {point["accuracy"] for point in calibration.coverage(np.full(100, 0.7), order)} == {0.5}
    curve = calibration.coverage(np.repeat([0.9, 0.4], 50), np.concatenate([np.ones(50), np.tile([1.0, 0.0], 25)]))
    assert {p["coverage"]: p["accuracy"] for p in curve}[0.5] == 1.0 and curve[0]["accuracy"] == 0.75


def test_few_rows_do_not_cancel_in_one_bin():
    chance = np.linspace(0.05, 0.95, 19)
    assert calibration.calibration_error(chance, (chance < 0.5).astype(float)).value > 0.4
    assert calibration.calibration_error(chance, (chance > 0.5).astype(float)).value < 0.35


def test_a_calibration_error_lies_in_its_own_interval_and_beside_what_chance_shows():
    for seed in range(20):
        draw = np.random.default_rng(seed)
        chance, groups = draw.random(200), [str(i) for i in range(200)]
        came = (draw.random(200) < chance).astype(float)
        error = calibration._calibration(chance, came, groups, Resamples(groups, 200))["calibration error"]
        assert error["interval"][0] <= error["value"] <= error["interval"][1]
        assert 0.04 < error["by chance"] < 0.12 and error["value"] < 2 * error["by chance"]
        wrong = calibration._calibration(chance, 1 - came, groups, Resamples(groups, 200))["calibration error"]
        assert wrong["interval"][0] > 2 * wrong["by chance"]


def a_row(number: int, said: str, reference_: str) -> dict:
    return {"image_id": str(number), "group": str(number // 2), "question_id": "Q7", "question": "", "answer_type": "",
            "reference": reference_, "prediction": said, "error": None}  # fmt: skip


def test_surer_answers_are_righter_and_unread_ones_get_a_marked_fallback():
    rows = [a_row(n, "abnormal" if n % 10 == 0 else "normal", "normal" if n < 10 else "abnormal" if n % 10 == 0 else "normal")
            for n in range(100)]  # fmt: skip
    rows[50]["prediction"] = "qqq"
    told = {(r["image_id"], "Q7"): {"probabilities": {"normal": 0.9, "abnormal": 0.1}, "mass": 1.0} for r in rows}
    for n in range(0, 100, 10):
        told[str(n), "Q7"]["probabilities"] = {"normal": 0.45, "abnormal": 0.55}
    scores = {"questions": {"Q7": {}}}
    calibration.add(scores, rows, told, 0.6, Resamples([r["group"] for r in rows], 100))
    found = scores["questions"]["Q7"]["confidence"]
    assert found["positives"] == 9 and found["AUROC"]["value"] == pytest.approx((91 - 0.5) / 91)
    assert found["AUROC"]["interval"][0] < found["AUROC"]["value"]
    assert found["abstain"]["held_back"] == 10 and found["abstain"]["accuracy"]["value"] == 1.0
    assert found["curve"][0]["accuracy"] == 0.98 and found["curve"][-1]["accuracy"] == 1.0
    (offer,) = found["fallback"]["offered"]
    assert (offer["image_id"], offer["likeliest"]) == ("50", "abnormal") and found["fallback"]["accuracy"]["value"] == 0.99
    assert not list(calibration.find(scores, 100, 100))
    (missing,) = calibration.find(scores, 100, 90)
    assert missing.kind == "no probabilities" and missing.serious


class Sure(FakeEngine):
    """Knows the truth of every closed question, is less sure of the Femur, and weighs by it."""

    def likelihoods(self, requests):
        for request in requests:
            for question_id, _, texts in request.prompts:
                self.asked.append((request.image_id, question_id))
                truth = self.truth.get((request.image_id, question_id), texts[0])
                sure = -5.0 if request.image_id.startswith("Femur") else -9.0
                yield LabelReply(request.image_id, question_id, tuple(-0.1 if text == truth else sure for text in texts))


def test_confidence_abstention_and_what_to_label_next(data, tmp_path, monkeypatch, capsys):  # noqa: F811
    new = tmp_path / "new"
    for number, folder in enumerate(("Femur", "Femur", "Abdomen", "Thorax")):
        (new / folder).mkdir(parents=True, exist_ok=True)
        (new / folder / f"n{number}.png").write_bytes(png(100 + number))
    engine = Sure(data, perfect)
    monkeypatch.setattr(evaluate, "open_engine", lambda *args: engine)
    flags = ["some/model", "--data", str(data), "--out", str(tmp_path / "e"), "--resamples", "50", "--confidence",
             "--abstain-below", "0.5", "--most-useful", "3", "--images", str(new)]  # fmt: skip
    assert evaluate.main(flags) == 0
    scores = files.read_json(tmp_path / "e" / "scores.json")
    found = scores["questions"]["Q7"]["confidence"]
    assert found["n"] == 84 and found["AUROC"]["value"] == 1.0 and found["abstain"]["held_back"] == 0
    assert found["likeliest label"]["value"] == 1.0 and "confidence" not in scores["questions"]["Q1"]
    listed = (tmp_path / "e" / "most-useful.csv").read_text().splitlines()
    assert len(listed) == 4 and {line.split(",")[0] for line in listed[1:]} == {"Femur", "Abdomen", "Thorax"}
    assert listed[1].startswith("Femur,n"), "the least sure come first, then the other categories in turn"
    shown = capsys.readouterr().out
    assert "AUROC" in shown and "3 images to label next" in shown
    asked = len(engine.asked)
    assert evaluate.main(flags) == 0 and len(engine.asked) == asked, "nothing is asked twice"


def test_an_engine_without_likelihoods_and_wrong_flags_are_said(data, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(evaluate, "open_engine", lambda *args: FakeEngine(data, perfect))
    base = ["some/model", "--data", str(data), "--out", str(tmp_path / "e"), "--no-blind", "--resamples", "0"]
    with pytest.raises(UserError, match="gives no likelihoods"):
        evaluate.main([*base, "--confidence"])
    with pytest.raises(UserError, match="asks no closed question"):
        evaluate.main([*base, "--confidence", "--task", "Q1", "--out", str(tmp_path / "f")])
    for wrong in (["--abstain-below", "0.5"], ["--confidence", "--abstain-below", "2"], ["--most-useful", "3"]):
        with pytest.raises(UserError):
            evaluate.main([*base, *wrong])


def test_dealt_in_turns_over_categories():
    rows = [{"image_id": f"{c}/{n}", "category": c, "confidence": s} for c, n, s in
            (("A", 1, 0.1), ("A", 2, 0.2), ("A", 3, 0.3), ("B", 1, 0.8), ("C", 1, 0.5))]  # fmt: skip
    assert [row["image_id"] for row in most_useful.dealt(rows)] == ["A/1", "C/1", "B/1", "A/2", "A/3"]


def completion_of(tokens: list[tuple[str, float]]):
    told = [None, *({str(at): {"decoded_token": text, "logprob": value}} for at, (text, value) in enumerate(tokens))]
    return types.SimpleNamespace(prompt_logprobs=told)


def test_prompt_log_probabilities_are_those_of_the_answer_and_its_end():
    tokens = [("normal", -7.0), ("?", -7.0), ("<|im_start|>", -7.0), ("assistant", -7.0), ("\n", -7.0),
              ("ab", -1.0), ("normal", -2.0), ("<|im_end|>", -0.5), ("\n", -9.0)]  # fmt: skip
    assert endpoint_likelihoods.read(completion_of(tokens), "abnormal") == -3.5
    assert endpoint_likelihoods.read(completion_of(tokens[:1] + tokens[2:]), "normal") == -2.5
    glued = [("assistant", -1.0), (" ab", -1.0), ("normal", -1.0), ("<|im_end|>", -1.0)]
    with pytest.raises(ValueError, match="no token begins where the answer"):
        endpoint_likelihoods.read(completion_of(glued), "abnormal")


def test_endpoint_weighs_every_wording_and_says_when_it_cannot(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    likely = {"normal": -0.5, "abnormal: cardiomegaly": -3.0, "axial abdomen": -1.0, "axial thorax": -1.5, "oblique": -9.0}

    def weigh(handler):
        answer = server.bodies[-1]["messages"][-1]["content"]
        tokens = ((answer, likely[answer]), ("#", -0.1))
        entries = [None, *({str(at): {"decoded_token": text, "logprob": value}} for at, (text, value) in enumerate(tokens))]
        choice = {"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "length"}
        head = {"id": "x", "object": "chat.completion", "created": 0, "model": "run"}
        send(handler, 200, head | {"choices": [choice], "prompt_logprobs": entries})

    with StandIn(lambda prompt, attempt: weigh) as server:
        engine = Endpoint(server.url, "run", in_flight=1)
        replies = list(engine.likelihoods([LabelRequest("a", png(), None, CLOSED), LabelRequest("b", b"no", None, CLOSED[:1])]))
    assert [reply.log_likelihoods for reply in replies[:2]] == [pytest.approx((-1.1, -1.6, -9.1)), pytest.approx((-0.6, -3.1))]
    assert "not readable" in replies[2].error
    body = server.bodies[0]
    assert body["prompt_logprobs"] == 0 and body["add_generation_prompt"] is False and body["messages"][-1]["role"] == "assistant"
    with StandIn() as server, pytest.raises(UserError, match="no prompt log-probabilities"):
        list(Endpoint(server.url, "run").likelihoods([LabelRequest("a", png(), None, CLOSED)]))


def test_an_endpoint_that_has_gone_away_ends_the_run_and_keeps_what_was_answered(data, tmp_path, monkeypatch):  # noqa: F811
    from sonovqa.engines import Reply

    def dies(request, question_id, truth):
        if len(engine.asked) <= 30:
            return truth
        return Reply(request.image_id, question_id, "", "connection failed (refused) (tried 6 times)")

    engine = FakeEngine(data, dies)
    monkeypatch.setattr(evaluate, "open_engine", lambda *args: engine)
    flags = ["some/model", "--data", str(data), "--out", str(tmp_path / "e"), "--no-blind", "--resamples", "0"]
    with pytest.raises(UserError, match="has gone away") as told:
        evaluate.main(flags)
    assert "\n" not in str(told.value) and len(engine.asked) == 30 + asking.MOST_UNREACHED
    engine.rule, engine.asked = perfect, []
    assert evaluate.main(flags) == 0 and len(engine.asked) == 84 * 5 - 30


@pytest.fixture(scope="module")
def bert(tmp_path_factory, tokenizer):
    """A small random BERT with the project's tiny tokenizer."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(tokenizer), **small)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_bertscore_is_greedy_matching_and_names_its_model(bert, tokenizer):
    score = BertScore(str(bert))
    assert str(bert) in score.name and "layer 2" in score.name
    assert score(["normal", "femur"], ["normal", ""]).value == pytest.approx(0.5, abs=1e-5)
    with torch.inference_mode():
        told = [score._tokenizer(text, return_tensors="pt") for text in ("axial abdomen", "sagittal spine")]
        a, b = (torch.nn.functional.normalize(score._model(**one).last_hidden_state[0], dim=-1) for one in told)
    recall = sum(max(float(x @ y) for y in b) for x in a) / len(a)
    precision = sum(max(float(x @ y) for x in a) for y in b) / len(b)
    expected = 2 * recall * precision / (recall + precision)
    assert score(["axial abdomen"], ["sagittal spine"]).value == pytest.approx(expected, abs=1e-5)


def test_bertscore_needs_nothing_loaded_before_it(bert):
    """`evaluate.py score` loads no other model: the first import of transformers is then BERTScore's own."""
    code = "import sys; from sonovqa.bertscore import BertScore; print(BertScore(sys.argv[1])(['femur'], ['femur']).value)"
    done = subprocess.run([sys.executable, "-c", code, str(bert)], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert float(done.stdout) == pytest.approx(1.0, abs=1e-5), done.stderr


def test_bertscore_fetches_nothing(tmp_path):
    with pytest.raises(UserError, match="hf download roberta-large") as told:
        BertScore("roberta-large")
    assert "\n" not in str(told.value)


def test_bertscore_by_flag(bert, data, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(evaluate, "open_engine", lambda *args: FakeEngine(data, perfect))
    flags = ["--data", str(data), "--out", str(tmp_path / "e"), "--no-blind", "--resamples", "0", "--bertscore", str(bert)]
    assert evaluate.main(["some/model", *flags]) == 0
    scores = json.loads((tmp_path / "e" / "scores.json").read_text())["questions"]["Q3"]["metrics"]
    (name,) = [name for name in scores if name.startswith("BERTScore F1")]
    assert str(bert) in name and scores[name]["value"] == pytest.approx(1.0, abs=1e-5)


def test_numbers_of_free_answers_have_a_tolerance():
    from sonovqa import measures

    asked = {"question_id": "9", "question": "How wide is it?", "answer_type": "open"}
    rows = [asked | {"reference": text} for text in ("40 mm", "40 mm", "liver")]
    scores = measures.measure("open", rows, ["about 41 mm", "50 mm", "liver"])
    assert scores["numbers right"].value == 0.5
