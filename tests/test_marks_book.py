"""The journal of the page's marks and the workbook made from it: what was saved is in it once, whatever dies in between."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import openpyxl
import pytest
from conftest import ROOT
from openpyxl import Workbook, load_workbook
from openpyxl.worksheet.worksheet import Worksheet
from page_serving import arguments, full_disk, png

from sonovqa import marks_book, page, page_marks, sources
from sonovqa.cli import UserError
from sonovqa.page_guard import Refusal
from sonovqa.page_marks import Mark, MarksSheet
from sonovqa.page_uploads import read


def saved(folder, count: int = 1, first: int = 0) -> MarksSheet:
    sheet = MarksSheet(folder)
    for seed in range(first, first + count):
        sheet.save(
            read(png(16, 16, seed)), "Femur", "P", [Mark("Q7", str(seed), True), Mark("Q5", "x", False, "13 weeks")], "run"
        )
    return sheet


def contents(sheet: MarksSheet) -> list[list[tuple]]:
    return [list(worksheet.iter_rows(min_row=2, values_only=True)) for worksheet in load_workbook(sheet.path).worksheets]


def written_here(monkeypatch) -> None:
    """The page's workbook is written without another process: starting one takes a second or more."""

    def run(words, **options):
        marks_book.bring_up_to_date(Path(words[-1]))
        return subprocess.CompletedProcess(words, 0, b"", b"")

    monkeypatch.setattr(page_marks.subprocess, "run", run)


def test_a_mark_costs_the_same_however_long_the_sheet_is(tmp_path, monkeypatch):
    sheet = saved(tmp_path, 3)
    written_here(monkeypatch)
    assert not sheet.path.exists() and len(marks_book.journal_of(sheet.path).read_bytes().splitlines()) == 3
    sheet.write()
    assert sheet.trouble is None and sheet.path.exists()
    monkeypatch.setattr(Workbook, "save", None)  # no workbook is written, and none is read: the writer looked at it
    monkeypatch.setattr(openpyxl, "load_workbook", None)
    for count in (4, 5):
        assert sheet.save(read(png(16, 16, count)), "Femur", "", [Mark("Q7", "x", True)], "run") == count
    sheet.path.write_bytes(b"another")  # which is seen at once
    with pytest.raises(Refusal, match="move it away"):
        saved(tmp_path)


def test_putting_marks_in_looks_for_the_last_row_no_more_often_when_there_are_more(tmp_path, monkeypatch):
    """openpyxl goes through all cells for it: asked at every mark, 3,000 images would take hours."""
    looked, last = [], Worksheet.max_row
    monkeypatch.setattr(Worksheet, "max_row", property(lambda sheet: looked.append(sheet) or last.__get__(sheet)))
    counts = []
    for count in (2, 8):
        saved(tmp_path / str(count), count)
        looked.clear()
        made = marks_book.opened(tmp_path / "none.xlsx")
        assert marks_book.put(made, entries(tmp_path / str(count))) == count
        counts.append(len(looked))
    assert counts[0] == counts[1]


def entries(folder) -> list[dict]:
    """What waits in a folder's journal."""
    return [json.loads(line) for line in marks_book.journal_of(folder / "marks.xlsx").read_bytes().splitlines()]


def test_marks_saved_in_the_same_moment_are_all_kept(tmp_path, monkeypatch):
    class Still(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 1, 2, tzinfo=tz)

    monkeypatch.setattr(page_marks.datetime, "datetime", Still)
    sheet, image = MarksSheet(tmp_path), read(png())
    for answer in map(str, range(20)):
        sheet.save(image, "", "", [Mark("Q7", answer, True)], "run")
    marks_book.bring_up_to_date(sheet.path)
    assert [row[4] for row in contents(sheet)[1]] == list(map(str, range(20)))


@pytest.mark.parametrize("name", [".~lock.marks.xlsx#", "~$marks.xlsx"])
def test_marks_wait_while_a_spreadsheet_program_has_the_workbook_open(tmp_path, monkeypatch, name):
    """It saves the workbook as it was when it was opened: what was put in meanwhile would be gone."""
    sheet = saved(tmp_path, 1)
    written_here(monkeypatch)
    sheet.write()
    as_opened, lock = sheet.path.read_bytes(), tmp_path / name
    lock.touch()
    saved(tmp_path, 1, 1)
    sheet.write()
    assert name in sheet.trouble and "open in a spreadsheet program" in sheet.trouble and "\n" not in sheet.trouble
    assert sheet.path.read_bytes() == as_opened and marks_book.is_behind(sheet.path)
    with pytest.raises(UserError, match="close it"):
        sources.sheet([sheet.path], sheet.images)
    lock.unlink()
    sheet.write()
    assert sheet.trouble is None and len(contents(sheet)[0]) == 2


def test_a_workbook_opened_while_it_is_written_is_left_alone(tmp_path, monkeypatch):
    sheet, put, lock = saved(tmp_path, 1), marks_book.put, tmp_path / "~$marks.xlsx"
    monkeypatch.setattr(marks_book, "put", lambda made, entries: (put(made, entries), lock.touch())[0])
    with pytest.raises(UserError, match="close it"):
        marks_book.bring_up_to_date(sheet.path)
    assert not sheet.path.exists() and marks_book.is_behind(sheet.path) and not list(tmp_path.glob("*.part"))


def test_a_stale_copy_saved_over_the_workbook_can_be_mended_and_what_was_changed_by_hand_stays(tmp_path, capsys):
    sheet = saved(tmp_path, 1)
    marks_book.bring_up_to_date(sheet.path)
    stale = load_workbook(sheet.path)
    saved(tmp_path, 2, 1)
    marks_book.bring_up_to_date(sheet.path)
    whole = contents(sheet)
    stale.worksheets[0].cell(2, 4).value = "by hand"
    stale.save(sheet.path)
    for count in (2, 0):
        assert marks_book.main([str(sheet.path), "--again"]) == 0
        assert f"{count} savings of the journal put in" in capsys.readouterr().out
    whole[0][0] = (*whole[0][0][:3], "by hand", *whole[0][0][4:])
    assert contents(sheet) == whole


def test_a_workbook_and_a_journal_from_before_marks_had_ids_go_on(tmp_path):
    sheet = saved(tmp_path, 1)
    (entry,) = entries(tmp_path)
    old = {name: value for name, value in entry.items() if name != "id"} | {"log": [row[:-1] for row in entry["log"]]}
    marks_book.journal_of(sheet.path).write_text(json.dumps(old) + "\n")
    for _ in range(2):
        marks_book.bring_up_to_date(sheet.path)
        marks_book.journal_of(sheet.path).write_text(json.dumps(old) + "\n")
    book = load_workbook(sheet.path)
    book.worksheets[1].delete_cols(len(marks_book.LOG_HEADER))
    book.save(sheet.path)
    saved(tmp_path, 1, 1)
    marks_book.bring_up_to_date(sheet.path)
    log = load_workbook(sheet.path).worksheets[1]
    assert [cell.value for cell in log[1]] == list(marks_book.LOG_HEADER) and log.max_row == 1 + 4


def test_one_look_at_the_journal_is_enough(tmp_path, monkeypatch):
    """Between two, another process may have put the last line in and removed it."""
    monkeypatch.setattr(Path, "exists", lambda path: True)
    assert not marks_book.is_behind(tmp_path / "marks.xlsx")


def test_no_fault_ends_the_page_that_keeps_the_workbook_up_to_date(tmp_path, monkeypatch, capfd):
    sheet, looks, is_behind = saved(tmp_path, 1), [], marks_book.is_behind

    def flaky(book):
        looks.append(sheet.trouble)
        if len(looks) == 1:
            raise OSError(116, "Stale file handle")
        return is_behind(book)

    async def followed() -> None:
        following = asyncio.create_task(sheet.follow())
        while not sheet.path.exists() or sheet.trouble:
            assert not following.done()
            await asyncio.sleep(0.01)
        following.cancel()

    written_here(monkeypatch)
    monkeypatch.setattr(page_marks, "SHORTEST_REST", 0.0)
    monkeypatch.setattr(marks_book, "is_behind", flaky)
    asyncio.run(followed())
    assert "Stale file handle" in looks[1] and "Stale file handle" in capfd.readouterr().err
    marks_book.bring_up_to_date(sheet.path)
    assert len(contents(sheet)[0]) == 1


def test_an_image_is_on_the_disk_before_the_line_that_names_it(tmp_path, monkeypatch):
    """With the names of its folders: fsync of a file syncs no name. A power cut can then take the line only."""
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(os.readlink(f"/proc/self/fd/{handle}")), fsync(handle)))
    sheet = saved(tmp_path / "new" / "marks", 1)
    line = synced.index(str(marks_book.journal_of(sheet.path)))
    (image,) = sheet.images.glob("*/*.png")
    before = synced[:line]
    assert any(name.startswith(str(image.parent / f".{image.name}.")) for name in before)
    folders = [*image.parents][: len(image.relative_to(tmp_path).parts)]
    assert {str(folder) for folder in folders} == {name for name in before if os.path.isdir(name)}


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
    assert marks_book.bring_up_to_date(sheet.path) == 1  # the one that was not in it
    after = contents(sheet)
    assert [rows[: len(kept)] for rows, kept in zip(after, before)] == before and list(map(len, after)) == [3, 6]


def test_marks_saved_while_the_workbook_is_written_wait_for_the_next_time(tmp_path, monkeypatch):
    sheet, put = saved(tmp_path, 1), marks_book.put
    with monkeypatch.context() as patch:
        patch.setattr(marks_book, "put", lambda made, entries: (put(made, entries), saved(tmp_path, 1, 1))[0])
        assert marks_book.bring_up_to_date(sheet.path) == 1
    assert len(contents(sheet)[0]) == 1 and marks_book.bring_up_to_date(sheet.path) == 1 and len(contents(sheet)[0]) == 2


def test_a_line_that_broke_off_spoils_no_other(tmp_path):
    sheet = saved(tmp_path, 1)
    with open(marks_book.journal_of(sheet.path), "ab") as stream:
        stream.write(b'{"image": "half')
    saved(tmp_path, 1, 1)
    assert marks_book.bring_up_to_date(sheet.path) == 2


#: What is called right before or after something on the disk changes for good.
MOMENTS = ("fsync", "replace", "unlink", "ftruncate")


def saves_until_killed(folder, images: list, moment: int, told: int) -> None:
    """A process's life: two savings, each followed by its writer. Dies by SIGKILL before its ``moment``-th of `MOMENTS`."""
    calls = itertools.count()

    def deadly(call):
        def counted(*args, **options):
            if next(calls) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)

        return counted

    for name in MOMENTS:
        setattr(os, name, deadly(getattr(os, name)))
    sheet = MarksSheet(folder)
    for number, image in enumerate(images):
        answer = f"{moment}-{number}"
        sheet.save(image, "Femur", "", [Mark("Q7", answer, True)], "run")
        os.write(told, f"{answer}\n".encode())
        marks_book.bring_up_to_date(sheet.path)


def in_a_process_of_its_own(work, *args) -> tuple[int, str]:
    """The status that a fork of this process ends with, and what it wrote."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            work(*args, write_end)
            os._exit(0)
        os._exit(1)
    os.close(write_end)
    with os.fdopen(read_end) as stream:
        said = stream.read()
    return os.waitpid(child, 0)[1], said


def test_killed_at_any_moment_every_mark_that_was_saved_is_in_the_sheet_once(tmp_path):
    """At each of the moments between which something changes on the disk, one after another: none is left to chance."""
    told, killed, images = [], 0, [read(png(16, 16, number)) for number in range(2)]
    for moment in range(100):
        status, said = in_a_process_of_its_own(saves_until_killed, tmp_path, images, moment)
        told += said.split()
        if not os.WIFSIGNALED(status):
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        killed += 1
    assert os.waitstatus_to_exitcode(status) == 0 and killed > 20
    sheet = MarksSheet(tmp_path)
    marks_book.bring_up_to_date(sheet.path)
    answers, log = contents(sheet)
    kept = [row[4] for row in log]
    assert set(told) <= set(kept) and len(kept) == len(set(kept)) and len(answers) == 2
    assert {row[1] for row in answers} == {path.name for path in sheet.images.glob("*/[!.]*.png")}


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
        began = time.monotonic()
        while (not sheet.path.exists() or marks_book.is_behind(sheet.path)) and time.monotonic() - began < 120:
            time.sleep(0.05)
        assert len(contents(sheet)[0]) == 1
        saved(tmp_path, 1, 1)
    assert len(contents(sheet)[0]) == 2 and json.dumps(contents(sheet)[1][0][2]) == '"Q7"'
