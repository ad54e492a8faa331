"""How fast training is and what memory it takes, all questions of an image in one sequence against one sequence each.

    python -m sonovqa.bench train --data data/phantoms --model tiny --size 128x96
    python -m sonovqa.bench train --data data/bench --model /tmp/qwen3-vl-8b --size 512x384 800x600 --pairs 64 128 256
    python -m sonovqa.bench train --data data/bench --model /tmp/qwen3-vl-8b --size 800x600 --batching shared --end-to-end

Raw steps are forward, backward and update on batches made beforehand. End to end is train.py itself, its data loading
included, against the peers' way: Unsloth and TRL with a chat sample a question (`sonovqa.bench_peers`). With ``--processes 1 2``
train.py also runs under torchrun, on a GPU each; a row of several has the ratio to one process with the same batch a process.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from sonovqa import bench_images, bench_peers, bench_records, bench_steps, bench_turns, cli, dataset, files, records
from sonovqa.cli import UserError, console

GPU_SETTINGS, CPU_SETTINGS = ("2 gc", "8 gc", "16 gc", "8 none"), ("8 none",)
_WHAT = ("kind", "model", "size", "pairs", "layers")
#: What tells rows of a record apart; those of the same ``_WHAT`` are compared.
KEY = (*_WHAT, "batching", "way", "setting", "processes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bench train``."""
    flag = argparse.BooleanOptionalAction
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--data", type=Path, required=True, help="a folder that prepare_dataset.py wrote; its training split is used"
    )
    what.add_argument("--model", nargs="+", default=["tiny"], help="hub ids, local folders, or tiny")
    what.add_argument("--size", nargs="+", type=bench_images.size_of, default=[(800, 600)], metavar="WxH",
                      help="pixels of an image; sides are rounded up to whole patches")  # fmt: skip
    what.add_argument("--pairs", nargs="+", type=int, default=[128], help="QA pairs an optimiser step")
    what.add_argument("--batching", nargs="*", choices=("shared", "separate"), default=["shared", "separate"],
                      help="all questions of an image in one sequence, or one each; end to end none: the peers only")  # fmt: skip
    what.add_argument("--end-to-end", action="store_true", help="train.py against the peers' way instead of raw steps")
    what.add_argument("--peer-settings", nargs="*", metavar="'8 gc'",
                      help="samples a micro-batch and checkpointing: gc (Unsloth's), plain-gc or none, perhaps padding-free "
                      "(unset: several on a GPU, '8 none' elsewhere)")  # fmt: skip
    what.add_argument("--processes", nargs="+", type=int, default=[1],
                      help="end to end: numbers of GPUs, or of processes on a CPU, each with --pairs a step")  # fmt: skip
    how = parser.add_argument_group("how")
    how.add_argument("--steps", type=int, default=5, help="timed optimiser steps")
    how.add_argument("--warmup", type=int, default=3, help="steps before them, where kernels compile")
    how.add_argument("--prepared", type=int, default=2, help="different batches of raw steps, used in turn")
    how.add_argument("--micro", type=int, help="images a micro-batch; separate: their questions (unset: the whole step at once)")
    how.add_argument("--bits", type=int, choices=(4, 8, 16), help="of the frozen base (unset: 4 with CUDA, else 16)")
    how.add_argument("--rank", type=int, default=16, help="LoRA rank")
    how.add_argument("--layers", nargs="+", choices=bench_steps.LAYERS, default=[bench_steps.ALL],
                     help="raw steps: linear layers that get LoRA matrices, as train.py's four toggles choose them")  # fmt: skip
    how.add_argument(
        "--checkpointing", action=flag, default=True, help="recompute activations (CUDA only; the peers' own: above)"
    )
    how.add_argument("--workers", type=int, help="processes that load data, end to end (unset: 4 with CUDA, else none)")
    how.add_argument("--seed", type=int, default=42, help="of rows, LoRA's start and order")
    how.add_argument("--record", type=Path, help="(unset: outputs/bench/train-raw.json or train-end-to-end.json)")


def run(args: argparse.Namespace) -> int:
    """Measure what is not in the record yet, print its table and write it beside the record in Markdown.

    Raises:
        UserError: for arguments that cannot be, or if a process ended badly; rows measured are kept.
    """
    check(args)
    kept = ("steps", "warmup", "prepared", "micro", "bits", "rank", "checkpointing", "workers", "seed")
    about = dataset.about(args.data)
    split, n = bench_steps.like_rows(args.data)
    if args.end_to_end and len(split) < dataset.load_undecoded(args.data)["train"].num_rows:
        raise UserError(
            f"--data {args.data}; its images have different numbers of questions, so a step would not hold --pairs of them; "
            "phantoms all have eight; run `python prepare_dataset.py phantoms --images 400`"
        )
    for pairs in args.pairs:
        bench_steps.images_of(pairs, n)
    sizes = {"data": args.data.name, "fingerprint": about["fingerprint"], "images": len(split), "questions_an_image": n}
    bench_records.start(args.record, "train", {name: getattr(args, name) for name in kept}, sizes)
    for model in args.model:
        if args.end_to_end:
            end_to_end(args, model, n)
        else:
            raw(args, model)
    found = bench_records.rows(args.record)
    bench_records.show(f"training, {records.device()['name']}", compared(found), columns_of(found))
    files.write_text(args.record.with_suffix(".md"), bench_records.markdown(compared(found), columns_of(found)))
    console.print(f"{args.record}, {args.record.with_suffix('.md')}", soft_wrap=True)
    return 0


def check(args: argparse.Namespace) -> None:
    """Fill in what was left unset; every problem of the arguments at once."""
    import torch

    cuda, problems = torch.cuda.is_available(), []
    if not (args.data / "dataset.json").exists():
        problems.append(f"--data {args.data}; no data set there; a folder that prepare_dataset.py wrote is needed; "
                        f"run `python prepare_dataset.py phantoms --images 400 --out {args.data}`")  # fmt: skip
    for name in ("pairs", "steps", "warmup", "prepared", "micro", "rank", "processes"):
        value = min(getattr(args, name)) if name in ("pairs", "processes") else getattr(args, name)
        if value is not None and value < 1:
            problems.append(f"--{name} {value}; must be 1 or more")
    if args.end_to_end and args.layers != [bench_steps.ALL]:
        problems.append(f"--layers {' '.join(args.layers)} with --end-to-end; raw steps are measured so; leave --end-to-end out")
    if not args.end_to_end and args.warmup < args.prepared:
        problems.append(f"--warmup {args.warmup}; every prepared batch is met before the clock starts; at least --prepared "
                        f"{args.prepared} is allowed")  # fmt: skip
    args.peer_settings = args.peer_settings if args.peer_settings is not None else list(GPU_SETTINGS if cuda else CPU_SETTINGS)
    args.bits = args.bits or (4 if cuda else 16)
    args.workers = args.workers if args.workers is not None else (4 if cuda else 0)
    args.settings = [bench_peers.setting_of(text) for text in args.peer_settings]
    for setting in args.settings if args.end_to_end else ():
        problems += [f"--peer-settings '{setting}'; --pairs {pairs} is no multiple of {setting.batch}; a divisor is allowed"
                     for pairs in args.pairs if pairs % setting.batch]  # fmt: skip
    kind = "end-to-end" if args.end_to_end else "raw"
    args.record = args.record or records.ROOT / "outputs" / "bench" / f"train-{kind}.json"
    cli.check(problems)


def raw(args: argparse.Namespace, model: str) -> None:
    """Raw steps of one model, a process a way of batching and choice of layers, cells that are in the record left out."""
    wanted = tuple(itertools.product(args.size, args.pairs))
    for batching, layers in itertools.product(args.batching, args.layers):
        work = bench_steps.Work(
            args.record, args.data, model, batching, layers, wanted, args.micro, args.warmup, args.steps, args.prepared,
            args.bits, args.rank, args.checkpointing, args.seed,
        )  # fmt: skip
        cells = tuple(cell for cell in wanted if is_new(args.record, bench_steps.row_of(work, *cell)))
        if cells:
            bench_steps.in_process(bench_steps.measure, replace(work, cells=cells))


def end_to_end(args: argparse.Namespace, model: str, n: int) -> None:
    """train.py, then the peers' way in each of its settings, a process each, those in the record left out."""
    for size in args.size:
        for pairs in args.pairs:
            images = bench_steps.images_of(pairs, n) * (args.warmup + args.steps)
            most = images * max(args.processes)
            bench_steps.drawn(bench_steps.like_rows(args.data)[0], most, args.data, args.seed)  # are there enough?
            for batching in args.batching:
                for processes in args.processes:
                    train(args, model, size, pairs, images, n, batching, processes)
            for setting in args.settings:
                work = bench_peers.Work(
                    args.record, args.data, model, size, pairs, images, setting, args.warmup, args.steps, args.bits, args.rank,
                    args.workers, args.seed,
                )  # fmt: skip
                if is_new(args.record, bench_peers.row_of(work)):
                    bench_steps.in_process(bench_peers.measure, work)


def train(
    args: argparse.Namespace, model: str, size: tuple[int, int], pairs: int, images: int, n: int, batching: str, processes: int
) -> None:
    """Run train.py on as many images and add what its run.json says of the steps after the warm-up.

    Args:
        args, model, size: the arguments, and what is measured of them.
        pairs, images: QA pairs a step and images in all, of each process.
        n: questions an image.
        batching, processes: of train.py.

    Raises:
        UserError: if it ended badly; it has said why.
    """
    step = pairs if batching == "separate" else pairs // n
    micro = min((args.micro or step) * (n if batching == "separate" and args.micro else 1), step)
    setting = f"{micro} x {step // micro}{'' if args.checkpointing else ' none'}"
    row = {"kind": "end to end", "model": Path(model).name, "size": f"{size[0]}x{size[1]}", "pairs": pairs * processes,
           "batching": batching, "way": f"train.py, {batching}", "setting": setting}  # fmt: skip
    if processes > 1:
        row |= {"way": f"{row['way']}, {processes} processes", "processes": processes}
    if not is_new(args.record, row):
        return
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
        words = [sys.executable, *launcher, records.ROOT / "train.py", "--data", args.data, "--model", model]
        words += ["--outputs", folder, "--run-name", "bench", "--batching", batching, "--batch", micro]
        words += ["--accumulate", step // micro, "--log-every", 1, "--steps", args.warmup + args.steps]
        words += ["--eval-every", args.warmup + args.steps, "--max-images", images * processes]
        words += ["--max-pixels", pixels(model, size), "--bits", args.bits, "--rank", args.rank, "--seed", args.seed]
        words += ["--workers", args.workers, "--checkpointing" if args.checkpointing else "--no-checkpointing"]
        words += ["--lr", bench_steps.LEARNING_RATE, "--report-to", "none", "--no-merge"]
        with bench_turns.alone():  # train.py itself knows of no turns
            done = subprocess.run([str(word) for word in words], check=False)
        if done.returncode:
            raise UserError(f"train.py ended with status {done.returncode}, see above; rows measured are in {args.record}; "
                            "the same command goes on after them")  # fmt: skip
        made = files.read_json(Path(folder) / "bench" / "run.json")
    row |= of_run(made, args.warmup, pairs * processes) | {"wall_seconds": round(time.perf_counter() - started, 1)}
    bench_records.add(args.record, row)
    bench_steps.say(row)


def of_run(made: dict, warmup: int, pairs: int) -> dict:
    """The figures of a run.json with a log line a step; ``data_wait_share`` is of the timed steps' seconds."""
    logged = [entry for entry in made["training"]["curve"] if "loss" in entry]
    seconds = [entry["step_seconds"] for entry in logged]
    row = bench_steps.figures(seconds, [entry["loss"] for entry in logged], warmup, pairs)
    row["peak_memory_bytes"] = max(entry["peak_memory_bytes"] for entry in logged)
    row["data_wait_share"] = round(sum(entry["data_wait_seconds"] for entry in logged[warmup:]) / sum(seconds[warmup:]), 4)
    return row | {"backend": made["backend"]}


def pixels(model: str, size: tuple[int, int]) -> int:
    """train.py's ``--max-pixels`` that keeps images at ``size``, see `bench_steps.budget`."""
    from sonovqa import models

    return bench_steps.budget(models.load_processor(models.locate(model)), size)


def is_new(record: Path, row: dict) -> bool:
    """Whether the record lacks a row of this name; those that it holds are not measured again."""
    return key_of(row) not in {key_of(found) for found in bench_records.rows(record)}


def key_of(row: dict) -> tuple:
    """What tells a row from all others of its record. Rows without ``layers`` are of all of them."""
    return tuple(({"layers": bench_steps.ALL} | row).get(name) for name in KEY)


def compared(rows: list[dict]) -> list[dict]:
    """The rows in the order of what they measured, however they were measured, those of shared batching with ``ratio`` and
    ``against``: how many times the QA pairs a second of the fastest other row of the same model, size and pairs a step, and
    which that is; end to end the peers' rows, where there are any. Of several processes the row of one that differs in nothing
    else."""
    return [row | _ratio(row, rows) for row in sorted(rows, key=_place)]


def _place(row: dict) -> tuple:
    """Where a row stands: models and sizes one after the other, what is compared together, the shared image first."""
    width, height = map(int, row["size"].split("x"))
    layers = bench_steps.LAYERS.index(row.get("layers", bench_steps.ALL))
    return row["model"], width * height, row["pairs"], layers, ("shared", "separate", None).index(row.get("batching"))


def markdown(record: dict) -> str:
    """A record's table in Markdown."""
    return bench_records.markdown(compared(record["rows"]), columns_of(record["rows"]))


def columns_of(rows: list[dict]) -> bench_records.Columns:
    """The columns that fit a record's rows; those of layers only where they differ."""
    if rows and rows[0]["kind"] == "end to end":
        return END_TO_END
    return RAW if {row.get("layers", bench_steps.ALL) for row in rows} <= {bench_steps.ALL} else LAYERS | RAW


def _ratio(row: dict, rows: list[dict]) -> dict:
    if processes := row.get("processes"):
        alone = row | {"pairs": row["pairs"] // processes, "way": f"train.py, {row['batching']}", "processes": None}
        one = next((other for other in rows if key_of(other) == key_of(alone) and "failed" not in other), None)
        return {"ratio": round(row["pairs_per_second"] / one["pairs_per_second"], 3), "against": "1 process"} if one else {}
    alike = [other for other in rows if _alike(other, row) and "failed" not in other and other is not row]
    others = [other for other in alike if "setting" in other and "batching" not in other] or alike
    if row.get("batching") != "shared" or "failed" in row or not others:
        return {}
    best = max(others, key=lambda other: other["pairs_per_second"])
    ratio = row["pairs_per_second"] / best["pairs_per_second"]
    return {"ratio": round(ratio, 3), "against": best.get("setting") or best["batching"]}


def _alike(one: dict, other: dict) -> bool:
    return key_of(one)[: len(_WHAT)] == key_of(other)[: len(_WHAT)]


def _speed(row: dict) -> str:
    return row["failed"] if "failed" in row else f"{row['pairs_per_second']:.1f}"


def _seconds(row: dict) -> str:
    if "failed" in row:
        return ""
    least, most = row["spread_seconds"]
    return f"{row['median_seconds']:.3g} ({least:.3g} to {most:.3g})"


def _memory(row: dict) -> str:
    return "" if "failed" in row else records.gigabytes(row["peak_memory_bytes"])


def _loss(row: dict) -> str:
    return "" if "failed" in row else f"{row['first_loss']:.3f}, {row['loss']:.3f}"


def _gain(row: dict) -> str:
    return f"{row['ratio']:.2f}" if "ratio" in row else ""


_NAMED: bench_records.Columns = {
    "model": lambda row: f"{row['model']}, {row['backend']}",
    "image": lambda row: row["size"],
    "pairs a step": lambda row: str(row["pairs"]),
}
_MEASURED: bench_records.Columns = {
    "QA pairs/s ↑": _speed,
    "s a step ↓": _seconds,
    "memory ↓": _memory,
    "loss: first, mean": _loss,
}
LAYERS: bench_records.Columns = {
    **_NAMED,
    "LoRA on": lambda row: row["layers"].replace("-", " "),
    "trained": lambda row: f"{row['trained_parameters']:,}",
}
RAW: bench_records.Columns = {
    **_NAMED,
    "image, prefix, branch tokens": lambda row: f"{row['image_tokens']}, {row['prefix_tokens']:.0f}, {row['branch_tokens']:.1f}",
    "batching": lambda row: f"{row['batching']}, {row['micro_batch']} x {row['accumulate']}",
    **_MEASURED,
    "ratio ↑": _gain,
    "token limit": lambda row: f"{row['token_limit']:.2f}" if row["batching"] == "shared" else "",
}
END_TO_END: bench_records.Columns = {
    **_NAMED,
    "way": lambda row: row["way"],
    "setting": lambda row: row["setting"],
    **_MEASURED,
    "data ↓": lambda row: "" if "failed" in row else f"{row['data_wait_share']:.1%}",
    "ratio ↑": lambda row: f"{_gain(row)} ({row['against']})" if "ratio" in row else "",
}
