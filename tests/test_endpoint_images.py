"""What the endpoint engine sends of an image: the pixels that training saw, within what serve.sh's gate takes."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from endpoint_asking import picture
from PIL import Image

from sonovqa import chat, endpoint, serving_gate


@pytest.mark.parametrize(
    ("mode", "format_", "options"),
    [("RGB", "PNG", {}), ("L", "PNG", {}), ("RGB", "JPEG", {}), ("RGBA", "PNG", {}), ("P", "PNG", {"transparency": 0}),
     ("CMYK", "JPEG", {}), ("RGB", "TIFF", {}), ("RGB", "BMP", {})],
)  # fmt: skip
def test_server_sees_the_pixels_that_training_saw(mode, format_, options):
    data = picture(mode, format_, **options)
    sent, mime = endpoint.encoded_as_seen(data)
    assert (sent == data) == (mode in ("RGB", "L") and format_ in ("PNG", "JPEG"))
    shown = Image.open(io.BytesIO(sent))
    assert shown.mode in ("RGB", "L")
    assert mime == f"image/{shown.format.lower()}"
    assert shown.convert("RGB").tobytes() == chat.open_image(data).tobytes()


def test_rotation_is_applied_before_sending():
    exif = Image.Exif()
    exif[0x0112] = 6
    sent, _ = endpoint.encoded_as_seen(picture(format_="JPEG", exif=exif))
    assert Image.open(io.BytesIO(sent)).size == (24, 32)


def photograph(width: int = 320, height: int = 240) -> bytes:
    """A JPEG as telephones make them: a picture with a sensor's noise, to be turned when it is shown."""
    random = np.random.default_rng(0)
    smooth = Image.fromarray(random.integers(0, 255, (height // 40, width // 40, 3), dtype=np.uint8))
    noisy = np.asarray(smooth.resize((width, height), Image.Resampling.BICUBIC)) + random.integers(-5, 6, (height, width, 1))
    stream, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90, exif=exif)
    return stream.getvalue()


def test_a_photograph_that_is_turned_keeps_its_pixels_unless_it_is_huge(monkeypatch):
    data = photograph()
    exact = chat.open_image(data)
    sent, mime = endpoint.encoded_as_seen(data)
    assert mime == "image/png" and Image.open(io.BytesIO(sent)).tobytes() == exact.tobytes() and exact.size == (240, 320)
    monkeypatch.setattr(endpoint, "LARGEST_EXACT", 320 * 240 - 1)
    smaller, mime = endpoint.encoded_as_seen(data)
    shown = Image.open(io.BytesIO(smaller))
    assert (mime, shown.format, shown.size, shown.getexif().get(0x0112)) == ("image/jpeg", "JPEG", (240, 320), None)
    assert len(smaller) < len(sent) / 2
    seen = [np.asarray(image.reduce(8), dtype=int) for image in (shown, exact)]  # as far as a model's pixel budget brings it
    assert np.abs(seen[0] - seen[1]).max() <= 2


def test_an_image_whose_png_is_more_than_the_gate_takes_is_sent_as_jpeg(monkeypatch):
    data = picture("RGB", "BMP")
    assert endpoint.encoded_as_seen(data)[1] == "image/png"
    monkeypatch.setattr(endpoint, "LARGEST_URL", 10)
    assert endpoint.encoded_as_seen(data)[1] == "image/jpeg"


def test_what_counts_as_sendable_passes_the_gate_of_serve_sh():
    """A request is the data URL and at most 25 texts of 8,000 characters, of four bytes each."""
    assert endpoint.LARGEST_URL + 25 * 8000 * 4 + 10_000 < serving_gate.LARGEST_BODY
    encoded = bytes(endpoint.LARGEST_URL // 4 * 3)
    assert endpoint.is_sendable(encoded) and not endpoint.is_sendable(encoded + bytes(3))
    assert len(base64.b64encode(encoded)) <= endpoint.LARGEST_URL
