"""PubMedVision (Chen et al., 2024, arXiv:2406.19280, Apache-2.0): figures of PubMed with long answers, which are all kept."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

from sonovqa.cli import UserError
from sonovqa.files import replacing
from sonovqa.hub_copies import add_question, derived_note, located, text_of
from sonovqa.images import ImageFolder, NotFoundError
from sonovqa.sheets import Drops
from sonovqa.sources import Loaded, Record, need_records, question
from sonovqa.splits import subset_order
from sonovqa.vqa_rad import derived_type

HUB_ID = "FreedomIntelligence/PubMedVision"
PATTERNS = ("PubMedVision_*.json", "images_*.zip")


def pubmedvision(root: Path | None, hub_id: str, extracted: Path, wanted: int | None = None, seed: int = 42) -> Loaded:
    """Load PubMedVision: ``PubMedVision_*.json`` beside ``images_*.zip`` or the unpacked ``images/``; one record an image.

    A sample is ``{id, image: [paths], conversations: [{from: human|gpt, value}], modality, body_part}``. Images of one figure
    (``pmc_<figure>_<n>.jpg``) are a group. Samples about several images are left out: a row is one image.

    Args:
        root: folder with the files; ``None`` fetches ``hub_id`` (about 57 GB of images).
        extracted: where images are unpacked to from the archives.
        wanted: of archives, unpack this many images only, drawn across the modalities; ``None``: all.
        seed: of that draw.

    Raises:
        UserError: files are missing or unreadable, the hub cannot be reached, the disk is too small, or no question is left.
    """
    folder = located(root, hub_id, PATTERNS)
    tables = sorted(folder.glob(PATTERNS[0]))
    if not tables:
        raise UserError(f"no PubMedVision in this folder; {folder}; {' and '.join(PATTERNS)}; mend --root")
    drops, records = {}, {}
    for table in tables:
        for sample in _samples(table):
            _take(records, sample, drops, table.name)
    about = {"kind": "pubmedvision", "root": str(root) if root else hub_id, "licence": "Apache-2.0"}
    loaded = Loaded(_with_images(list(records.values()), folder, extracted, wanted, seed, drops), drops, about)
    need_records(loaded, about["root"])
    loaded.notes.append(derived_note(loaded.records))
    lengths = sorted(len(q["answer"]) for record in loaded.records for q in record.questions)
    loaded.notes.append(
        f"answers hold {lengths[0]} to {lengths[-1]} characters (median {lengths[len(lengths) // 2]}); none was left out or cut"
    )
    return loaded


def _samples(table: Path) -> Iterator[dict]:
    try:
        yield from json.loads(table.read_text(encoding="utf-8"))
    except (ValueError, TypeError) as fault:
        raise UserError(f"the samples cannot be read; {table}: {fault}; the release's JSON; fetch it anew") from None


def _take(records: dict, sample: dict, drops: Drops, where: str) -> None:
    """Add a sample's questions to its image's record, whose path is the one that the release names."""
    try:
        images, turns, number = sample["image"], sample["conversations"], str(sample["id"])
        images = [images] if isinstance(images, str) else images
        pairs = [(text_of(h["value"]), text_of(g["value"])) for h, g in zip(turns[::2], turns[1::2], strict=True)]
        speakers = [turn["from"] for turn in turns]
        whole = pairs and isinstance(images, list) and images and all(isinstance(name, str) and name for name in images)
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        drops.setdefault("a sample without id, image or whole conversation", []).append(f"{where}: {str(sample)[:60]}")
        return
    if len(images) != 1:
        drops.setdefault("a sample about several images: a row is one image", []).append(f"{number}: {len(images)} images")
        return
    if speakers != ["human", "gpt"] * len(pairs):
        drops.setdefault("a conversation that does not go human, gpt", []).append(number)
        return
    category = text_of(sample.get("modality")) or "unknown"
    record = Record(images[0], Path(images[0]), category, Path(images[0]).stem.rpartition("_")[0], [])
    for turn, (text, answer) in enumerate(pairs):
        text = text_of(text.replace("<image>", ""))
        asked = question(number if turn == 0 else f"{number}/{turn + 1}", answer, text, derived_type(text, answer))
        add_question(records, record, asked, drops)


def _with_images(records: list, folder: Path, extracted: Path, wanted: int | None, seed: int, drops: Drops) -> list[Record]:
    """The records whose image is there, unpacked if it is in an archive, with its true path."""
    unpacked, found, packed = ImageFolder(folder), [], []
    members = {Path(name).name: (archive, name) for archive in sorted(folder.glob(PATTERNS[1])) for name in _names(archive)}
    for record in records:
        try:
            record.image_id, record.path = unpacked.find("images", Path(record.image_id).name)
            found.append(record)
        except NotFoundError as reason:
            if record.path.name in members:
                packed.append(record)
            else:
                drops.setdefault(f"{reason}, nor in an archive", []).append(record.image_id)
    short = None if wanted is None else max(0, wanted - len(found))
    if short is not None and short < len(packed):
        order = subset_order([r.image_id for r in packed], [(r.category, "") for r in packed], seed)
        reason = f"not unpacked: --max-images {wanted}, drawn across the modalities"
        drops.setdefault(reason, []).extend(packed[index].image_id for index in sorted(order[short:]))
        packed = [packed[index] for index in sorted(order[:short])]
    _unpack(packed, members, extracted)
    return found + packed


def _names(archive: Path) -> list[str]:
    try:
        with zipfile.ZipFile(archive) as opened:
            return [info.filename for info in opened.infolist() if not info.is_dir()]
    except (zipfile.BadZipFile, OSError) as fault:
        raise UserError(f"the archive cannot be read; {archive}: {fault}; a whole ZIP file; fetch it anew") from None


def _unpack(records: list[Record], members: dict[str, tuple[Path, str]], extracted: Path) -> None:
    """Unpack the records' images, archive by archive; those that are there already stay."""
    by_archive: dict[Path, list[Record]] = {}
    for record in records:
        by_archive.setdefault(members[record.path.name][0], []).append(record)
    extracted.mkdir(parents=True, exist_ok=True)
    for archive, inside in by_archive.items():
        with zipfile.ZipFile(archive) as opened:
            sizes = [opened.getinfo(members[record.path.name][1]).file_size for record in inside]
            if sum(sizes) > (free := shutil.disk_usage(extracted).free):
                raise UserError(
                    f"the disk is too small; {extracted} has {free / 1e9:.1f} GB free; {archive.name} needs "
                    f"{sum(sizes) / 1e9:.1f} GB more; make room, choose another --out, or fewer images with --max-images"
                )
            for record, size in zip(inside, sizes, strict=True):
                name = members[record.path.name][1]
                record.path = extracted / "images" / Path(name).name
                record.image_id = f"images/{record.path.name}"
                if not record.path.exists() or record.path.stat().st_size != size:
                    with replacing(record.path) as part, opened.open(name) as source, open(part, "wb") as target:
                        shutil.copyfileobj(source, target)
