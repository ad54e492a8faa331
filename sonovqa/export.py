"""The chat-formatted SFT set that other tools read: JSON lines of ``messages`` beside a folder of image files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from sonovqa.chat import context_for, messages, tasks_of
from sonovqa.cli import UserError
from sonovqa.files import replacing, replacing_folder
from sonovqa.images import size_of
from sonovqa.splits import SPLITS

MARK = ".sonovqa-export"  # tells a folder that an export made, and may replace, from any other


def export_chat(
    data, path: Path, task: str, variant: str = "default", advance: Callable[[int], None] = lambda count: None
) -> dict[str, int]:
    """Write the training split to ``path``, the others beside it as ``<stem>-validation.jsonl`` and ``<stem>-test.jsonl``.

    A line is ``{"messages": [system, user (image, then text), assistant]}``, one for each question, or one an image for the
    report; the image is a path relative to the file, under ``<stem>-images/``, holding the data set's own bytes.

    Args:
        data: a stored data set (`DatasetDict`); images are copied without being decoded.
        path: a ``.jsonl`` file.
        task: ``all``, ``report`` or a question id.
        variant: a line of `prompt_variants.variants`; answers are in the form that its prompts ask for, as in training.
        advance: told how many more images are written.

    Returns:
        Lines written to each split's file.

    Raises:
        UserError: no row answers ``task``, ``variant`` names a prompt that there is not, or the images folder holds something
            that no export wrote.
    """
    from datasets import Image

    folder = path.with_name(f"{path.stem}-images")
    if folder.exists() and not (folder / MARK).is_file():
        raise UserError(f"the folder for the images exists; {folder}; one that an export made; choose another --export-chat")
    lines: dict[str, list[str]] = {}
    with replacing_folder(folder) as part:
        (part / MARK).touch()
        for split in SPLITS:
            lines[split] = []
            for row in data[split].cast_column("image", Image(decode=False)):
                lines[split] += _write_row(row, part, folder.name, task, variant)
                advance(1)
        if not lines["train"]:
            raise UserError(
                f"no row of the training split answers --task {task}; 0 rows; a question of this set, or all; mend --task"
            )
    for split in reversed(SPLITS):  # the file that was asked for appears last, when all it needs is there
        target = path if split == "train" else path.with_name(f"{path.stem}-{split}.jsonl")
        with replacing(target) as part:
            part.write_text("".join(lines[split]), encoding="utf-8")
    return {split: len(found) for split, found in lines.items()}


def _write_row(row: dict, part: Path, folder: str, task: str, variant: str) -> list[str]:
    tasks = tasks_of(row, task, variant)
    if not tasks:
        return []
    target = part / row["image_id"]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(row["image"]["bytes"])
    shown = f"{folder}/{row['image_id']}"
    context = context_for(row["context"], size_of(row["image"]["bytes"])) if row.get("context") else None
    turns = [messages(shown, asked["prompt"], context, asked["answer"]) for asked in tasks]
    return [json.dumps({"messages": turn}, ensure_ascii=False) + "\n" for turn in turns]
