"""Answers a second, latency, load time and memory of every model, precision and engine, on the same images and prompts.

    python -m sonovqa.bench answer --model tiny --engines one-at-a-time shared vllm --data data/phantoms
    python -m sonovqa.bench answer --run outputs/phantoms --data data/phantoms --no-ignore-eos --new-tokens 48
    python -m sonovqa.bench answer --model A B --bits 16 8 4 --size 512x384
    python -m sonovqa.bench answer --engines vllm --endpoint http://127.0.0.1:8000/v1 --in-flight 1 16 64 256

Engines: one-at-a-time encodes the image again for every question, as simple evaluation loops do; shared encodes it once
for all eight; vllm sends them to a server with so many requests in flight. Each case is a process of its own. A case that
fails is a row that says why.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from sonovqa import (
    bench_images,
    bench_predictions,
    bench_records,
    bench_timing,
    bench_worker,
    cli,
    files,
    memory,
    predictions,
    records,
    serving,
)
from sonovqa.bench_worker import ENGINES, ONE_AT_A_TIME, SHARED, VLLM, Case
from sonovqa.cli import console
from sonovqa.serving_plan import ROOT

BITS = (16, 8, 4)
STOP_GRACE = 60.0  # seconds a case gets to stop its server


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bench answer``."""
    who = parser.add_argument_group("who answers")
    who.add_argument("--model", nargs="+", default=[], metavar="NAME", help="model folders, hub ids or tiny")
    who.add_argument("--run", nargs="+", type=Path, default=[], help="runs of train.py: base, adapter and merged weights of each")
    who.add_argument("--bits", nargs="+", type=int, choices=BITS, default=[16], help="precisions the weights are loaded in")
    who.add_argument("--engines", nargs="+", choices=ENGINES, default=[ONE_AT_A_TIME, SHARED], help="see above")
    who.add_argument("--batch-images", nargs="+", type=int, default=[1], metavar="N", help="shared: images at a time")
    who.add_argument("--in-flight", nargs="+", type=int, default=[16], metavar="N", help="vllm: requests open at a time")
    who.add_argument("--endpoint", metavar="URL", help="vllm: a server that runs already (unset: one is started for each model)")
    who.add_argument("--endpoint-model", metavar="NAME", help="its name for the model (unset: the only one it serves)")
    who.add_argument("--api-key-env", metavar="NAME", help="environment variable that holds its key (unset: VLLM_API_KEY)")
    who.add_argument("--server-flags", default="", metavar="FLAGS", help='for a started server: --server-flags="--dtype float32"')
    bench_images.add_arguments(parser)
    how = parser.add_argument_group("how")
    flag = argparse.BooleanOptionalAction
    how.add_argument("--new-tokens", type=int, default=32, help="tokens of an answer; at most, with --no-ignore-eos")
    how.add_argument("--ignore-eos", action=flag, default=True, help="answers of fixed length; off, the answers are compared")
    how.add_argument("--limit", type=float, default=3600.0, metavar="SECONDS", help="most time for one process")
    how.add_argument("--record", type=Path, default=Path("outputs/bench/answer.json"), help="JSON file of all rows, added to")


def run(args: argparse.Namespace) -> int:
    """Measure every case, writing and printing rows as they come; 1 if every case failed.

    Raises:
        UserError: for arguments that do not go together, or a record of other settings.
    """
    check(args)
    images = {"data": args.data and str(args.data), "split": args.split, "rows": args.rows, "seed": args.seed}
    images["size"] = args.size and list(args.size)
    requests = bench_images.make(args.data, args.split, args.rows, args.size, args.seed)
    about = bench_images.described(requests)
    settings = {"new_tokens": args.new_tokens, "ignore_eos": args.ignore_eos, "images": images}
    bench_records.start(args.record, "answer", settings, about)
    title = bench_images.in_words(about, args.new_tokens, args.ignore_eos)
    console.print(title, "prompts: " + " | ".join(about["prompts"]), sep="\n", markup=False, soft_wrap=True)
    todo = missing(cases(args, images), bench_records.rows(args.record))
    expected = predict(todo, requests, args.record)
    for case in todo:
        for row in measured(case, args.limit, args.record.with_suffix(".cases")):
            compared = with_identity(row, bench_records.rows(args.record), args.record.with_suffix(".cases"), args.ignore_eos)
            compared = bench_predictions.beside(compared, expected)
            bench_records.add(args.record, compared)
            console.print(line(compared), markup=False, soft_wrap=True)
    found = latest(bench_records.rows(args.record))
    show(found, title)
    files.write_text(
        args.record.with_suffix(".md"), bench_records.markdown(found, SPEED) + "\n" + bench_records.markdown(found, ROOM)
    )
    console.print(f"written: {args.record}", soft_wrap=True)
    return 0 if any(row["error"] is None for row in found) else 1


def missing(wanted: Iterator[Case], rows: list[dict]) -> list[Case]:
    """The cases, less what the record has measured already."""
    done = {key_of(row) for row in rows if row["error"] is None}
    left = [(case, tuple(n for n, key in zip(case.levels, case.keys, strict=True) if key not in done)) for case in wanted]
    return [dataclasses.replace(case, levels=levels) for case, levels in left if levels]


def predict(todo: list[Case], requests: list, record: Path) -> list[dict]:
    """Predict the memory of every case: printed and in the record before the first is loaded."""
    made = [entry for case in todo for entry in bench_predictions.of_case(case, requests)]
    bench_records.note(record, "predictions", made)
    for entry in made:
        console.print(bench_predictions.in_words(entry), markup=False, soft_wrap=True)
    return made


def check(args: argparse.Namespace) -> None:
    """Every problem with the arguments at once. Raises `UserError`."""
    problems = cli.out_of_range(args, ("rows", "new_tokens", "limit", "batch_images", "in_flight"))
    if not (args.model or args.run) and not (args.endpoint and args.engines == [VLLM]):
        problems.append("nobody to answer; name --model or --run, or --engines vllm with --endpoint URL")
    problems += [f"--run; {run} is no run of train.py; it has no run.json; name outputs/<run>, or a folder of weights as --model"
                 for run in args.run if not (run / "run.json").exists()]  # fmt: skip
    if args.endpoint and (len(args.model) > 1 or args.run):
        problems.append("--endpoint serves one model; name its weights alone with --model, or leave --endpoint out")
    cli.check(problems)


def cases(args: argparse.Namespace, images: dict) -> Iterator[Case]:
    """Every model, precision and engine: the ones most alike follow one another."""
    named = [(name, name, None) for name in args.model] or ([] if args.run else [(args.endpoint, None, None)])
    for run in args.run:
        base = records.read_run(run)["arguments"]["model"]
        named += [(f"{run.name}: base", base, None)]
        named += [(f"{run.name}: adapter", base, str(run / "adapter"))] if (run / "adapter").is_dir() else []
        named += [(f"{run.name}: merged", str(run / "merged"), None)]
    for label, model, adapter in named:
        for bits in args.bits:
            for engine in args.engines:
                ways = {ONE_AT_A_TIME: [(1,)], SHARED: [(n,) for n in args.batch_images], VLLM: [tuple(args.in_flight)]}
                for levels in ways[engine]:
                    server = {"server_flags": tuple(shlex.split(args.server_flags))}
                    if engine == VLLM and args.endpoint:
                        server = {"endpoint": args.endpoint, "endpoint_model": args.endpoint_model, "key_env": args.api_key_env}
                    yield Case(label, model, adapter, bits, engine, levels, args.new_tokens, args.ignore_eos, images, **server)


def measured(case: Case, limit: float, folder: Path) -> Iterator[dict]:
    """The rows of one case, measured in a process of its own; those it did not come to are rows that say why.

    Args:
        limit: most seconds it may take.
        folder: where each case keeps its log, and that of its server.
    """
    folder = folder / files.sha256(*map(str, case.keys[0]))[:16]
    spec, rows, log = (folder / name for name in ("case.json", "rows.jsonl", "worker.log"))
    bench_worker.save(case, spec)
    rows.unlink(missing_ok=True)
    reason = _ended(case, [sys.executable, "-m", "sonovqa.bench_worker", str(spec), str(rows)], log, limit)
    found = predictions.read(rows)
    yield from found
    for level in case.levels[len(found) :]:
        yield bench_worker.row_of(case, level, {"error": reason})


def _ended(case: Case, command: list[str], log: Path, limit: float) -> str:
    """Run a case to its end, showing what it is at; gives its last words."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    what, started = f"{case.label}, {case.bits} bits, {case.engine}", time.monotonic()
    with open(log, "wb") as out, cli.stderr.status(what) as status:
        process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        try:
            while process.poll() is None and time.monotonic() - started < limit:
                time.sleep(0.2)
                status.update(f"{what}: {time.monotonic() - started:.0f} s · {serving.tail(log)[-1][:80]}")
            late = process.poll() is None
        finally:  # Ctrl-C reached it as well; SIGTERM lets it stop its server
            if process.poll() is None:
                process.terminate()
            try:
                process.wait(STOP_GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    if late:
        return f"stopped after --limit {limit:.0f} s"
    if process.returncode < 0:
        return f"killed by signal {-process.returncode}" + (" (out of memory, most likely)" if process.returncode == -9 else "")
    return serving.last_words(log).removeprefix("error: ")


def with_identity(row: dict, before: list[dict], folder: Path, ignore_eos: bool) -> dict:
    """The row with, in place of its answers, the share of them that equal those of the first engine of the same weights.

    The answers themselves go to a file in ``folder``. Where the end of the turn is ignored nothing is compared: what
    a model says after its answer means nothing.
    """
    answers = row.pop("answers", None)
    if not answers or ignore_eos:
        return row
    first = next((r for r in before if r["error"] is None and (r["model"], r["bits"]) == (row["model"], row["bits"])), None)
    files.write_json(folder / _file_name(row), answers)
    if first is None or not (folder / _file_name(first)).exists():
        return row
    same = bench_timing.same_share(answers, files.read_json(folder / _file_name(first)))
    return row | {"identical": same, "identical_to": f"{first['engine']} {first['level']}"}


def _file_name(row: dict) -> str:
    return files.sha256(*map(str, key_of(row)))[:16] + ".answers.json"


def key_of(row: dict) -> tuple:
    """What tells a row from the others of its record; see `Case.keys`."""
    return row["model"], row["bits"], row["engine"], row["level"]


def latest(rows: list[dict]) -> list[dict]:
    """The last row of every case, in the order in which cases were first measured."""
    return list({key_of(row): row for row in rows}.values())


def _memory(row: dict, key: str) -> str:
    return memory.gigabytes(row[key]) if row.get(key) is not None else "–"


def _beside(row: dict, what: str) -> str:
    """``15.8 GB (16 GB, 0.99)``: measured, predicted, and the one over the other (`bench_predictions.beside`)."""
    measured = _memory(row, f"memory_{what}")
    if f"predicted_{what}" not in row:
        return measured
    ratio = f", {row[f'ratio_{what}']:.2f}" if f"ratio_{what}" in row else ""
    return f"{measured} ({memory.gigabytes(row[f'predicted_{what}'])}{ratio})"


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


_WHO: bench_records.Columns = {
    "model": lambda row: row["model"],
    "bits": lambda row: str(row["bits"]),
    "engine": lambda row: row["engine"] + ("" if row["engine"] == ONE_AT_A_TIME else f" {row['level']}"),
}
SPEED: bench_records.Columns = _WHO | {
    "answers/s": lambda row: _number(row, "answers_per_second", ".2f"),
    "tokens/s": lambda row: _number(row, "tokens_per_second", ".1f"),
    "s an image: min/mean/median/p95/max": _image_seconds,
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


def show(found: list[dict], title: str) -> None:
    """Print both tables, and under them what is wrong with a row."""
    bench_records.show(f"speed: {title}", found, SPEED)
    bench_records.show("load time and memory", found, ROOM)
    for row in found:
        if told := note(row):
            console.print(" ".join(cell(row) for cell in _WHO.values()), told, sep=": ", markup=False, soft_wrap=True)


def line(row: dict) -> str:
    """A row as it is printed while others are still to come."""
    who = " ".join(cell(row) for cell in _WHO.values())
    figures = {**SPEED, **ROOM, "note": note}
    told = {name: cell(row) for name, cell in figures.items() if name not in _WHO}
    return " · ".join([who, *(f"{name} {value}" for name, value in told.items() if value not in ("–", ""))])
