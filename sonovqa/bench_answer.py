"""Answers a second, latency, load time and memory of every model, precision and engine, on the same images and prompts.

    python -m sonovqa.bench answer --model tiny --engines one-at-a-time shared vllm --data data/phantoms
    python -m sonovqa.bench answer --run outputs/phantoms --data data/phantoms --no-ignore-eos --new-tokens 48
    python -m sonovqa.bench answer --model A B --bits 16 8 4 --size 512x384 --markdown paper.md
    python -m sonovqa.bench answer --run outputs/phantoms --bits 16 4 --data data/phantoms --scores 0
    python -m sonovqa.bench answer --engines vllm --endpoint http://127.0.0.1:8000/v1 --in-flight 1 16 64 256

Memory is predicted from the weights' headers, printed and put into the record before anything is loaded. With --scores each
model's answers to the same rows are scored as evaluate.py does. The record (JSON) comes with tables (.md) and a page (.html).

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
from collections.abc import Callable, Iterator
from pathlib import Path

from sonovqa import (
    bench_answer_table,
    bench_cases,
    bench_images,
    bench_predictions,
    bench_records,
    bench_report,
    bench_scores,
    bench_timing,
    bench_worker,
    choice,
    cli,
    endpoint_cost,
    evaluation_flags,
    files,
    predictions,
    provenance,
    records,
    serving,
)
from sonovqa.bench_cases import ENGINES, ONE_AT_A_TIME, SHARED, VLLM, Case, Scoring
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
    evaluation_flags.add_elsewhere(who)
    who.add_argument("--server-flags", default="", metavar="FLAGS", help='for a started server: --server-flags="--dtype float32"')
    bench_images.add_arguments(parser)
    how = parser.add_argument_group("how")
    flag = argparse.BooleanOptionalAction
    how.add_argument("--new-tokens", type=int, default=32, help="tokens of an answer; at most, with --no-ignore-eos")
    how.add_argument("--ignore-eos", action=flag, default=True, help="answers of fixed length; off, the answers are compared")
    how.add_argument("--scores", type=int, metavar="N", help="also score N images of --data's split; 0: all (unset: speed only)")
    how.add_argument("--scores-new-tokens", type=int, metavar="N", help="limit of a scored answer (unset: by what is asked)")
    how.add_argument("--markdown", type=Path, metavar="FILE", help="tables for a paper (unset: beside the record, .md)")
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
    settings = {"new_tokens": args.new_tokens, "ignore_eos": args.ignore_eos, "images": images, "scores": args.scores}
    settings["scores_new_tokens"] = args.scores_new_tokens
    bench_records.start(args.record, "answer", settings, about)
    console.print(bench_answer_table.title(settings, about), markup=False, soft_wrap=True)
    console.print("prompts: " + " | ".join(about["prompts"]), markup=False, soft_wrap=True)
    todo = missing(cases(args, images), args)
    agree(todo, requests, args)
    expected = predict(todo, requests, args.record)
    for case in todo:
        for row in measured(case, args.limit, _kept(args)):
            write(row, expected, args)
    return finish(args)


def write(row: dict, expected: list[dict], args: argparse.Namespace) -> None:
    """Put a measured row, or a model's scores, into the record and print it."""
    if "scores" in row:
        bench_records.note(args.record, "scores", [row["scores"]])
        console.print(bench_answer_table.scores_line(row["scores"]), markup=False, soft_wrap=True)
        return
    compared = with_identity(row, bench_records.rows(args.record), _kept(args), args.ignore_eos)
    compared = bench_predictions.beside(compared, expected)
    bench_records.add(args.record, compared)
    console.print(bench_answer_table.line(compared), markup=False, soft_wrap=True)


def finish(args: argparse.Namespace) -> int:
    """Print the tables, write the pages; 1 if every case failed."""
    record = files.read_json(args.record)
    record |= {"rows": latest(record["rows"]), "scores": latest(record.get("scores", []), bench_scores.key_of)}
    record["verdicts"] = bench_scores.verdicts(record["scores"])
    bench_answer_table.show(record)
    page = args.markdown or args.record.with_suffix(".md")
    report = args.record.with_suffix(".html")
    files.write_text(page, bench_answer_table.markdown(record))
    files.write_text(report, bench_report.render(record))
    console.print(f"written: {args.record}, {page}, {report}", soft_wrap=True)
    return 0 if any(row["error"] is None for row in record["rows"]) else 1


def _kept(args: argparse.Namespace) -> Path:
    """Where logs and answers lie."""
    return args.record.with_suffix(".cases")


def missing(wanted: Iterator[Case], args: argparse.Namespace) -> list[Case]:
    """The cases, less what the record has measured and scored already."""
    record = files.read_json(args.record)
    found = list(wanted)
    if args.scores is not None:
        how = Scoring(str(args.data), args.split, args.scores, args.seed, new_tokens=args.scores_new_tokens)
        scored = [bench_scores.key_of(entry) for entry in record.get("scores", []) if entry["error"] is None]
        own = {run.name: provenance.own_prompts(records.read_run(run)) for run in args.run}
        prompts = {f"{name}: {part}": prompt for name, prompt in own.items() for part in ("base", "adapter", "merged")}
        found = bench_scores.with_scoring(found, how, scored, prompts, _kept(args))
    done = {key_of(row) for row in record["rows"] if row["error"] is None}
    left = [(case, tuple(n for n, key in zip(case.levels, case.keys, strict=True) if key not in done)) for case in found]
    return [bench_scores.with_work(dataclasses.replace(case, levels=levels)) for case, levels in left if levels or case.scoring]


def agree(todo: list[Case], requests: list, args: argparse.Namespace) -> None:
    """`endpoint_cost.consent` to all that the endpoint is sent: warm-ups, measured images and scored ones."""
    sent = [case for case in todo if case.engine == VLLM] if args.endpoint else []
    times = sum(len(case.levels) for case in sent)
    told = endpoint_cost.of_requests(requests, args.new_tokens, times)
    warm = endpoint_cost.of_requests(bench_images.warm_up(requests, bench_worker.WARM_UPS), args.new_tokens, times)
    told += dataclasses.replace(warm, images=0)  # noise: nobody's
    for case in sent:
        told += bench_scores.to_send(case.scoring) if case.scoring else endpoint_cost.NOTHING
    endpoint_cost.consent(args, told)


def predict(todo: list[Case], requests: list, record: Path) -> list[dict]:
    """Predict the memory of every case: printed and in the record before the first is loaded."""
    made = [entry for case in todo for entry in bench_predictions.of_case(case, requests)]
    bench_records.note(record, "predictions", made)
    for entry in made:
        console.print(bench_predictions.in_words(entry), markup=False, soft_wrap=True)
    return made


def check(args: argparse.Namespace) -> None:
    """Every problem with the arguments at once. Raises `UserError`."""
    problems = cli.out_of_range(
        args,
        ("rows", "new_tokens", "limit", "batch_images", "in_flight", "scores_new_tokens"),
        ("price_input", "price_output"),
    )
    if not (args.model or args.run) and not (args.endpoint and args.engines == [VLLM]):
        problems.append("nobody to answer; name --model or --run, or --engines vllm with --endpoint URL")
    problems += [f"--run; {run} is no run of train.py; it has no run.json; name outputs/<run>, or a folder of weights as --model"
                 for run in args.run if not (run / "run.json").exists()]  # fmt: skip
    problems += [f"--run {run}; it answers by a choice head; generated answers are measured here; evaluate.py asks it rightly"
                 for run in args.run if choice.of_run(records.read_run(run))]  # fmt: skip
    if args.scores is not None and (args.data is None or args.scores < 0):
        problems.append(
            f"--scores {args.scores} with --data {args.data}; images of a data set are scored, 0 or more: name --data"
        )
    if args.scores is None and args.scores_new_tokens is not None:
        problems.append(f"--scores-new-tokens {args.scores_new_tokens}; nothing is scored; it goes with --scores N; leave it out")
    if args.endpoint and (len(args.model) > 1 or args.run):
        problems.append("--endpoint serves one model; name its weights alone with --model, or leave --endpoint out")
    if args.endpoint and len(args.bits) > 1:
        told = f"--bits {' '.join(map(str, args.bits))} with --endpoint; a server has one precision; name that one alone"
        problems.append(told)
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
    folder = folder / files.sha256(case.label, str(case.bits), case.engine, *map(str, case.levels))[:16]
    spec, rows, log = (folder / name for name in ("case.json", "rows.jsonl", "worker.log"))
    bench_cases.save(case, spec)
    rows.unlink(missing_ok=True)
    reason = _ended(case, [sys.executable, "-m", "sonovqa.bench_worker", str(spec), str(rows)], log, limit)
    found = predictions.read(rows)
    yield from found
    for level in case.levels[sum("scores" not in row for row in found) :]:
        yield bench_cases.row_of(case, level, {"error": reason})
    if case.scoring and not any("scores" in row for row in found):
        yield {"scores": bench_scores.failed(case, reason)}


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


def latest(entries: list[dict], key: Callable[[dict], tuple] = key_of) -> list[dict]:
    """The last entry of every key, in the order in which they were first measured."""
    return list({key(entry): entry for entry in entries}.values())
