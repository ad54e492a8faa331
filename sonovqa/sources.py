"""One function a data set: each turns files into `Record`s, one an image, and says what it left out and why."""

from __future__ import annotations

import csv
import glob
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from sonovqa import answers, marks_book
from sonovqa.cli import UserError, check
from sonovqa.files import sha256, write_json
from sonovqa.images import ImageFolder, NotFoundError
from sonovqa.questions import QUESTIONS
from sonovqa.sheets import PATIENT_CELL, Drops, SheetRow, read_sheet


@dataclass
class Record:
    """One image with all its questions, before its file has been looked at.

    Attributes:
        image_id: ``<folder>/<file>``.
        path: the image's file; ``None``: the row is a text (`csv_text`).
        group: the patient, or "" where nobody said.
        questions: dictionaries ``{question_id, question, answer, answer_type}`` with the answer as written.
        context: a line that belongs to the image, or "".
        split: the split that the data set's makers gave it, or "".
        place: the row of the sheet it comes from, or "".
    """

    image_id: str
    path: Path | None
    category: str
    group: str
    questions: list[dict]
    context: str = ""
    split: str = ""
    place: str = ""


@dataclass
class Loaded:
    """What a source gives: records, what it dropped (reason -> items), what it read, and remarks for the reader."""

    records: list[Record]
    drops: Drops
    about: dict
    notes: list[str] = field(default_factory=list)


def question(question_id: str, answer: str, text: str | None = None, answer_type: str = "") -> dict:
    """One entry of a record's ``questions``; the text of Q1 … Q8 is their default prompt."""
    text = QUESTIONS[question_id].prompts["default"] if text is None else text
    return {"question_id": question_id, "question": text, "answer": answer, "answer_type": answer_type}


def sheet(workbooks: list[Path], images: Path, group_column: str | None = None, group_regex: str | None = None) -> Loaded:
    """The real case: annotation sheets of either form beside folders of images (issue 2).

    Args:
        workbooks: .xlsx or .csv files.
        images: root of the folders of images.
        group_column: column that names the patient.
        group_regex: pattern searched in the file name; its first group (or all it matches) names the patient.

    Raises:
        UserError: a sheet cannot be read, the root is missing, no row is left, or nobody's patient is known though asked for.
    """
    pattern = _compiled(group_regex)
    folder, drops, rows, problems = ImageFolder(images), {}, [], []
    for workbook in workbooks:
        if workbook.name.startswith("~$"):
            drops.setdefault("a spreadsheet program's lock file", []).append(str(workbook))
            continue
        try:
            marks_book.bring_up_to_date(workbook)  # the page's marks are saved before they stand in its workbook
            rows += read_sheet(workbook, drops, group_column)
        except UserError as mistake:
            problems.append(str(mistake))
    check(problems)
    records, missing = _locate(rows, folder, pattern, drops)
    respelt = _unify_patients(records)
    loaded = Loaded(_merge_duplicates(records, drops), drops, {"kind": "sheet", "images": str(images)})
    loaded.about["sheets"] = {str(path): sha256(path.read_bytes()) for path in workbooks if not path.name.startswith("~$")}
    if respelt:
        loaded.notes.append(f"patients spelt in several ways are one each: {', '.join(respelt)}")
    if missing:
        loaded.notes.append(f"{missing} images have no patient: near-duplicates among them share a group instead")
    if group_column is None and group_regex is None:
        loaded.notes.append("nobody's patient is named: near-duplicates share a group, but other images of a patient may stand "
                            "in training and test alike; name patients with --group-column or --group-regex")  # fmt: skip
    need_records(loaded, f"{', '.join(map(str, workbooks))} with --images {images}")
    _need_patients(loaded, group_column, group_regex)
    return loaded


def _need_patients(loaded: Loaded, group_column: str | None, group_regex: str | None) -> None:
    """Whoever names patients and gets none would have every image as its own group, and patients in train and test alike."""
    if any(record.group for record in loaded.records):
        return
    if group_regex is not None:
        raise UserError(
            f"--group-regex matches no file name; {group_regex}; a pattern such as '(P[0-9]+)_'; "
            f"the first file is {Path(loaded.records[0].image_id).name}"
        )
    if group_column is not None:
        unread = {reason: items for reason, items in loaded.drops.items() if reason.startswith(PATIENT_CELL)}
        raise UserError(
            f"--group-column names no patient; {group_column}: {left_out(unread) or 'every cell is empty'}; a column with each "
            "patient's name or number as text; mend the sheet, name another column, or leave --group-column out"
        )


def _unify_patients(records: list[Record]) -> list[str]:
    """Give a patient one spelling where only case differs; return those spelt in several ways, such as ``P1 = p1``."""
    spelt: dict[str, set[str]] = {}
    for record in records:
        record.group = record.group.strip()
        spelt.setdefault(record.group.casefold(), set()).add(record.group)
    for record in records:
        record.group = min(spelt[record.group.casefold()])  # the same whatever order the rows come in
    return sorted(" = ".join(sorted(names)) for names in spelt.values() if len(names) > 1)


def _compiled(group_regex: str | None) -> re.Pattern | None:
    try:
        return re.compile(group_regex) if group_regex is not None else None
    except re.error as fault:
        raise UserError(
            f"--group-regex is no regular expression; {group_regex}: {fault}; a pattern such as '(P[0-9]+)_'; mend it"
        ) from None


def _locate(rows: list[SheetRow], folder: ImageFolder, pattern: re.Pattern | None, drops: Drops) -> tuple[list, int]:
    """Records of the rows whose image is there, and how many of them lack the patient that others have."""
    records = []
    for row in rows:
        try:
            image_id, path = folder.find(row.folder, row.image)
        except NotFoundError as reason:
            drops.setdefault(str(reason), []).append(f"{row.place}: {row.folder}/{row.image}")
            continue
        found = pattern.search(path.name) if pattern else None
        group = (found[1] if pattern.groups else found[0]) if found else row.group
        asked = [question(question_id, answer) for question_id, answer in row.answers.items()]
        records.append(Record(image_id, path, image_id.split("/")[-2], group or "", asked, place=row.place))
    with_patient = sum(bool(record.group) for record in records)
    return records, (len(records) - with_patient if with_patient else 0)


def _merge_duplicates(records: list[Record], drops: Drops) -> list[Record]:
    """Rows of one image that agree become one row with all their answers; rows that contradict each other are all left out."""
    by_image: dict[str, list[Record]] = {}
    for record in records:
        by_image.setdefault(record.image_id, []).append(record)
    kept = []
    for image_id, (first, *others) in by_image.items():
        answered = {}
        for entry in (entry for record in (first, *others) for entry in record.questions):
            answered.setdefault(entry["question_id"], []).append(entry)
        differ = [question_id for question_id, entries in answered.items() if not _agree(question_id, entries)]
        patients = sorted({record.group for record in (first, *others)} - {""})
        if differ or len(patients) > 1:
            what = ", ".join(sorted(differ)) or "the patient"
            listed = drops.setdefault("rows of one image contradict each other: none is used", [])
            listed += [f"{record.place}: {image_id}, {what}" for record in (first, *others)]
            continue
        if others:
            listed = drops.setdefault("rows of one image agree: merged into one", [])
            listed += [f"{record.place}: {image_id}" for record in others]
        first.questions = [entries[0] for entries in answered.values()]
        first.group = "".join(patients)
        kept.append(first)
    return kept


def _agree(question_id: str, entries: list[dict]) -> bool:
    return len({answers.normalise(question_id, entry["answer"]).casefold() for entry in entries}) == 1


def need_records(loaded: Loaded, where: str) -> None:
    """Raise a `UserError` with the commonest reasons if a source gave no record at all."""
    if not loaded.records:
        reasons = left_out(loaded.drops) or "no rows"
        raise UserError(f"no usable row is left; {where}; {reasons}; mend the sheet or the image folder")


def left_out(drops: Drops) -> str:
    """The three commonest reasons of ``drops`` with an example each, in words for an error; "" if nothing was dropped."""
    worst = sorted(drops.items(), key=lambda item: -len(item[1]))[:3]
    return "; ".join(f"{len(items)} x {reason} (such as {items[0]})" for reason, items in worst)


def claim_folder(folder: Path, marker: str, about: dict | None = None) -> None:
    """Make sure that a folder to write into is new, empty or our own: nobody's files are ever overwritten.

    Args:
        folder: where a source draws or unpacks its images.
        marker: file that tells that such a source made the folder.
        about: content of the marker, written if it is not there yet; ``None`` where the source writes its own.

    Raises:
        UserError: ``folder`` is no folder, or holds something without the marker.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"the source's files have no place; {folder} is no folder; a new one; rename it or choose another --out")
    if (folder / marker).is_file():
        return
    leftover = f".{glob.escape(marker)}.*.part"  # of a run killed while it wrote the marker
    found = next((path for path in folder.iterdir() if not path.match(leftover)), None) if folder.is_dir() else None
    if found is not None:
        raise UserError(
            f"the source's files would go into somebody else's folder; {folder} holds {found.name} but no {marker}; "
            "a new folder, or one of an earlier run; choose another --out, or move it away"
        )
    if about is not None:
        write_json(folder / marker, about)


def phantoms(root: Path, **options) -> Loaded:
    """Synthetic ultrasound with a sheet in form (a), drawn under ``root`` and read back like any other sheet (issue 2).

    Args:
        root: where images and sheet go; what an interrupted run has drawn there is kept.
        **options: of `sonovqa.phantoms.write_phantoms`.

    Raises:
        UserError: an argument is out of range, or ``root`` is somebody else's folder.
    """
    from sonovqa.phantoms import write_phantoms

    claim_folder(root, "phantoms.json")
    workbook = write_phantoms(root, **options)
    loaded = sheet([workbook], root / "images", group_column="Patient")
    loaded.about |= {"kind": "phantoms", "drawn": options}
    return loaded


#: Bins of the gestational age in whole weeks, upper bounds excluded (issue 5); the last one is open.
WEEK_BINS = ((8, 13), (13, 15), (15, 20), (20, 25), (25, 30), (30, 35), (35, 38))


def weeks_from_hc(hc_mm: float) -> float:
    """Gestational age in weeks from the head circumference in mm.

    Source: Hadlock FP, Deter RL, Harrist RB, Park SK. Estimating fetal age: computer-assisted analysis of multiple fetal
    growth parameters. Radiology 1984;152:497-501. GA = 8.96 + 0.540 HC + 0.0003 HC^3, HC in cm.
    """
    hc = hc_mm / 10
    return 8.96 + 0.540 * hc + 0.0003 * hc**3


def week_interval(weeks: float) -> str:
    """The answer to Q5 that holds ``weeks``, such as ``20-25 weeks``; below 8 weeks it is the lowest one."""
    return next((f"{low}-{high} weeks" for low, high in WEEK_BINS if weeks < high), "38+ weeks")


def hc18(root: Path, context: bool = True) -> Loaded:
    """HC18: real fetal heads with their circumference (van den Heuvel et al. 2018, Zenodo 1327317, CC BY 4.0).

    Q4 is the circumference in mm, Q5 the week interval by `weeks_from_hc`; Q1 and Q3 are the same for every image, as is
    the category. The subject is the part of the file name before the first ``_``.

    Args:
        root: folder with ``training_set/`` and ``training_set_pixel_size_and_HC.csv``.
        context: carry the pixel size in mm; without it millimetres cannot be read from the image.

    Raises:
        UserError: files or columns are missing.
    """
    table = root / "training_set_pixel_size_and_HC.csv"
    rows = _csv_rows(table, ("filename", "pixel size(mm)", "head circumference (mm)"), "hc18 --root")
    folder, drops, records = ImageFolder(root), {}, []
    for number, row in enumerate(rows, 2):
        name = row["filename"].strip()
        try:
            pixel, hc = (float(row[key]) for key in ("pixel size(mm)", "head circumference (mm)"))
            image_id, path = folder.find("training_set", name)
        except (ValueError, NotFoundError) as fault:
            reason = str(fault) if isinstance(fault, NotFoundError) else "pixel size or circumference is no number"
            drops.setdefault(reason, []).append(f"{table.name} row {number}: {name}")
            continue
        asked = [
            question("Q1", "Fetal head"),
            question("Q3", "Axial"),
            question("Q4", f"HC {hc:.1f} mm"),
            question("Q5", week_interval(weeks_from_hc(hc))),
        ]
        line = f"Pixel size: {pixel:.4f} mm" if context else ""
        records.append(Record(image_id, path, "Head", name.split("_")[0], asked, line))
    loaded = Loaded(records, drops, {"kind": "hc18", "root": str(root), "context": context, "licence": "CC BY 4.0"})
    need_records(loaded, str(table))
    return loaded


def _csv_rows(path: Path, columns: Iterable[str], flag: str) -> list[dict]:
    if not path.is_file():
        raise UserError(f"a file of the data set is missing; {path}; the unpacked release; mend {flag}")
    with open(path, encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        lacking = [name for name in columns if name not in (reader.fieldnames or ())]
        if lacking:
            raise UserError(f"columns are missing; {path} lacks {', '.join(lacking)}; the unpacked release; mend {flag}")
        return [{key: row.get(key) or "" for key in columns} for row in reader]
