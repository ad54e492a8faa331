"""Records of `python -m sonovqa.bench`: one JSON file a benchmark, whole after every row, and tables made from it.

A record says what was measured, on what hardware, with which versions, commit, sizes and settings, and holds a row a
measurement. It is written anew with every row, so a run that is killed loses at most the row at hand, and the same
command goes on after the rows that are there.
"""

from __future__ import annotations

import contextlib
import fcntl
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.measure import Measurement
from rich.table import Column, Table

from sonovqa import doctor_probe, files, records
from sonovqa.cli import UserError, console

#: Heading and what stands below it for a row.
Columns = dict[str, Callable[[dict], str]]
ABREAST = 3  # rows side by side on a narrow terminal
_SAME = ("benchmark", "settings", "sizes", "commit", "device")  # what all rows of a record have in common


def start(path: Path, benchmark: str, settings: dict, sizes: dict, program: str = "sonovqa.bench") -> dict:
    """Begin a record, or go on with the one at ``path``.

    Args:
        path: the JSON file.
        benchmark: which one: ``train``, ``answer``, ``load`` or ``plan``. The command line is kept with it.
        settings: what every row was measured with: steps, bits, rank, …
        sizes: what it was measured on: data set, rows, image sizes, parameters, …
        program: what ``python -m`` ran.

    Returns:
        The record, ``rows`` among it.

    Raises:
        UserError: if the record there was made with other settings, at another commit or on another device, or is no whole
            JSON.
    """
    command = shlex.join(["python", "-m", program, *sys.argv[1:]])
    made = {
        "benchmark": benchmark,
        "commands": [command],
        "started": records.now(),
        "updated": records.now(),
        **records.commit(),
        "versions": records.versions(),
        "device": records.device(),
        "drivers": doctor_probe.driver_gpus(),
        "settings": settings,
        "sizes": sizes,
        "rows": [],
    }
    with _held(path):
        if path.exists():
            before = files.read_made(path)
            other = [key for key in _SAME if before.get(key) != made[key]]
            if other:
                raise UserError(
                    f"--record {path}; its rows were measured with another {', '.join(other)}; a record's rows must be "
                    "comparable; name another --record, or delete it"
                )
            if command in before["commands"]:
                return before
            made = before | {"commands": [*before["commands"], command]}
        files.write_json(path, made)
    return made


def add(path: Path, row: dict) -> None:
    """Append one row to the record at ``path``. Raises ``OSError`` if it cannot be written; the rows before it are kept."""
    with _held(path):
        record = files.read_json(path)
        files.write_json(path, record | {"updated": records.now(), "rows": [*record["rows"], row]})


def note(path: Path, key: str, entries: Sequence[dict]) -> None:
    """Append to the record's list of ``key``, such as predictions that must stand there before what they predict."""
    with _held(path):
        record = files.read_json(path)
        files.write_json(path, record | {"updated": records.now(), key: [*record.get(key, []), *entries]})


def rows(path: Path) -> list[dict]:
    """The rows of the record at ``path``, an empty list where there is none."""
    return files.read_made(path)["rows"] if path.exists() else []


def show(title: str, found: Sequence[dict], columns: Columns) -> None:
    """Print rows as a table; on a terminal that is too narrow for it, turned: a column a row, as many as fit side by side."""
    cells = [[cell(row) for cell in columns.values()] for row in found]
    table = _table(title, list(columns), cells)
    if Measurement.get(console, console.options.update_width(10_000), table).maximum <= console.width:
        console.print(table)
        return
    for at in range(0, len(cells), ABREAST):
        few = cells[at : at + ABREAST]
        heads = ["", *(str(at + k + 1) for k in range(len(few)))]
        console.print(_table(title, heads, list(zip(columns, *few, strict=True))))


def _table(title: str, heads: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    table = Table(*(Column(head, overflow="fold") for head in heads), title=title, title_justify="left")  # no figure is cut
    for line in lines:
        table.add_row(*line)
    return table


def markdown(found: Sequence[dict], columns: Columns) -> str:
    """Rows as a Markdown table."""
    lines = [list(columns), ["---"] * len(columns), *([cell(row) for cell in columns.values()] for row in found)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """Let one process at a time change the record: two GPUs may measure for the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
