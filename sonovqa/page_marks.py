"""Marks of the page's users, kept as a sheet that ``prepare_dataset.py sheet`` reads, beside a folder of the images.

The first worksheet has the form of the annotation sheets: one row an image, under Q1 … Q8 what a person found right or wrote
instead. The second keeps every mark with the answer it was made on. Both change together, by one rename, or not at all.
"""

from __future__ import annotations

import contextlib
import fcntl
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sonovqa import files, folder_sheet, records
from sonovqa.page_guard import Refusal
from sonovqa.page_uploads import Upload
from sonovqa.questions import CATEGORIES, QUESTIONS

PATIENT = "Patient"
HEADER = (*folder_sheet.HEADER[:3], PATIENT, *folder_sheet.HEADER[3:])
FIRST_ANSWER = HEADER.index(folder_sheet.HEADER[3]) + 1  # worksheet columns count from 1
LOG_HEADER = ("Date", "Image Name", "Asked", "Model", "Model's answer", "Confidence", "Verdict", "Correction")
UNSORTED = "Unsorted"  # the folder of images whose view nobody named
LONGEST_TEXT = 8000  # characters of an answer or a correction
LONGEST_PATIENT = 64


@dataclass(frozen=True)
class Mark:
    """What a person said of one answer.

    Attributes:
        question_id: ``Q1`` … ``Q8``.
        answer: the model's.
        right: whether it was found right.
        correction: what is right instead; "" where the person did not say.
        confidence: the model's, or ``None``.
    """

    question_id: str
    answer: str
    right: bool
    correction: str = ""
    confidence: float | None = None

    def annotation(self, variant: str) -> str:
        """What goes under the question's column; "" leaves the question without an answer."""
        return folder_sheet.cell_of(self.question_id, self.answer, variant) if self.right else self.correction


class MarksSheet:
    """``<folder>/marks.xlsx`` and ``<folder>/images/<view>/<hash>.<ending>``; safe to use from several threads and processes."""

    def __init__(self, folder: Path, variant: str = "default"):
        self.folder, self.variant = folder, variant
        self.path, self.images = folder / "marks.xlsx", folder / "images"
        self.lock = threading.Lock()

    def save(self, image: Upload, category: str, patient: str, marks: list[Mark], model: str) -> int:
        """Keep the marks on one image; a question marked before is marked anew.

        Args:
            category: one of `questions.CATEGORIES`, or "": the view it was saved with before stays (the page's own choice is
                empty again after it was loaded anew).
            patient: a code that holds the images of one patient together (`--group-column Patient`), or "".
            model: who answered.

        Returns:
            How many images the sheet then has.

        Raises:
            Refusal: 507 if it cannot be written, 409 if what lies there is no sheet of this form. Nothing has changed then.
        """
        name = image.sha256[:16] + image.suffix
        try:
            with self._alone():
                book = self._book()
                before = view_of(book.worksheets[0], name)
                view = category if category in CATEGORIES else before or UNSORTED
                with self._image(self.images / view / name, image.data):
                    self._put(book.worksheets[0], name, view, patient, marks)
                    for mark in marks:
                        folder_sheet.add_row(book.worksheets[1], self._log_row(name, model, mark))
                    with files.replacing(self.path) as part:
                        book.save(part)
                if before not in (None, view):
                    (self.images / before / name).unlink(missing_ok=True)
                return book.worksheets[0].max_row - 1
        except OSError as fault:
            words = f"Your marks were not saved: {fault.strerror or fault} where the page keeps them. "
            raise Refusal(507, words + "They are still on this page: once there is room, save again.") from fault

    @contextlib.contextmanager
    def _alone(self):
        """Nobody else reads, changes and writes the sheet meanwhile."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.lock, open(self.folder / ".lock", "w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def _image(self, place: Path, data: bytes):
        """Keep the image if it is not there yet, and only if what comes next succeeds."""
        is_new = not place.exists()
        if is_new:
            with files.replacing(place) as part:
                part.write_bytes(data)
        try:
            yield
        except BaseException:
            if is_new:
                place.unlink(missing_ok=True)
            raise

    def _book(self):
        """The workbook as it lies there, or a new one. Raises `Refusal` (409) if it is none of this form."""
        from openpyxl import Workbook, load_workbook

        if not self.path.exists():
            book = Workbook()
            book.active.title = "Answers"
            folder_sheet.add_row(book.active, list(HEADER))
            book.active.freeze_panes = "E2"
            folder_sheet.add_row(book.create_sheet("Marks"), list(LOG_HEADER))
            return book
        try:
            book = load_workbook(self.path)
        except OSError:
            raise
        except Exception:  # a broken workbook fails anywhere in zip, XML or openpyxl, with any type
            book = None
        if book is None or len(book.worksheets) < 2 or tuple(cell.value for cell in book.worksheets[0][1]) != HEADER:
            words = f"Your marks were not saved: {self.path.name} on the page's disk is not the sheet that the page writes. "
            raise Refusal(409, words + "Whoever runs the page must move it away; then save again.")
        return book

    def _put(self, sheet, name: str, view: str, patient: str, marks: list[Mark]) -> None:
        """Write an image's row, a new one or over what was marked before."""
        row = row_of(sheet, name)
        if row is None:
            folder_sheet.add_row(sheet, ["", name, "complete", "", *[""] * len(QUESTIONS)])
            row = sheet.max_row
        folder_sheet.set_cell(sheet.cell(row, 1), view)
        if patient:
            folder_sheet.set_cell(sheet.cell(row, 4), patient)
        for mark in marks:
            column = FIRST_ANSWER + list(QUESTIONS).index(mark.question_id)
            folder_sheet.set_cell(sheet.cell(row, column), mark.annotation(self.variant))

    def _log_row(self, name: str, model: str, mark: Mark) -> list[str]:
        confidence = "" if mark.confidence is None else f"{mark.confidence:.4f}"
        verdict = "right" if mark.right else "wrong"
        return [records.now(), name, mark.question_id, model, mark.answer, confidence, verdict, mark.correction]


def row_of(sheet, name: str) -> int | None:
    """The number of an image's row in the first worksheet, counted from 1; ``None`` where it has none."""
    return next((row for row in range(2, sheet.max_row + 1) if sheet.cell(row, 2).value == name), None)


def view_of(sheet, name: str) -> str | None:
    """The folder an image lies in by its row. ``None`` without a row, or where somebody wrote another folder than the page's."""
    row = row_of(sheet, name)
    view = None if row is None else sheet.cell(row, 1).value
    return view if view in (*CATEGORIES, UNSORTED) else None


def marks_of(told: Mapping) -> list[Mark]:
    """Marks as the page sends them: ``{question id: {answer, verdict, correction, confidence}}``.

    Raises:
        Refusal: 400 if they are of any other form, or there are none.
    """
    made = []
    for question_id, mark in told.items():
        known = question_id in QUESTIONS and isinstance(mark, Mapping) and mark.get("verdict") in ("right", "wrong")
        texts = (mark.get("answer"), mark.get("correction", "")) if known else ()
        confidence = mark.get("confidence") if known else None
        if not known or not all(isinstance(text, str) for text in texts):
            raise Refusal(400, "A mark says of an answer to Q1 … Q8 that it is right or wrong, and what is right instead.")
        for what, text in zip(("An answer that is marked", "A correction"), texts, strict=True):
            if len(text) > LONGEST_TEXT:
                raise Refusal(400, f"{what} has at most {LONGEST_TEXT} characters, that of {question_id} has {len(text)}.")
        is_number = isinstance(confidence, int | float) and not isinstance(confidence, bool)
        if confidence is not None and not (is_number and 0 <= confidence <= 1):
            raise Refusal(400, "A confidence is a number from 0 to 1.")
        made.append(Mark(question_id, texts[0].strip(), mark["verdict"] == "right", texts[1].strip(), confidence))
    if not made:
        raise Refusal(400, "Nothing is marked yet: mark an answer right or wrong, then save.")
    return made
