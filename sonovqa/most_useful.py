"""Which unannotated images to label next: those whose closed questions the model is least sure of, spread over categories.

Source: least-confidence sampling (Lewis & Gale, 1994; Settles, Active learning literature survey, 2009, section 3.1), the
mean over the closed questions; dealt to categories in turn, so that one hard category does not take all places.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from sonovqa import asking, calibration, chat, confidence, files, images, predictions, text_only
from sonovqa.cli import UserError
from sonovqa.engines import LabelRequest
from sonovqa.folder_sheet import Found, find_images

SHOWN = 10


def unannotated(folder: Path, splits: Mapping) -> list[Found]:
    """The images below ``folder`` that are in no split, by name and by bytes.

    Args:
        splits: the data set's splits, images not decoded.

    Raises:
        UserError: if there is no such image.
    """
    if any(text_only.has_no_images(split) for split in splits.values()):
        raise UserError("--most-useful is of images; --data holds texts; leave it out")
    names = {image_id for split in splits.values() for image_id in split["image_id"]}
    known = {hashlib.sha256(asking.image_bytes(split, row)).digest() for split in splits.values() for row in range(len(split))}
    found = [image for image in find_images(folder) if image.image_id not in names]
    found = [image for image in found if hashlib.sha256(image.path.read_bytes()).digest() not in known]
    if not found:
        raise UserError(f"--images; every image is in the data set; {folder}; a folder with unannotated ones; name another")
    return found


def rank(engine: Callable, found: list[Found], labels: confidence.Labels, variant: str, path: Path) -> list[dict]:
    """Weigh the closed questions of all images and deal them out, the most useful first.

    Args:
        engine: gives ``(engine, seconds it took to load)``; called only if there is something to weigh.
        variant: name of the prompt variant.
        path: a .jsonl that keeps what was weighed, so that a stopped run goes on.

    Returns:
        ``{image_id, category, confidence, <question id>: (likeliest label, probability)}``.
    """
    done = confidence.read(path)
    wanted = {(image.image_id, q): labels.of_id(q) for image in found for q in confidence.CLOSED}
    open_ = {key: wordings for key, wordings in wanted.items() if key not in done}
    if open_:
        confidence.weigh(confidence.engine_of(engine()[0]), _requests(found, open_, variant), open_, path)
    done = confidence.read(path)
    rows = []
    for image in found:
        told = {q: calibration.likeliest_of(done[image.image_id, q]) for q in confidence.CLOSED if (image.image_id, q) in done}
        if told:
            sure = sum(chance for _, chance in told.values()) / len(told)
            rows.append({"image_id": image.image_id, "category": image.folder.split("/")[0], "confidence": sure, **told})
    return dealt(rows)


def dealt(rows: Iterable[dict]) -> list[dict]:
    """Rows in turns over categories, in each the least confident first; the category with the least confident one begins."""
    piles: dict[str, list[dict]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (row["confidence"], row["image_id"])):
        piles[row["category"]].append(row)
    turns = sorted((at, row["confidence"], row["image_id"], row) for pile in piles.values() for at, row in enumerate(pile))
    return [row for *_, row in turns]


def _requests(found: list[Found], open_: Mapping[predictions.Key, confidence.Wordings], variant: str) -> Iterator[LabelRequest]:
    for image in found:
        asked = [q for q in confidence.CLOSED if (image.image_id, q) in open_]
        if asked and not images.check_image(image.path).problem:
            prompts = ((q, chat.prompt_for(q, "", variant), confidence.texts_of(open_[image.image_id, q])) for q in asked)
            yield LabelRequest(image.image_id, image.path.read_bytes(), None, tuple(prompts))


def write(path: Path, rows: list[dict]) -> None:
    """A CSV with one row an image: folder and name as the annotation sheet has them, and what the model takes it for."""
    stream = io.StringIO()
    table = csv.writer(stream, lineterminator="\n")
    told = [name for q in confidence.CLOSED for name in (f"{q} likeliest", f"{q} probability")]
    table.writerow(["Folder Name", "Image Name", "mean confidence", *told])
    for row in rows:
        folder, _, name = row["image_id"].rpartition("/")
        cells = [cell for q in confidence.CLOSED for cell in row.get(q, ("", ""))]
        table.writerow([folder, name, f"{row['confidence']:.4f}", *(f"{c:.4f}" if isinstance(c, float) else c for c in cells)])
    files.write_text(path, stream.getvalue())


def show(rows: list[dict], path: Path, console: Console) -> None:
    """Print the first few and where all are."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title="Label next", title_justify="left")
    for name in ("image", "confidence", "least sure of"):
        table.add_column(name, justify="right" if name == "confidence" else "left")
    for row in rows[:SHOWN]:
        question, (label, chance) = min(((q, row[q]) for q in confidence.CLOSED if q in row), key=lambda entry: entry[1][1])
        table.add_row(row["image_id"], f"{row['confidence']:.2f}", f"{question} ({label}, {chance:.2f})")
    console.print(table)
    console.print(f"{len(rows)} images to label next: {path}", soft_wrap=True)
