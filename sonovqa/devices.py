"""What a process computes on: its GPU, its number type, how it saves memory there."""

from __future__ import annotations

import contextlib
import itertools
import os

from sonovqa.cli import UserError, console


def visible() -> list[str] | None:
    """The GPUs that ``CUDA_VISIBLE_DEVICES`` leaves to this process, by number or UUID, as CUDA numbers them; ``None``: all.

    For what is asked of nvidia-smi, which knows nothing of the variable. As in CUDA, names behind one that is none do not
    count. Numbers are the same for both where GPUs are alike or ``CUDA_DEVICE_ORDER=PCI_BUS_ID`` (CUDA C++ Programming
    Guide, environment variables).
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return None
    return list(itertools.takewhile(lambda name: name and not name.startswith("-"), map(str.strip, named.split(","))))


def first_visible() -> str | None:
    """The first of `visible`, which a process uses unless it is told otherwise; ``"0"`` where all are; ``None``: none is."""
    names = visible()
    return "0" if names is None else next(iter(names), None)


def take_gpu() -> None:
    """Make each of torchrun's processes use a GPU of its own, by its ``LOCAL_RANK``. To be called before anything is loaded:
    what asks for the current GPU (quantised weights, memory at hand) would else be given the first one in all of them."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))


def tell_idle() -> None:
    """Say so if there are GPUs that no process of this training uses: a process uses one."""
    import torch

    found, used = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if found > used:
        console.print(f"{found - used} of {found} GPUs stay idle; to use all: torchrun --nproc_per_node={found} train.py …")


def one_gpu(config):
    """A ``TrainingArguments`` whose trainer uses one GPU a process. Left to itself and without torchrun it would copy the model
    to all GPUs it sees and multiply the batch by their number."""
    if config.n_gpu > 1:
        config._n_gpu = 1
    return config


@contextlib.contextmanager
def _in_memory(ways_out: str):
    """Inside, a GPU that runs out of memory is a `UserError` with what is kept and the ``ways_out``, not a traceback."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as fault:
        what = " ".join(str(fault).split(". ")[:2])[:150]
        raise UserError(f"the GPU's memory is full; {what}; {ways_out}") from None


def answering_in_memory():
    """`_in_memory` for a model that answers."""
    return _in_memory("what was answered is kept; take fewer images at once (--batch-images 1), smaller ones (--max-pixels) or "
                      "fewer bits (--bits 4), where the command has the flag")  # fmt: skip


def training_in_memory():
    """`_in_memory` for a model in training. Of what helps only ``--checkpointing`` may change when a run goes on
    (`resuming.FREE`); the rest makes another run of it."""
    return _in_memory("checkpoints are kept; if --no-checkpointing was given, --resume without it; else start another --run: a "
                      "smaller --batch and as much more --accumulate, smaller images (--max-pixels) or --bits 4")  # fmt: skip


def compute_dtype():
    """bf16 where the device computes in it, fp16 on older GPUs (a T4 has no bf16), fp32 on a CPU."""
    import torch

    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def row_multiple() -> int:
    """Tokens that a training batch's rows are a multiple of: 8 with CUDA, else 1.

    There attention with a mask takes another path where a row's length is no multiple of 8, so that a compiled model is compiled
    again, for a quarter of a minute, when the first of the other kind comes along in the middle of a training (PyTorch,
    aten/src/ATen/native/transformers/attention.cpp, ``preprocess_mask``; github.com/pytorch/pytorch/pull/163083).
    """
    import torch

    return 8 if torch.cuda.is_available() else 1


def recomputing(on: bool) -> str | bool:
    """Unsloth's ``use_gradient_checkpointing``: its own, which parks hidden states in main memory; plain when GPUs share it."""
    return on and ("unsloth" if int(os.environ.get("WORLD_SIZE", 1)) == 1 else True)
