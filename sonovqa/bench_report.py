"""The page of `bench answer`: one HTML file that opens offline, figures and tables of a record."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

from sonovqa import bench_answer_table, bench_plots, bench_records, bench_scores, plots
from sonovqa.cli import RESEARCH_NOTICE

TEMPLATE = Path(__file__).with_name("bench_report.html.j2")


@functools.cache
def _template():
    from jinja2 import Environment, StrictUndefined, select_autoescape

    environment = Environment(autoescape=select_autoescape(default=True, default_for_string=True), undefined=StrictUndefined)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def render(record: Mapping) -> str:
    """The page as one HTML text.

    Args:
        record: a record of `bench answer`, each row and score once, with ``verdicts`` (`bench_answer.finish`).
    """
    found = bench_answer_table.ordered(record["rows"])
    tables = [
        ("Speed", *_cells(found, bench_answer_table.SPEED)),
        ("Load time and memory", *_cells(found, bench_answer_table.ROOM)),
    ]
    if scores := record["scores"]:
        tables.insert(0, ("Scores on the same rows", *_cells(scores, bench_scores.OVERALL)))
        tables.append(("Scores of each question", *_cells(bench_scores.by_question(scores), bench_scores.QUESTIONS)))
    return _template().render(
        title=bench_answer_table.title(record["settings"], record["sizes"]), prompts=record["sizes"]["prompts"],
        notice=RESEARCH_NOTICE, figures=figures(record), tables=tables, commands=record["commands"],
        verdicts=record["verdicts"], notes=bench_answer_table.notes(record), caption=bench_answer_table.caption(record),
        environment=bench_answer_table.environment(record),
    )  # fmt: skip


def figures(record: Mapping) -> dict[str, str]:
    """SVG by what it shows; rows that failed are in the notes, not in a figure."""
    rows = [row for row in bench_answer_table.ordered(record["rows"]) if row["error"] is None]
    names = [_label(row["model"], row["bits"], f"{row['engine']} {row['level']}") for row in rows]
    timed = [(name, row) for name, row in zip(names, rows, strict=True) if row.get("image_seconds")]
    weighed = [(name, row) for name, row in zip(names, rows, strict=True) if row.get("memory_loaded") is not None]
    scored = [(_label(entry["model"], entry["bits"], entry["where"]), entry["overall"])
              for entry in record["scores"] if entry["error"] is None]  # fmt: skip
    drawn = {
        "Scores": (bench_plots.accuracy, scored),
        "Latency": (bench_plots.latency, timed),
        "Speed": (bench_plots.speed, timed),
        "Memory": (bench_plots.memory, weighed),
    }
    return {name: draw(*zip(*found, strict=True)) for name, (draw, found) in drawn.items() if found}


def _label(model: str, bits: int, how: str) -> str:
    """Two lines that a phone has room for: a model's name without its owner or folder, and how it was run."""
    return f"{plots.short(model.rstrip('/').rpartition('/')[2])}\n{bits} bits, {how}"


def _cells(found: list[dict], columns: bench_records.Columns) -> tuple[list[str], list[list[str]]]:
    """Headings and cells, without columns in which no row has anything."""
    told = {name: [cell(row) for row in found] for name, cell in columns.items()}
    kept = {name: cells for name, cells in told.items() if set(cells) - {"–", ""}}
    return list(kept), list(map(list, zip(*kept.values(), strict=True)))
