"""Raw optimiser steps: forward, backward and update on batches made beforehand, in one process a model, choice of
layers and way of batching.

A process of its own makes peak memory honest and lets Unsloth compile once; processes side by side take turns
(`bench_turns`). The batches are those that train.py would make (`planning`, `batching.Collator`) and so is the loss
(`losses`); only the loader and the trainer are left out.
"""

from __future__ import annotations

import contextlib
import gc
import io
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sonovqa import adapting, bench_records, bench_turns, chat, cli, dataset, devices, families, models, planning, records
from sonovqa.cli import UserError, console

LEARNING_RATE, CLIP = 2e-4, 1.0  # train.py's default and the trainer's
ALL = "all"
#: Which layers get LoRA matrices: those of all four toggles, or all but one's.
LAYERS = (ALL, "no-vision", "no-language", "no-attention", "no-mlp")


@dataclass(frozen=True)
class Work:
    """What one process measures.

    Attributes:
        record: where each row goes as it is measured.
        data: a prepared data set with the same number of questions an image.
        model: what ``--model`` names.
        batching: ``shared`` or ``separate``.
        layers: one of `LAYERS`.
        cells: ``((width, height), QA pairs an optimiser step)`` each; images are resized to that size.
        micro: images a micro-batch (separate: so many images' questions); ``None`` for the whole step at once.
        warmup, steps: steps before the clock starts, and timed ones.
        prepared: different steps' batches, used in turn; all are met in the warm-up, so none compiles under the clock.
        bits, rank, checkpointing, seed: as train.py has them.
    """

    record: Path
    data: Path
    model: str
    batching: str
    layers: str
    cells: tuple[tuple[tuple[int, int], int], ...]
    micro: int | None
    warmup: int
    steps: int
    prepared: int
    bits: int
    rank: int
    checkpointing: bool
    seed: int


def measure(work: Work) -> None:
    """Measure all cells, a row of the record each.

    Raises:
        UserError: if the data set has too few images, or the model cannot be had.
    """
    import torch

    with bench_turns.beside_others():
        loaded, model = _load(work)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    start = [parameter.detach().to("cpu", copy=True) for parameter in trained]
    for size, pairs in work.cells:
        with torch.no_grad():  # every cell starts from the same weights, whatever was measured before it
            for parameter, value in zip(trained, start, strict=True):
                parameter.copy_(value)
        steps, about = prepare(work, loaded.processor, model, size, pairs)
        row = row_of(work, size, pairs) | about
        row |= {"backend": loaded.backend, "trained_parameters": sum(parameter.numel() for parameter in trained)}
        try:
            row |= time_steps(model, trained, steps, work.warmup, work.steps, pairs)
        except torch.OutOfMemoryError:
            row |= {"failed": "out of memory"}
        bench_records.add(work.record, row)
        say(row)
        del steps


def row_of(work: Work, size: tuple[int, int], pairs: int) -> dict:
    """What tells a row of raw steps from all others."""
    named = {"kind": "raw", "model": Path(work.model).name, "size": f"{size[0]}x{size[1]}", "pairs": pairs}
    return named | {"layers": work.layers, "batching": work.batching}


def prepare(work: Work, processor, model, size: tuple[int, int], pairs: int) -> tuple[list[list[dict]], dict]:
    """The micro-batches of ``work.prepared`` optimiser steps, in main memory, and what they hold.

    Returns:
        ``(steps, about)``: for each step its batches; token counts of prefix and branch, questions an image, the most that
        sharing can gain in tokens, ``n (P + B) / (P + n B)``, and how a step is dealt.

    Raises:
        UserError: if the images do not suffice, or ``pairs`` is no multiple of the questions an image.
    """
    import torch

    from sonovqa.batching import Collator, Encoder

    models.set_pixels(processor, None, budget(processor, size))
    split, n = like_rows(work.data)
    images = images_of(pairs, n)
    split = resized(drawn(split, images * work.prepared, work.data, work.seed), size)
    _check_sharing(model, work.batching)
    encoder = Encoder(processor, model)
    plan = planning.plan_split(split, "train", encoder, "all", "default", work.batching == "shared", 1 << 20)
    each = 1 if work.batching == "shared" else n  # sequences an image
    micro = min(work.micro or images, images) * each
    collate = Collator({"train": split}, encoder, multiple=devices.row_multiple())
    pinned = torch.cuda.is_available()
    steps = []
    for first in range(0, len(plan.items), images * each):
        items = plan.items[first : first + images * each]
        made = [collate(items[at : at + micro]) for at in range(0, len(items), micro)]
        steps.append([{key: value.pin_memory() if pinned else value for key, value in batch.items()} for batch in made])
    prefix, branch = plan.prefix_tokens / len(plan.items), plan.branch_tokens / plan.questions
    about = {
        "questions_an_image": n,
        "image_tokens": round(encoder.prefix_lengths([size], [None])[0] - _text_tokens(encoder)),
        "prefix_tokens": round(prefix, 2),
        "branch_tokens": round(branch, 2),
        "token_limit": round(n * (prefix + branch) / (prefix + n * branch), 3),
        "micro_batch": micro,
        "accumulate": len(steps[0]),
        "sequence_tokens": max(batch["input_ids"].shape[1] for batches in steps for batch in batches),
    }
    return steps, about


def time_steps(model, trained: Sequence, steps: Sequence[Sequence[dict]], warmup: int, timed: int, pairs: int) -> dict:
    """Run ``warmup + timed`` optimiser steps over ``steps`` in turn; see `figures` for what comes back.

    The timed ones and the last of the warm-up are run alone on the device, the others beside what else warms up there.
    """
    import torch

    cuda = torch.cuda.is_available()
    if cuda:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    optimizer = _optimizer(trained)
    optimizer.zero_grad(set_to_none=True)  # a cell that ran out of memory may have left some
    seconds, losses = [], []

    def run(numbers: Iterable[int]) -> None:
        for number in numbers:
            started = time.perf_counter()
            loss = one_step(model, trained, optimizer, steps[number % len(steps)])
            losses.append(float(loss))  # waits for the device
            seconds.append(time.perf_counter() - started)

    with bench_turns.beside_others():
        run(range(warmup - 1))
    with bench_turns.alone():
        run(range(warmup - 1, warmup + timed))
    return figures(seconds, losses, warmup, pairs)


def one_step(model, trained: Sequence, optimizer, batches: Sequence[dict]):
    """One optimiser step over its micro-batches; the mean loss over all its supervised tokens, as a tensor."""
    import torch

    from sonovqa import losses

    device = trained[0].device
    weight = sum(float(batch["weights"].sum()) for batch in batches)
    total = torch.zeros((), device=device)
    for batch in batches:
        placed = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
        mixed = torch.autocast("cuda", devices.compute_dtype()) if device.type == "cuda" else contextlib.nullcontext()
        with mixed:
            loss = losses.weighted_sum(*losses.answer_logits(model, placed)) / weight
        loss.backward()
        total += loss.detach()
    torch.nn.utils.clip_grad_norm_(trained, CLIP)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


def figures(seconds: Sequence[float], losses: Sequence[float], warmup: int, pairs: int) -> dict:
    """What all ways of training are compared by, from the seconds and losses of all steps, warm-up among them.

    Returns:
        ``seconds`` and ``losses`` of the timed steps; ``median_seconds``, ``mean_seconds``, ``spread_seconds`` (least and
        most); ``pairs_per_second`` at the median; ``warmup_seconds``; ``first_loss``, before any update; mean ``loss`` of
        the timed steps; ``peak_memory_bytes`` of this process, see `records.peak_memory`.
    """
    timed = list(seconds[warmup:])
    median = statistics.median(timed)
    return {
        "median_seconds": round(median, 4),
        "mean_seconds": round(statistics.fmean(timed), 4),
        "spread_seconds": [round(min(timed), 4), round(max(timed), 4)],
        "pairs_per_second": round(pairs / median, 3),
        "peak_memory_bytes": records.peak_memory(),
        "loss": round(statistics.fmean(losses[warmup:]), 6),
        "first_loss": round(losses[0], 6),
        "seconds": [round(value, 4) for value in timed],
        "losses": [round(value, 6) for value in losses[warmup:]],
        "warmup_seconds": round(sum(seconds[:warmup]), 2),
    }


def say(row: dict) -> None:
    """One line as soon as a row is measured."""
    told = f"{row['pairs_per_second']:.1f} QA pairs/s" if "failed" not in row else row["failed"]
    named = " ".join(str(row[key]) for key in ("model", "size", "pairs", "layers", "batching", "way", "setting") if key in row)
    console.print(f"{named}: {told}", soft_wrap=True)


def budget(processor, size: tuple[int, int]) -> int:
    """Most pixels an image may have so that one of ``size`` keeps its size but for rounding up to whole patches."""
    shape = processor.image_processor
    side = getattr(shape, "patch_size", 14) * getattr(shape, "merge_size", 1)
    return -(-size[0] // side) * -(-size[1] // side) * side * side


def like_rows(data: Path):
    """The training rows with the most common number of questions, undecoded, and that number."""
    split = dataset.load_undecoded(data)["train"]
    counts = [len(chat.tasks_of({"questions": questions})) for questions in split["questions"]]
    n = statistics.mode(counts)
    return split.select([row for row, count in enumerate(counts) if count == n]), n


def images_of(pairs: int, n: int) -> int:
    """Images that hold ``pairs`` questions at ``n`` each. Raises `UserError` if it is no whole number."""
    if pairs % n:
        raise UserError(f"--pairs {pairs}; an image has {n} questions here; a multiple of {n} is allowed; such as {n * 8}")
    return pairs // n


def drawn(split, images: int, data: Path, seed: int):
    """``images`` rows, spread over categories. Raises `UserError` if there are fewer: no image is to be seen twice."""
    if len(split) < images:
        raise UserError(f"--data {data}; {len(split)} training images have the same number of questions, {images} are needed; "
                        f"make a larger set, such as prepare_dataset.py phantoms --images {images * 2}")  # fmt: skip
    return dataset.subset(split, images, seed)


def resized(split, size: tuple[int, int]):
    """The split with every image stored as a PNG of ``size``, so that sizes can be compared on the same rows."""
    import datasets

    def store(row: dict) -> dict:
        image, stream = chat.open_image(row["image"]["bytes"]), io.BytesIO()
        if image.size == size:
            return {"image": row["image"]}
        image.resize(size).save(stream, "PNG")
        return {"image": {"bytes": stream.getvalue(), "path": None}}

    datasets.disable_progress_bars()
    return split.map(store, features=split.features, keep_in_memory=True, load_from_cache_file=False)


def in_process(function, work) -> None:
    """Run ``function(work)`` in a process of its own.

    Raises:
        UserError: if it ended badly; it has said why.
    """
    import multiprocessing

    process = multiprocessing.get_context("spawn").Process(target=_run, args=(function, work))
    process.start()
    process.join()
    if process.exitcode:
        raise UserError(f"the measuring process ended with status {process.exitcode}, see above; its rows so far are in "
                        f"{work.record}; the same command goes on after them")  # fmt: skip


def _run(function, work) -> None:
    import multiprocessing

    # Workers of a data loader take the start method of the process; Unsloth's collator cannot be pickled for spawned ones.
    multiprocessing.set_start_method("fork", force=True)
    cli.run(lambda: function(work))


def _load(work: Work):
    import torch

    torch.manual_seed(work.seed)
    backend, _ = models.choose_backend()
    if backend == "unsloth":
        import unsloth  # noqa: F401 - it patches transformers, trl and peft, so it comes before them
    loaded = models.load_for_training(models.locate(work.model), work.bits, checkpointing=work.checkpointing)
    without = {work.layers.removeprefix("no-"): False} if work.layers != ALL else {}
    how = adapting.Adapting(rank=work.rank, seed=work.seed, checkpointing=work.checkpointing, **without)
    model = adapting.adapt(loaded, how)
    if backend == "unsloth":
        model.for_training(use_gradient_checkpointing=devices.recomputing(work.checkpointing))
        return loaded, model
    model.train()
    if work.checkpointing and torch.cuda.is_available():
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    return loaded, model


def _check_sharing(model, batching: str) -> None:
    family = families.of(model.config)
    if batching == "shared" and not family.shares_prefix:
        raise UserError(f"--batching shared; {family.name} cannot share an image among its questions ({family.why_not}); "
                        "use --batching separate")  # fmt: skip


def _text_tokens(encoder) -> int:
    return len(encoder.tokenizer(encoder.template.prefix(None), add_special_tokens=False)["input_ids"]) - 1


def _optimizer(trained: Sequence):
    import torch

    if torch.cuda.is_available():
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(trained, lr=LEARNING_RATE, weight_decay=0.01)
    return torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.01)
