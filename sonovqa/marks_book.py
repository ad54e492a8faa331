"""The workbook of the page's marks, and the journal that they are written to first.

    python -m sonovqa.marks_book outputs/marks/marks.xlsx      # put in what still waits in the journal

Writing a workbook anew takes seconds once it has a thousand rows, so a mark is one line at the end of ``<workbook>.journal``
and counts as saved once that line is on the disk. The page, this command and `prepare_dataset.py sheet` put waiting lines
into the workbook: written whole beside it and renamed, and only then taken from the journal. A process killed between the two
leaves lines that are in the workbook already; put in again they change nothing.

The first worksheet has the form of the annotation sheets: one row an image, under Q1 … Q8 what a person found right or wrote
instead. The second keeps every mark with the answer it was made on.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from sonovqa import cli, files, folder_sheet
from sonovqa.cli import UserError
from sonovqa.questions import QUESTIONS

PATIENT = "Patient"
HEADER = (*folder_sheet.HEADER[:3], PATIENT, *folder_sheet.HEADER[3:])
FIRST_ANSWER = HEADER.index(folder_sheet.HEADER[3]) + 1  # worksheet columns count from 1
LOG_HEADER = ("Date", "Image Name", "Asked", "Model", "Model's answer", "Confidence", "Verdict", "Correction")
POLITE = 10  # niceness: answers that stream meanwhile come first


def journal_of(book: Path) -> Path:
    """The file beside a workbook that holds what is not in it yet."""
    return book.with_name(book.name + ".journal")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file's lock, against threads and processes alike; waits for it."""
    with open(path, "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # of this opening of the file, so threads exclude each other too
        yield


def journal_lock(book: Path) -> Path:
    """Held for moments: while the journal, or images beside the workbook, change."""
    return book.with_name(".lock")


def append(book: Path, entry: dict) -> None:
    """Add one line to the journal, on the disk when this returns. To be called with `journal_lock` held.

    Args:
        entry: ``image`` (name), ``view``, ``patient``, ``answers`` (text by question id), ``log`` (rows of `LOG_HEADER`).

    Raises:
        OSError: if it cannot be written whole; the journal is then as it was.
    """
    journal = journal_of(book)
    is_new = not journal.exists()
    with open(journal, "ab+", buffering=0) as stream:
        stream.seek(0)
        size = len(_whole(stream.read()))
        stream.truncate(size)  # of a line that broke off with its process
        try:
            line = json.dumps(entry).encode() + b"\n"
            while line:  # an unbuffered write may take a part
                line = line[stream.write(line) :]
            os.fsync(stream.fileno())
        except BaseException:
            stream.truncate(size)
            if is_new:
                journal.unlink()
            raise
    if is_new:
        _sync_folder(journal.parent)


def _whole(data: bytes) -> bytes:
    """A journal's bytes without a last line that broke off."""
    return data[: data.rfind(b"\n") + 1]


def _sync_folder(folder: Path) -> None:
    """Put a folder's list of names on the disk. Source: fsync(2): that of a file does not."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_behind(book: Path) -> bool:
    """Whether marks wait in a workbook's journal."""
    journal = journal_of(book)
    return journal.exists() and journal.stat().st_size > 0


def bring_up_to_date(book: Path) -> int:
    """Put into a workbook what waits in its journal. Does nothing at all where there is no journal.

    Returns:
        How many lines were put in.

    Raises:
        UserError: if the workbook is none of the page's or cannot be written; everything is then as it was.
    """
    journal = journal_of(book)
    if not is_behind(book):
        return 0
    try:
        with locked(book.with_name(".book.lock")):
            data = _whole(journal.read_bytes()) if journal.exists() else b""
            entries = _entries(journal, data)
            if entries:
                made = opened(book)
                put(made, entries)
                with files.replacing(book) as part:
                    made.save(part)
                _sync_folder(book.parent)
            with locked(journal_lock(book)):
                _cut(journal, len(data))
    except OSError as fault:
        told = f"marks wait in {journal.name} and cannot be put into the workbook; {book}: {fault.strerror or fault}"
        raise UserError(f"{told}; a folder with room that you may write to; {command(book)}") from fault
    return len(entries)


def _entries(journal: Path, data: bytes) -> list[dict]:
    try:
        return [json.loads(line) for line in data.splitlines()]
    except ValueError:
        raise UserError(f"a line is no JSON; {journal}; lines that the page wrote; mend it or move it away") from None


def _cut(journal: Path, length: int) -> None:
    """Take the first ``length`` bytes off a journal, and with the last line the journal itself."""
    rest = _whole(journal.read_bytes()[length:]) if journal.exists() else b""
    if rest:
        with files.replacing(journal) as part:
            part.write_bytes(rest)
    else:
        journal.unlink(missing_ok=True)


def command(book: Path) -> str:
    """What brings a workbook up to date."""
    return f"python -m sonovqa.marks_book {book}"


def opened(book: Path):
    """The workbook as it lies there, or a new one. Raises `UserError` if it is none of this form."""
    from openpyxl import Workbook, load_workbook

    if not book.exists():
        made = Workbook()
        made.active.title = "Answers"
        folder_sheet.add_row(made.active, list(HEADER))
        made.active.freeze_panes = "E2"
        folder_sheet.add_row(made.create_sheet("Marks"), list(LOG_HEADER))
        return made
    check_form(book)
    return load_workbook(book)


def check_form(book: Path) -> None:
    """Raise `UserError` if a file is there that is no workbook of this form. Reads its first row only."""
    from openpyxl import load_workbook

    if not book.exists():
        return
    try:
        read = load_workbook(book, read_only=True)
        with contextlib.closing(read):
            header = next(read.worksheets[0].iter_rows(max_row=1, values_only=True), ())
            is_ours = len(read.worksheets) >= 2 and tuple(header) == HEADER
    except OSError:
        raise
    except Exception:  # a broken workbook fails anywhere in zip, XML or openpyxl, with any type
        is_ours = False
    if not is_ours:
        raise UserError(f"marks go into the page's own sheet only; {book} is another; move it away; then {command(book)}")


def put(made, entries: list[dict]) -> None:
    """Write journal entries into an open workbook: a row an image, new or over what was marked before, and every mark's own.

    Entries that are in it already change nothing: a mark is known by its time, image and question.
    """
    sheet, log = made.worksheets[:2]
    places = {sheet.cell(row, 2).value: row for row in range(sheet.max_row, 1, -1)}  # of a name's rows the first
    known = {tuple(row) for row in log.iter_rows(min_row=2, max_col=3, values_only=True)}
    for entry in entries:
        name = entry["image"]
        if name not in places:
            folder_sheet.add_row(sheet, ["", name, "complete", "", *[""] * len(QUESTIONS)])
            places[name] = sheet.max_row
        row = places[name]
        folder_sheet.set_cell(sheet.cell(row, 1), entry["view"])
        if entry["patient"]:
            folder_sheet.set_cell(sheet.cell(row, 4), entry["patient"])
        for question_id, text in entry["answers"].items():
            folder_sheet.set_cell(sheet.cell(row, FIRST_ANSWER + list(QUESTIONS).index(question_id)), text)
        for told in entry["log"]:
            if tuple(told[:3]) not in known:
                known.add(tuple(told[:3]))
                folder_sheet.add_row(log, told)


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser(prog="python -m sonovqa.marks_book", description=__doc__)
    parser.add_argument("book", type=Path, metavar="WORKBOOK", help="the page's marks.xlsx")
    book = parser.parse_args(argv).book
    if not (book.exists() or is_behind(book)):
        raise UserError(f"no such workbook; {book}; the marks.xlsx of a page; see `ls outputs/marks`")
    os.nice(POLITE)
    count = bring_up_to_date(book)
    cli.console.print(f"{book}: {count} savings of the journal put in", markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
