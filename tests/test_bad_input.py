"""Whatever sheet and image files are thrown at prepare_dataset.py: one line of error, or every row kept or listed. No traceback.

2,000 generated cases by default, the same every time; ``SONOVQA_CASES=10000 pytest tests/test_bad_input.py`` draws others.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import io
import itertools
import json
import os
import shutil

import openpyxl
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
from PIL import Image

import prepare_dataset
from sonovqa import dataset
from sonovqa.cli import UserError

CASES = int(os.environ.get("SONOVQA_CASES", "2000"))
LIMITS = settings(max_examples=CASES // 2, suppress_health_check=list(HealthCheck), derandomize="SONOVQA_CASES" not in os.environ)
QUESTIONS = [f"Q{number}" for number in range(1, 9)]


def encoded(mode, kind, size=(24, 20), **options):
    stream = io.BytesIO()
    Image.effect_noise(size, 80).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


SEEDS = [
    encoded("L", "PNG"), encoded("RGB", "PNG"), encoded("RGBA", "PNG"), encoded("P", "PNG"), encoded("1", "PNG"),
    encoded("RGB", "JPEG"), encoded("CMYK", "JPEG"), encoded("L", "JPEG", progressive=True), encoded("P", "GIF"),
    encoded("RGB", "TIFF"), encoded("L", "TIFF", compression="tiff_lzw"), encoded("RGB", "WEBP"), encoded("L", "BMP"),
    encoded("L", "PNG", (4, 4)), encoded("RGB", "PPM"), b"", b"text", b"\x89PNG\r\n\x1a\n",
]  # fmt: skip


GOOD_IMAGES = [encoded("L", "PNG") for _ in range(4)]


@st.composite
def image_bytes(draw):
    """A small image file in one of many formats, whole or with bytes changed, cut out, put in or cut off."""
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3, 10]))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(["change", "cut", "insert", "end"]))
        if kind == "change" and data:
            data[place] = draw(st.integers(0, 255))
        elif kind == "cut":
            del data[place : place + draw(st.integers(1, 40))]
        elif kind == "insert":
            data[place:place] = draw(st.binary(max_size=12))
        elif kind == "end":
            del data[place:]
    return bytes(data)


NAMES = st.sampled_from(
    ["a.png", "A 1.PNG", "a_1.png", "é.jpg", "e\u0301.jpg", "b", "b.png", "..", "c.tif", "[red].png", "x" * 200]
)
PATHS = st.one_of(
    NAMES, st.sampled_from(["../b.png", "/etc/passwd", "a/b.png", r"C:\b.png", "\x00.png", " ", "%s.png"]), st.text(max_size=8)
)
FOLDERS = st.sampled_from(["A", "a", "B b", "B_b", "..", ".", "../A", "/", "", None, "A/B", "~"])
TEXT = st.text(max_size=20).map(lambda text: ILLEGAL_CHARACTERS_RE.sub("", text))
ODD = [
    None,
    3,
    2.5,
    float("inf"),
    True,
    datetime.datetime(2024, 1, 2),
    datetime.time(3),
    "=A1",
    "#REF!",
    "nan",
    "two\nlines",
    "[/red]",
]
CELLS = st.one_of(
    st.sampled_from(["normal", "Abnormal: wide ventricle", "20-25 weeks", "AC", "cephalic"]), st.sampled_from(ODD), TEXT
)
STATUS = st.sampled_from(["complete", "complete", "complete", "Complete ", "complet", "todo", None, 1])
HEADERS = st.lists(
    st.one_of(
        st.sampled_from(["Folder Name", "Image Name", "Status", "Patient", *QUESTIONS, "Q9", "Q1:\nagain", None]),
        TEXT,
        st.integers(0, 9),
    ),
    max_size=12,
)
GOOD_HEADER = ["Folder Name", "Image Name", "Status", "Patient", *QUESTIONS]


GOOD_ROWS = [["A", f"good{n}.png", "complete", f"P{n}", *["normal"] * 8] for n in range(4)]


@st.composite
def tables(draw):
    """Rows of a sheet, most of them in form (a), and often among them the four that are good."""
    header = draw(st.one_of(st.just(GOOD_HEADER), st.just(GOOD_HEADER), st.just(GOOD_HEADER), HEADERS))
    row = st.tuples(FOLDERS, st.one_of(NAMES, PATHS), STATUS, st.sampled_from(["P1", "P2", "P3", "P4", None, 5]), *[CELLS] * 8)
    rows = draw(st.lists(row.map(list), max_size=12))
    place = draw(st.integers(0, len(rows)))
    return [header, *rows[:place], *GOOD_ROWS[: draw(st.sampled_from([0, 4, 4]))], *rows[place:]]


def clean(value):
    return ILLEGAL_CHARACTERS_RE.sub("", value) if isinstance(value, str) else value


def write_sheet(path, rows):
    if path.suffix == ".csv":
        with open(path, "w", encoding="utf-8", newline="") as stream:
            csv.writer(stream).writerows(rows)
    else:
        book = openpyxl.Workbook(write_only=True)
        sheet = book.create_sheet()
        for row in rows:
            sheet.append([clean(value) for value in row])
        book.save(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A new empty folder a case; the last one is removed when the next begins."""
    root = tmp_path_factory.mktemp("cases")

    def make():
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        return root

    return make


def write_images(root, files):
    for folder, (name, data) in itertools.product(("A", "B b"), files.items()):
        (root / folder).mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(IsADirectoryError):  # a file named ".."
            (root / folder / name).write_bytes(data)
    for number, data in enumerate(GOOD_IMAGES):
        (root / "A").mkdir(parents=True, exist_ok=True)
        (root / "a.png").write_bytes(data)
        (root / "A" / f"good{number}.png").write_bytes(data)


def outcome(arguments):
    """Run the script's ``main``; "" if it made a data set, else its one line. Anything else it raises is a failure."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            prepare_dataset.main(arguments)
    except UserError as mistake:
        assert str(mistake) and "\n" not in str(mistake)
        return str(mistake)
    event("made a data set")
    return ""


def assert_accounted(root, finished):
    """Every finished row is in the data set or in the list of what was dropped."""
    about = json.loads((root / "data" / "dataset.json").read_text(encoding="utf-8"))
    kept = dataset.load(root / "data")
    assert sum(split.num_rows for split in kept.values()) == sum(split["images"] for split in about["splits"].values())
    whole_rows = [
        item for why, items in about["dropped"].items() if not why.startswith(("answer cell", "unknown")) for item in items
    ]
    assert sum(split.num_rows for split in kept.values()) + len(whole_rows) >= finished
    for split in kept.values():
        for row in split:  # decodes every image
            assert row["image"].size[0] >= 16 and row["questions"]


@LIMITS
@given(
    rows=tables(),
    files=st.dictionaries(NAMES, image_bytes(), max_size=6),
    suffix=st.sampled_from([".xlsx", ".csv"]),
    patient=st.booleans(),
)
def test_generated_sheets_and_mutated_images(place, rows, files, suffix, patient):
    root = place()
    write_images(root / "images", files)
    write_sheet(root / f"sheet{suffix}", rows)
    arguments = ["sheet", str(root / f"sheet{suffix}"), "--images", str(root / "images"), "--out", str(root / "data")]
    if not outcome(arguments + ["--group-column", "Patient"] * patient):
        assert_accounted(root, len([row for row in rows[1:] if row[2] in ("complete", "Complete ")]))


@pytest.fixture(scope="module")
def whole_sheets(tmp_path_factory):
    """Bytes of a good sheet by suffix; made once, since a workbook holds the time it was saved."""
    folder = tmp_path_factory.mktemp("sheets")
    for suffix in (".xlsx", ".csv"):
        write_sheet(folder / f"s{suffix}", [GOOD_HEADER, *GOOD_ROWS])
    return {suffix: (folder / f"s{suffix}").read_bytes() for suffix in (".xlsx", ".csv")}


@LIMITS
@given(data=st.data(), suffix=st.sampled_from([".xlsx", ".csv"]))
def test_sheets_with_broken_bytes(place, whole_sheets, data, suffix):
    root = place()
    write_images(root / "images", {})
    sheet = root / f"sheet{suffix}"
    content = bytearray(whole_sheets[suffix])
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        content[start : start + data.draw(st.integers(0, 30))] = data.draw(st.binary(max_size=8))
    sheet.write_bytes(content)
    arguments = ["sheet", str(sheet), "--images", str(root / "images"), "--out", str(root / "data"), "--group-column", "Patient"]
    if not outcome(arguments):
        assert_accounted(root, 0)
