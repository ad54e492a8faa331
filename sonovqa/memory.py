"""How much memory a model's weights and its training take, told from its headers before a single weight is loaded.

Two checks refuse what will not fit. `check_training` here counts weights, what training keeps beside them, and activations of
one micro-batch, and for merging the 16-bit weights in main memory; it is held to within 25 % of what was measured
(tests/test_memory.py). `memory_check.check_inference` counts the peak of answering (`memory_peak`): weights, KV cache and
activations of the images that a command answers at once. Both count CUDA's context. Of what torch's allocator reserves beyond
its tensors, answering counts nothing, and training what it was in the runs that its activations were fitted to. So a model that
is refused might just have fitted, and one that is let through may still run out with long sequences: a smaller ``--batch``,
``--batch-images`` or ``--max-pixels`` needs less.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from sonovqa import devices, families, weights
from sonovqa.cli import UserError
from sonovqa.questions import QUESTIONS, REPORT_ID, YES_NO_TASK
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
#: Tokens beside an image: of system text, of a question with its answer, and of the longest one, to which others are padded.
#: Those of phantoms with Qwen3-VL's tokenizer (outputs/records/bench-train-h200.json).
SYSTEM_TOKENS, QUESTION_TOKENS, LONGEST_TOKENS, ANSWER_TOKENS = 26, 20, 36, 8
USUAL_PIXELS = 800 * 600  # of an image where no limit is given: a frame of an ultrasound machine
#: Numbers a token and hidden unit that a layer keeps for the backward pass, and that live at once while one layer is gone back
#: through, both fitted to what was reserved (bench-train-end-to-end-no-checkpointing-h200.json, bench-train-h200.json).
#: Korthikanti et al. 2022 (arXiv:2205.05198, section 4.1) count 17 of the former (34 bytes in 16 bits), without a gated
#: feed-forward layer.
KEPT_OF_A_LAYER, ONE_LAYER = 20, 44
LOGIT_BYTES = 14  # a logit in 16 bits and in fp32, its softmax and its gradient


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
        questions: of a sequence: all of an image, or one.
        unsloth: whether Unsloth trains; without it what is not quantised is put into fp32 beside what is.
        parked: whether hidden states of recomputed layers wait in main memory (`devices.recomputing`).
    """

    rank: int
    images: int
    pixels: int | None
    optimizer: str | None
    checkpointing: bool
    merge: bool = True
    questions: int = len(QUESTIONS)
    unsloth: bool = True
    parked: bool = True


def of_run(args: argparse.Namespace, family: families.Family, backend: str) -> Training:
    """What train.py's arguments ask for, with the family's own way of batching and the backend that was chosen."""
    shared = args.batching == "shared" and family.shares_prefix
    many, unsloth = args.task == REPORT_ID or (shared and args.task in ("all", YES_NO_TASK)), backend == "unsloth"
    return Training(
        rank=0 if args.full else args.rank, images=args.batch, pixels=args.max_pixels, optimizer=args.optimizer,
        checkpointing=args.checkpointing, merge=args.merge, questions=len(QUESTIONS) if many else 1, unsloth=unsloth,
        parked=unsloth and devices.recomputing(args.checkpointing) == "unsloth",
    )  # fmt: skip


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


def training_bytes(tensors: dict[str, Tensor], config: Mapping, how: Training, element: int) -> dict[int, float]:
    """Most bytes of tensors while training, by the bits that can be trained in; arguments as of `weight_bytes`."""
    beside = trained_bytes(tensors, how, element) + activation_bytes(config, how, element)
    # Without Unsloth: peft's prepare_model_for_kbit_training puts what is not quantised into fp32.
    left = {bits: element if how.unsloth or bits == 16 else 4 for bits in (BITS if how.rank else (16,))}
    return {bits: weight_bytes(tensors, bits, left[bits], config) + beside for bits in left}


def activation_bytes(config: Mapping, how: Training, element: int) -> float:
    """Bytes of activations of one micro-batch: what all layers keep, and the most of one step back.

    Every layer keeps `KEPT_OF_A_LAYER`, with checkpointing its input only, and nothing on the device where that is parked. Going
    back through a layer of the language model, through one of the tower and through the logits follow one another.
    """
    text, vision = config.get("text_config") or config, config.get("vision_config") or {}
    tokens, patches = image_work(config, how.pixels)
    tokens += SYSTEM_TOKENS + (how.questions * QUESTION_TOKENS if how.questions > 1 else LONGEST_TOKENS)
    width = text.get("hidden_size", text.get("d_model", 0))
    depth, tower = _total(vision.get("depth", vision.get("num_hidden_layers", 0))), _most(vision, "embed_dim", "hidden_size")
    each = KEPT_OF_A_LAYER if not how.checkpointing else 0 if how.parked else 1
    kept = each * (tokens * width * text.get("num_hidden_layers", 0) + patches * tower * depth)
    logits = how.questions * ANSWER_TOKENS * text.get("vocab_size", 0) * LOGIT_BYTES
    return how.images * (kept * element + max(logits, ONE_LAYER * element * max(tokens * width, patches * tower)))


def image_work(config: Mapping, pixels: int | None) -> tuple[float, float]:
    """Tokens of an image among the text's, and patches that its tower sees.

    Args:
        config: config.json.
        pixels: most pixels of an image, or ``None``: `USUAL_PIXELS`. Families that resize every image to one size have theirs.
    """
    text, vision = config.get("text_config") or config, config.get("vision_config") or {}
    side = patch_side(vision)
    if not vision:
        return 0, 0
    if "spatial_merge_size" in vision:
        patches = (pixels or USUAL_PIXELS) / side**2
        return patches / vision["spatial_merge_size"] ** 2, patches
    patches = (_most(vision, "image_size") or 336) ** 2 / side**2 * vision.get("max_num_tiles", 1)
    if "cross_attention_layers" in text:  # Llama 3.2 Vision: the image is attended to, and no part of the text
        return 0, patches
    return config.get("mm_tokens_per_image") or config.get("num_query_tokens") or patches, patches


def patch_side(tower: Mapping) -> int:
    """Pixels along a patch, by a vision tower's configuration; 14, as in CLIP's towers, where it does not say."""
    return _most(tower, "patch_size") or 14


def _most(config: Mapping, *names: str) -> int:
    """The first of these that is set; of a list, as towers of several stages have, the largest."""
    found = next((config[name] for name in names if config.get(name)), 0)
    return max(found) if isinstance(found, list | tuple) else found


def _total(depth: int | Sequence[int]) -> int:
    return sum(depth) if isinstance(depth, list | tuple) else depth


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


def check_training(name: str, bits: int, how: Training) -> None:
    """Raise `UserError` if a model cannot be trained, or not be merged afterwards, with what is free."""
    tensors = weights.of_model(name)
    if tensors is None:
        return
    cuda, element = device()
    optimizer = how.optimizer or ("adamw_8bit" if cuda else "adamw_torch")
    how = replace(how, optimizer=optimizer, checkpointing=how.checkpointing and cuda)
    config = weights.config_of(name)
    need = {b: told + CUDA_CONTEXT * cuda for b, told in training_bytes(tensors, config, how, element).items()}
    room = free(cuda)
    if how.rank == 0 and need[16] > room:
        raise UserError(f"--full; training all weights of {name} needs about {gigabytes(need[16])}; {place(room, cuda)}; "
                        "leave --full out: LoRA trains a small part of them")  # fmt: skip
    _refuse(name, bits, need, room, cuda)
    merging = weight_bytes(tensors, 16, 2 if cuda else 4, config)
    room = free(False)
    if how.merge and (cuda or bits != 16) and merging > room:
        raise UserError(f"--merge; putting {name} together at the end needs about {gigabytes(merging)} of main memory; "
                        f"{place(room, False)}; use --no-merge, and "
                        "merge on another machine with python -m sonovqa.merging")  # fmt: skip


def _refuse(name: str, bits: int, need: dict[int, float], room: int, cuda: bool) -> None:
    if need[bits] <= room:
        return
    fitting = next((b for b in BITS if b < bits and need.get(b, room + 1) <= room), None)
    way_out = f"--bits {fitting} needs about {gigabytes(need[fitting])}" if fitting else (
        f"--bits 4 would need {gigabytes(need[4])}: use a smaller model or a machine with more" if bits > 4 else
        "use a smaller model or a machine with more")  # fmt: skip
    raise UserError(f"{name} needs about {gigabytes(need[bits])} in {bits} bits; {place(room, cuda)}; {way_out}")


def place(room: int, cuda: bool) -> str:
    """What is free and where, in words."""
    return f"{gigabytes(room)} {'are free on the GPU' if cuda else 'of memory are free here'}"


def device() -> tuple[bool, int]:
    """Whether there is CUDA, and the bytes of an unquantised element there: 2, or 4 on a CPU, which computes in fp32."""
    import torch

    cuda = torch.cuda.is_available()
    return cuda, 2 if cuda else 4


def gigabytes(count: float) -> str:
    """Bytes in units of 10^9, two digits that matter."""
    return f"{count / 1e9:.0f} GB" if count >= 9.95e9 else f"{count / 1e9:.2g} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"
