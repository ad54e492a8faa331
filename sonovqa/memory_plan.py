"""How much memory models need, before any of them is downloaded or a GPU is rented for it.

    python -m sonovqa.memory_plan Qwen/Qwen3-VL-8B-Instruct --batch 4 --max-pixels 262144
    python -m sonovqa.memory_plan 2B 4B 8B 32B                     # Qwen3-VL's published sizes, without a network

Answering is eight questions about one image at once, or one where the family cannot share its prefix (`memory_peak`, as
`memory_check` counts before loading), training is LoRA on all linear layers as train.py does it on CUDA with Unsloth
(`memory.training_bytes`), merging is the 16-bit weights in main memory. Predicted from names and shapes of the tensors
alone; tests/test_memory.py holds both to what was measured.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path

from sonovqa import architectures, bench_records, cli, memory, memory_peak, models, records, weights
from sonovqa.architectures_sizes import SIZES
from sonovqa.cli import UserError, console
from sonovqa.questions import QUESTIONS

ELEMENT = 2  # bytes of an unquantised element on a GPU
#: GB of GPUs that are sold, from a T4 to a B200; what training needs is to leave a tenth of one free.
GPUS, ROOM = (16, 24, 32, 40, 48, 80, 96, 141, 180), 0.9


def plan(name: str, bits: int, batch: int, rank: int, pixels: int, new_tokens: int) -> dict:
    """A row: what one model needs in one precision, in bytes.

    Args:
        name: a key of `architectures_sizes.SIZES`, a hub id or a folder.
        bits: 4, 8 or 16.
        batch: sequences (images with all their questions) of a training step.
        rank: of LoRA.
        pixels: most pixels of an image.
        new_tokens: of an answer.

    Raises:
        UserError: if a folder or hub id cannot be read, or holds no safetensors headers.
    """
    tensors, config = shapes(name)
    whole = memory.weight_bytes(tensors, 16, ELEMENT, config)  # a head that is tied to the embeddings counts once
    how = memory.Training(rank, batch, pixels, "adamw_8bit", checkpointing=True, questions=len(QUESTIONS))
    trained = memory.training_bytes(tensors, config, how, ELEMENT)[bits] + memory.CUDA_CONTEXT
    one_image = memory_peak.expected(config, memory_peak.Batch(new_tokens=new_tokens, pixels=pixels))
    answered = memory_peak.predict(tensors, config, bits, ELEMENT, one_image)
    return {
        "model": name,
        "parameters": round(whole / ELEMENT),
        "bits": bits,
        "loaded_bytes": answered.loaded,
        "answering_bytes": round(answered.peak + memory.CUDA_CONTEXT),
        "training_bytes": round(trained),
        "merging_bytes": round(whole),
        "gpu_gigabytes": next((size for size in GPUS if trained <= ROOM * size * 1e9), None),
    }


def shapes(name: str) -> tuple[dict[str, weights.Tensor], Mapping]:
    """A model's tensors and its config.json; arguments and errors as of `plan`."""
    if name in SIZES:
        return architectures.shapes(name), architectures.config(name).to_dict()
    place = models.locate(name)
    found = weights.of_model(place)
    if found is None:
        raise UserError(f"{name} shows no safetensors headers; a folder or hub id with safetensors weights is needed, or one of "
                        f"{', '.join(SIZES)}; check its name")  # fmt: skip
    return found, weights.config_of(place)


COLUMNS: bench_records.Columns = {
    "model": lambda row: re.sub(r"^(\d+B)$", r"Qwen3-VL-\1", row["model"]),
    "parameters": lambda row: f"{row['parameters'] / 1e9:.1f} B",
    "bits": lambda row: str(row["bits"]),
    "weights": lambda row: records.gigabytes(row["loaded_bytes"]),
    "answering, at its peak": lambda row: records.gigabytes(row["answering_bytes"]),
    "training, at its peak": lambda row: records.gigabytes(row["training_bytes"]),
    "trains on a GPU of": lambda row: f"{row['gpu_gigabytes']} GB" if row["gpu_gigabytes"] else f"more than {GPUS[-1]} GB",
    "merging, main memory": lambda row: records.gigabytes(row["merging_bytes"]),
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__, prog="python -m sonovqa.memory_plan")
    parser.add_argument("models", nargs="+", metavar="MODEL", help=f"hub ids, folders, or {', '.join(SIZES)}")
    parser.add_argument("--bits", nargs="+", type=int, choices=memory.BITS, default=[16, 4], help="precisions of the frozen base")
    parser.add_argument("--batch", type=int, default=8, help="images a micro-batch of training")
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank")
    parser.add_argument("--max-pixels", type=int, default=memory.USUAL_PIXELS, help="of an image")
    parser.add_argument("--new-tokens", type=int, default=48, help="of an answer")
    parser.add_argument("--record", type=Path, help="JSON file to keep the table in (unset: it is printed only)")
    args = parser.parse_args(argv)
    cli.check(cli.out_of_range(args, ("batch", "rank", "max_pixels", "new_tokens"), ()))
    return args


def main(argv: list[str] | None = None) -> None:
    """Print the table, and keep it where that was asked for."""
    args = parse(argv)
    rows = [
        plan(name, bits, args.batch, args.rank, args.max_pixels, args.new_tokens) for name in args.models for bits in args.bits
    ]
    bench_records.show(f"predicted, batch {args.batch}, rank {args.rank}, {args.max_pixels} pixels an image", rows, COLUMNS)
    if args.record:
        settings = {name: getattr(args, name) for name in ("batch", "rank", "max_pixels", "new_tokens")}
        bench_records.start(args.record, "plan", settings, {}, "sonovqa.memory_plan")
        for row in rows:
            if row not in bench_records.rows(args.record):
                bench_records.add(args.record, row)
        console.print(f"written: {args.record}", soft_wrap=True)


if __name__ == "__main__":
    cli.run(main)
