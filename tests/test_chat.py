"""One prompt builder: the cut template, the exported SFT set and what train.py trains on are the same tokens and labels."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import noise_image
from PIL import Image
from tiny_families import FAMILIES

from sonovqa import batching, chat, dataset, export, layout, models
from sonovqa.questions import QUESTIONS, report_text


@pytest.mark.parametrize("context", [None, "Pixel size: 0.0897 mm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cut_template_equals_the_processors_own(family, context, tokenizer):
    model, processor = FAMILIES[family](tokenizer)
    template = batching.Encoder(processor, model).template
    turns = chat.messages(None, "What is it?", context, "a spine")
    own = processor.apply_chat_template(turns if template.system_turn else chat.folded(turns), tokenize=False).rstrip()
    cut = template.prefix(context) + template.branch("What is it?") + template.lead + "a spine" + template.end_of_turn
    assert cut in (own, own + processor.tokenizer.eos_token), "an answer that a template leaves open ends with the text"
    assert template.end_of_turn in processor.tokenizer.get_vocab() and (not context or context in template.prefix(context))


def whole_sample(processor, line: dict, folder) -> tuple[list[int], list[int]]:
    """Tokens and labels of one exported line as any other trainer makes them: the template over all turns, the loss on the
    assistant's, up to its end of turn."""
    turns = line["messages"]
    image = Image.open(folder / turns[1]["content"][0]["image"]).convert("RGB")
    turns[1]["content"][0]["image"] = image
    options = {"tokenize": True, "return_dict": True}
    full = processor.apply_chat_template(turns, **options)["input_ids"][0]
    asked = processor.apply_chat_template(turns[:-1], add_generation_prompt=True, **options)["input_ids"][0]
    assert full[: len(asked)] == asked
    end = len(full) - full[::-1].index(processor.tokenizer.eos_token_id)
    return full[:end], [layout.IGNORED] * len(asked) + full[len(asked) : end]


@pytest.mark.parametrize("task", ["all", "report", "Q2"])
def test_exported_set_has_the_tokens_and_labels_of_training(task, base, data, tmp_path):
    processor = models.load_processor(str(base))
    splits = dataset.load(data)
    written = export.export_chat(splits, tmp_path / "sft.jsonl", task)
    lines = [json.loads(line) for line in (tmp_path / "sft.jsonl").read_text().splitlines()]
    encoder = batching.Encoder(processor)
    collate = batching.Collator(dataset.load_undecoded(data), encoder, task)
    wanted = [chat.tasks_of(row, task) for row in splits["train"].remove_columns("image")]
    items = [
        {"split": "train", "row": i, "branches": [k], "weights": [1.0]}
        for i, asked in enumerate(wanted)
        for k in range(len(asked))
    ]
    assert len(lines) == written["train"] == len(items) > 10
    for line, item in zip(lines, items, strict=True):
        ids, labels = whole_sample(processor, line, tmp_path)
        batch = collate([item])
        assert batch["input_ids"][0].tolist() == ids
        assert batch["labels"][0].tolist() == labels


def test_loss_falls_on_answer_and_end_of_turn_only(base, data):
    processor = models.load_processor(str(base))
    batch = batching.Collator(dataset.load_undecoded(data), batching.Encoder(processor))(
        [{"split": "train", "row": 0, "branches": [1, 6], "weights": [1.0, 1.0]}]
    )
    told = batch["labels"][0][batch["labels"][0] != layout.IGNORED]
    row = dataset.load(data)["train"].remove_columns("image")[0]["questions"]
    assert processor.tokenizer.decode(told) == f"{row[1]['answer']}<|im_end|>{row[6]['answer']}<|im_end|>"
    assert torch.equal(batch["weights"] > 0, batch["labels"] != layout.IGNORED)


def test_report_has_eight_titled_sections_in_order():
    text = report_text({q: f"answer to {q}" for q in reversed(QUESTIONS)})
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == [q.title for q in QUESTIONS.values()]
    assert "## Imaging Plane" not in report_text({"Q1": "spine"})


def test_openai_messages_hold_the_same_text_after_the_image():
    turns = chat.openai_messages(b"\x89PNG", "Is it normal?", "Probe: C5")
    assert [part["type"] for part in turns[1]["content"]] == ["image_url", "text"]
    assert turns[1]["content"][1] == chat.messages(None, "Is it normal?", "Probe: C5")[1]["content"][1]
    assert turns[1]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")


def test_exif_rotation_is_honoured():
    import io

    image, data = noise_image(40, 20, 0), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(data, "JPEG", exif=exif)
    assert chat.open_image(data.getvalue()).size == (20, 40)
