"""What tests share: small models made on the spot, one trained run, and the rule that nothing reaches for a network."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402
from PIL import Image  # noqa: E402

from sonovqa import files, torchvision_ops  # noqa: E402
from sonovqa.questions import QUESTIONS, SYSTEM_TEXT  # noqa: E402

torchvision_ops.declare()

# Generated cases are the same every time, so that a change is what a failure comes from; and no case is too slow.
settings.register_profile("the same", derandomize=True, deadline=None, database=None)
settings.load_profile("the same")

#: Why a test is skipped where a browser, vLLM or Node is missing; not where a test suits another machine or other data.
MISSING = re.compile(r"is not installed|there is no |no Chromium|could not import", re.IGNORECASE)


def proven_nothing(report) -> str | None:
    """Why a test or a file of tests was skipped that `SONOVQA_ALL_TESTS` wants to have run, else ``None``."""
    if not os.environ.get("SONOVQA_ALL_TESTS") or not report.skipped or hasattr(report, "wasxfail"):
        return None
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return reason if MISSING.search(reason) else None


def failing(report):
    """The report, as a failure where it is a skip that must not be."""
    if reason := proven_nothing(report):
        report.outcome, report.longrepr = "failed", f"SONOVQA_ALL_TESTS is set: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    return failing((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    return failing((yield))


CORPUS = [SYSTEM_TEXT, *(q.prompts["default"] for q in QUESTIONS.values())] * 20 + [
    "cephalic, axial, occiput left",
    "routine monitoring",
    "HC, BPD",
    "20-25 weeks",
    "normal",
    "thalami, falx",
    "good",
] * 20


@pytest.fixture(scope="session")
def tokenizer():
    """A small byte-level BPE tokenizer with Qwen's special tokens."""
    from sonovqa import tiny

    return tiny.make_tokenizer(CORPUS, 450)


def noise_image(width: int, height: int, seed: int) -> Image.Image:
    """Random RGB noise: no two images alike, so that a mix-up of images cannot pass."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="session")
def base(tmp_path_factory, tokenizer) -> Path:
    """A tiny random base model, stored in bf16 like any other."""
    folder = tmp_path_factory.mktemp("base")
    import torch

    from sonovqa import tiny

    torch.manual_seed(0)
    tiny.make_model(tokenizer, "small").to(torch.bfloat16).save_pretrained(folder)
    tiny.make_processor(tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Twenty-four images whose brightness decides Q2, in the stored form."""
    from datasets import Dataset, DatasetDict, Features, Image, Value

    entry = {name: Value("string") for name in ("question_id", "question", "answer", "label", "answer_type")}
    features = Features(
        {
            "image": Image(),
            "image_id": Value("string"),
            "group": Value("string"),
            "category": Value("string"),
            "questions": [entry],
        }
    )

    def row(i: int) -> dict:
        data = io.BytesIO()
        noise_image(96, 64, i).point(lambda v: v // (1 + 7 * (i % 2))).save(data, "PNG")
        answers = {q: CORPUS[-7:][(i + k) % 7] for k, q in enumerate(QUESTIONS)} | {"Q2": CORPUS[-7:][i % 2]}
        questions = [
            {"question_id": q, "question": QUESTIONS[q].title, "answer": a, "label": a, "answer_type": "open"}
            for q, a in answers.items()
        ]
        return {
            "image": {"bytes": data.getvalue(), "path": None},
            "image_id": f"A/{i}.png",
            "group": f"g{i}",
            "category": "Abdomen",
            "questions": questions if i != 3 else questions[:1],
        }

    folder = tmp_path_factory.mktemp("data") / "toy"
    parts = {"train": range(16), "validation": range(16, 20), "test": range(20, 24)}
    DatasetDict(
        {name: Dataset.from_list([row(i) for i in rows], features=features) for name, rows in parts.items()}
    ).save_to_disk(folder)
    files.write_json(folder / "dataset.json", {"fingerprint": "toy"})
    return folder


@pytest.fixture
def hangs_up():
    """Tests started by nohup or a batch system hand an ignored SIGHUP on to all that they start."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)
