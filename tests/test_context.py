"""A pixel size is told as the millimetres across the image, which stay right whatever an image is resized to."""

from __future__ import annotations

import io

import pytest
from conftest import noise_image
from PIL import Image

from sonovqa import batching, chat, models

STORED = "Pixel size: 0.0897 mm"


@pytest.mark.parametrize(
    ("context", "told"),
    [
        (STORED, "Image size: 71.8 x 48.4 mm"),
        ("Probe C5. Pixel size: 0.5 mm", "Probe C5. Image size: 400.0 x 270.0 mm"),
        ("Gestation known", "Gestation known"),
        ("", ""),
        (None, None),
    ],
)
def test_pixel_size_becomes_image_size(context, told):
    assert chat.context_for(context, (800, 540)) == told


@pytest.mark.parametrize("most", [4096, 12288, 65536])
def test_training_and_every_engine_tell_the_same_at_any_budget(base, most):
    processor = models.load_processor(str(base), (1024, most))
    encoder = batching.Encoder(processor)
    image = noise_image(300, 140, 1)
    data = io.BytesIO()
    image.save(data, "PNG")
    prefixes, _ = encoder.prefixes([image, image], [STORED, None])
    said = processor.tokenizer.decode(prefixes[0].ids)
    assert said.endswith("Image size: 26.9 x 12.6 mm\n") and "Pixel size" not in said
    assert encoder.prefix_lengths([image.size] * 2, [STORED, None]) == [len(prefix.ids) for prefix in prefixes]
    openai = chat.openai_messages(data.getvalue(), "Is it normal?", STORED)[1]["content"][1]["text"]
    local = chat.messages(Image.open(data), "Is it normal?", STORED)[1]["content"][1]["text"]
    assert openai == local == "Image size: 26.9 x 12.6 mm\nIs it normal?"
