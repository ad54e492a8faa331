"""MedPix: questions about CT and MR images of teaching cases (MEDPIX-ShortQA), or the captions of MedPix 2.0 itself.

Source: Siragusa et al., MedPix 2.0, arXiv:2407.02994; the questions were made from its texts.
"""

from __future__ import annotations

import json
from pathlib import Path

from sonovqa.cli import UserError
from sonovqa.hub_copies import add_question, derived_note, image_file, located, parquet_rows, text_of
from sonovqa.images import ImageFolder, NotFoundError
from sonovqa.sources import Loaded, Record, need_records, question
from sonovqa.vqa_rad import derived_type, official_leak

HUB_ID = "adishourya/MEDPIX-ShortQA"
DESCRIPTIONS = "Descriptions.json"
#: What is asked of MedPix 2.0, which has texts and no questions: of each description, the field that answers.
ASKED = {
    "Caption": "Describe this image.",
    "Modality": "Which imaging modality is this?",
    "Plane": "Which plane is this image in?",
}


def medpix(root: Path | None, hub_id: str, extracted: Path, official: bool = False) -> Loaded:
    """Load MedPix: one record an image, grouped by case.

    Args:
        root: folder with MEDPIX-ShortQA's Parquet files ``{Train,Valid,Test}-*`` (columns image_id, which holds the image,
            case_id, question, answer, mode), or with MedPix 2.0's ``Descriptions.json`` and ``images/``; ``None`` fetches
            ``hub_id``.
        extracted: where images of Parquet files are written.
        official: keep the makers' test split (MEDPIX-ShortQA only).

    Raises:
        UserError: files are missing or unreadable, the hub cannot be reached, or no question is left.
    """
    if root is not None and (root / DESCRIPTIONS).is_file():
        return _original(root, official)
    folder, drops, records, told = located(root, hub_id, ["*.parquet"]), {}, {}, []
    for number, (split, row) in enumerate(parquet_rows(folder, ("image_id", "case_id", "question", "answer", "mode"))):
        path = image_file(row["image_id"], extracted)
        if path is None:
            drops.setdefault("a row without an image", []).append(f"row {number}")
            continue
        text, answer, case = (text_of(row[key]) for key in ("question", "answer", "case_id"))
        category = text_of(row["mode"]) or "unknown"
        record = Record(f"images/{path.name}", path, category, case, [], split=split if official else "")
        told.append((path.name, split))
        add_question(records, record, question(str(number), answer, text, derived_type(text, answer)), drops)
    about = {"kind": "medpix", "root": str(root) if root else hub_id}
    loaded = Loaded(list(records.values()), drops, about)
    need_records(loaded, about["root"])
    loaded.notes += [derived_note(loaded.records), official_leak(told)]
    return loaded


def _original(root: Path, official: bool) -> Loaded:
    if official:
        raise UserError(f"MedPix 2.0 as released has no questions and no split here; {root}; --split grouped; leave --split out")
    try:
        entries = json.loads((root / DESCRIPTIONS).read_text(encoding="utf-8"))
        rows = [(e["image"], e["U_id"], e["Type"], e["Description"]) for e in entries]
    except (ValueError, KeyError, TypeError) as fault:
        raise UserError(
            f"the descriptions cannot be read; {root / DESCRIPTIONS}: {fault!r}; MedPix 2.0 as released; mend --root"
        ) from None
    folder, drops, records = ImageFolder(root), {}, {}
    for name, case, kind, described in rows:
        description = described if isinstance(described, dict) else {}  # a null: nothing is told of the image
        try:
            image_id, path = folder.find("images", str(name))
        except NotFoundError as reason:
            drops.setdefault(str(reason), []).append(f"{case}: {name}")
            continue
        for number, (key, text) in enumerate(ASKED.items(), 1):
            asked = question(str(number), text_of(description.get(key)), text, "open")
            add_question(records, Record(image_id, path, text_of(kind), text_of(case), []), asked, drops)
    loaded = Loaded(list(records.values()), drops, {"kind": "medpix", "root": str(root)})
    loaded.notes.append(f"MedPix 2.0 holds texts, not questions: these were asked of each image: {' '.join(ASKED.values())}")
    need_records(loaded, str(root))
    return loaded
