"""The results of an experiment as tables: a row a configuration, its seeds together, every score beside its baselines."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from sonovqa import records
from sonovqa.experiments_records import BESIDE

SPEED = "speed"  # stands among the scores of a marker: how fast the runs answered, and in what memory
_SEED = re.compile(r"-s\d+$")  # of a run's name: runs that differ in it alone stand in one row


def configurations(found: Mapping[str, Mapping]) -> dict[str, dict[str, Mapping]]:
    """Records by configuration, which is the run's name without its ``-s<seed>``, and there by file name; 25 before 100."""
    rows: dict[str, dict[str, Mapping]] = {}
    for name, record in found.items():
        rows.setdefault(_SEED.sub("", record["run"]), {})[name] = record
    return {name: rows[name] for name in sorted(rows, key=_natural)}


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts numbers in a name by size."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def figure_of(record: Mapping, spec: str) -> tuple[str, Mapping] | None:
    """A score of a record: its full name and figure, or ``None`` where no evaluation has it.

    Args:
        spec: ``Q7`` (its headline), ``Q7 AUROC``, ``overall accuracy``, ``report complete`` or ``coherent``.
    """
    kind, _, score = spec.partition(" ")
    for one in record.get("evaluations", {}).values():
        about = one["questions"].get(kind, {})
        scores = {**about.get("metrics", {}), **about.get("by probability", {})} if about else one.get(kind, {})
        if kind == "coherent" and scores:
            return spec, scores
        name = score or about.get("headline", "accuracy")
        if scores.get(name):
            return f"{kind} {name}", scores[name]
    return None


def rows(found: Mapping[str, Mapping], specs: Sequence[str]) -> list[list[str]]:
    """The table's lines, the head first.

    Args:
        found: records by file name (`experiments_records.record_of`).
        specs: the scores to show, see `figure_of`; `SPEED` for that of answering, where a record has it.
    """
    specs = [spec for spec in specs if spec != SPEED or any(_speeds([record]) for record in found.values())]
    head = ["run", "model", "data", *(_heading(spec, found.values()) for spec in specs), "seeds", "trained", "trained answers/s"]
    head += ["time", "peak memory", "command", "date", "record"]
    return [head, *(_row(name, same, specs) for name, same in configurations(found).items())]


def _speeds(runs: Sequence[Mapping]) -> list[Mapping]:
    """How fast the records' first evaluations answered (`asking.speed`), of those that say."""
    told = [next(iter(record.get("evaluations", {}).values()), {}).get("speed") for record in runs]
    return [one for one in told if one]


def _speed_cell(runs: Sequence[Mapping]) -> str:
    """``189.2 (188.7, 190.1, 188.8), 0.8 GB``: answers a second, of several seeds their mean and all, and the most memory."""
    found = _speeds(runs)
    if not found:
        return "-"
    each = [one["answers_per_second"] for one in found]
    told = f"{mean(each):.1f}" + (f" ({', '.join(format(one, '.1f') for one in each)})" if len(each) > 1 else "")
    peaks = [one["peak_memory_bytes"] for one in found if one.get("peak_memory_bytes")]
    return f"{told}, {records.gigabytes(max(peaks))}" if peaks else told


def _heading(spec: str, found) -> str:
    if spec == SPEED:
        return "answering: answers/s, peak memory"
    figures = [figure for record in found if (figure := figure_of(record, spec))]
    name, figure = figures[0] if figures else (spec, {})
    return f"{name}{ {True: ' ↑', False: ' ↓'}.get(figure.get('higher_is_better'), '') } [95 %]"


def _row(name: str, same: Mapping[str, Mapping], specs: Sequence[str]) -> list[str]:
    runs = sorted(same.values(), key=lambda record: record["arguments"]["seed"])
    first, made = runs[0], [record["training"] for record in runs]
    given = first["arguments"]
    weights = f" ({first['weights']})" if first.get("weights") else ""
    return [
        name,
        f"{given['model']}{weights}, {given['bits']} bits",
        _data(first),
        *(_speed_cell(runs) if spec == SPEED else _cell([one[1] for record in runs if (one := figure_of(record, spec))])
          for spec in specs),
        ", ".join(str(record["arguments"]["seed"]) for record in runs),
        f"{first['training']['trainable_parameters']:,}" if "trainable_parameters" in first["training"] else "",
        f"{mean(one['answers_per_second'] for one in made):.1f}",
        f"{records.duration(mean(one['seconds'] for one in made))}{_box(runs)}",
        records.gigabytes(max(one["peak_memory_bytes"] for one in made)),
        f"`{first['command']}`" if first.get("command") else "",
        max(record["finished"] for record in runs)[:10],
        ", ".join(f"[{path if len(same) == 1 else record['arguments']['seed']}](outputs/records/{path})"
                  for path, record in same.items()),
    ]  # fmt: skip


def _box(runs: Sequence[Mapping]) -> str:
    """What the runs were trained on, behind their time: ``, NVIDIA H200`` or ``, 64 CPUs``; of several all."""
    found = [record["device"] for record in runs if record.get("device")]
    told = {one["name"] if "NVIDIA" in one["name"] else f"{one['cpus']} CPUs" for one in found}
    return f", {' and '.join(sorted(told))}" if told else ""


def _data(record: Mapping) -> str:
    """What it was trained on and, where that is another set, what it was asked about."""
    given = record["arguments"]
    some = f", {given['max_images']} images" if given.get("max_images") else ""
    told = [f"{Path(given['data']).name} `{str(record['data'])[:8]}`{some}"]
    for one in list(record.get("evaluations", {}).values())[:1]:
        about = one["data"]
        other = "" if about["fingerprint"] == record["data"] else f" of {one['asked']['data']} `{about['fingerprint'][:8]}`"
        told.append(f"{about['split']}{other}: {about['images']} images of {one['groups']} groups")
    return "; ".join(told)


def _cell(figures: Sequence[Mapping]) -> str:
    """``0.81 [0.74, 0.88]; majority 0.50, blind 0.50``; of several seeds their mean, all of them, and the outermost interval."""
    known = [one for one in figures if one["value"] is not None]
    if not known:
        return "-"
    spans = [one["interval"] for one in known if one.get("interval") and None not in one["interval"]]
    told = f"{mean(one['value'] for one in known):.3f}"
    told += f" [{min(low for low, _ in spans):.3f}, {max(high for _, high in spans):.3f}]" if spans else ""
    told += f" ({', '.join(format(one['value'], '.3f') for one in known)})" if len(known) > 1 else ""
    beside = {name: [one[name] for one in known if one.get(name) is not None] for name in BESIDE}
    others = ", ".join(f"{name} {mean(values):.3f}" for name, values in beside.items() if values)
    return f"{told}; {others}" if others else told


def differences(record: Mapping) -> list[list[str]]:
    """The lines of a comparison (`experiments_records.comparison_of`), the head first."""
    lines = [["run", "question", "score", record["first"], "run's", "difference, paired [95 %]", "n"]]
    for one in record["differences"]:
        values = [f"{one[key]:.3f}" for key in ("first", "second")]
        difference = _spanned([one["difference"], *(one["interval"] or ())], "+.3f")
        lines.append([one["with"], one["kind"], one["score"], *values, difference, str(one["n"])])
    return lines


def prompts(record: Mapping) -> list[list[str]]:
    """The lines of one model under several prompts (`experiments_records.prompts_of`), the head first."""
    lines = [["question", "prompt", "score", "value [95 %]; majority", "against own", "same meaning; by chance", "in form", "n"]]
    for one in record["prompts"]:
        usual = "" if one["majority"] is None else f"; {one['majority']:.3f}"
        chance = "" if one["by chance"] is None else f"; {one['by chance']:.3f}"
        named = [one["kind"], f"{one['prompt']} (own)" if one["own"] else one["prompt"], one["score"]]
        against, same, form = _spanned(one["against own"], "+.3f"), _spanned(one["same meaning"]), _spanned(one["in form"])
        lines.append([*named, _spanned(one["value"]) + usual, against, same + chance, form, str(one["n"])])
    return lines


def _spanned(values: Sequence[float] | None, form: str = ".3f") -> str:
    """``0.810 [0.740, 0.880]`` of ``[value, low, high]``; empty where there is none."""
    if not values:
        return ""
    value, *ends = (format(number, form) for number in values if number is not None)
    return f"{value} [{', '.join(ends)}]" if ends else value
