"""Find and load a model: Unsloth's `FastVisionModel` where CUDA and the model allow, transformers + PEFT elsewhere."""

from __future__ import annotations

import contextlib
import importlib.util
import logging as stdlib_logging
from dataclasses import dataclass
from pathlib import Path

from sonovqa import (
    adapters,
    credentials,
    devices,
    families,
    memory,
    memory_check,
    memory_peak,
    text_only,
    torchvision_ops,
    weights,
)
from sonovqa.cli import UserError
from sonovqa.weights import check_folder

LEAST_PIXELS = 28 * 28  # one token of Qwen2-VL; of Qwen3-VL it is 32 x 32


@dataclass
class Loaded:
    """A model ready for use, its processor, and how it was loaded (``unsloth`` or ``transformers``, and why)."""

    model: object
    processor: object
    backend: str
    why: str


def locate(name: str) -> str:
    """The folder or hub id behind ``--model``: `tiny` is built at its first use, a local folder is checked, else a hub id.

    Raises:
        UserError: if a local folder lacks what a model needs or holds pickled weights only, or a hub id cannot be read.
    """
    if name == "tiny" or name.startswith("tiny-"):
        from sonovqa import tiny

        return str(tiny.ensure(name.partition("-")[2] or "base"))
    path = Path(name)
    if path.is_dir():
        check_folder(path)
    elif path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(
            f"no model folder at {name}; a local folder, a hub id such as Qwen/Qwen3-VL-8B-Instruct, or tiny is allowed"
        )
    else:
        weights.check_hub(name)
    return name


def load_processor(name: str, pixels: tuple[int | None, int | None] = (None, None), family: families.Family | None = None):
    """The processor of a model, its pixel budget set.

    Args:
        name: a local folder or hub id.
        pixels: fewest and most pixels an image is resized to; ``None`` keeps the model's own.
        family: whose chat template it gets if it has none.
    """
    torchvision_ops.declare()
    from transformers import AutoProcessor

    if weights.takes_no_images(name):
        return text_only.load_processor(name)
    processor = AutoProcessor.from_pretrained(name)
    processor.tokenizer.padding_side = "right"
    if family and not processor.chat_template:
        processor.chat_template = family.template
    set_pixels(processor, *pixels)
    return processor


def wrong_pixels(fewest: int | None, most: int | None) -> list[str]:
    """What is wrong with a pixel budget as it was typed, a line each, for `cli.check`."""
    problems = [
        f"--{name}-pixels {value}; at least {LEAST_PIXELS} (28 x 28, a token's worth) are needed"
        for name, value in (("min", fewest), ("max", most))
        if value is not None and value < LEAST_PIXELS
    ]
    if fewest is not None and most is not None and fewest > most:
        problems.append(f"--min-pixels {fewest} with --max-pixels {most}; the fewest must not exceed the most")
    return problems


def set_pixels(processor, fewest: int | None, most: int | None) -> None:
    """Write a pixel budget into a Qwen-VL processor; it is saved with the processor and read back by everything after it.

    Raises:
        UserError: if the processor has no pixel budget (its family resizes to a fixed size) but one was asked for.
    """
    if fewest is None and most is None:
        return
    size = getattr(processor.image_processor, "size", None)
    if size is None or "longest_edge" not in size:
        raise UserError(
            "--min-pixels/--max-pixels; this model's processor resizes every image to one size; leave the two flags out"
        )
    fewest = size["shortest_edge"] if fewest is None else fewest
    most = size["longest_edge"] if most is None else most
    if fewest > most:
        fewest = most
    processor.image_processor.size = {"shortest_edge": fewest, "longest_edge": most}


def pixel_budget(processor) -> tuple[int, int] | None:
    """``(fewest, most)`` pixels an image is resized to, or ``None`` for a family with a fixed image size."""
    size = getattr(processor.image_processor, "size", None) or {}
    return (size["shortest_edge"], size["longest_edge"]) if "longest_edge" in size else None


def choose_backend(asked: str = "auto", family: families.Family | None = None) -> tuple[str, str]:
    """``(backend, reason)``: Unsloth needs a CUDA device, its package and a family it knows; everything else is transformers.

    Args:
        asked: train.py's ``--backend``.
        family: of the model; ``None``: not asked about.

    Raises:
        UserError: if ``unsloth`` was asked for and cannot be had.
    """
    import torch

    missing = []
    if not torch.cuda.is_available():
        missing.append("no CUDA device")
    if importlib.util.find_spec("unsloth") is None:
        missing.append("unsloth is not installed")
    if family and not family.unsloth:
        missing.append(f"Unsloth is not used for {family.name}")
    if asked == "unsloth" and missing:
        raise UserError(
            f"--backend unsloth; {' and '.join(missing)}; use --backend auto, or pip install -r requirements.txt on a GPU box"
        )
    if asked == "transformers" or missing:
        return "transformers", "asked for" if asked == "transformers" else ", ".join(missing)
    return "unsloth", "asked for" if asked == "unsloth" else "CUDA device, package and family found"


def load_for_training(name: str, bits: int, pixels=(None, None), backend: str = "auto", checkpointing: bool = True) -> Loaded:
    """Load a base model for fine-tuning.

    Args:
        name: a local folder or hub id (see `locate`).
        bits: 4 (NF4), 8 or 16; on a CPU 16 means the fp32 copy of 16-bit weights.
        pixels: the pixel budget, see `load_processor`.
        backend: ``auto``, ``unsloth`` or ``transformers``.
        checkpointing: recompute activations in the backward pass (saves memory, costs a third of the time).

    Raises:
        UserError: if the backend cannot be had or the model not be loaded.
    """
    backend, why = choose_backend(backend, families.of_model(name))
    if weights.takes_no_images(name):
        backend, why = "transformers", "a text-only model"
    model = _load_unsloth(name, bits, checkpointing) if backend == "unsloth" else _load_transformers(name, bits)
    return Loaded(model, load_processor(name, pixels, families.of(model.config)), backend, why)


def quiet() -> None:
    """Keep transformers' own progress bars and notes off the terminal: what a user needs to know is said here."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    # On some CPUs bitsandbytes asks for a package of faster 4-bit kernels; nothing here computes in 4 bits on a CPU.
    stdlib_logging.getLogger("bitsandbytes").setLevel(stdlib_logging.ERROR)


def _load_unsloth(name: str, bits: int, checkpointing: bool):
    import unsloth

    quiet()
    with _one_line(name):
        model, _ = unsloth.FastVisionModel.from_pretrained(
            name,
            load_in_4bit=bits == 4,
            load_in_8bit=bits == 8,
            load_in_16bit=bits == 16,
            dtype=devices.compute_dtype(),
            max_seq_length=32768,
            # The very weights that the adapter is merged onto later, not Unsloth's own quantised upload of them.
            use_exact_model_name=True,
            use_gradient_checkpointing=devices.recomputing(checkpointing),
        )
    return model


def _load_transformers(name: str, bits: int, device_map=None, max_memory=None):
    torchvision_ops.declare()  # before the first import of transformers, which notes what is installed
    import torch
    from transformers import BitsAndBytesConfig

    quiet()
    quantization = None
    if bits in (4, 8):
        quantization = BitsAndBytesConfig(
            load_in_4bit=bits == 4,
            load_in_8bit=bits == 8,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=devices.compute_dtype(),
            # Patterns matched from a name's beginning: "visual" alone would miss "model.visual".
            llm_int8_skip_modules=[f".*{part}" for part in memory.NOT_QUANTISED],
        )
    if device_map is None and torch.cuda.is_available():
        device_map = {"": torch.cuda.current_device()}
    with _one_line(name):
        return text_only.model_class(name).from_pretrained(
            name,
            dtype=devices.compute_dtype(),
            quantization_config=quantization,
            device_map=device_map,
            max_memory=max_memory,
            attn_implementation="sdpa",
            use_safetensors=True,
        )


@contextlib.contextmanager
def _one_line(name: str):
    """Turn the loaders' long complaints about a name, access or files into one line."""
    try:
        yield
    except (OSError, ValueError) as fault:
        first = credentials.hub_fault(fault, 300)
        hint = (
            "set HF_TOKEN to a token that was granted access"
            if "gated" in str(fault).lower() or "401" in str(fault)
            else "check the name"
        )
        raise UserError(
            f"cannot load --model {name}; {first}; a local folder, a hub id you may read, or tiny is allowed; {hint}"
        ) from fault


def load_for_inference(
    name: str,
    bits: int = 16,
    adapter: Path | None = None,
    pixels=(None, None),
    batch: memory_peak.Batch | None = None,
):
    """A model in evaluation mode and its processor.

    Args:
        name: a run folder's ``merged/``, any model folder, a hub id or ``tiny``.
        bits: 4, 8 or 16.
        adapter: a run's ``adapter/`` to put on top; its own processor files are then used.
        pixels: override of the pixel budget.
        batch: what will be answered at one time, for `memory_check.check_inference`.

    Returns:
        ``(model, processor)``.

    Raises:
        UserError: if something cannot be loaded or does not fit the memory at hand, or the adapter belongs to another base.
    """
    name = locate(name)
    if adapter is not None:
        adapters.check(adapter, name)
    memory_check.check_inference(name, bits, batch, pixels, adapter)
    model = _load_transformers(name, bits)
    if adapter is not None:
        model = adapters.attach(model, adapter)
    source = str(adapter) if adapter is not None and (Path(adapter) / "processor_config.json").exists() else name
    return model.eval(), load_processor(source, pixels, families.of(model.config))
