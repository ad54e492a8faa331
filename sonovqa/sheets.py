"""Reads annotation sheets as they come from the field: workbooks and CSV files, headers matched by ``Qn``.

Two forms are known (issue 2): one workbook for all categories with folder, image, status and Q1 … Q8 columns; and one
workbook a category, ``<Category>_image_list.xlsx``, with an image column and Q1 … Q8, most rows not annotated yet.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import difflib
import io
import itertools
import re
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sonovqa.cli import UserError
from sonovqa.questions import QUESTIONS

#: Column names by role, compared without case, spaces and punctuation; an earlier name wins over a later one.
COLUMNS = {
    "image": ("imagename", "imagefilename", "imagefile", "filename", "image", "file", "images"),
    "folder": ("foldername", "folder", "category"),
    "status": ("status", "annotationstatus"),
}
#: Statuses of a finished row, compared without case and spaces.
FINISHED = ("complete", "completed")
HEADER_ROWS = 20  # a title or a note may stand above the header
LARGEST_WORKBOOK = 1 << 30  # bytes, unpacked: 15,446 rows of eight answers are about 20 MB
LARGEST_CELL = 1 << 20  # characters; Excel's own limit is 32,767
PATIENT_CELL = "patient cell: "  # begins the reasons why a patient is not known

Drops = dict[str, list[str]]


@dataclass
class SheetRow:
    """One finished row of a sheet.

    Attributes:
        place: file and row number, as a person counts them.
        folder, image: as written in the sheet; ``folder`` is the category where the sheet has no folder column.
        group: the patient column's text, or "".
        answers: question id to the answer as it was written; questions without an answer are absent.
    """

    place: str
    folder: str
    image: str
    group: str
    answers: dict[str, str]


@dataclass(frozen=True)
class Unreadable:
    """A cell that holds something other than what the annotator meant; ``reason`` says what."""

    reason: str


@dataclass
class _Header:
    row: int  # index in the table
    image: int
    folder: int | None
    status: int | None
    group: int | None
    questions: dict[str, int] = field(default_factory=dict)
    unknown: dict[str, int] = field(default_factory=dict)


def read_sheet(path: Path, drops: Drops, group_column: str | None = None) -> Iterator[SheetRow]:
    """Yield the finished rows of a workbook or CSV file; whatever is left out is noted in ``drops`` (reason -> places).

    Args:
        path: a ``.xlsx``, ``.xlsm`` or ``.csv`` file. Of several worksheets the first with a header and rows is read.
        group_column: name of the column with the patient, or ``None``.

    Raises:
        UserError: the file is missing, protected, corrupt or empty, or lacks a column it must have.
    """
    tables = _tables(path)
    found = [(name, table, header) for name, table in tables if (header := _find_header(path, table)) is not None]
    if not found:
        raise UserError(_no_header(path, [table for _, table in tables]))
    filled = [sheet for sheet in found if _has_rows(*sheet[1:])] or found[:1]
    for name, _, _ in filled[1:]:
        drops.setdefault("another worksheet of the same workbook: only the first is read", []).append(f"{path.name}, {name}")
    _, table, header = filled[0]
    header.group = _group_index(path, table[header.row], group_column)
    category = _category_of(path)
    if header.folder is None and category is None:
        raise UserError(
            f"no folder column in the sheet; {path}; a `Folder Name` column, or one workbook a category named "
            "`<Category>_image_list.xlsx`; add the column or rename the file"
        )
    _note_unknown(path, table, header, drops)
    for index, cells in enumerate(table[header.row + 1 :], header.row + 2):
        row = _read_row(cells, header, category, f"{path.name} row {index}", drops)
        if row is not None:
            yield row


def _has_rows(table: list[list], header: _Header) -> bool:
    """Whether a row below the header names an image: a template has a header, and at times a status, but no images."""
    return any(isinstance(name, str) and name.strip() for row in table[header.row + 1 :] for name in row[header.image :][:1])


def _read_row(cells: list, header: _Header, category: str | None, place: str, drops: Drops) -> SheetRow | None:
    def text(column: int | None) -> str:
        value = cells[column] if column is not None and column < len(cells) else ""
        return "" if isinstance(value, Unreadable) else " ".join(value.split())

    if not any(cells):
        return None
    image, folder = text(header.image), text(header.folder) if header.folder is not None else category
    reason = _status_problem(text(header.status)) if header.status is not None else None
    if reason is None and not (image and folder):
        reason = "no image name in the row" if not image else "no folder name in the row"
    where = f"{place}: {folder or '?'}/{image or '?'}"
    if reason is None:
        answers = _answers(cells, header, where, drops)
        reason = None if answers else "no answers yet"
    if reason is not None:
        drops.setdefault(reason, []).append(where)
        return None
    patient = cells[header.group] if header.group is not None and header.group < len(cells) else ""
    if isinstance(patient, Unreadable):
        drops.setdefault(PATIENT_CELL + patient.reason, []).append(where)
    return SheetRow(place, folder, image, text(header.group), answers)


def _answers(cells: list, header: _Header, where: str, drops: Drops) -> dict[str, str]:
    answers = {}
    for question_id, column in header.questions.items():
        value = cells[column] if column < len(cells) else ""
        if isinstance(value, Unreadable):
            drops.setdefault(f"answer cell: {value.reason}", []).append(f"{where}, {question_id}")
        elif re.search(r"\w", value) and value.strip().casefold() != "nan":  # "nan" is how pandas writes an empty cell
            answers[question_id] = value.strip()
    return answers


def _status_problem(status: str) -> str | None:
    plain = re.sub(r"[\s_]+", "", status).casefold()
    if plain in FINISHED:
        return None
    if difflib.get_close_matches(plain, FINISHED, 1, 0.8) and not plain.startswith(("in", "not", "un")):
        return f'status is misspelt: "{status}" instead of "complete"'
    return "status is not complete"


def _plain(header) -> str:
    return "" if isinstance(header, Unreadable) else re.sub(r"[\W_]+", "", header).casefold()


def _find_header(path: Path, table: list[list]) -> _Header | None:
    """The first row that names an image column and at least one question; ``None`` where there is none."""
    for index, cells in enumerate(table[:HEADER_ROWS]):
        names = [_plain(cell) for cell in cells]
        roles = {role: next((names.index(n) for n in wanted if n in names), None) for role, wanted in COLUMNS.items()}
        header = _Header(index, roles["image"], roles["folder"], roles["status"], None)
        for column, cell in enumerate(cells):
            number = re.match(r"\s*q\s*0*(\d{1,3})(?!\d)", cell, re.IGNORECASE) if isinstance(cell, str) else None
            if number:
                _add_question(path, header, f"Q{number[1]}", column, cell)
        if header.image is not None and header.questions:
            return header
    return None


def _add_question(path: Path, header: _Header, question_id: str, column: int, title: str) -> None:
    if question_id not in QUESTIONS:
        header.unknown[" ".join(title.split())] = column
    elif question_id in header.questions:
        raise UserError(
            f"two columns for {question_id}; {path}, columns {header.questions[question_id] + 1} and {column + 1}; "
            "one column a question; delete or rename one of them"
        )
    else:
        header.questions[question_id] = column


def _group_index(path: Path, names: list, group_column: str | None) -> int | None:
    if group_column is None:
        return None
    plain = [_plain(name) for name in names]
    if _plain(group_column) in plain:
        return plain.index(_plain(group_column))
    shown = ", ".join(f"`{' '.join(n.split())[:40]}`" for n in names if isinstance(n, str) and n)
    raise UserError(f"no patient column of that name in {path}; {group_column}; columns there: {shown}; mend --group-column")


def _note_unknown(path: Path, table: list[list], header: _Header, drops: Drops) -> None:
    for title, column in header.unknown.items():
        count = sum(bool(row[column]) for row in table[header.row + 1 :] if column < len(row))
        drops.setdefault("unknown question: Q1 … Q8 are known", []).append(f"{path.name}, `{title[:60]}`, {count} answers")


def _category_of(path: Path) -> str | None:
    match = re.fullmatch(r"(.+?)[\s_-]*image[\s_-]*list", path.stem, re.IGNORECASE)
    return match[1] if match else None


def _no_header(path: Path, tables: list[list[list]]) -> str:
    if not any(any(row) for table in tables for row in table):
        return f"the sheet is empty; {path}; a header row and one row an image; check that it was saved"
    first = next(row for table in tables for row in table if any(row))
    shown = ", ".join(f"`{' '.join(c.split())[:30]}`" for c in first if isinstance(c, str) and c) or "none"
    names = {_plain(cell) for table in tables for row in table[:HEADER_ROWS] for cell in row}
    lacks = "question columns" if names & set(COLUMNS["image"]) else "an `Image Name` column"
    return (
        f"the sheet lacks {lacks}; {path}, which has {shown}; `Image Name` and headers that begin with Q1 … Q8 in one "
        "row; add or rename the columns"
    )


def _tables(path: Path) -> list[tuple[str, list[list]]]:
    """All worksheets as (name, rows of cells); a cell is text ("" if empty) or `Unreadable`."""
    if not path.is_file():
        raise UserError(f"no such sheet; {path}; an .xlsx or .csv file; check the path")
    kind = path.suffix.casefold()
    if kind == ".csv":
        return [(path.name, _read_csv(path))]
    if kind in (".xlsx", ".xlsm"):
        return _read_workbook(path)
    raise UserError(f"unknown kind of sheet; {path}; .xlsx or .csv; save it as one of these")


def _read_csv(path: Path) -> list[list]:
    data = path.read_bytes()
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:  # what Excel on Windows writes for western languages
        text = data.decode("cp1252", errors="replace")
    csv.field_size_limit(LARGEST_CELL)
    try:
        delimiter = max(",;\t", key=lambda mark: _columns_known(text, mark))
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    except csv.Error as fault:
        raise UserError(f"the sheet cannot be read as CSV; {path}: {fault}; open it and save it anew") from None
    return [[Unreadable("a formula without a stored value") if c.startswith("=") else c for c in row] for row in rows]


def _columns_known(text: str, delimiter: str) -> tuple[int, int]:
    """How many of a header's columns this delimiter finds, then how often the first line has it; answers decide nothing."""
    known, most = {name for names in COLUMNS.values() for name in names}, 0
    with contextlib.suppress(csv.Error):  # a wrong delimiter can make nonsense of quotes
        for row in itertools.islice(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), HEADER_ROWS):
            most = max(most, sum(_plain(c) in known or bool(re.match(r"\s*q\s*\d", c, re.IGNORECASE)) for c in row))
    return most, text.partition("\n")[0].count(delimiter)


def _read_workbook(path: Path) -> list[tuple[str, list[list]]]:
    _check_container(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about styles and validations, which are not read
            values = _cells(path, data_only=True)
            if _has_formulas(path):
                written = _cells(path, data_only=False)
                values = {name: _mark_formulas(values[name], written[name]) for name in values}
    except Exception as fault:  # a broken workbook fails anywhere in zip, XML or openpyxl, with any type
        raise UserError(
            f"the workbook is corrupt; {path}: {type(fault).__name__}: {' '.join(str(fault).split())[:120]}; "
            "open it in a spreadsheet program and save it anew"
        ) from None
    return [(name, [[cell_text(cell) for cell in row] for row in rows]) for name, rows in values.items()]


def _cells(path: Path, data_only: bool) -> dict[str, list[list]]:
    from openpyxl.chartsheet import Chartsheet
    from openpyxl.reader.excel import ExcelReader

    class Reader(ExcelReader):
        def read_chartsheet(self, sheet, rel):  # openpyxl 3.1 fails on one without a chart; a bare one keeps the sheets' order
            self.wb._add_sheet(Chartsheet(parent=self.wb, title=sheet.name))

    reader = Reader(path, read_only=True, data_only=data_only, keep_links=False)
    try:
        reader.read()
        tables = {}
        for sheet in reader.wb.worksheets:
            sheet.reset_dimensions()  # the size that a writer states is often wrong
            tables[sheet.title] = [list(row) for row in sheet.iter_rows(values_only=True)]
        return tables
    finally:
        reader.archive.close()


def _mark_formulas(values: list[list], written: list[list]) -> list[list]:
    """A formula whose result was never stored reads as empty: tell it from a cell that is empty."""
    lost = Unreadable("a formula without a stored value")
    for row, raw in zip(values, written, strict=False):
        for column in range(min(len(row), len(raw))):
            if row[column] is None and raw[column] is not None:
                row[column] = lost
    return values


def _has_formulas(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        sheets = [name for name in archive.namelist() if re.match(r"xl/worksheets/[^/]+\.xml$", name)]
        return any(re.search(rb"<(?:\w+:)?f[\s>/]", archive.read(name)) for name in sheets)


def _check_container(path: Path) -> None:
    with open(path, "rb") as stream:
        magic = stream.read(8)
        if magic == b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1":  # OLE2: an encrypted .xlsx, or the .xls of before 2007
            locked = "EncryptedPackage".encode("utf-16-le") in magic + stream.read()
            what = "the workbook is protected by a password" if locked else "the workbook is in the old .xls format"
            raise UserError(f"{what}; {path}; an unprotected .xlsx; save it as that")
    if not magic:
        raise UserError(f"the sheet is empty; {path} has 0 bytes; a header row and one row an image; check that it was saved")
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError):
        raise UserError(f"the workbook is corrupt; {path} is no .xlsx file; open it and save it anew") from None
    if unpacked > LARGEST_WORKBOOK:
        most = LARGEST_WORKBOOK >> 20
        raise UserError(f"the workbook is too large; {path} unpacks to {unpacked >> 20} MB; {most} MB at most; split it")


def cell_text(value) -> str | Unreadable:
    """A cell's value as text: whole numbers without a decimal point; dates, times and errors are `Unreadable`."""
    if value is None:
        return ""
    if isinstance(value, (str, Unreadable)):
        if isinstance(value, str) and re.fullmatch(r"#(REF!|N/A|VALUE!|NAME\?|DIV/0!|NUM!|NULL!|SPILL!|CALC!)", value):
            return Unreadable(f"the spreadsheet error {value}")
        return value.replace("_x000D_", "\n") if isinstance(value, str) else value
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, (datetime.date, datetime.time, datetime.timedelta)):  # "12-14" weeks typed into a date cell
        return Unreadable("a date where text belongs")
    return Unreadable(f"a {type(value).__name__} where text belongs")
