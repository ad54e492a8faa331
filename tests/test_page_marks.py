"""Marks of the page's users: a sheet that prepare_dataset.py reads, whole or unchanged whatever happens."""

from __future__ import annotations

import threading

import pytest
from openpyxl import Workbook, load_workbook
from page_serving import ANSWERS, full_disk, png

import prepare_dataset
from sonovqa import dataset, marks_book, page_marks
from sonovqa.page_guard import Refusal
from sonovqa.page_marks import Mark, MarksSheet, marks_of
from sonovqa.page_uploads import read
from sonovqa.questions import QUESTIONS


def mark(question_id: str, verdict: str = "right", correction: str = "", answer: str | None = None) -> Mark:
    return Mark(question_id, ANSWERS[question_id] if answer is None else answer, verdict == "right", correction, 0.5)


def rows_of(sheet: MarksSheet) -> list[list]:
    """The workbook's rows once the journal is in it."""
    marks_book.bring_up_to_date(sheet.path)
    return [[cell.value for cell in row] for row in load_workbook(sheet.path).worksheets[0].iter_rows(min_row=2)]


def prepared(sheet: MarksSheet, out, *more: str) -> dict[str, dict]:
    """What prepare_dataset.py makes of the marks, by image id."""
    command = ["sheet", str(sheet.path), "--images", str(sheet.images), "--out", str(out), "--near-duplicates", "0", *more]
    assert prepare_dataset.main(command) == 0
    splits = dataset.load_undecoded(out)
    return {row["image_id"]: row for name in splits for row in splits[name]}


def test_marks_become_a_data_set_with_those_answers(tmp_path):
    sheet = MarksSheet(tmp_path / "marks")
    views = ["Abdomen", "Femur", "", "Thorax", "Femur", "Aorta"]
    images = [read(png(64, 48, seed)) for seed in range(6)]
    marks = [mark("Q3"), mark("Q5", "wrong", "13-15 weeks"), mark("Q6", "wrong"), mark("Q7")]
    for i, (image, view) in enumerate(zip(images, views)):
        assert sheet.save(image, view, f"code-{i}", marks, "run at http://127.0.0.1/v1") == i + 1
    rows = prepared(sheet, tmp_path / "set", "--group-column", page_marks.PATIENT)
    wanted = {f"{view or 'Unsorted'}/{image.sha256[:16]}.png" for image, view in zip(images, views)}
    assert set(rows) == wanted
    for row in rows.values():  # a wrong answer without a correction is no answer, and nothing that was not marked is one
        answers = {q["question_id"]: q["answer"] for q in row["questions"]}
        assert answers == {"Q3": "trans-thalamic", "Q5": "13-15 weeks", "Q7": "normal"}
    assert {row["image"]["bytes"] for row in rows.values()} == {image.data for image in images}


def test_an_image_marked_again_keeps_one_row_and_moves_with_its_view(tmp_path):
    sheet, image = MarksSheet(tmp_path), read(png())
    sheet.save(image, "Abdomen", "", [mark("Q7"), mark("Q6")], "run")
    assert sheet.save(image, "Femur", "code", [mark("Q7", "wrong", "abnormal: mass")], "run") == 1
    folder, name, status, patient, *answers = rows_of(sheet)[0]
    assert (folder, status, patient) == ("Femur", "complete", "code")
    assert dict(zip(QUESTIONS, answers))["Q7"] == "abnormal: mass" and dict(zip(QUESTIONS, answers))["Q6"] == "good"
    assert [path.parent.name for path in sheet.images.rglob("*.png")] == ["Femur"]
    log = [[cell.value for cell in row] for row in load_workbook(sheet.path).worksheets[1].iter_rows(min_row=2)]
    assert [(row[2], row[6], row[7]) for row in log] == [
        ("Q7", "right", None), ("Q6", "right", None), ("Q7", "wrong", "abnormal: mass"),
    ]  # fmt: skip


def test_an_image_saved_again_without_a_view_keeps_the_one_it_has(tmp_path):
    """As after the page was loaded anew: its choice of a view is empty again. Where the file lies counts, not what a row says."""
    sheet, image = MarksSheet(tmp_path), read(png())
    sheet.save(image, "Femur", "", [mark("Q7")], "run")
    sheet.save(image, "", "", [mark("Q6")], "run")
    assert rows_of(sheet)[0][0] == "Femur" and [path.parent.name for path in sheet.images.rglob("*.png")] == ["Femur"]
    book = load_workbook(sheet.path)
    book.worksheets[0].cell(2, 1).value = "../elsewhere"  # by somebody's hand: never a path of the page's
    book.save(sheet.path)
    sheet.save(image, "", "", [mark("Q6")], "run")
    assert rows_of(sheet)[0][0] == "Femur" and [path.parent.name for path in sheet.images.rglob("*.png")] == ["Femur"]


@pytest.mark.parametrize("text", ["=1+1", '=HYPERLINK("http://x")', "+cmd|' /C calc'!A0", "a\x00b\x0b", "é ✓ 胎", "\ud800"])
def test_no_text_becomes_a_formula_or_breaks_the_sheet(tmp_path, text):
    sheet = MarksSheet(tmp_path)
    sheet.save(read(png()), "Abdomen", text, [mark("Q2", "wrong", text), mark("Q7", answer=text)], text)
    assert len(rows_of(sheet)) == 1
    for worksheet in load_workbook(sheet.path).worksheets:
        assert all(cell.data_type != "f" for row in worksheet.iter_rows() for cell in row)


def test_nothing_from_a_request_becomes_a_path(tmp_path):
    sheet = MarksSheet(tmp_path / "marks")
    sheet.save(read(png()), "../../elsewhere", "../../code", [mark("Q7")], "../model")
    assert len(rows_of(sheet)) == 1
    written = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert written == [
        "marks/.book.lock",
        "marks/.lock",
        f"marks/images/Unsorted/{read(png()).sha256[:16]}.png",
        "marks/marks.xlsx",
        "marks/marks.xlsx.merged",
    ]


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.6, 0.9, 0.99])
def test_a_full_disk_leaves_all_as_it_was_and_is_told(tmp_path, share):
    """The kernel fails the write after a share of the journal's size as it would be: of the image, or of the new line."""
    sheet, images = MarksSheet(tmp_path), [read(png(40, 30, seed)) for seed in range(2)]
    sheet.save(images[0], "Abdomen", "", [mark("Q7", answer="x" * 8000)], "run")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with full_disk(int(share * 2 * marks_book.journal_of(sheet.path).stat().st_size)), pytest.raises(Refusal) as refusal:
        sheet.save(images[1], "Abdomen", "", [mark("Q7", answer="x" * 8000)], "run")
    assert refusal.value.status == 507 and "not saved" in refusal.value.words and "save again" in refusal.value.words
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert sheet.save(images[1], "Abdomen", "", [mark("Q7")], "run") == 2 and len(rows_of(sheet)) == 2


def test_a_sheet_of_another_form_is_left_alone(tmp_path):
    sheet = MarksSheet(tmp_path)
    for content in (b"no workbook", None):
        if content:
            sheet.path.write_bytes(content)
        else:
            Workbook().save(sheet.path)
        before = sheet.path.read_bytes()
        with pytest.raises(Refusal, match="move it away") as refusal:
            sheet.save(read(png()), "Abdomen", "", [mark("Q7")], "run")
        assert refusal.value.status == 409 and sheet.path.read_bytes() == before and not list(sheet.images.rglob("*.png"))


def test_marks_of_many_at_once_are_all_kept(tmp_path):
    sheets = [MarksSheet(tmp_path), MarksSheet(tmp_path)]  # as two pages on one folder
    images = [read(png(64, 48, seed)) for seed in range(8)]
    threads = []
    for i, image in enumerate(images):
        threads.append(threading.Thread(target=sheets[i % 2].save, args=(image, "Abdomen", "", [mark("Q7")], "run")))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {row[1] for row in rows_of(sheets[0])} == {f"{image.sha256[:16]}.png" for image in images}


@pytest.mark.parametrize(
    "told",
    [
        {}, {"Q9": {"answer": "x", "verdict": "right"}}, {"Q1": {"answer": "x", "verdict": "maybe"}}, {"Q1": "right"},
        {"Q1": {"answer": 5, "verdict": "right"}}, {"Q1": {"verdict": "right"}},
        {"Q1": {"answer": "x", "verdict": "wrong", "correction": "y" * 9000}},
        *({"Q1": {"answer": "x", "verdict": "right", "confidence": c}} for c in ("high", True, -0.1, 10**400, float("nan"))),
    ],
)  # fmt: skip
def test_marks_of_another_form_are_refused(told):
    with pytest.raises(Refusal) as refusal:
        marks_of(told)
    assert refusal.value.status == 400


@pytest.mark.parametrize(
    ("mark", "words"),
    [({"answer": "x" * 9000}, "An answer that is marked has at most 8000"),
     ({"answer": "x", "correction": "y" * 9000}, "A correction has at most 8000")],
)  # fmt: skip
def test_each_limit_of_a_mark_has_words_of_its_own(mark, words):
    with pytest.raises(Refusal, match=words):
        marks_of({"Q1": {"verdict": "wrong", **mark}})
