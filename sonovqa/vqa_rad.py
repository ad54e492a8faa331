"""VQA-RAD (Lau et al., 2018, CC0-1.0): the original release in a folder, or the hub's copy, which lost names and types."""

from __future__ import annotations

import json
import re
from pathlib import Path

from sonovqa.cli import UserError
from sonovqa.hub_copies import image_file, parquet_rows
from sonovqa.images import ImageFolder, NotFoundError
from sonovqa.sheets import Drops, Unreadable, cell_text
from sonovqa.sources import Loaded, Record, need_records, question

HUB_ID = "flaviagiammarino/vqa-rad"
ANNOTATIONS, IMAGES = "VQA_RAD Dataset Public.json", "VQA_RAD Image Folder"


def vqa_rad(root: Path | None, extracted: Path, official: bool = False) -> Loaded:
    """Load VQA-RAD: one record an image, or with ``official`` one an image and split, since its split cuts images.

    No patient is known: images that are near-duplicates of each other share a group, any other is a group of its own.

    Args:
        root: folder with the original release, or with the hub copy's Parquet files; ``None`` fetches the hub's copy.
        extracted: where the hub copy's images are written as files.
        official: keep the makers' split by question.

    Raises:
        UserError: files are missing or unreadable, or the hub cannot be reached.
    """
    if root is not None and (root / ANNOTATIONS).is_file():
        return _original(root, official)
    folder = root if root is not None else _fetch()
    if not any(folder.rglob("*.parquet")):
        raise UserError(
            f"no VQA-RAD in this folder; {root}; `{ANNOTATIONS}` beside `{IMAGES}`, or the hub copy's Parquet files; mend --root"
        )
    return _hub_copy(folder, extracted, official)


def _original(root: Path, official: bool) -> Loaded:
    try:
        entries = json.loads((root / ANNOTATIONS).read_text(encoding="utf-8"))
        rows = [
            (entry["image_name"], entry["image_organ"], "test" if entry["phrase_type"].startswith("test") else "train", entry)
            for entry in entries
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as fault:
        raise UserError(
            f"the annotations cannot be read; {root / ANNOTATIONS}: {fault}; the original release; mend --root"
        ) from None
    folder, drops, records = ImageFolder(root), {}, {}
    for number, (name, organ, split, entry) in enumerate(rows):
        try:
            image_id, path = folder.find(IMAGES, str(name))
        except NotFoundError as reason:
            drops.setdefault(str(reason), []).append(f"{name}: question {entry.get('qid')}")
            continue
        text, answer, kind = (_text(entry.get(key)) for key in ("question", "answer", "answer_type"))
        asked = question(str(entry.get("qid", f"entry {number}")), answer, text, kind.casefold() or derived_type(text, answer))
        organ = _text(organ) or "unknown"
        _add(records, Record(image_id, path, organ, "", [], split=split if official else ""), asked, drops)
    loaded = Loaded(list(records.values()), drops, {"kind": "vqa-rad", "root": str(root), "licence": "CC0-1.0"})
    loaded.notes.append(official_leak([(name, split) for name, _, split, _ in rows]))
    need_records(loaded, str(root))
    return loaded


def _hub_copy(folder: Path, extracted: Path, official: bool) -> Loaded:
    """Rows of the hub's copy hold image, question and answer only: an image is told by its bytes, a type by the answer."""
    drops, records, told = {}, {}, []
    for number, (split, row) in enumerate(parquet_rows(folder, ("image", "question", "answer"))):
        path = image_file(row["image"], extracted)
        if path is None:
            drops.setdefault("a row without an image", []).append(f"row {number}")
            continue
        name, text, answer = path.name, _text(row["question"]), _text(row["answer"])
        told.append((name, split))
        asked = question(str(number), answer, text, derived_type(text, answer))
        _add(records, Record(f"images/{name}", path, "Radiology", "", [], split=split if official else ""), asked, drops)
    loaded = Loaded(list(records.values()), drops, {"kind": "vqa-rad", "root": str(folder), "licence": "CC0-1.0"})
    loaded.notes.append("the hub's copy has no image names and no answer types: grouped by the images' content, types derived")
    loaded.notes.append(official_leak(told))
    need_records(loaded, str(folder))
    return loaded


def official_leak(questions: list[tuple[str, str]]) -> str:
    """How far the makers' split leaks, in words, from one (image, split) a question."""
    trained = {image for image, split in questions if split == "train"}
    tested = [image for image, split in questions if split == "test"]
    leaked = [image for image in tested if image in trained]
    return (
        f"the official split leaks: {len(leaked)} of its {len(tested)} test questions, on {len(set(leaked))} of its "
        f"{len(set(tested))} test images, are about training images"
    )


def _add(records: dict, record: Record, asked: dict, drops: Drops) -> None:
    if asked["answer"] and asked["question"]:
        records.setdefault((record.image_id, record.split), record).questions.append(asked)
    else:
        drops.setdefault("a question without text or answer", []).append(f"{record.image_id}: {asked['question_id']}")


def derived_type(text: str, answer: str) -> str:
    """``closed`` if the answer is yes or no, or one of the choices that an "A or B" question names; else ``open``."""
    plain = answer.casefold().strip(" .")
    choice = " or " in text.casefold() and re.search(rf"\b{re.escape(plain)}\b", text.casefold())
    return "closed" if plain in ("yes", "no") or choice else "open"


def _text(value) -> str:
    text = cell_text(value)  # five answers of the release are numbers
    return "" if isinstance(text, Unreadable) else " ".join(text.split())


def _fetch() -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(HUB_ID, repo_type="dataset", allow_patterns="*.parquet"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as fault:
        what = " ".join(str(fault).split())[:120]
        raise UserError(
            f"the hub's copy cannot be fetched; {HUB_ID}: {what}; a local folder works offline; give it with --root"
        ) from None
