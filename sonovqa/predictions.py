"""Predictions on disk: one JSON object a line, written as answers arrive, so that a stopped evaluation goes on.

`Log` appends and flushes every row. Whoever is killed leaves at most one torn last line; reading leaves it out and the
next append cuts it off. Later rows stand for earlier ones of the same question: a failed one that is asked again.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from sonovqa import files
from sonovqa.cli import UserError

Key = tuple[str, str]
#: What an evaluation writes beside its settings; ``--fresh`` throws it away.
MADE = ("predictions.jsonl", "blind.jsonl", "confidence.jsonl", "unannotated.jsonl", "most-useful.csv", "sessions.jsonl",
        "scores.json", "report.html")  # fmt: skip


def read(path: Path) -> list[dict]:
    """All whole rows of a predictions file, in the order written; a torn last line is left out, a missing file is empty.

    Raises:
        UserError: if a line before the last is not a JSON object.
    """
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif number < len(lines):  # only what follows the last line feed can be torn
            raise UserError(f"not a JSON object: {path}, line {number}; one object a line; mend or delete that line")
    return rows


def latest(rows: Iterable[dict]) -> dict[Key, dict]:
    """The last row of every ``(image_id, question_id)``, except that a failure never replaces an answer."""
    kept: dict[Key, dict] = {}
    for row in rows:
        key = (row["image_id"], row["question_id"])
        if key not in kept or kept[key]["error"] is not None or row["error"] is None:
            kept[key] = row
    return kept


def write(path: Path, rows: Iterable[dict]) -> None:
    """Write a whole predictions file at once (`files.write_text`)."""
    files.write_text(path, b"".join(map(_line, rows)).decode())


def _line(row: dict) -> bytes:
    """A row as it is stored. A lone surrogate, as a file name or an endpoint's reply may hold, has no UTF-8 form and is
    written as JSON's own escape, which reads back as it was (RFC 8259, section 8.2).
    """
    return json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


class Log:
    """A predictions file open for appending by one process. Use as a context manager.

    Raises:
        UserError: if another process has it open.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = open(path, "ab+")  # noqa: SIM115 - closed by __exit__
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._stream.close()
            raise UserError(f"another evaluation is writing {path}; wait for it, or choose another folder with --out") from None
        self._cut_torn_line()

    def _cut_torn_line(self) -> None:
        size = self._stream.seek(0, os.SEEK_END)
        while size:  # backwards in blocks: the file may be long, the torn line is not
            start = max(0, size - 65536)
            self._stream.seek(start)
            end = self._stream.read(size - start).rfind(b"\n")
            if end >= 0 or not start:
                self._stream.truncate(start + end + 1)
                return
            size = start

    def append(self, row: dict) -> None:
        """Write one row and flush it to the operating system."""
        self._stream.write(_line(row))
        self._stream.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        os.fsync(self._stream.fileno())
        self._stream.close()


def claim(folder: Path, settings: dict, fresh: bool = False) -> None:
    """Make ``folder`` the place of predictions made with ``settings``, or find that it already is.

    Args:
        settings: everything that changes an answer (model, data, prompt variant, pixels …), JSON values only.
        fresh: throw away what was predicted there before.

    Raises:
        UserError: if the folder holds predictions made with other settings.
    """
    path = folder / "settings.json"
    settings = json.loads(json.dumps(settings))
    if fresh:
        for name in (*MADE, path.name):
            (folder / name).unlink(missing_ok=True)
    if path.exists():
        before = files.read_json(path)
        changed = [k for k in sorted({*before, *settings}) if before.get(k) != settings.get(k)]
        if changed:
            told = ", ".join(f"{k} was {before.get(k)!r}, now {settings.get(k)!r}" for k in changed)
            way_out = "choose another --out, or start anew with --fresh"
            raise UserError(f"{folder} holds answers made with other settings: {told}; {way_out}")
    elif (folder / "predictions.jsonl").exists():
        raise UserError(f"{folder} holds predictions without settings.json; choose another --out, or start anew with --fresh")
    else:
        files.write_json(path, settings)
