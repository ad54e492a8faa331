"""Phantoms: synthetic fetal ultrasound of the 14 categories with the sheet that two annotators would have filled in.

An honest stand-in for the real case (issue 2): every answer follows from what is drawn, and position, scale, gain and
side vary independently of category. So gestational ages also occur where a real plane would not be used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from sonovqa import cli, files
from sonovqa.phantom_anatomy import RADIUS_CM
from sonovqa.phantom_answers import ANNOTATORS, answers_of, as_written
from sonovqa.phantom_drawing import Spec, draw
from sonovqa.questions import CATEGORIES, QUESTIONS

__all__ = ["Phantom", "Spec", "answers_of", "draw", "plan", "sample_spec", "write_phantoms"]

#: Share of images by quality, and the faults of each: (blur, gain) severities, one pair drawn at random.
QUALITY = {
    "good": (0.5, ((0, 0),)),
    "medium": (0.3, ((1, 0), (0, 1), (1, 1))),
    "low": (0.2, ((2, 0), (0, 2))),
}
BLUR = ((0.0, 0.002), (0.009, 0.011), (0.019, 0.022))  #: heights of the image, by severity
GAIN_DB = ((0.0, 2.0), (6.0, 7.0), (11.5, 13.0))  #: too much or too little, by severity
CENTRE, CENTRE_RANGE = (0.0, 0.53), (0.18, 0.04)  #: of the anatomy, heights of the image
UNFINISHED = ("pending", "in progress", "Pending ")  #: statuses of rows that nobody has completed


@dataclass(frozen=True)
class Phantom:
    """A row to be: ``name`` is ``<Category>/<Patient>_<k>.png``, ``status`` the sheet's."""

    name: str
    patient: str
    annotator: str
    status: str
    spec: Spec


def sample_spec(rng: np.random.Generator, category: str | None = None, **given) -> Spec:
    """Draw a specification; nothing that a category does not decide depends on it.

    Args:
        rng: source of randomness.
        category: unset: any of the 14 with equal chance.
        **given: fields of `Spec` to hold fixed; of those unset ``abnormal`` is False and ``weeks``, ``quality``, ``side``
            and ``presentation`` are drawn.

    Raises:
        KeyError: if ``weeks`` or ``quality`` is none of those known.
    """

    def pick(values: Sequence):
        return values[rng.integers(len(values))]

    known = {
        "category": category or pick(CATEGORIES),
        "abnormal": False,
        "side": pick(("left", "right")),
        "presentation": pick(("cephalic", "breech")),
        "weeks": pick(tuple(RADIUS_CM)),
        "quality": str(rng.choice(list(QUALITY), p=[share for share, _ in QUALITY.values()])),
        **given,
    }
    blur, gain = pick(QUALITY[known["quality"]][1])
    low, high = GAIN_DB[gain]
    drawn = {
        "radius_cm": RADIUS_CM[known["weeks"]] * rng.uniform(0.97, 1.03),
        "zoom": rng.uniform(0.98, 1.02),
        "centre": tuple(float(c + rng.uniform(-r, r)) for c, r in zip(CENTRE, CENTRE_RANGE, strict=True)),
        "tilt": rng.uniform(-5, 5),
        "pocket": float(pick((0, 180)) + rng.uniform(-25, 25)),
        "gain_db": pick((-1, 1)) * rng.uniform(low, high),
        "blur": rng.uniform(*BLUR[blur]),
        "seed": int(rng.integers(2**31)),
    }
    return Spec(**{**drawn, **known})


def plan(
    images: int, seed: int = 0, abnormal_rate: float = 0.05, categories: Sequence[str] = CATEGORIES, images_per_patient: int = 4
) -> list[Phantom]:
    """What `write_phantoms` draws, patient by patient: ``images`` completed rows, then one unfinished for every hundred.

    A patient's images share gestational age and presentation and show different categories. Abnormal images gather in
    affected patients (half of such a patient's images), so that intervals have to be clustered here too. Patient ``p`` is
    the same whatever the number of images.
    """
    affected = min(1.0, 2 * abnormal_rate)
    wanted, made, patient = images + max(2, images // 100), [], 0
    while len(made) < wanted:
        rng = np.random.default_rng([seed, patient])
        count = rng.integers(
            max(1, images_per_patient - images_per_patient // 2), images_per_patient + images_per_patient // 2 + 1
        )
        shared = {
            "weeks": tuple(RADIUS_CM)[rng.integers(len(RADIUS_CM))],
            "presentation": ("cephalic", "breech")[rng.integers(2)],
        }
        share = abnormal_rate / affected if affected and rng.random() < affected else 0.0
        order = np.concatenate([rng.permutation(len(categories)) for _ in range(-(-int(count) // len(categories)))])[:count]
        for k, index in enumerate(order):
            spec = sample_spec(rng, categories[index], abnormal=bool(rng.random() < share), **shared)
            key, row = f"P{patient:04d}", len(made)
            status = "complete" if row < images else UNFINISHED[row % len(UNFINISHED)]
            made.append(Phantom(f"{spec.category}/{key}_{k + 1}.png", key, ANNOTATORS[rng.integers(2)], status, spec))
        patient += 1
    return made[:wanted]


def write_phantoms(
    root: Path,
    images: int,
    seed: int = 0,
    abnormal_rate: float = 0.05,
    size: tuple[int, int] = (800, 600),
    categories: Sequence[str] = CATEGORIES,
    images_per_patient: int = 4,
    workers: int = 0,
) -> Path:
    """Draw phantoms and write their sheet in form (a).

    Below ``root``: ``images/<Category>/<Patient>_<k>.png`` (8-bit grey), ``phantoms.json`` (arguments, specification and
    true answers of each image), last ``annotations.xlsx``. An image that is there whole and of the same specification is
    not drawn again; one that an earlier call drew and this one does not want is removed.

    Args:
        root: where to write.
        images: completed rows; a few unfinished ones come on top.
        seed: decides everything; the number of workers decides nothing.
        abnormal_rate: share of abnormal images, 0 … 1.
        size: width and height of an image in pixels.
        categories: those to draw.
        images_per_patient: average; single patients have from half to one and a half times as many.
        workers: processes that draw beside this one; 0 draws here.

    Returns:
        The sheet's path.

    Raises:
        UserError: if an argument is out of range, or ``root`` holds somebody else's ``phantoms.json``.
    """
    _check(images, abnormal_rate, size, categories, images_per_patient)
    root, rows = Path(root), plan(images, seed, abnormal_rate, categories, images_per_patient)
    record = {
        "images": images,
        "seed": seed,
        "abnormal_rate": abnormal_rate,
        "size": list(size),
        "categories": list(categories),
        "images_per_patient": images_per_patient,
        "truth": {row.name: {**asdict(row), "answers": answers_of(row.spec)} for row in rows},
    }
    record = json.loads(json.dumps(record))  # as it will be read back: tuples are lists
    _drop_outdated(root, record)
    files.write_json(root / "phantoms.json", record)
    _draw_all([(root / "images" / row.name, row.spec, size) for row in rows if not _whole(root / "images" / row.name)], workers)
    return _write_sheet(root / "annotations.xlsx", rows, seed)


def _check(images: int, abnormal_rate: float, size: tuple[int, int], categories: Sequence[str], images_per_patient: int) -> None:
    unknown = [name for name in categories if name not in CATEGORIES]
    limits = "48 to 4000 pixels a side"
    wrong = {
        f"too few phantoms: {images}; 1 or more are drawn; pass --images 200": images < 1,
        f"no such share of abnormal images: {abnormal_rate}; 0 to 1; pass --abnormal-rate 0.05": not 0 <= abnormal_rate <= 1,
        f"no such image size: {size[0]}x{size[1]}; {limits}; pass --size 800x600": min(size) < 48 or max(size) > 4000,
        f"unknown categories: {', '.join(unknown) or 'none'}; allowed: {', '.join(CATEGORIES)}": bool(unknown) or not categories,
        f"too few images a patient: {images_per_patient}; 1 or more; pass --images-per-patient 4": images_per_patient < 1,
    }
    cli.check([problem for problem, found in wrong.items() if found])


def _drop_outdated(root: Path, record: dict) -> None:
    """Remove what an earlier call drew from another specification, before the record that tells so is replaced."""
    path = root / "phantoms.json"
    if not path.exists():
        return
    try:
        earlier = files.read_json(path)
        specs = {name: row["spec"] for name, row in earlier["truth"].items() if earlier["size"] == record["size"]}
    except (ValueError, KeyError, TypeError, AttributeError) as fault:
        message = f"not a record of phantoms; {path}; it is what an earlier call wrote; draw into another folder or delete {root}"
        raise cli.UserError(message) from fault
    for name in earlier["truth"]:
        if name not in specs or specs[name] != record["truth"].get(name, {}).get("spec"):
            (root / "images" / name).unlink(missing_ok=True)


def _whole(path: Path) -> bool:
    """Whether a PNG is there up to its last chunk."""
    try:
        with open(path, "rb") as stream:
            stream.seek(-12, 2)
            return stream.read()[4:8] == b"IEND"
    except OSError:  # absent, or shorter than a chunk
        return False


def _draw_one(task: tuple[Path, Spec, tuple[int, int]]) -> None:
    from PIL import Image

    path, spec, size = task
    with files.replacing(path) as part:
        Image.fromarray(draw(spec, size)).save(part, format="PNG", compress_level=3)


def _draw_all(tasks: list, workers: int) -> None:
    from rich.progress import track

    def shown(done: Iterable) -> None:
        for _ in track(done, "drawing phantoms", total=len(tasks), console=cli.stderr, transient=True):
            pass

    if not tasks:
        return
    if workers < 1:
        shown(map(_draw_one, tasks))
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:  # forked torch threads can deadlock
        shown(pool.map(_draw_one, tasks, chunksize=max(1, min(32, math.ceil(len(tasks) / workers / 4)))))


def _write_sheet(path: Path, rows: list[Phantom], seed: int) -> Path:
    """Write form (a), sorted by folder as people keep it: the head of the file is one anatomy."""
    from openpyxl import Workbook

    book = Workbook(write_only=True)
    sheet = book.create_sheet("annotations")
    sheet.append(["Folder Name", "Image Name", "Patient", "Status", *(f"{q.id}: {q.title}" for q in QUESTIONS.values())])
    for row in sorted(rows, key=lambda row: row.name):
        rng = np.random.default_rng([seed, row.spec.seed])
        answers = {q: as_written(q, text, row.annotator, rng) for q, text in answers_of(row.spec).items()}
        folder, name = row.name.split("/")
        cells = answers.values() if row.status == "complete" else [""] * len(answers)
        sheet.append([folder, name, row.patient, row.status, *cells])
    with files.replacing(path) as part, open(part, "wb") as stream:
        book.save(stream)
    return path
