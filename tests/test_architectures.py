"""Random checkpoints of real architectures: their sizes are the published ones, their processors fit them."""

from __future__ import annotations

import pytest
import torch
from conftest import noise_image

from sonovqa import architectures, models, tiny
from sonovqa.batching import Encoder

#: Parameters as the hub counts them in the published safetensors.
PUBLISHED = {"8B": 8_767_123_696, "qwen2.5-vl-7b": 8_292_166_656, "llama-3.2-11b-vision": 10_670_220_835,
             "llava-1.5-7b": 7_063_427_072}  # fmt: skip


@pytest.mark.parametrize("size", PUBLISHED)
def test_as_many_parameters_as_published_and_a_processor_that_fits(size, tokenizer):
    from transformers import AutoModelForImageTextToText

    made, processor = architectures.with_processor(architectures.config(size), tiny.make_processor(tokenizer))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(made)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[size]
    encoder = Encoder(processor, model)
    (prefix,), vision = encoder.prefixes([noise_image(512, 384, 0)], ["Pixel size: 0.1 mm"])
    assert encoder.prefix_lengths([(512, 384)], ["Pixel size: 0.1 mm"]) == [len(prefix.ids)]
    assert int(prefix.ids.max()) < model.get_input_embeddings().num_embeddings and "pixel_values" in vision


def test_a_cut_tokenizer_reads_what_it_writes(tokenizer):
    cut = architectures.cut_tokenizer(tokenizer, 300, ("<s>", "</s>"), eos_token="</s>")
    text = "Identify the imaging plane: 20-25 weeks, normal"
    ids = cut(text)["input_ids"]
    assert cut.decode(ids) == text and len(ids) > len(tokenizer(text)["input_ids"]) and max(ids) < 300
    assert cut.convert_tokens_to_ids(["<s>", "</s>"]) == [301, 300] and cut.eos_token_id == 300


def test_a_written_checkpoint_loads_and_answers(tokenizer, tmp_path, monkeypatch):
    from tiny_families import FAMILIES

    model, _ = FAMILIES["llava"](tokenizer)
    small = model.config.to_dict()
    small = {"model_type": "llava"} | {k: small[k] for k in ("text_config", "vision_config", "image_seq_length")}
    monkeypatch.setitem(architectures.SIZES, "small", small)
    tiny.make_processor(tokenizer).save_pretrained(tmp_path / "given")
    monkeypatch.setattr("sys.argv", ["architectures"])
    architectures.main(["small", str(tmp_path / "made"), "--processor", str(tmp_path / "given")])
    loaded, processor = models.load_for_inference(str(tmp_path / "made"))
    assert loaded.config.model_type == "llava" and processor.tokenizer.eos_token == "</s>"
