"""What tests share: small models made on the spot, one trained run, and the rule that nothing reaches for a network."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from PIL import Image  # noqa: E402

from sonovqa import torchvision_ops  # noqa: E402
from sonovqa.questions import QUESTIONS, SYSTEM_TEXT  # noqa: E402

torchvision_ops.declare()

CORPUS = [SYSTEM_TEXT, *(q.prompts["default"] for q in QUESTIONS.values())] * 20 + [
    "cephalic, axial, occiput left", "routine monitoring", "HC, BPD", "20-25 weeks", "normal", "thalami, falx", "good",
] * 20  # fmt: skip


@pytest.fixture(scope="session")
def tokenizer():
    """A small byte-level BPE tokenizer with Qwen's special tokens."""
    from sonovqa import tiny

    return tiny.make_tokenizer(CORPUS, 450)


def noise_image(width: int, height: int, seed: int) -> Image.Image:
    """Random RGB noise: no two images alike, so that a mix-up of images cannot pass."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))
