"""The workbook of the page's marks, and the journal that they are written to first.

    python -m sonovqa.marks_book outputs/marks/marks.xlsx            # put in what still waits in the journal
    python -m sonovqa.marks_book outputs/marks/marks.xlsx --again    # and what was put in before, but is there no more

Writing a workbook anew takes seconds once it has a thousand rows, so a mark is one line at the end of ``<workbook>.journal``
and counts as saved once that line is on the disk. The page, this command and `prepare_dataset.py sheet` put waiting lines
into the workbook: written whole beside it and renamed, and only then moved from the journal to ``<workbook>.merged``. A process
killed in between leaves lines that are in the workbook already; put in again they change nothing.

While a spreadsheet program has the workbook open, nothing is put in: what it saves is the workbook as it was when it was opened,
and would undo that. Where one did all the same (a copy saved over the workbook, a program that leaves no lock file),
``--again`` puts in what is missing. It also brings back marks whose rows somebody removed by hand from the second worksheet.

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
LOG_HEADER = ("Date", "Image Name", "Asked", "Model", "Model's answer", "Confidence", "Verdict", "Correction", "Saving")
POLITE = 10  # niceness: answers that stream meanwhile come first
OPEN_NAMES = (".~lock.{}#", "~${}")  # what LibreOffice and Excel put beside a workbook while they have it open
_looked_at: dict[Path, tuple] = {}  # of workbooks known to be of this form, what tells them from any other


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


def merged_of(book: Path) -> Path:
    """The file beside a workbook that holds what was put into it: lines of the journal, the oldest first."""
    return book.with_name(book.name + ".merged")


def append(book: Path, entry: dict) -> None:
    """Add one line to the journal, on the disk when this returns. To be called with `journal_lock` held.

    Args:
        entry: ``id`` (random), ``image`` (name), ``view``, ``patient``, ``answers`` (text by question id), ``log`` (rows of
            `LOG_HEADER`).

    Raises:
        OSError: if it cannot be written whole; the journal is then as it was.
    """
    _append(journal_of(book), json.dumps(entry).encode() + b"\n")


def _append(path: Path, lines: bytes) -> None:
    """Add whole lines to a file, all or none of them."""
    is_new = not path.exists()
    with open(path, "ab+", buffering=0) as stream:
        stream.seek(0)
        size = len(_whole(stream.read()))
        stream.truncate(size)  # of a line that broke off with its process
        try:
            while lines:  # an unbuffered write may take a part
                lines = lines[stream.write(lines) :]
            os.fsync(stream.fileno())
        except BaseException:
            stream.truncate(size)
            if is_new:
                path.unlink()
            raise
    if is_new:
        files.sync_folder(path.parent)


def _whole(data: bytes) -> bytes:
    """A journal's bytes without a last line that broke off."""
    return data[: data.rfind(b"\n") + 1]


def is_behind(book: Path) -> bool:
    """Whether marks wait in a workbook's journal."""
    try:  # one look: between two, another process may take the last line and the file with it
        return journal_of(book).stat().st_size > 0
    except (FileNotFoundError, NotADirectoryError):
        return False


def bring_up_to_date(book: Path, again: bool = False) -> int:
    """Put into a workbook what waits in its journal. Does nothing at all where there is no journal.

    Args:
        again: also what was put in before and is missing now.

    Returns:
        How many lines were put in.

    Raises:
        UserError: if the workbook is none of the page's, is open in a spreadsheet program or cannot be written; everything is
            then as it was.
    """
    journal, merged = journal_of(book), merged_of(book)
    if not (is_behind(book) or again):
        return 0
    try:
        with locked(book.with_name(".book.lock")):
            data = _lines(journal)
            entries = (_entries(merged, _lines(merged)) if again else []) + _entries(journal, data)
            count = _put_into(book, entries) if entries else 0
            if data:
                _append(merged, data)
            with locked(journal_lock(book)):
                _cut(journal, len(data))
    except OSError as fault:
        told = f"marks wait in {journal.name} and cannot be put into the workbook; {book}: {fault.strerror or fault}"
        raise UserError(f"{told}; a folder with room that you may write to; {command(book)}") from fault
    return count


def _put_into(book: Path, entries: list[dict]) -> int:
    """Write a workbook anew with journal entries in it; how many were not in it before."""
    check_closed(book)
    made = opened(book)
    count = put(made, entries)
    if not count:
        return 0
    with files.replacing(book) as part:
        made.save(part)
        check_closed(book)  # it may have been opened meanwhile: a large one takes seconds to write
    files.sync_folder(book.parent)
    return count


def check_closed(book: Path) -> None:
    """Raise `UserError` while a spreadsheet program has the workbook open: what it saves would undo what is put in now."""
    for name in OPEN_NAMES:
        lock = book.with_name(name.format(book.name))
        if lock.exists():
            told = f"marks wait in {journal_of(book).name}: the workbook is open in a spreadsheet program; {lock}"
            raise UserError(f"{told}; a workbook that is closed; close it, or remove that file where none has it open")


def _lines(path: Path) -> bytes:
    """The whole lines of a journal; none where it is not there."""
    try:
        return _whole(path.read_bytes())
    except FileNotFoundError:
        return b""


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
    """Raise `UserError` if a file is there that is no workbook of this form. A file that was found good is not read again.

    Of one that was not, the first row is looked at, but all of its texts are read for that: half a second at 3,000 images.
    """
    with contextlib.suppress(FileNotFoundError), open(book, "rb") as stream:
        status = os.fstat(stream.fileno())  # of what is read, whatever takes its name meanwhile
        stamp = status.st_mtime_ns, status.st_size, status.st_ino
        if _looked_at.get(book) == stamp:
            return
        if not _is_ours(stream):
            raise UserError(f"marks go into the page's own sheet only; {book} is another; move it away; then {command(book)}")
        _looked_at[book] = stamp


def _is_ours(stream) -> bool:
    from openpyxl import load_workbook

    try:
        read = load_workbook(stream, read_only=True)
        with contextlib.closing(read):
            header = next(read.worksheets[0].iter_rows(max_row=1, values_only=True), ())
            return len(read.worksheets) >= 2 and tuple(header) == HEADER
    except OSError:
        raise
    except Exception:  # a broken workbook fails anywhere in zip, XML or openpyxl, with any type
        return False


def put(made, entries: list[dict]) -> int:
    """Write journal entries into an open workbook: a row an image, new or over what was marked before, and every mark's own.

    Entries that are in it already change nothing, whatever was changed by hand since: they are known by their id. Those written
    before there were ids are known by the time, image and question of each mark.

    Returns:
        How many were put in.
    """
    sheet, log = made.worksheets[:2]
    places = {sheet.cell(row, 2).value: row for row in range(sheet.max_row, 1, -1)}  # of a name's rows the first
    rows = list(log.iter_rows(min_row=2, max_col=len(LOG_HEADER), values_only=True))
    known, ids = {row[:3] for row in rows}, {row[-1] for row in rows if row[-1]}
    folder_sheet.set_cell(log.cell(1, len(LOG_HEADER)), LOG_HEADER[-1])  # a workbook from before there were ids lacks it
    count = 0
    for entry in entries:
        own_id, name = entry.get("id"), entry["image"]
        if own_id in ids:
            continue
        count += 1
        if name not in places:
            places[name] = folder_sheet.add_row(sheet, ["", name, "complete", "", *[""] * len(QUESTIONS)])
        row = places[name]
        folder_sheet.set_cell(sheet.cell(row, 1), entry["view"])
        if entry["patient"]:
            folder_sheet.set_cell(sheet.cell(row, 4), entry["patient"])
        for question_id, text in entry["answers"].items():
            folder_sheet.set_cell(sheet.cell(row, FIRST_ANSWER + list(QUESTIONS).index(question_id)), text)
        for told in entry["log"]:
            if own_id or tuple(told[:3]) not in known:
                known.add(tuple(told[:3]))
                folder_sheet.add_row(log, told)
        ids |= {own_id} if own_id else set()
    return count


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser(prog="python -m sonovqa.marks_book", description=__doc__)
    parser.add_argument("book", type=Path, metavar="WORKBOOK", help="the page's marks.xlsx")
    parser.add_argument("--again", action="store_true", help="also what was put in before and is missing now")
    args = parser.parse_args(argv)
    book = args.book
    if not (book.exists() or is_behind(book) or (args.again and merged_of(book).exists())):
        raise UserError(f"no such workbook; {book}; the marks.xlsx of a page; see `ls outputs/marks`")
    os.nice(POLITE)
    count = bring_up_to_date(book, args.again)
    cli.console.print(f"{book}: {count} savings of the journal put in", markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
