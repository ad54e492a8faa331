"""Answers of the local engine, image encoded once, equal asking the model one question at a time."""

from __future__ import annotations

import io

import pytest
import torch
from conftest import noise_image
from tiny_families import FAMILIES

from sonovqa import chat, families, generation
from sonovqa.cli import UserError
from sonovqa.engines import ImageRequest, LabelRequest
from sonovqa.generation import LocalEngine, stream

PROMPTS = [
    ("Q3", "Identify the imaging plane shown."),
    ("Q7", "Is it normal?"),
    ("x", "Tell me all there is to see in this image."),
]


def png(image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def alone(model, processor, image, context, prompt, count) -> list[int]:
    """What transformers' own ``generate`` says to one prompt, without the beams that Florence-2's settings ask for."""
    turns = chat.messages(image, prompt, context)
    inputs = processor.apply_chat_template(
        turns if families.of(model.config).system_turn else chat.folded(turns),
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    given = 2 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]  # a decoder's start and forced beginning
    with torch.inference_mode():
        made = model.generate(**inputs, do_sample=False, num_beams=1, no_repeat_ngram_size=0, forced_eos_token_id=None,
                              max_new_tokens=count + model.config.is_encoder_decoder)  # fmt: skip
    return made[0, given:].tolist()


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_batched_shared_answers_equal_one_at_a_time(family, share, tokenizer, monkeypatch):
    monkeypatch.setattr(generation, "BRANCHES", 4)  # of six questions of two images: decoded in two parts
    torch.manual_seed(1)
    model, processor = FAMILIES[family](tokenizer)
    model = model.double().eval()
    cases = [("a", (128, 96), None), ("b", (60, 90), "Pixel size: 0.09 mm"), ("c", (200, 80), None)]
    images = {name: noise_image(*size, seed=i) for i, (name, size, _) in enumerate(cases)}
    requests = [ImageRequest(name, png(images[name]), context, tuple(PROMPTS)) for name, _, context in cases]
    engine = LocalEngine(model, processor, batch_images=2, share=share)
    got = {(reply.image_id, reply.question_id): reply for reply in engine.answer(iter(requests), max_new_tokens=12)}
    assert len(got) == 9
    texts = set()
    for name, _, context in cases:
        for question_id, prompt in PROMPTS:
            ids = alone(model, processor, images[name], context, prompt, 12)
            assert got[name, question_id].text == processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
            assert got[name, question_id].error is None
            texts.add(got[name, question_id].text)
    assert len(texts) >= 3, "answers that are all alike could not show a mix-up"


def test_unreadable_image_fails_alone(tokenizer):
    model, processor = FAMILIES["qwen3_vl"](tokenizer)
    requests = [
        ImageRequest("broken", b"not an image", None, tuple(PROMPTS)),
        ImageRequest("whole", png(noise_image(64, 64, 1)), None, tuple(PROMPTS)),
    ]
    replies = list(LocalEngine(model, processor).answer(requests, max_new_tokens=3))
    assert [r.error is None for r in replies if r.image_id == "whole"] == [True] * 3
    assert all("not readable" in r.error and r.text == "" for r in replies if r.image_id == "broken")


def test_cut_answers_say_so(tokenizer):
    model, processor = FAMILIES["qwen3_vl"](tokenizer)
    request = ImageRequest("a", png(noise_image(64, 64, 1)), None, tuple(PROMPTS))
    replies = list(LocalEngine(model, processor).answer([request], max_new_tokens=2))
    assert {(r.finish_reason, r.new_tokens) for r in replies} <= {("length", 2), ("stop", 1), ("stop", 2)}
    assert any(r.finish_reason == "length" for r in replies)


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_a_gpu_without_memory_ends_answering_in_a_line_that_names_the_way_out(family, tokenizer, monkeypatch):
    model, processor = FAMILIES[family](tokenizer)
    image, engine = noise_image(64, 64, 1), LocalEngine(model.eval(), processor)

    def full(*arguments, **more):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a\ntotal capacity of 16 GiB")

    monkeypatch.setattr(torch.nn.Embedding, "forward", full)  # a model's own has a signature that generate() goes by
    weighed = LabelRequest("a", png(image), None, (("Q7", "Is it normal?", ("normal", "abnormal")),))
    for ask in (
        lambda: engine.answer([ImageRequest("a", png(image), None, tuple(PROMPTS))], 3),
        lambda: engine.likelihoods([weighed]),
        lambda: stream(model, processor, chat.messages(image, "Is it normal?"), 3),
    ):
        with pytest.raises(UserError, match=r"memory is full; .*2.00 GiB; .*--batch-images 1.*--max-pixels.*--bits 4") as mistake:
            list(ask())
        assert "\n" not in str(mistake.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_stream_gives_the_same_text(family, tokenizer):
    torch.manual_seed(1)
    model, processor = FAMILIES[family](tokenizer)
    model.eval()
    image = noise_image(96, 64, 3)
    ids = alone(model, processor, image, None, "Is it normal?", 8)
    said = "".join(stream(model, processor, chat.messages(image, "Is it normal?"), 8))
    assert said.strip() == processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
