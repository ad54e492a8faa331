"""The stored data set on disk: written as rows stream by, whole or not there at all, and opened again."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from sonovqa.cli import UserError
from sonovqa.files import read_json, replacing_folder, write_json
from sonovqa.questions import TEXT_LABEL
from sonovqa.rows import Row, fingerprint
from sonovqa.splits import SPLITS, subset_order

ROWS_AT_ONCE = 32  # rows of an Arrow batch held in memory: about 10 MB of images


def features(with_context: bool):
    """The stored columns as `datasets.Features`."""
    from datasets import Features, Image, Value

    text = Value("string")
    entry = dict.fromkeys(("question_id", "question", "answer", "label", "answer_type"), text)
    columns = {"image": Image(), "image_id": text, "group": text, "category": text}
    return Features({**columns, **({"context": text} if with_context else {}), "questions": [entry]})


def store(out: Path, rows: list[Row], about: dict, advance: Callable[[int], None] = lambda count: None) -> None:
    """Write a `DatasetDict` that `datasets.load_from_disk` opens, and ``dataset.json``; the folder appears whole or not at all.

    Images are stored as their files' bytes. Memory holds a few dozen rows at a time.

    Args:
        out: folder to make, or a data set to replace.
        rows: every row with its ``split``.
        about: content of ``dataset.json``.
        advance: told how many more images are written.

    Raises:
        UserError: the disk is too small, or an image changed meanwhile.
    """
    need = sum(row.checked.size for row in rows) * 1.05 + (1 << 20)
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if need > free:
        raise UserError(
            f"the disk is too small; {out.parent} has {free / 1e9:.2f} GB free; {need / 1e9:.2f} GB are needed; "
            "make room, choose another --out, or fewer images with --max-images"
        )
    columns = features(any(row.record.context for row in rows))
    with replacing_folder(out) as part:
        for index, name in enumerate(SPLITS):
            _write_split(part / name, name, [row for row in rows if row.split == index], columns, advance)
        write_json(part / "dataset_dict.json", {"splits": list(SPLITS)})
        write_json(part / "dataset.json", about)


def _write_split(folder: Path, name: str, rows: list[Row], columns, advance: Callable[[int], None]) -> None:
    """One split in the layout of `Dataset.save_to_disk` (datasets 4), without the copy that loading all rows first costs."""
    from datasets import DatasetInfo
    from datasets.arrow_writer import ArrowWriter

    folder.mkdir()
    data = folder / "data-00000-of-00001.arrow"
    with ArrowWriter(features=columns, path=str(data), writer_batch_size=ROWS_AT_ONCE) as writer:
        for row in rows:
            writer.write(_stored(row, "context" in columns))
            advance(1)
        writer.finalize()
    DatasetInfo(features=columns).write_to_directory(str(folder))
    state = {"_data_files": [{"filename": data.name}], "_fingerprint": fingerprint(rows)[:16], "_split": name}
    state |= {"_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False}
    write_json(folder / "state.json", state)


def _stored(row: Row, with_context: bool) -> dict:
    record = row.record
    image = None  # of a text
    if record.path is not None:
        data = record.path.read_bytes()
        if hashlib.sha256(data).hexdigest() != row.checked.sha256:
            raise UserError(
                f"an image changed while it was read; {record.path}; files that stay as they are; run the command again"
            )
        image = {"bytes": data, "path": record.path.name}
    stored = {"image": image, "image_id": record.image_id, "group": row.group}
    stored |= {"category": record.category, "questions": row.questions}
    return {**stored, "context": record.context} if with_context else stored


@contextlib.contextmanager
def claimed(out: Path) -> Iterator[Path]:
    """Hold ``out`` for one run; clear away what killed runs left half written, and put back a set they were replacing.

    Yields:
        The journal of checked images, which outlives an interrupted run.

    Raises:
        UserError: another run holds it, or ``out`` is something else than a data set.
    """
    check_output(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    # The lock file stays: unlinked, a run that has it open would hold the old file while a third one locks a new one.
    with open(out.with_name(f".{out.name}.lock"), "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another run is making this data set; {out}; one run at a time; wait, or choose another --out"
            ) from None
        _clear_away(out)
        yield out.with_name(f".{out.name}.checked.jsonl")


def _clear_away(out: Path) -> None:
    """Undo what a killed `replacing_folder` left: the old set under another name, new ones half written."""
    for old in out.parent.glob(f".{glob.escape(out.name)}.*.part.old"):
        if not out.exists():
            os.replace(old, out)
    for stale in out.parent.glob(f".{glob.escape(out.name)}.*.part*"):
        shutil.rmtree(stale, ignore_errors=True)


def check_output(out: Path) -> None:
    """Refuse to replace anything but a data set: a mistyped ``--out`` must not cost a folder of images.

    Raises:
        UserError: ``out`` exists, is not empty and is no stored data set.
    """
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if out.is_symlink() or (out.exists() and not out.is_dir()) or not above.is_dir():
        raise UserError(f"--out is no folder; {out}; a new folder, or a data set to replace; choose another --out")
    if out.is_dir() and any(out.iterdir()) and not (out / "dataset.json").is_file():
        raise UserError(
            f"--out holds something else than a data set; {out}; a new folder, or a data set to replace; choose another"
        )


def check_source(out: Path, kind: str, files: Iterable[Path] = ()) -> None:
    """Refuse to replace a data set by one of another source: two clinics' sheets have the same ``--out`` where none is given.

    Args:
        kind: of source, as ``dataset.json`` names it.
        files: sheets or tables and the folder of images that are about to be read; one in common makes it the same source.

    Raises:
        UserError: what lies at ``out`` was made from something else.
    """
    try:
        told = about(out).get("source") or {}
    except UserError:  # none, or one that nobody can read: nothing is lost with it
        return
    kept = [*told.get("sheets", ()), *told.get("tables", ()), *([told["images"]] if isinstance(told.get("images"), str) else [])]
    wanted = {Path(file).resolve() for file in files}
    same = not (kept and wanted) or any(Path(file).resolve() in wanted for file in kept)
    if told.get("kind") not in (None, kind) or not same:
        what = f"{told['kind']}{', ' + ', '.join(kept) if kept else ''}"
        raise UserError(
            f"--out holds a data set of another source; {out}: {what}; a new folder, or a set of the same source; "
            f"choose another --out, or remove {out}"
        )


def about(path: Path) -> dict:
    """The content of ``dataset.json`` in the data set's folder ``path``; its ``fingerprint`` is there and is a text.

    Raises:
        UserError: there is no data set at ``path``, or its ``dataset.json`` is damaged.
    """
    file = path / "dataset.json"
    if not file.is_file():
        raise _absent(path)
    try:
        told = read_json(file)
    except ValueError as fault:  # UnicodeDecodeError and json.JSONDecodeError are both
        raise _damaged(file, f"no JSON: {fault}") from None
    if not isinstance(told, dict) or not isinstance(told.get("fingerprint"), str):
        raise _damaged(file, "it lacks the fingerprint")
    return told


def load(path: Path):
    """Open a stored data set as a `DatasetDict`, with images left as bytes until they are used.

    Raises:
        UserError: there is none at ``path``, or it cannot be read.
    """
    import datasets

    if not (path / "dataset_dict.json").is_file():
        raise _absent(path)
    try:
        return datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as fault:
        what = " ".join(str(fault).split())[:120]
        raise _damaged(path, what) from None


def _absent(path: Path) -> UserError:
    return UserError(f"no data set there; {path}; a folder made by prepare_dataset.py; run `prepare_dataset.py … --out {path}`")


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"the data set cannot be read; {path}: {what}; make it anew with prepare_dataset.py")


def load_undecoded(path: Path):
    """The same, each image a dictionary ``{bytes, path}``: the file's own bytes, for those who decode in their own time."""
    import datasets

    return load(path).cast_column("image", datasets.Image(decode=False))


def trained_on(arguments: Mapping):
    """The splits of a run, images not decoded, with its training rows numbered as train.py numbered them.

    Args:
        arguments: of its run.json or plan.json.
    """
    splits = load_undecoded(Path(arguments["data"]))
    if arguments.get("max_images"):
        splits["train"] = subset(splits["train"], arguments["max_images"], arguments["seed"])
    return splits


def subset(split, count: int, seed: int):
    """``count`` rows of a split, spread over categories and normality (of texts labels), never its head; all if there are fewer.

    Source: `splits.subset_order`.
    """
    normality = [next((q["label"] for q in row if q["question_id"] in ("Q7", TEXT_LABEL)), "") for row in split["questions"]]
    order = subset_order(split["image_id"], list(zip(split["category"], normality, strict=True)), seed)
    return split.select(sorted(order[:count]))
