"""A small data set of closed questions that an image's brightness answers, beside an open one."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
from conftest import noise_image

from sonovqa import files

PARTS = {"train": range(16), "validation": range(16, 20), "test": range(20, 24)}


def row(i: int) -> dict:
    """An image of noise, every second one dark: Q6 and Q7 say so, and a yes-or-no question with an id of its own."""
    stream, dark = io.BytesIO(), bool(i % 2)
    noise_image(64, 64, i).point(lambda v: v // (8 if dark else 1)).save(stream, "PNG")
    told = [("Q1", "femur", "", "open"), ("Q6", "low" if dark else "good", "", ""),
            ("Q7", "abnormal: mass" if dark else "normal", "", ""),
            ("17", "yes" if dark else "no", "Is it dark?", "closed")]  # fmt: skip
    names = ("question_id", "answer", "question", "answer_type")
    asked = [dict(zip(names, one, strict=True)) | {"label": one[1].partition(":")[0]} for one in told]
    where = {"image_id": f"A/{i}.png", "group": f"g{i}", "category": "Abdomen"}
    return {"image": {"bytes": stream.getvalue(), "path": None}, "questions": asked, **where}


def write(folder: Path) -> Path:
    """Store the set in ``folder``, which is given back."""
    made = {name: datasets.Dataset.from_list([row(i) for i in rows]) for name, rows in PARTS.items()}
    datasets.DatasetDict(made).cast_column("image", datasets.Image()).save_to_disk(str(folder))
    files.write_json(folder / "dataset.json", {"fingerprint": "closed"})
    return folder
