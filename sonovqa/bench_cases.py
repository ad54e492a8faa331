"""What one process of `bench answer` measures, as it is told to that process and found again in the record."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from sonovqa import files, prompt_variants

TENSORS, RESIDENT = "torch's tensors", "resident set"  # what a row's memory is
ONE_AT_A_TIME, SHARED, VLLM = ENGINES = ("one-at-a-time", "shared", "vllm")


@dataclass(frozen=True)
class Scoring:
    """Which rows of a data set are answered and scored besides (`bench_scores`).

    Attributes:
        data, split: the data set's folder and its split.
        rows: images, drawn across categories; 0: all of the split.
        seed: of the draw and of the intervals.
        prompt: a line of `prompt_variants.variants`.
        folder: where the answers are kept.
        at_once: images answered together, or requests in flight.
        new_tokens: an answer's limit; ``None``: by what is asked (`answer_limits.usual`).
        work: of a local engine, the fields of the `memory_peak.Batch` that it has in work (`bench_scores.with_work`).
    """

    data: str
    split: str
    rows: int
    seed: int
    prompt: str = prompt_variants.DEFAULT
    folder: str = ""
    at_once: int = 1
    new_tokens: int | None = None
    work: dict | None = None


@dataclass(frozen=True)
class Case:
    """What one process measures.

    Attributes:
        label: the model's name in the table.
        model: weights to load: a folder, hub id or ``tiny``; ``None``: only its endpoint has them.
        adapter: a run's ``adapter/`` on top, or ``None``.
        bits: 4, 8 or 16.
        engine: one of `ENGINES`.
        levels: images at a time (`SHARED`), requests in flight (`VLLM`); ``(1,)`` for `ONE_AT_A_TIME`.
        new_tokens, ignore_eos: length of an answer, fixed if the end of the turn is ignored.
        images: arguments of `bench_images.make`.
        endpoint: a server that runs already, or ``None``: one is started.
        endpoint_model: its name for the model; ``None``: the only one it serves.
        key_env: environment variable that holds its key.
        server_flags: for a server started here.
        scoring: rows to answer and score when all levels are measured, or ``None``.
    """

    label: str
    model: str | None
    adapter: str | None
    bits: int
    engine: str
    levels: tuple[int, ...]
    new_tokens: int
    ignore_eos: bool
    images: dict
    endpoint: str | None = None
    endpoint_model: str | None = None
    key_env: str | None = None
    server_flags: tuple[str, ...] = ()
    scoring: Scoring | None = None

    @property
    def keys(self) -> list[tuple]:
        """What tells its rows from others of the same record, in the order measured."""
        return [(self.label, self.bits, self.engine, level) for level in self.levels]


def row_of(case: Case, level: int, told: dict) -> dict:
    """A row of the record."""
    return {"model": case.label, "bits": case.bits, "engine": case.engine, "level": level, "error": None} | told


def save(case: Case, path: Path) -> None:
    """Write a case down for the process that measures it."""
    files.write_json(path, dataclasses.asdict(case))


def load(path: Path) -> Case:
    """A case as `save` wrote it down."""
    stored = files.read_json(path)
    images, scoring = stored["images"], stored["scoring"]
    images |= {"data": images["data"] and Path(images["data"]), "size": images["size"] and tuple(images["size"])}
    stored |= {"levels": tuple(stored["levels"]), "server_flags": tuple(stored["server_flags"])}
    return Case(**stored | {"images": images, "scoring": scoring and Scoring(**scoring)})
