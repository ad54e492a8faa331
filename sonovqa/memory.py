"""Whether a model fits the memory at hand, told from its headers before a single weight is loaded.

The estimate is of what cannot be done without: weights, what training keeps beside them, activations of one micro-batch.
So a model that is refused here would not have run; one that is let through may still run out with long sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from sonovqa import weights
from sonovqa.cli import UserError
from sonovqa.weights import Tensor

BITS = (16, 8, 4)
#: Bytes a quantised element: NF4 with double quantisation has 4 bits and 0.127 bits of constants (QLoRA, arXiv:2305.14314,
#: section 3); 8 bits have one scale a row (LLM.int8(), arXiv:2208.07339), which is nothing beside it.
QUANTISED = {4: 4.127 / 8, 8: 1.0}
#: Parts of names of what is left in 16 bits (`models.load_for_training`): embeddings, head, vision.
NOT_QUANTISED = ("embed_tokens", "lm_head", "embed_out", "visual", "vision_tower", "vision_model", "multi_modal_projector")
BYTES = ("U8", "I8")  # types of weights that are stored quantised already
CUDA_CONTEXT = 500e6  # bytes that CUDA's context and kernels take before any tensor
#: Parts of names of tables of two dimensions that are no linear layer's.
TABLES = ("embed", "embedding", "shared.weight")
QUESTION_TOKENS = 300  # of system text, question and answer, beside an image


@dataclass(frozen=True)
class Training:
    """What is trained, as far as memory goes.

    Attributes:
        rank: LoRA rank on all linear layers; 0 trains every weight.
        images: sequences of a micro-batch.
        pixels: most pixels of an image; ``None``: not known.
        optimizer: train.py's ``--optimizer``; ``None``: its default for the device.
        checkpointing: whether activations are recomputed where there is CUDA.
        merge: whether 16-bit weights are put together in main memory at the end.
    """

    rank: int
    images: int
    pixels: int | None
    optimizer: str | None
    checkpointing: bool
    merge: bool = True


def is_linear(name: str) -> bool:
    """Whether a tensor of two dimensions is a linear layer's matrix, by its name; the LM head is one."""
    return name.endswith(".weight") and not any(part in name for part in TABLES)


def is_quantised(name: str, tensor: Tensor, skipped: Sequence[str] = NOT_QUANTISED) -> bool:
    """Whether a weight is a linear layer that bitsandbytes quantises; norms, biases and embeddings stay as they are, and so
    does what has a part of ``skipped`` in its name."""
    return len(tensor.shape) == 2 and is_linear(name) and not any(part in name for part in skipped)


def weight_bytes(
    tensors: dict[str, Tensor],
    bits: int,
    element: int,
    config: Mapping = MappingProxyType({}),
    skipped: Sequence[str] = NOT_QUANTISED,
) -> float:
    """Bytes of the weights once they are loaded.

    Args:
        tensors: the stored tensors, see `weights.of_model`.
        bits: 4, 8 or 16.
        element: bytes of an unquantised element: 2, or 4 on a CPU, which computes in fp32.
        config: config.json; where embeddings are tied a stored LM head is not loaded.
        skipped: see `is_quantised`.
    """  # fmt: skip
    tied = config.get("tie_word_embeddings") and any("embed_tokens" in name for name in tensors)
    return sum(
        tensor.count * (1 if tensor.dtype in BYTES else QUANTISED[bits] if bits != 16 and is_quantised(name, tensor, skipped)
                        else element)
        for name, tensor in tensors.items() if not (tied and name.endswith("lm_head.weight"))
    )  # fmt: skip


def trained_bytes(tensors: dict[str, Tensor], how: Training, element: int) -> float:
    """Bytes that training adds: trained copies, gradients, optimiser state. LoRA matrices are kept in fp32."""
    state = {"adamw_torch": 8, "adamw_8bit": 2, "paged_adamw_8bit": 0, "sgd": 0}[how.optimizer]  # a trained element
    if how.rank == 0:
        return sum(t.count for t in tensors.values()) * (element + state * (element / 4 if state == 8 else 1))
    linear = [t for name, t in tensors.items() if len(t.shape) == 2 and name.endswith(".weight")
              and "embed" not in name and "lm_head" not in name]  # fmt: skip
    return sum(how.rank * sum(t.shape) for t in linear) * (4 + 4 + state)


def activation_bytes(config: dict, how: Training, element: int) -> float:
    """Bytes of activations of one micro-batch: with checkpointing a hidden state a layer and one layer's own, else all layers'.

    Source: Korthikanti et al. 2022, arXiv:2205.05198, section 4.1 (34 bytes a token and hidden unit in 16 bits), attention
    without its score matrix.
    """
    text, vision = config.get("text_config") or config, config.get("vision_config") or {}
    hidden, layers = text.get("hidden_size", 0), text.get("num_hidden_layers", 0)
    side = vision.get("patch_size", 14)
    side = (side[0] if isinstance(side, list) else side) * vision.get("spatial_merge_size", 2)
    tokens = how.images * ((how.pixels / side**2 if how.pixels else 0) + QUESTION_TOKENS)
    layer = tokens * hidden * 17 * element
    return tokens * hidden * layers * element + layer if how.checkpointing else layer * layers


def free(cuda: bool) -> int:
    """Bytes free on the current CUDA device, or in main memory: what the system has left, within the control group's limit.

    A GPU that shares main memory (GB10) is asked for both: CUDA does not count the page cache as free, which is given back.
    """
    if cuda:
        import torch

        told = torch.cuda.mem_get_info()[0]
        return max(told, free(False)) if torch.cuda.get_device_properties().is_integrated else told
    import psutil

    return min(psutil.virtual_memory().available, *_group_room(Path("/sys/fs/cgroup")), 2**63)


def _group_room(group: Path) -> list[int]:
    """Bytes until a control group's limit, an empty list without one. Its page cache counts as free: it is given back."""
    try:
        limit, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["inactive_file"]
    except (OSError, ValueError, KeyError):
        return []
    return [] if limit == "max" else [int(limit) - used + int(cached)]


def check_inference(name: str, bits: int) -> None:
    """Raise `UserError` if a model cannot be loaded in ``bits`` with what is free, naming the ``--bits`` that would fit."""
    tensors = weights.of_model(name)
    if tensors is None:
        return
    cuda, element = device()
    need = {b: weight_bytes(tensors, b, element, weights.config_of(name)) + CUDA_CONTEXT * cuda for b in BITS}
    _refuse(name, bits, need, free(cuda), cuda)


def check_training(name: str, bits: int, how: Training) -> None:
    """Raise `UserError` if a model cannot be trained, or not be merged afterwards, with what is free."""
    tensors = weights.of_model(name)
    if tensors is None:
        return
    cuda, element = device()
    optimizer = how.optimizer or ("adamw_8bit" if cuda else "adamw_torch")
    how = replace(how, optimizer=optimizer, checkpointing=how.checkpointing and cuda)
    config = weights.config_of(name)
    beside = trained_bytes(tensors, how, element) + activation_bytes(config, how, element) + CUDA_CONTEXT * cuda
    need = {b: weight_bytes(tensors, b, element, config) + beside for b in (BITS if how.rank else (16,))}
    room = free(cuda)
    if how.rank == 0 and need[16] > room:
        raise UserError(f"--full; training all weights of {name} needs about {gigabytes(need[16])}; {_place(room, cuda)}; "
                        "leave --full out: LoRA trains a small part of them")  # fmt: skip
    _refuse(name, bits, need, room, cuda)
    merging = weight_bytes(tensors, 16, 2 if cuda else 4, config)
    room = free(False)
    if how.merge and (cuda or bits != 16) and merging > room:
        raise UserError(f"--merge; putting {name} together at the end needs about {gigabytes(merging)} of main memory; "
                        f"{_place(room, False)}; use --no-merge, and "
                        "merge on another machine with python -m sonovqa.merging")  # fmt: skip


def _refuse(name: str, bits: int, need: dict[int, float], room: int, cuda: bool) -> None:
    if need[bits] <= room:
        return
    fitting = next((b for b in BITS if b < bits and need.get(b, room + 1) <= room), None)
    way_out = f"--bits {fitting} needs about {gigabytes(need[fitting])}" if fitting else (
        f"--bits 4 would need {gigabytes(need[4])}: use a smaller model or a machine with more" if bits > 4 else
        "use a smaller model or a machine with more")  # fmt: skip
    raise UserError(f"{name} needs about {gigabytes(need[bits])} in {bits} bits; {_place(room, cuda)}; {way_out}")


def _place(room: int, cuda: bool) -> str:
    return f"{gigabytes(room)} {'are free on the GPU' if cuda else 'of memory are free here'}"


def device() -> tuple[bool, int]:
    """Whether there is CUDA, and the bytes of an unquantised element there: 2, or 4 on a CPU, which computes in fp32."""
    import torch

    cuda = torch.cuda.is_available()
    return cuda, 2 if cuda else 4


def gigabytes(count: float) -> str:
    """Bytes in units of 10^9, two digits that matter."""
    return f"{count / 1e9:.0f} GB" if count >= 9.95e9 else f"{count / 1e9:.2g} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"
