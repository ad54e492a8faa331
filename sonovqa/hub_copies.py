"""What the loaders of public sets share: a hub repository's files, rows of Parquet with their images, questions of an image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from sonovqa import credentials
from sonovqa.cli import UserError
from sonovqa.files import replacing, sha256
from sonovqa.sheets import Drops, Unreadable, cell_text
from sonovqa.sources import Record


def located(root: Path | None, hub_id: str, patterns: Sequence[str]) -> Path:
    """``root``, or the folder into which the hub's repository was fetched: the same files, so the same loader reads both.

    Raises:
        UserError: there is no such folder, or the hub cannot be reached.
    """
    if root is not None:
        if not root.is_dir():
            raise UserError(f"no such folder; {root}; the files of {hub_id}; mend --root")
        return root
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(huggingface_hub.snapshot_download(hub_id, repo_type="dataset", allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, OSError) as fault:
        what = credentials.hub_fault(fault, 120)
        raise UserError(
            f"the hub's repository cannot be fetched; {hub_id}: {what}; a local folder works offline; give it with --root"
        ) from None


def parquet_rows(root: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict]]:
    """Rows of all Parquet files below ``root`` as (``test`` or ``train``, row): the file's name tells the makers' split.

    Raises:
        UserError: there is no such file, one cannot be read, or it lacks a column.
    """
    import pyarrow
    import pyarrow.parquet

    tables = sorted(root.rglob("*.parquet"))
    if not tables:
        raise UserError(f"no Parquet file in this folder; {root}; the hub repository's files; mend --root or use --hub-id")
    for path in tables:
        split = "test" if path.name.casefold().startswith("test") else "train"
        try:
            with pyarrow.parquet.ParquetFile(path) as table:
                if lacking := [name for name in columns if name not in table.schema_arrow.names]:
                    raise UserError(f"columns are missing; {path} lacks {', '.join(lacking)}; the hub's files; mend --root")
                for batch in table.iter_batches(64, columns=list(columns)):
                    yield from ((split, row) for row in batch.to_pylist())
        except (pyarrow.ArrowException, OSError) as fault:
            what = " ".join(str(fault).split())[:120]
            raise UserError(f"the Parquet file cannot be read; {path}: {what}; fetch it anew") from None


def image_file(image: dict | bytes | None, folder: Path) -> Path | None:
    """Write an image column's bytes, plain or in the hub's ``{bytes, path}``, as a file named by its content; ``None`` if there
    are none.

    Raises:
        UserError: the column holds something else.
    """
    data = image.get("bytes") if isinstance(image, dict) else image
    if data is not None and not isinstance(data, bytes):
        raise UserError(
            f"the image column holds no images but {type(data).__name__}; {str(data)[:60]!r}; a file's bytes, or a struct that "
            "has them as bytes; fetch the files that the hub shows as images anew, or mend --root"
        )
    if not data:
        return None
    path = folder / "images" / (sha256(data)[:16] + (".png" if data.startswith(b"\x89PNG") else ".jpg"))
    if not path.exists():
        with replacing(path) as part:
            part.write_bytes(data)
    return path


def text_of(value) -> str:
    """A cell as text with single spaces; "" for what is no text or number. No text is too long."""
    text = cell_text(value)
    return "" if isinstance(text, Unreadable) else " ".join(text.split())


def add_question(records: dict[tuple[str, str], Record], record: Record, asked: dict, drops: Drops) -> None:
    """Give an image one more question, unless it lacks text or answer or is there already; what is left out goes to ``drops``."""
    where = f"{record.image_id}: {asked['question_id']}"
    if not asked["question"] or not asked["answer"]:
        drops.setdefault("a question without text or answer", []).append(where)
        return
    there = records.setdefault((record.image_id, record.split), record).questions
    if any((q["question"], q["answer"]) == (asked["question"], asked["answer"]) for q in there):
        drops.setdefault("the same question and answer about one image again", []).append(where)
    else:
        there.append(asked)


def derived_note(records: Sequence[Record]) -> str:
    """How the answer types, which the release does not have, were derived, and how many of each."""
    types = [q["answer_type"] for record in records for q in record.questions]
    return (
        f"the release has no answer types: {types.count('closed')} closed (yes, no, or a choice that the question names) and "
        f"{types.count('open')} open were derived from the answers"
    )
