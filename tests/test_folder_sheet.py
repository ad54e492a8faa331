"""`inference.py --folder`: every image answered or marked with the reason, nothing asked twice, nothing overwritten."""

from __future__ import annotations

import os
from pathlib import Path

import openpyxl
import pytest
from conftest import noise_image

import inference
from sonovqa import folder_sheet, images, predictions, sheets
from sonovqa.cli import UserError
from sonovqa.engines import Reply
from sonovqa.questions import QUESTIONS


class Engine:
    """Answers every prompt; fails or stops (as Ctrl-C and SIGKILL do) where it is told to."""

    name = "echo"

    def __init__(self, fail=(), stop_after=None, text="fine"):
        self.fail, self.stop_after, self.text = set(fail), stop_after, text
        self.asked: list[tuple[str, str]] = []

    def answer(self, requests, max_new_tokens):
        for request in requests:
            for question_id, _ in request.prompts:
                if self.stop_after == len(self.asked):
                    raise KeyboardInterrupt
                self.asked.append((request.image_id, question_id))
                if (request.image_id, question_id) in self.fail:
                    yield Reply(request.image_id, question_id, "", "HTTP 500: no")
                else:
                    yield Reply(request.image_id, question_id, f"{self.text} {question_id}")


@pytest.fixture
def scans(tmp_path) -> Path:
    for number, name in enumerate(("Femur/a 1.png", "Femur/b.JPG", "Aorta/c.png", "Aorta/bad.png", "Aorta/notes.txt")):
        path = tmp_path / "scans" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith((".txt", "bad.png")):
            path.write_text("no image")
        else:
            noise_image(48, 40, number).save(path)
    return tmp_path / "scans"


def fill(scans: Path, engine: Engine, prompts: str = "default", **options):
    return folder_sheet.fill(scans, scans.parent / "out.xlsx", engine, prompts, 16, **options)


def table(scans: Path) -> list[tuple]:
    return list(openpyxl.load_workbook(scans.parent / "out.xlsx")["Answers"].iter_rows(values_only=True))


def test_every_image_is_answered_or_says_why_not(scans):
    told = fill(scans, Engine(fail={("Femur/b.JPG", "Q3")}))
    assert told == {"images": 4, "answered": 2, "failed": 2, "asked": 24}
    header, *rows = table(scans)
    assert header == folder_sheet.HEADER
    assert [row[:2] for row in rows] == [("Aorta", "bad.png"), ("Aorta", "c.png"), ("Femur", "a 1.png"), ("Femur", "b.JPG")]
    assert rows[0][2].startswith("failed: not an image")
    assert rows[0][3:] == (None,) * 8
    assert rows[1][2:] == ("answered", *(f"fine {q}" for q in QUESTIONS))
    assert rows[3][2] == "failed: Q3: HTTP 500: no"
    assert rows[3][5] is None and rows[3][6] == "fine Q4"


def test_answers_are_read_back_as_annotations_only_once_a_person_has_released_them(scans):
    fill(scans, Engine())
    out = scans.parent / "out.xlsx"
    assert list(sheets.read_sheet(out, {})) == []
    book = openpyxl.load_workbook(out)
    book["Answers"]["C3"] = "complete"
    book.save(out)
    (row,) = sheets.read_sheet(out, {})
    assert (row.folder, row.image, row.answers["Q8"]) == ("Aorta", "c.png", "fine Q8")
    with pytest.raises(UserError, match="was edited"):
        fill(scans, Engine())


@pytest.mark.parametrize("after", [0, 1, 8, 13, 23])
def test_a_stopped_run_goes_on_and_asks_nothing_twice(scans, after):
    first, second, third = Engine(stop_after=after), Engine(), Engine()
    with pytest.raises(KeyboardInterrupt):
        fill(scans, first)
    assert not (scans.parent / "out.xlsx").exists()
    journal = scans.parent / "out.xlsx.answers.jsonl"
    journal.write_bytes(journal.read_bytes() + b'{"image_id": "Femur/')  # as a kill leaves it
    fill(scans, second)
    assert len(first.asked + second.asked) == len(set(first.asked + second.asked)) == 24
    before = table(scans)
    assert fill(scans, third)["asked"] == 0
    assert table(scans) == before


def test_failures_new_and_changed_images_are_asked_again(scans):
    fill(scans, Engine(fail={("Femur/b.JPG", "Q3")}))
    noise_image(48, 40, 9).save(scans / "Femur" / "new.png")
    noise_image(40, 48, 10).save(scans / "Aorta" / "c.png")
    again = Engine(text="now")
    assert fill(scans, again)["answered"] == 4
    asked = {("Femur/b.JPG", "Q3"), *((image, q) for image in ("Femur/new.png", "Aorta/c.png") for q in QUESTIONS)}
    assert set(again.asked) == asked
    assert len(again.asked) == len(asked)


def test_answers_of_another_model_or_a_sheet_made_elsewhere_are_not_mixed_in(scans):
    fill(scans, Engine())
    other = Engine()
    other.name = "another"
    with pytest.raises(UserError, match="engine was 'echo'"):
        fill(scans, other)
    with pytest.raises(UserError, match="prompt was 'default'"):
        fill(scans, Engine(), "Q7=simple")
    with pytest.raises(UserError, match="context was None"):
        fill(scans, Engine(), context="Pixel size: 1 mm")
    (scans.parent / "out.xlsx.answers.jsonl").unlink()
    with pytest.raises(UserError, match="not made here"):
        fill(scans, Engine())
    assert other.asked == []


def test_cells_hold_text_whatever_it_begins_with(scans):
    (scans / "Femur" / "a 1.png").rename(scans / "Femur" / "=1+1.png")
    fill(scans, Engine(text="=HYPERLINK(0)\x07 @+-"))
    sheet = openpyxl.load_workbook(scans.parent / "out.xlsx")["Answers"]
    assert "f" not in {cell.data_type for row in sheet for cell in row}
    assert sheet["D3"].value == "=HYPERLINK(0)\ufffd @+- Q1"


@pytest.mark.parametrize(
    ("prompts", "said", "cell"),
    [
        ("default", "abnormal: mass", "abnormal: mass"),
        ("Q7=simple", "No.", "abnormal."),
        ("simple", "Yes, normal.", "Yes, normal."),
        ("clinical", "None.", "normal."),
        ("structured", "NORMAL. No abnormal mass is seen.", "NORMAL. No abnormal mass is seen."),
    ],
)
def test_a_cell_means_in_its_column_what_was_meant_by_the_prompt(prompts, said, cell):
    assert folder_sheet.cell_of("Q7", said, prompts) == cell
    assert folder_sheet.cell_of("Q2", said, prompts) == said


def test_the_sheet_holds_what_is_meant_and_the_journal_what_was_said(scans):
    class Terse(Engine):
        def answer(self, requests, max_new_tokens):
            for request in requests:
                for question_id, prompt in request.prompts:
                    yield Reply(request.image_id, question_id, "No." if prompt == "Is this ultrasound normal?" else "fine")

    fill(scans, Terse(), "Q7=simple")
    assert [row[9] for row in table(scans)[2:]] == ["abnormal."] * 3
    assert (scans.parent / "out.xlsx.answers.jsonl").read_text().count('"No."') == 3


def test_images_directly_in_the_folder_take_its_name(tmp_path):
    (tmp_path / "Femur").mkdir()
    noise_image(32, 32, 1).save(tmp_path / "Femur" / "x.png")
    (found,) = folder_sheet.find_images(tmp_path / "Femur")
    assert found.image_id == "Femur/x.png"


def test_images_of_one_name_in_folders_of_one_name_are_told_apart(tmp_path):
    root = tmp_path / "scan"
    for number, name in enumerate(("x.png", "scan/x.png", "scan/scan/x.png", "Femur/x.png")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        noise_image(32, 32, number).save(root / name)

    class Seen(Engine):
        def answer(self, requests, max_new_tokens):
            for request in requests:
                for question_id, _ in request.prompts:
                    yield Reply(request.image_id, question_id, f"{hash(request.image)}")

    fill(root, Seen())
    rows = table(root)[1:]
    assert {row[0] for row in rows} == {"scan", "scan/scan", "scan/scan/scan", "scan/Femur"}
    for folder, name, status, *answers in rows:  # as the sheet is read back, from one level up
        _, path = images.ImageFolder(tmp_path).find(folder, name)
        assert (status, set(answers)) == ("answered", {f"{hash(path.read_bytes())}"})


@pytest.mark.parametrize("name", [b"Femur/caf\xe9.png", b"T\xeate/d.png"])
def test_a_name_that_is_not_utf8_fails_its_row_only(scans, name):
    odd = scans / os.fsdecode(name)
    odd.parent.mkdir(exist_ok=True)
    noise_image(48, 40, 7).save(odd)
    first = fill(scans, Engine())
    assert (first["images"], first["answered"], first["failed"]) == (5, 3, 2)
    shown = os.fsdecode(name).encode("utf-8", "replace").decode().replace("?", "\ufffd")
    (row,) = [row for row in table(scans) if f"{row[0]}/{row[1]}" == shown]
    assert row[2:] == ("failed: the name of the file or its folder is not UTF-8: rename it", *[None] * 8)
    os.rename(odd, scans / "Femur" / "cafe.png")
    assert fill(scans, Engine())["asked"] == 8


def test_an_answer_that_has_no_utf8_form_is_kept_and_shown_without_it(scans):
    fill(scans, Engine(text="half \ud83e"))
    assert table(scans)[2][3] == "half \ufffd Q1"
    again = Engine()
    assert fill(scans, again)["asked"] == len(again.asked) == 0
    rows = predictions.read(scans.parent / "out.xlsx.answers.jsonl")
    assert rows[1]["prediction"] == "half \ud83e Q1"
    predictions.write(scans.parent / "copy.jsonl", rows)
    assert predictions.read(scans.parent / "copy.jsonl") == rows


@pytest.mark.parametrize(
    ("out", "told"),
    [
        (".", r"ending in \.xlsx"),
        ("out.csv", r"ending in \.xlsx"),
        ("folder.xlsx", "is a folder"),
        ("file/out.xlsx", "nothing can be written below"),
        ("theirs.xlsx", "was not made here"),
        ("ours.xlsx", "context was 'Pixel size: 1 mm'"),
        ("other.xlsx", "engine was 'echo'"),
    ],
)
def test_a_sheet_that_cannot_be_written_is_told_before_a_model_is_loaded(scans, tmp_path, monkeypatch, out, told):
    (tmp_path / "folder.xlsx").mkdir()
    for name in ("file", "theirs.xlsx"):
        (tmp_path / name).write_text("theirs")
    folder_sheet.fill(scans, tmp_path / "ours.xlsx", Engine(), "default", 128, "Pixel size: 1 mm")
    folder_sheet.fill(scans, tmp_path / "other.xlsx", Engine(), "default", 128)
    monkeypatch.setattr(inference, "answerer", lambda args: pytest.fail("loaded"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=told):
        inference.main(["--run", "tiny", "--folder", str(scans), "--out", out])


def test_mistakes(scans, tmp_path):
    (tmp_path / "none").mkdir()
    for folder, told in ((tmp_path / "absent", "no such folder"), (tmp_path / "none", "no image in it")):
        with pytest.raises(UserError, match=told):
            inference.main(["--run", "tiny", "--folder", str(folder), "--out", "x.xlsx"])
    with pytest.raises(UserError, match="only one of them"):
        inference.main(["--run", "tiny", "--folder", str(scans)])
    with pytest.raises(UserError, match=r"ending in \.xlsx"):
        folder_sheet.fill(scans, tmp_path / "out.csv", Engine(), "default", 16)
