"""Rows of `bench answer` as a person reads them: columns, the line of a row, the notes, and a page of Markdown for a paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sonovqa import bench_images, bench_records, bench_scores, memory, records
from sonovqa.bench_cases import ENGINES, ONE_AT_A_TIME, TENSORS, VLLM
from sonovqa.cli import console


def _memory(row: dict, key: str) -> str:
    return _size(row[key]) if row.get(key) is not None else "–"


def _size(count: float) -> str:
    """Bytes with a decimal more than an estimate has (`memory.gigabytes`): measured and predicted stand side by side."""
    return records.gigabytes(count) if count >= 1e9 else memory.gigabytes(count)


def _beside(row: dict, what: str) -> str:
    """``15.8 GB (16 GB, 0.99)``: measured, predicted, and the one over the other (`bench_predictions.beside`)."""
    measured = _memory(row, f"memory_{what}")
    if f"predicted_{what}" not in row:
        return measured
    ratio = f", {row[f'ratio_{what}']:.2f}" if f"ratio_{what}" in row else ""
    return f"{measured} ({_size(row[f'predicted_{what}'])}{ratio})"


def _image_seconds(row: dict) -> str:
    told = row.get("image_seconds")
    return "/".join(f"{told[name]:.3g}" for name in ("min", "mean", "median", "p95", "max")) if told else "–"


def _number(row: dict, key: str, form: str) -> str:
    return format(row[key], form) if row.get(key) is not None else "–"


def note(row: dict) -> str:
    """What is wrong with a row, or worth knowing beside its figures."""
    if row["error"] is not None:
        return f"failed: {row['error']}"
    notes = [f"{row['failed']} failed: {next(iter(row['errors']))}"] if row["failed"] else []
    if row.get("vllm") is False:
        notes.append("no vLLM: answers may end early")
    if row["engine"] == VLLM and row["client_cpu"] > 0.8:
        notes.append(f"client busy {row['client_cpu']:.0%}")
    return "; ".join(notes)


def ordered(rows: Sequence[dict]) -> list[dict]:
    """Rows model by model, most bits and the plainest engine first, in whatever order they were measured."""
    return sorted(rows, key=lambda row: (row["model"], -row["bits"], ENGINES.index(row["engine"]), row["level"]))


_WHO: bench_records.Columns = {
    "model": lambda row: row["model"],
    "bits": lambda row: str(row["bits"]),
    "engine": lambda row: row["engine"] + ("" if row["engine"] == ONE_AT_A_TIME else f" {row['level']}"),
}
SPEED: bench_records.Columns = _WHO | {
    "answers/s": lambda row: _number(row, "answers_per_second", ".2f"),
    "tokens/s": lambda row: _number(row, "tokens_per_second", ".1f"),
    "s for the eight questions: min/mean/median/p95/max": _image_seconds,
    "prefix hits": lambda row: _number(row.get("cache_hits") or {}, "prefix", ".0%"),
    "same answers": lambda row: _number(row, "identical", ".0%"),
}
ROOM: bench_records.Columns = _WHO | {
    "computes in": lambda row: row.get("dtype") or "–",
    "on disk": lambda row: _memory(row, "disk_bytes"),
    "load s": lambda row: _number(row, "load_seconds", ".1f"),
    "before": lambda row: _memory(row, "memory_before"),
    "loaded (predicted)": lambda row: _beside(row, "loaded"),
    "peak (predicted)": lambda row: _beside(row, "peak"),
    "device at peak": lambda row: _memory(row, "device_peak"),
    "memory is": lambda row: row.get("memory") or "–",
}


def title(settings: Mapping, about: Mapping) -> str:
    """What was asked, in one line."""
    return bench_images.in_words(about, settings["new_tokens"], settings["ignore_eos"])


def show(record: Mapping) -> None:
    """Print the tables, and under them what is wrong with a row."""
    found, scores = record["rows"], record["scores"]
    bench_records.show(f"speed: {title(record['settings'], record['sizes'])}", found, SPEED)
    bench_records.show("load time and memory", found, ROOM)
    if scores:
        where = record["settings"]["images"]["data"]
        bench_records.show(f"scores on the same rows of {where}", scores, bench_scores.OVERALL)
        bench_records.show("scores of each question", bench_scores.by_question(scores), bench_scores.QUESTIONS)
    for told in [*notes(record), *record["verdicts"]]:
        console.print(told, markup=False, soft_wrap=True)


def notes(record: Mapping) -> list[str]:
    """What is wrong with rows and scores, a line each, each with the row it is about."""
    told = [f"{who(row)}: {note(row)}" for row in record["rows"] if note(row)]
    told += [f"{bench_scores.named(entry)}: not scored: {entry['error']}" for entry in record["scores"] if entry["error"]]
    return told + [told_cut for entry in record["scores"] if (told_cut := bench_scores.cut_note(entry))]


def who(row: Mapping) -> str:
    """``Qwen3-VL-8B 4 shared 1``."""
    return " ".join(cell(row) for cell in _WHO.values())


def scores_line(entry: Mapping) -> str:
    """One model's scores as they are printed while others are still to come."""
    if entry["error"]:
        return f"{bench_scores.named(entry)}: not scored: {entry['error']}"
    beside = ", ".join(f"{name} {bench_scores.baseline(entry['overall'], name)}" for name in ("majority", "blind"))
    return f"{bench_scores.named(entry)}: accuracy {bench_scores.value(entry['overall'])}, {beside}, {entry['asked']} questions"


def environment(record: Mapping) -> dict[str, str]:
    """Where the rows were measured: device, driver, versions, commit and date."""
    device, drivers = record["device"], record.get("drivers") or []
    several = f"{device['count']} x " if device["count"] > 1 else ""
    told = {"device": f"{several}{device['name']}, {memory.gigabytes(device['memory'])}, {device['cpus']} CPU cores"}
    told |= {"driver": drivers[0]["driver"]} if drivers else {}
    told |= {"versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items())}
    commit = f"{record['commit'][:12]}{' with changes' if record['dirty'] else ''}" if record["commit"] else "unknown"
    return told | {"commit": commit, "measured": f"{record['started']} to {record['updated']}"}


def caption(record: Mapping) -> list[str]:
    """What the columns mean."""
    told = ["Loaded and peak: measured, in brackets what was predicted before loading and the one over the other."]
    if any(row.get("memory") == TENSORS for row in record["rows"]):
        told.append("Memory is that of torch's tensors; what the device has in use besides is CUDA's context and what torch's "
                    "allocator reserved.")  # fmt: skip
    if record["scores"]:
        told.append("Scores: 95 % intervals by bootstrap over groups. Majority: the commonest answer of the training split. "
                    "Blind: the model's own answers with the image greyed out.")  # fmt: skip
    return told


def markdown(record: Mapping) -> str:
    """All tables with what was asked, of whom and where, as Markdown."""
    prompts, found = "; ".join(f"“{prompt}”" for prompt in record["sizes"]["prompts"]), ordered(record["rows"])
    parts = [f"{title(record['settings'], record['sizes'])}. Prompts: {prompts}."]
    parts += [f"**Speed.**\n\n{bench_records.markdown(found, SPEED).strip()}"]
    parts += [f"**Load time and memory.**\n\n{bench_records.markdown(found, ROOM).strip()}"]
    if scores := record["scores"]:
        parts += [f"**Scores.**\n\n{bench_records.markdown(scores, bench_scores.OVERALL).strip()}"]
        each = bench_records.markdown(bench_scores.by_question(scores), bench_scores.QUESTIONS)
        parts += [f"**Scores of each question.**\n\n{each.strip()}"]
    parts += ["\n".join(f"- {line}" for line in [*caption(record), *record["verdicts"], *notes(record)])]
    parts += ["\n".join(f"- {name}: {value}" for name, value in environment(record).items())]
    return "\n\n".join(parts) + "\n"


def line(row: dict) -> str:
    """A row as it is printed while others are still to come."""
    figures = {**SPEED, **ROOM, "note": note}
    told = {name: cell(row) for name, cell in figures.items() if name not in _WHO}
    return " · ".join([who(row), *(f"{name} {value}" for name, value in told.items() if value not in ("–", ""))])
