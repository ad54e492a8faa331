"""Fill a sheet of form (a) with a model's answers to a folder of images, resumably: `inference.py --folder`.

Answers go to ``<out>.answers.jsonl`` as they come; the workbook is written from them at the end. Its rows carry the status
``answered``, never ``complete``: a model's answers become training data only after a person has read and released them.
"""

from __future__ import annotations

import argparse
import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rich.progress import Progress

from sonovqa import answers, chat, cli, endpoint_cost, files, images, predictions, prompt_variants, records
from sonovqa.cli import UserError
from sonovqa.engines import Engine, ImageRequest
from sonovqa.questions import QUESTIONS

HEADER = ("Folder Name", "Image Name", "Status", *(f"{q.id}: {q.title}" for q in QUESTIONS.values()))
NOT_UTF8 = "the name of the file or its folder is not UTF-8: rename it"
LONGEST_CELL = 32_767  # characters; Excel's limit
#: What no XML document may hold, lone surrogates among it. Source: XML 1.0, section 2.2, production Char.
_NOT_IN_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Found:
    """An image file: folder and name as the sheet has them, and what tells a changed file from the one asked about."""

    path: Path
    folder: str
    stamp: tuple[int, int]

    @property
    def image_id(self) -> str:
        return f"{self.folder}/{self.path.name}"

    @property
    def is_unnameable(self) -> bool:
        """Whether the name is no UTF-8: the sheet could not name the file, and nobody find it by its row (PEP 383)."""
        return any("\ud800" <= character <= "\udfff" for character in self.image_id)


def find_images(folder: Path) -> list[Found]:
    """All image files below ``folder`` by their suffix, in order of name; symbolic links to folders are not followed.

    A file's folder is its path below ``folder``; files directly in it take its own name. Where a folder inside has that name
    too, all are named from one level up (``scan`` and ``scan/scan``), so that no two files ever share an image id.

    Raises:
        UserError: if ``folder`` is not there or holds no image file.
    """
    if not folder.is_dir():
        raise UserError(f"--folder; no such folder; {folder}; a folder with images; check the path")
    own, found = folder.resolve().name, []
    for here, folders, names in os.walk(folder):
        folders.sort()
        inside = Path(here).relative_to(folder).as_posix()
        for name in sorted(names):
            path = Path(here) / name
            if path.suffix.lower() in images.SUFFIXES and not name.startswith("."):
                status = path.lstat()
                stamp = (status.st_size, status.st_mtime_ns)
                found.append(Found(path, own if inside == "." else inside, stamp))
    if not found:
        raise UserError(f"--folder; no image in it; {folder}; files ending in {', '.join(images.SUFFIXES)}; check the path")
    directly = any(image.path.parent == folder for image in found)
    if directly and any(image.folder == own for image in found if image.path.parent != folder):
        found = [image if image.path.parent == folder else replace(image, folder=f"{own}/{image.folder}") for image in found]
    return found


def fill(
    folder: Path, out: Path, engine: Engine, variant: str, max_new_tokens: int, context: str | None = None
) -> dict[str, int]:
    """Ask the eight questions about every image below ``folder`` and write ``out``; what is answered already is not asked again.

    Args:
        out: the workbook; ``<out>.answers.jsonl`` beside it keeps the answers.
        variant: a line of `prompt_variants.variants`.
        context: a line that belongs to every image, such as a pixel size.

    Returns:
        ``images``, ``answered`` and ``failed`` ones, and ``asked``, the questions put in this call.

    Raises:
        UserError: if ``out`` cannot be written to without losing something.
    """
    found, problems = find_images(folder), {}
    settings = settings_of(engine.name, variant, max_new_tokens, context)
    rows, journal = check_out(out, settings), journal_of(out)
    stamps, kept = {image.image_id: list(image.stamp) for image in found}, _kept(found, rows)
    asked = 0
    with predictions.Log(journal) as log, Progress(console=cli.stderr, transient=True) as bar:
        if not rows:
            log.append({"settings": settings})
        done = answered(found, rows)
        task = bar.add_task("answers", total=len(found) * len(QUESTIONS), completed=len(done))
        for reply in engine.answer(requests(found, done, variant, context, problems), max_new_tokens):
            key = reply.image_id, reply.question_id
            kept[key] = dict(zip(("image_id", "question_id"), key)) | {"prediction": reply.text, "error": reply.error}
            log.append(kept[key] | {"file": stamps[reply.image_id]})
            asked += 1
            bar.advance(task)
        table = [row_of(image, kept, problems, variant) for image in found]
        write_workbook(out, table, settings)
        log.append({"wrote": files.sha256(out.read_bytes())})
    full = sum(row[2] == "answered" for row in table)
    return {"images": len(found), "answered": full, "failed": len(found) - full, "asked": asked}


def check(args: argparse.Namespace) -> None:
    """Whether inference.py may ask and write: `endpoint_cost.consent` to what an endpoint elsewhere is still to be sent.

    Raises:
        UserError: as `find_images`, `check_out` and `consent` do.
    """
    found = find_images(args.folder)
    rows = check_out(args.out, settings_of(args.run, args.prompts, args.max_new_tokens, args.context))
    if args.endpoint:
        left = requests(found, answered(found, rows), args.prompts, args.context, {})
        endpoint_cost.consent(args, endpoint_cost.of_requests(left, args.max_new_tokens))


def answered(found: list[Found], rows: list[dict]) -> set[predictions.Key]:
    """The questions that the journal's ``rows`` (`check_out`) answer, of files that have not changed since."""
    return {key for key, row in _kept(found, rows).items() if row["error"] is None}


def _kept(found: list[Found], rows: list[dict]) -> dict[predictions.Key, dict]:
    stamps = {image.image_id: list(image.stamp) for image in found}
    return predictions.latest(row for row in rows if "image_id" in row and stamps.get(row["image_id"]) == row["file"])


def settings_of(name: str | None, variant: str, max_new_tokens: int, context: str | None) -> dict:
    """What changes an answer; without the engine's ``name`` where that is not known yet (``None``)."""
    engine = {"engine": name} if name is not None else {}
    return engine | {"prompt": variant, "max_new_tokens": max_new_tokens, "context": context}


def journal_of(out: Path) -> Path:
    """The file beside the workbook ``out`` that keeps its answers."""
    return out.with_name(out.name + ".answers.jsonl")


def check_out(out: Path, settings: dict) -> list[dict]:
    """The journal's rows, if going on with them loses nothing.

    Args:
        settings: of `settings_of`; what they leave out is not compared.

    Raises:
        UserError: if ``out`` is no ``.xlsx``, has no folder to lie in, was not written by this, was changed since, or was
            made with other settings.
    """
    if out.suffix.lower() != ".xlsx":
        raise UserError(f"--out; {out}; a name ending in .xlsx; such as --out answers.xlsx")
    home = next(folder for folder in out.absolute().parents if folder.exists())
    if out.is_dir() or not home.is_dir() or not os.access(home, os.W_OK | os.X_OK):
        what = f"{out} is a folder" if out.is_dir() else f"nothing can be written below {home}"
        raise UserError(f"--out; {what}; a file in a folder of yours; take another --out")
    rows = predictions.read(journal_of(out))
    before = next((row["settings"] for row in rows if "settings" in row), settings)
    if changed := ", ".join(f"{k} was {before.get(k)!r}" for k in settings if before.get(k) != settings[k]):
        raise UserError(f"{out} holds answers made otherwise: {changed}; take another --out, or delete {journal_of(out)}")
    wrote = [row["wrote"] for row in rows if "wrote" in row]
    if out.exists() and (not wrote or files.sha256(out.read_bytes()) != wrote[-1]):
        raise UserError(f"{out} was edited or was not made here, and would be overwritten; take another --out, or move it away")
    return rows


def requests(
    found: list[Found], done: set, variant: str, context: str | None, problems: dict[str, str]
) -> Iterator[ImageRequest]:
    """What is still to be asked; images that cannot be used go to ``problems`` (image id -> reason) instead."""
    for image in found:
        open_ = [q for q in QUESTIONS.values() if (image.image_id, q.id) not in done]
        if not open_:
            continue
        if problem := NOT_UTF8 if image.is_unnameable else images.check_image(image.path).problem:
            problems[image.image_id] = problem
            continue
        prompts = tuple((q.id, chat.prompt_for(q.id, "", variant)) for q in open_)
        yield ImageRequest(image.image_id, image.path.read_bytes(), context, prompts)


def row_of(image: Found, kept: dict, problems: dict[str, str], variant: str) -> list[str]:
    """One row of the sheet: every answer there is, and ``answered`` or the reason why some are missing."""
    cells, reasons = [], []
    for question_id in QUESTIONS:
        row = kept.get((image.image_id, question_id))
        cells.append(cell_of(question_id, row["prediction"], variant) if row and row["error"] is None else "")
        if row and row["error"] is not None:
            reasons.append(f"{question_id}: {row['error']}")
    if problem := problems.get(image.image_id):
        reasons = [problem]
    missing = cells.count("")
    status = "answered" if not missing else f"failed: {'; '.join(reasons) or f'no answer to {missing} questions'}"
    return [image.folder, image.path.name, status, *cells]


def cell_of(question_id: str, answer: str, variant: str) -> str:
    """An answer as the sheet's column, which knows nothing of the prompt, would be read: "No." to "Is this ultrasound normal?"
    is abnormal. What reads alike there stays as it was said; the journal keeps every answer so.
    """
    meant = prompt_variants.understood(question_id, chat.prompt_for(question_id, "", variant), answer)
    return answer if answers.label(question_id, answer) == answers.label(question_id, meant) else meant


def write_workbook(out: Path, table: list[list[str]], settings: dict) -> None:
    """Write the sheet, and beside it a worksheet that says who answered, when, and that it is for research only."""
    from openpyxl import Workbook
    from openpyxl.styles import Font

    book = Workbook()
    sheet, about = book.active, book.create_sheet("About")
    sheet.title = "Answers"
    for row in (list(HEADER), *table):
        add_row(sheet, row)
    sheet.freeze_panes = "D2"
    for cell in sheet[1]:
        cell.font = Font(bold=True)
    for column, width in zip("ABCDEFGHIJK", (22, 26, 14, *[34] * len(QUESTIONS)), strict=True):
        sheet.column_dimensions[column].width = width
    told = {**settings, "written": records.now(), "notice": cli.RESEARCH_NOTICE}
    told["status"] = "Rows are read back as annotations only after a person has set their status to complete."
    for name, value in told.items():
        add_row(about, [name, "" if value is None else str(value)])
    with files.replacing(out) as part:
        book.save(part)
    for torn in out.parent.glob(f".{glob.escape(out.name)}.*.part"):  # of runs that were killed while they wrote it
        torn.unlink(missing_ok=True)


def add_row(sheet, values: list[str]) -> int:
    """Append text cells; never a formula, whatever a model or a file name begins with.

    Returns:
        The row's number. To look for the last row instead (``max_row``) takes as long as the sheet has cells.
    """
    from openpyxl.cell import Cell

    cells = [Cell(sheet) for _ in values]
    for cell, value in zip(cells, values, strict=True):
        set_cell(cell, value)
    sheet.append(cells)
    return cells[0].row


def set_cell(cell, value: str) -> None:
    """Write text into a cell; never a formula."""
    cell.value = _NOT_IN_XML.sub("\ufffd", value)[:LONGEST_CELL]
    if cell.data_type == "f":
        cell.data_type = "s"
