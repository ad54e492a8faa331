"""Marks of the page's users, kept as a sheet that ``prepare_dataset.py sheet`` reads, beside a folder of the images.

What is saved goes to a journal first and from there into the workbook (`marks_book`), by a process of its own: writing a large
workbook takes seconds of computing, in which no answer would stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sonovqa import files, folder_sheet, marks_book
from sonovqa.cli import UserError
from sonovqa.marks_book import PATIENT as PATIENT
from sonovqa.page_guard import Refusal
from sonovqa.page_uploads import Upload
from sonovqa.questions import CATEGORIES, QUESTIONS

ROOT = Path(__file__).resolve().parents[1]
UNSORTED = "Unsorted"  # the folder of images whose view nobody named
VERDICTS = ("right", "wrong", "withdrawn")
LONGEST_TEXT = 8000  # characters of an answer or a correction
LONGEST_PATIENT = 64
REST = 9  # times as long as the workbook took to write it is then left alone, so that a tenth of a processor goes into it
SHORTEST_REST = 5.0  # seconds
QUIET = {"PYTHONPATH": str(ROOT), "NO_COLOR": "1"}


@dataclass(frozen=True)
class Mark:
    """What a person said of one answer.

    Attributes:
        question_id: ``Q1`` … ``Q8``.
        answer: the model's.
        right: whether it was found right.
        correction: what is right instead; "" where the person did not say.
        confidence: the model's, or ``None``.
        withdrawn: whether it takes a mark back that was saved before; nothing is known of the answer then.
        model: who answered; "": the one that serves now.
    """

    question_id: str
    answer: str
    right: bool
    correction: str = ""
    confidence: float | None = None
    withdrawn: bool = False
    model: str = ""

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`."""
        return VERDICTS[2] if self.withdrawn else VERDICTS[0] if self.right else VERDICTS[1]

    def annotation(self, variant: str) -> str:
        """What goes under the question's column; "" leaves the question without an answer."""
        if self.withdrawn:
            return ""
        return folder_sheet.cell_of(self.question_id, self.answer, variant) if self.right else self.correction


class MarksSheet:
    """``<folder>/marks.xlsx`` and ``<folder>/images/<view>/<hash>.<ending>``; safe to use from several threads and processes.

    Attributes:
        trouble: why the workbook could not be brought up to date the last time; ``None`` where it could.
    """

    def __init__(self, folder: Path, variant: str = "default"):
        self.folder, self.variant = folder, variant
        self.path, self.images = folder / "marks.xlsx", folder / "images"
        self.trouble: str | None = None

    def save(self, image: Upload, category: str, patient: str, marks: list[Mark], model: str) -> int:
        """Keep the marks on one image in the journal; a question marked before is marked anew.

        Args:
            category: one of `questions.CATEGORIES`, or "": the view it was saved with before stays (the page's own choice is
                empty again after it was loaded anew).
            patient: a code that holds the images of one patient together (`--group-column Patient`), or "".
            model: who answered where a mark does not say.

        Returns:
            How many marked images there then are.

        Raises:
            Refusal: 507 if it cannot be written, 409 if what lies there is no sheet of this form. Nothing has changed then.
        """
        name = image.sha256[:16] + image.suffix
        try:
            files.make_folder(self.folder)
            marks_book.check_form(self.path)  # not under the lock: where the workbook is new it takes a while
            with marks_book.locked(marks_book.journal_lock(self.path)):
                before = [view for view in (*CATEGORIES, UNSORTED) if (self.images / view / name).exists()]
                view = category if category in CATEGORIES else next(iter(before), UNSORTED)
                with self._image(self.images / view / name, image.data):
                    marks_book.append(self.path, self._entry(name, view, patient, marks, model))
                for other in before:
                    if other != view:
                        (self.images / other / name).unlink(missing_ok=True)
                return sum(not path.name.startswith(".") for path in self.images.glob("*/*"))
        except UserError as fault:
            words = f"Your marks were not saved: {self.path.name} on the page's disk is not the sheet that the page writes. "
            raise Refusal(409, words + "Whoever runs the page must move it away; then save again.") from fault
        except OSError as fault:
            words = f"Your marks were not saved: {fault.strerror or fault} where the page keeps them. "
            raise Refusal(507, words + "They are still on this page: once there is room, save again.") from fault

    @contextlib.contextmanager
    def _image(self, place: Path, data: bytes):
        """Keep the image if it is not there yet, and only if what comes next succeeds. It is on the disk before that.

        The folders' names too: a line of the journal that outlives a power cut while its image does not is of no use. They are
        synced again for an image that was there, whose process may have died before it came to that.
        """
        is_new = not place.exists()
        try:
            if is_new:
                with files.replacing(place) as part:
                    part.write_bytes(data)
            for folder in (place.parent, self.images, self.folder):
                files.sync_folder(folder)
            yield
        except BaseException:
            if is_new:
                place.unlink(missing_ok=True)
            raise

    def _entry(self, name: str, view: str, patient: str, marks: list[Mark], model: str) -> dict:
        """A line of the journal (`marks_book.append`). Its id tells it from all others; in a burst a time does not."""
        now, log, own_id = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"), [], secrets.token_hex(8)
        for mark in marks:
            confidence = "" if mark.confidence is None else f"{mark.confidence:.4f}"
            told = [mark.model or model, mark.answer, confidence, mark.verdict, mark.correction]
            log.append([now, name, mark.question_id, *told, own_id])
        answers = {mark.question_id: mark.annotation(self.variant) for mark in marks}
        return {"id": own_id, "image": name, "view": view, "patient": patient, "answers": answers, "log": log}

    def write(self) -> None:
        """Bring the workbook up to date, in another process; `trouble` says why where that cannot be done."""
        before = self.trouble
        try:
            self.trouble = self._written()[:500] or None
        except (OSError, UserError) as fault:  # a disk that is away for a moment, no memory for another process
            self.trouble = str(fault)[:500] or type(fault).__name__
        if self.trouble and self.trouble != before:
            print(f"marks are kept, but not in the sheet yet: {self.trouble}", file=sys.stderr, flush=True)

    def _written(self) -> str:
        """Bring the workbook up to date where it is not; "", or what went wrong."""
        if not marks_book.is_behind(self.path):
            return ""
        marks_book.check_closed(self.path)  # here as well: it may be open all day, and a process to find that out costs a second
        words = [sys.executable, "-m", "sonovqa.marks_book", str(self.path.absolute())]
        done = subprocess.run(  # a session of its own: Ctrl-C in the page's terminal leaves the workbook to be finished
            words, cwd=ROOT, env=os.environ | QUIET, stdin=subprocess.DEVNULL, capture_output=True, start_new_session=True
        )
        if done.returncode == 0:
            marks_book.check_form(self.path)  # here, so that nobody who saves has to wait for it
            return ""
        lines = done.stderr.decode(errors="replace").splitlines() or [f"status {done.returncode}"]
        return next((line for line in lines if line.startswith("error:")), lines[-1])

    async def follow(self) -> None:
        """Keep the workbook up to date until cancelled, with rests that grow with it; no fault ends it."""
        while True:
            began = time.monotonic()
            try:
                await asyncio.to_thread(self.write)
            except (OSError, RuntimeError) as fault:  # nobody reads what the page prints; no thread is to be had
                self.trouble = str(fault)[:500] or type(fault).__name__
            await asyncio.sleep(max(SHORTEST_REST, REST * (time.monotonic() - began)))


def marks_of(told: Mapping) -> list[Mark]:
    """Marks as the page sends them: ``{question id: {answer, verdict, correction, confidence}}``.

    Raises:
        Refusal: 400 if they are of any other form, or there are none.
    """
    made = []
    for question_id, mark in told.items():
        known = question_id in QUESTIONS and isinstance(mark, Mapping) and mark.get("verdict") in VERDICTS
        texts = (mark.get("answer"), mark.get("correction", ""), mark.get("model", "")) if known else ()
        confidence = mark.get("confidence") if known else None
        if not known or not all(isinstance(text, str) for text in texts):
            raise Refusal(400, "A mark says of an answer to Q1 … Q8 that it is right or wrong, and what is right instead.")
        for what, text in zip(("An answer that is marked", "A correction", "A model's name"), texts, strict=True):
            if len(text) > LONGEST_TEXT:
                raise Refusal(400, f"{what} has at most {LONGEST_TEXT} characters, that of {question_id} has {len(text)}.")
        is_number = isinstance(confidence, int | float) and not isinstance(confidence, bool)
        if confidence is not None and not (is_number and 0 <= confidence <= 1):
            raise Refusal(400, "A confidence is a number from 0 to 1.")
        right, withdrawn = mark["verdict"] == VERDICTS[0], mark["verdict"] == VERDICTS[2]
        made.append(Mark(question_id, texts[0].strip(), right, texts[1].strip(), confidence, withdrawn, texts[2].strip()))
    if not made:
        raise Refusal(400, "Nothing is marked yet: mark an answer right or wrong, then save.")
    return made
