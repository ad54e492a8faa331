"""Texts with labels from CSV files, for text-only models with a choice head: one row a text, no image.

The text is the row's question and the label its answer. A text that occurs more than once, case, punctuation and white space
aside, is kept once, so that it can lie in one split only; with different labels it is of no use and is left out.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from sonovqa.cli import UserError
from sonovqa.files import sha256
from sonovqa.images import Checked
from sonovqa.questions import TEXT_LABEL
from sonovqa.sheets import LARGEST_CELL, Drops
from sonovqa.sources import Loaded, Record, need_records, question

SOURCE = "csv-text"


def add(subparsers, source_parser) -> None:
    """Add the source's subparser to prepare_dataset.py's; ``source_parser`` makes one with the flags that all sources share."""
    texts = source_parser(subparsers, SOURCE, "texts with labels (.csv), for text-only models and train.py --head choice")
    texts.add_argument("tables", nargs="+", type=Path, metavar="CSV", help="files with a column of texts and one of labels")
    texts.add_argument("--text-column", default="text", metavar="NAME", help="column of the texts")
    texts.add_argument("--label-column", default="label", metavar="NAME", help="column of the labels")
    texts.add_argument("--group-column", metavar="NAME", help="column of the patient or source whose texts stay together")
    texts.add_argument("--question", default="", metavar="TEXT", help="put before every text: what is asked about it")


def load(args: argparse.Namespace) -> Loaded:
    """Read the files of prepare_dataset.py's arguments.

    Raises:
        UserError: if a file cannot be read or lacks a column, two have one name, or no usable row is left.
    """
    drops: Drops = {}
    stems = [path.stem for path in args.tables]
    if len(set(stems)) < len(stems):
        raise UserError(f"two files have the same name; {', '.join(map(str, args.tables))}; names tell rows apart; rename one")
    columns = (args.text_column, args.label_column, args.group_column)
    found = [record for path in args.tables for record in _records(path, columns, args.question, drops)]
    about = {"kind": SOURCE, "tables": {str(path): sha256(path.read_bytes()) for path in args.tables}}
    loaded = Loaded(_once_each(found, drops), drops, about)
    need_records(loaded, ", ".join(map(str, args.tables)))
    if len({record.questions[0]["answer"] for record in loaded.records}) < 2:
        raise UserError(
            f"one label for all texts; {', '.join(map(str, args.tables))}; two or more are needed; mend --label-column"
        )
    return loaded


def _records(path: Path, columns: tuple[str, str, str | None], asked: str, drops: Drops) -> Iterator[Record]:
    header, *rows = _table(path)
    names = [name.strip().casefold() for name in header]
    wanted = [name for name in columns if name]
    found = [[at for at, name in enumerate(names) if name == one.strip().casefold()] for one in wanted]
    if wrong := [name for name, places in zip(wanted, found, strict=True) if len(places) != 1]:
        what = "more than one column of a name; {} has two of {}" if all(found) else "columns are missing; {} lacks {}"
        raise UserError(
            f"{what.format(path, ', '.join(wrong))}; it has {', '.join(header)}; name them with --text-column, --label-column "
            "and --group-column"
        )
    for number, cells in enumerate(rows, start=2):  # the header is row 1
        place = f"{path.name} row {number}"
        if not cells:  # an empty line
            continue
        if len(cells) != len(header):  # which cell belongs to which column is not known: nothing is guessed
            reason = "a row with more or fewer cells than the header: a text with a comma needs quotes around it"
            drops.setdefault(reason, []).append(f"{place}: {len(cells)} cells, not {len(header)}")
            continue
        text, label, *group = (" ".join(cells[at].split()) for (at,) in found)
        if not text or not label:
            drops.setdefault(f"a row without {'text' if not text else 'label'}", []).append(place)
            continue
        entry = question(TEXT_LABEL, label, f"{asked}\n{text}" if asked else text, TEXT_LABEL)
        yield Record(f"{path.stem}/{number}", None, path.stem, "".join(group), [entry], place=place)


def _table(path: Path) -> list[list[str]]:
    """All rows, the header first and empty ones among them, so that a row's place is the one a spreadsheet shows.

    pandas would not do: of a first row with a cell too many it makes an index, and every column stands under its neighbour's
    name.
    """
    csv.field_size_limit(LARGEST_CELL)
    rows: list[list[str]] = []
    try:
        text = path.read_bytes().decode("utf-8-sig")
        rows += csv.reader(io.StringIO(text, newline=""), strict=True)
    except (OSError, UnicodeDecodeError, csv.Error) as fault:
        where = f"after row {len(rows)}: " if isinstance(fault, csv.Error) else ""
        what = where + " ".join(str(fault).split())[:150]
        raise UserError(f"the table cannot be read; {path}: {what}; a CSV file in UTF-8 with a header; save it as one") from None
    if not rows or not any(rows[0]):
        raise UserError(f"the table has no header; {path}; its first row must name the columns; add one")
    return rows


def _once_each(records: list[Record], drops: Drops) -> list[Record]:
    """The first record of every text; none of a text whose labels differ."""
    same: dict[str, list[Record]] = {}
    for record in records:
        same.setdefault(plain(record.questions[0]["question"]), []).append(record)
    kept = []
    for found in same.values():
        if len({record.questions[0]["answer"] for record in found}) > 1:
            drops.setdefault("one text with different labels", []).extend(record.place for record in found)
            continue
        kept.append(found[0])
        if found[1:]:
            drops.setdefault("the same text again", []).extend(record.place for record in found[1:])
    return kept


def plain(text: str) -> str:
    """A text without case, punctuation and white space beyond single spaces; as it is where nothing else is in it."""
    words = re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()
    return words or text


def checked(record: Record) -> Checked:
    """What `images.check_image` finds out of an image: a text's size in bytes and its hash, which no two texts share."""
    text = record.questions[0]["question"]
    return Checked(size=len(text.encode()), sha256=sha256(text), phash=sha256(plain(text)))
