"""What all engines of a benchmark are asked: the same images and the same eight prompts, image first."""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

from sonovqa import chat, files
from sonovqa.cli import UserError
from sonovqa.engines import ImageRequest
from sonovqa.questions import QUESTIONS

#: The eight questions of an image, whether a data set has answers to them or not: every image is asked the same.
PROMPTS = tuple((q.id, chat.prompt_for(q.id, "")) for q in QUESTIONS.values())
NOISE_SIZE = (512, 384)
WARM_UP_SEED = 1_000_000  # far from every measured image's: a cache must not know a measured image beforehand


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that say which images; `make` takes them."""
    group = parser.add_argument_group("what is asked")
    group.add_argument("--data", type=Path, help="a folder made by prepare_dataset.py (unset: images of random noise)")
    group.add_argument("--split", choices=("test", "validation", "train"), default="test", help="whose images")
    group.add_argument("--rows", type=int, default=8, metavar="N", help="images, drawn across categories")
    group.add_argument("--size", type=size_of, metavar="WxH", help="resize every image to so many pixels (noise: 512x384)")
    group.add_argument("--seed", type=int, default=42, help="of the draw and of noise")


def size_of(text: str) -> tuple[int, int]:
    """``512x384`` as ``(width, height)`` in pixels, for argparse."""
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit() and 0 < int(width) <= 8192 and 0 < int(height) <= 8192):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; such as 512x384, in pixels, 8192 a side at most")
    return int(width), int(height)


def make(data: Path | None, split: str, rows: int, size: tuple[int, int] | None, seed: int) -> list[ImageRequest]:
    """``rows`` images (fewer if the split has fewer), each with `PROMPTS`; the same arguments give the same bytes.

    Raises:
        UserError: if ``data`` is no data set.
    """
    if data is None:
        return noise(rows, size or NOISE_SIZE, seed)
    from sonovqa import asking, dataset

    drawn = dataset.subset(dataset.load_undecoded(data)[split], rows, seed)
    if not len(drawn):
        raise UserError(f"--split; the {split} split of {data} has no images; choose another --split")
    contexts = drawn["context"] if "context" in drawn.column_names else [None] * len(drawn)
    images = [asking.image_bytes(drawn, row) for row in range(len(drawn))]
    return [
        ImageRequest(image_id, image if size is None else _resized(image, size), context or None, PROMPTS)
        for image_id, image, context in zip(drawn["image_id"], images, contexts, strict=True)
    ]


def noise(count: int, size: tuple[int, int], seed: int) -> list[ImageRequest]:
    """RGB noise as PNG files: no two images alike, and none that compresses."""
    import numpy as np
    from PIL import Image

    def png(number: int) -> bytes:
        values = np.random.default_rng(seed + number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        return _png(Image.fromarray(values))

    return [ImageRequest(f"noise/{seed + i}.png", png(i), None, PROMPTS) for i in range(count)]


def warm_up(requests: Sequence[ImageRequest], count: int) -> list[ImageRequest]:
    """``count`` images of noise as large as the first one asked about: what is compiled or allocated once is by then."""
    size = chat.open_image(requests[0].image).size
    return noise(count, size, WARM_UP_SEED)


def described(requests: Sequence[ImageRequest]) -> dict:
    """What a table of speeds must say about its images: how many, how large, how asked."""
    sizes = sorted({chat.open_image(request.image).size for request in requests}, key=lambda s: s[0] * s[1])
    return {
        "images": len(requests),
        "questions": len(PROMPTS),
        "sizes": ["x".join(map(str, s)) for s in (sizes if len(sizes) <= 2 else (sizes[0], sizes[-1]))],
        "mean_bytes": round(sum(len(request.image) for request in requests) / len(requests)),
        "images_sha": files.sha256(*(request.image for request in requests))[:16],
        "prompts": [prompt for _, prompt in PROMPTS],
    }


def in_words(about: dict, new_tokens: int, ignore_eos: bool) -> str:
    """`described` in one line, with the length of an answer."""
    length = f"{new_tokens} new tokens each" if ignore_eos else f"at most {new_tokens} new tokens each"
    return f"{about['images']} images of {' to '.join(about['sizes'])} pixels, {about['questions']} questions an image, {length}"


def _resized(data: bytes, size: tuple[int, int]) -> bytes:
    return _png(chat.open_image(data).resize(size))


def _png(image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()
