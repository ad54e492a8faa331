"""Whether a model fits the memory at hand together with what it is to answer at once, told before a single weight is loaded.

What counts is the peak that `memory_peak` predicts from safetensors headers and config.json: weights, the KV cache and the
activations of the batch that the command will answer, for as many new tokens as it allows. Of an architecture that
`families` does not know only the weights are counted. What one answer leaves to the next (a conversation's history) and the
labels that ``--confidence`` weighs are not.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from sonovqa import families, memory, memory_peak, serving_memory, weights
from sonovqa.cli import UserError
from sonovqa.memory_peak import Batch

Need = Callable[[int, Batch], float]  # bytes at the peak, in so many bits with such a batch
Pixels = tuple[int | None, int | None]


def check_inference(
    name: str, bits: int, batch: Batch | None = None, pixels: Pixels = (None, None), adapter: Path | None = None
) -> None:
    """Raise `UserError` if a model cannot answer a batch in ``bits`` with what is free, naming what of it would fit.

    Args:
        name: a folder or hub id as `models.locate` gives it.
        bits: 4, 8 or 16.
        batch: what is answered at one time; ``None``: one image's eight questions.
        pixels: override of the pixel budget.
        adapter: a run's ``adapter/`` that is put on top.
    """
    tensors = weights.of_model(name)
    if tensors is None:
        return
    config, (cuda, element) = weights.config_of(name), memory.device()
    batch = batch or Batch()
    share = batch.share and families.of_type(config.get("model_type")).shares_prefix
    batch = replace(batch, share=share, pixels=_encoded(batch.pixels, _budget(name, adapter, pixels)))
    beside = memory.CUDA_CONTEXT * cuda + memory_peak.adapter_bytes(adapter)

    def need(bits: int, batch: Batch) -> float:
        return peak(tensors, config, bits, element, batch) + beside

    room, needed = memory.free(cuda), need(bits, batch)
    if needed > room:
        counted = needed > need(bits, replace(batch, images=1))
        at_once = f" with {batch.images} {'images' if share else 'questions'} at once" * counted
        raise UserError(f"{name} needs about {_above(needed, room)} in {bits} bits{at_once}; {memory.place(room, cuda)}; "
                        f"{_way_out(need, bits, batch, room)}")  # fmt: skip


def peak(tensors: Mapping[str, weights.Tensor], config: Mapping, bits: int, element: int, batch: Batch) -> float:
    """Bytes of tensors at the most while a batch is answered; those of the weights where the architecture is unknown, or its
    configuration does not say what is needed: loading it will say why.

    Args:
        tensors, config, bits, element: see `memory_peak.predict`.
        batch: what is answered at one time.
    """
    if config.get("model_type") in families.FAMILIES or (config and weights.is_text_only(config)):
        with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError):
            return memory_peak.predict(tensors, config, bits, element, memory_peak.expected(config, batch)).peak
    return memory.weight_bytes(tensors, bits, element, config)


def _budget(name: str, adapter: Path | None, pixels: Pixels) -> Pixels:
    """Fewest and most pixels of an image: as told, else by the adapter's or model's processor files, as far as these are here."""
    from huggingface_hub import try_to_load_from_cache

    config = None if Path(name).is_dir() else try_to_load_from_cache(name, "config.json")
    folders = [Path(adapter)] if adapter else []
    folders += [Path(config).parent if isinstance(config, str) else Path(name)]
    own = (None, None)
    with contextlib.suppress(OSError, TypeError, ValueError):  # of files that are none: loading them will say what is wrong
        own = next((found for found in map(serving_memory.pixel_budget, folders) if found), own)
    fewest, most = (own[k] if told is None else told for k, told in enumerate(pixels))
    return fewest, most


def _encoded(largest: int | None, budget: Pixels) -> int:
    """Pixels of an image once it is resized. Published budgets go up to 16 million, which no frame of an ultrasound machine
    fills: an image of which nothing is known is a usual one."""
    fewest, most = budget
    return min(max(largest or memory.USUAL_PIXELS, fewest or 0), most or 2**63)


def _way_out(need: Need, bits: int, batch: Batch, room: float) -> str:
    """The least that has to change for all to fit, in flags, or what the most modest would still need."""
    for one in _batches(batch):
        for fewer in (b for b in memory.BITS if b <= bits):
            fitting = bisect.bisect_right(range(1, one.images + 1), room, key=lambda n: need(fewer, replace(one, images=n)))
            if fitting:
                found = replace(one, images=fitting)
                return f"{_flags(bits, batch, fewer, found)} needs about {memory.gigabytes(need(fewer, found))}"
    found = replace(one, images=1)
    flags, least = _flags(bits, batch, 4, found), _above(need(4, found), room)
    return (f"{flags} would need {least}: " if flags else "") + "use a smaller model or a machine with more"


def _above(count: float, room: int) -> str:
    """What is needed, with the digits that tell it from what is free."""
    told = memory.gigabytes(count)
    return told if told != memory.gigabytes(room) else f"{count / 1e9:.4g} GB"


def _batches(batch: Batch) -> Iterator[Batch]:
    """The batch, and then one question at a time where the command has a flag for it: the image is encoded for each anew."""
    yield batch
    if batch.share and batch.alone:
        yield replace(batch, images=1, share=False)


def _flags(bits: int, batch: Batch, fewer: int, found: Batch) -> str:
    """What to write on the command line for ``fewer`` bits and the batch ``found`` in place of ``bits`` and ``batch``."""
    told = [f"--bits {fewer}"] * (fewer != bits) + [f"--batch-images {found.images}"] * (found.images != batch.images)
    return " ".join(told + [batch.alone] * (found.share != batch.share))
