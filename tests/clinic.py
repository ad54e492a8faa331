"""A made-up clinic: a sheet of annotations beside folders of images, and prepare_dataset.py run on them."""

from __future__ import annotations

import json

import numpy as np
import openpyxl
from PIL import Image

import prepare_dataset
from sonovqa import dataset
from sonovqa.questions import QUESTIONS

HEADERS = ["Folder Name", "Image Name", "Status", "Patient", *(f"{q.id}: {q.title}" for q in QUESTIONS.values())]
NORMAL = ["stomach, spine", "Cephalic", "Axial", "AC", "20-25 weeks", "Good", "Normal", "Routine monitoring"]


def picture(path, seed=0, size=(64, 48), **options):
    """A smooth random picture: two seeds are never near-duplicates, unlike two fields of noise over one shape."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 255, (12, 12), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    image.save(path, **options)
    return image


def write_sheet(path, rows, headers=HEADERS):
    book = openpyxl.Workbook()
    book.active.append(headers)
    for row in rows:
        book.active.append(row)
    book.save(path)
    return path


def clinic(tmp_path, patients=10, extra=()):
    """A sheet in form (a) of two images a patient in two categories, with further rows at its end."""
    rows = []
    for number in range(2 * patients):
        folder, name = ("Abdomen", "Femur")[number % 2], f"img_{number:03}.png"
        picture(tmp_path / "images" / folder / name, number)
        abnormal = number % 7 == 0
        rows.append([folder, name, "complete", f"P{number // 2}", *NORMAL[:6], "Abnormal" if abnormal else "Normal", NORMAL[7]])
    return write_sheet(tmp_path / "annotations.xlsx", [*rows, *extra])


def prepare(tmp_path, *arguments, source="sheet"):
    out = tmp_path / "data"
    first = (str(tmp_path / "annotations.xlsx"), "--images", str(tmp_path / "images")) if source == "sheet" else ()
    prepare_dataset.main([source, *first, "--out", str(out), *map(str, arguments)])
    return dataset.load(out), json.loads((out / "dataset.json").read_text())


def rows_of(data):
    from datasets import Image as Column

    return {row["image_id"]: row for split in data.values() for row in split.cast_column("image", Column(decode=False))}
