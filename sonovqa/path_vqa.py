"""PathVQA (He et al., 2020, arXiv:2003.10286, MIT): questions about pathology images, from the hub's copy."""

from __future__ import annotations

from pathlib import Path

from sonovqa.hub_copies import add_question, derived_note, image_file, located, parquet_rows, text_of
from sonovqa.sources import Loaded, Record, need_records, question
from sonovqa.vqa_rad import derived_type, official_leak

HUB_ID = "flaviagiammarino/path-vqa"


def path_vqa(root: Path | None, hub_id: str, extracted: Path, official: bool = False) -> Loaded:
    """Load PathVQA: Parquet files ``{train,validation,test}-*`` with columns image, question, answer; one record an image.

    Patients are not known: an image is told by its content, and near-duplicates share a group.

    Args:
        root: folder with the Parquet files; ``None`` fetches ``hub_id``.
        extracted: where images are written as files.
        official: keep the makers' test split; their validation questions join those that validation is drawn from.

    Raises:
        UserError: files are missing or unreadable, the hub cannot be reached, or no question is left.
    """
    folder, drops, records, told = located(root, hub_id, ["*.parquet"]), {}, {}, []
    for number, (split, row) in enumerate(parquet_rows(folder, ("image", "question", "answer"))):
        path = image_file(row["image"], extracted)
        if path is None:
            drops.setdefault("a row without an image", []).append(f"row {number}")
            continue
        text, answer = text_of(row["question"]), text_of(row["answer"])
        record = Record(f"images/{path.name}", path, "Pathology", "", [], split=split if official else "")
        told.append((path.name, split))
        add_question(records, record, question(str(number), answer, text, derived_type(text, answer)), drops)
    about = {"kind": "path-vqa", "root": str(root) if root else hub_id, "licence": "MIT"}
    loaded = Loaded(list(records.values()), drops, about)
    need_records(loaded, about["root"])
    loaded.notes += [derived_note(loaded.records), official_leak(told)]
    return loaded
