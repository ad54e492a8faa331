"""The journal of the page's marks and the workbook made from it: what was saved is in it once, whatever dies in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from openpyxl import Workbook, load_workbook
from page_serving import arguments, full_disk, png

from sonovqa import marks_book, page, sources
from sonovqa.cli import UserError
from sonovqa.page_marks import Mark, MarksSheet
from sonovqa.page_uploads import read

SAVES = """
import sys
from pathlib import Path
from page_serving import png
from sonovqa.page_marks import Mark, MarksSheet
from sonovqa.page_uploads import read
sheet = MarksSheet(Path(sys.argv[1]))
for seed in range(10**6):
    sheet.save(read(png(16, 16, seed)), "Femur", "", [Mark("Q7", str(seed), True)], "run")
    print(seed, flush=True)
"""


def saved(folder, count: int = 1, first: int = 0) -> MarksSheet:
    sheet = MarksSheet(folder)
    for seed in range(first, first + count):
        sheet.save(
            read(png(16, 16, seed)), "Femur", "P", [Mark("Q7", str(seed), True), Mark("Q5", "x", False, "13 weeks")], "run"
        )
    return sheet


def contents(sheet: MarksSheet) -> list[list[tuple]]:
    return [list(worksheet.iter_rows(min_row=2, values_only=True)) for worksheet in load_workbook(sheet.path).worksheets]


def test_a_mark_costs_the_same_however_long_the_sheet_is(tmp_path, monkeypatch):
    sheet = saved(tmp_path, 3)
    assert not sheet.path.exists() and len(marks_book.journal_of(sheet.path).read_bytes().splitlines()) == 3
    marks_book.bring_up_to_date(sheet.path)
    monkeypatch.setattr(Workbook, "save", None)
    assert sheet.save(read(png(16, 16, 9)), "Femur", "", [Mark("Q7", "x", True)], "run") == 4  # no workbook is written


def test_a_data_set_has_what_was_saved_before_the_workbook_does(tmp_path):
    sheet = saved(tmp_path, 2)
    for more in (2, 3):
        loaded = sources.sheet([sheet.path], sheet.images, "Patient")
        assert len(loaded.records) == more and not marks_book.journal_of(sheet.path).exists()
        saved(tmp_path, 1, more)


def test_killed_between_workbook_and_journal_a_mark_is_in_it_once(tmp_path, monkeypatch):
    sheet = saved(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(marks_book, "_cut", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            marks_book.bring_up_to_date(sheet.path)
    before = contents(sheet)
    assert marks_book.is_behind(sheet.path) and len(before[1]) == 4
    saved(tmp_path, 1, 2)
    assert marks_book.bring_up_to_date(sheet.path) == 3
    after = contents(sheet)
    assert [rows[: len(kept)] for rows, kept in zip(after, before)] == before and list(map(len, after)) == [3, 6]


def test_marks_saved_while_the_workbook_is_written_wait_for_the_next_time(tmp_path, monkeypatch):
    sheet, put = saved(tmp_path, 1), marks_book.put
    with monkeypatch.context() as patch:
        patch.setattr(marks_book, "put", lambda made, entries: (put(made, entries), saved(tmp_path, 1, 1)))
        assert marks_book.bring_up_to_date(sheet.path) == 1
    assert len(contents(sheet)[0]) == 1 and marks_book.bring_up_to_date(sheet.path) == 1 and len(contents(sheet)[0]) == 2


def test_a_line_that_broke_off_spoils_no_other(tmp_path):
    sheet = saved(tmp_path, 1)
    with open(marks_book.journal_of(sheet.path), "ab") as stream:
        stream.write(b'{"image": "half')
    saved(tmp_path, 1, 1)
    assert marks_book.bring_up_to_date(sheet.path) == 2


def test_killed_at_any_moment_every_mark_that_was_saved_is_in_the_sheet(tmp_path):
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    sheet, told = MarksSheet(tmp_path), set()
    for pause in (0.05, 0.3, 0.7):
        child = subprocess.Popen([sys.executable, "-c", SAVES, str(tmp_path)], stdout=subprocess.PIPE, env=env)
        first = child.stdout.readline()
        writer = subprocess.Popen([sys.executable, "-m", "sonovqa.marks_book", str(sheet.path)], cwd=ROOT, env=env)
        time.sleep(1 + pause)
        for process in (writer, child):
            process.send_signal(signal.SIGKILL)
            process.wait()
        told |= set((first + child.stdout.read()).decode().split())
        child.stdout.close()
    loaded = sources.sheet([sheet.path], sheet.images)
    answers = {question["answer"] for record in loaded.records for question in record.questions}
    assert told and told <= answers


def test_a_workbook_that_cannot_be_written_is_told_and_its_marks_wait(tmp_path, capfd):
    sheet = saved(tmp_path, 3)
    with full_disk(4096):
        sheet.write()
    assert "marks wait in marks.xlsx.journal" in sheet.trouble and "marks are kept" in capfd.readouterr().err
    sheet.write()
    assert sheet.trouble is None and len(contents(sheet)[0]) == 3
    saved(tmp_path, 1, 3)
    sheet.path.write_bytes(b"another")
    with pytest.raises(UserError, match=r"the page's own sheet only; .*; move it away; then python -m sonovqa.marks_book"):
        sources.sheet([sheet.path], sheet.images)
    assert marks_book.is_behind(sheet.path)


def test_a_sheet_of_others_has_nothing_put_beside_it(tmp_path):
    (tmp_path / "sheet.csv").write_text("image\n")
    assert marks_book.bring_up_to_date(tmp_path / "sheet.csv") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.csv"]


def test_a_journal_of_another_form_is_told_in_one_line(tmp_path):
    (tmp_path / "marks.xlsx.journal").write_text("no JSON\n")
    with pytest.raises(UserError, match="a line is no JSON"):
        marks_book.bring_up_to_date(tmp_path / "marks.xlsx")
    done = subprocess.run(
        [sys.executable, "-m", "sonovqa.marks_book", str(tmp_path / "no.xlsx")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("error: no such workbook;") and done.stderr.count("\n") == 1


def test_the_page_writes_the_workbook_of_the_run_before_and_the_last_marks_when_it_ends(tmp_path):
    from starlette.testclient import TestClient

    sheet = saved(tmp_path, 1)
    with TestClient(page.make(arguments("http://127.0.0.1:9/v1", tmp_path)).application()):
        for _ in range(200):
            if sheet.path.exists() and not marks_book.is_behind(sheet.path):
                break
            time.sleep(0.1)
        assert len(contents(sheet)[0]) == 1
        saved(tmp_path, 1, 1)
    assert len(contents(sheet)[0]) == 2 and json.dumps(contents(sheet)[1][0][2]) == '"Q7"'
