"""What a process computes on: its GPU, its number type, how it saves memory there."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess

from sonovqa.cli import UserError, console

NVIDIA_SMI_SECONDS = 20.0  # a driver that hangs must not hang what asks it


def visible() -> list[str] | None:
    """What ``CUDA_VISIBLE_DEVICES`` names, in its order: numbers or UUIDs, perhaps shortened; ``None``: it is unset, all GPUs."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return None
    return list(itertools.takewhile(lambda name: name and not name.startswith("-"), map(str.strip, named.split(","))))


def first_visible() -> str | None:
    """The first of `visible`, which a process uses unless it is told otherwise; ``"0"`` where all are; ``None``: none is."""
    names = visible()
    return "0" if names is None else next(iter(names), None)


def ask_nvidia_smi(*fields: str) -> list[list[str]]:
    """What nvidia-smi says of the GPUs that CUDA shows this process, in CUDA's order; nvidia-smi itself knows nothing of
    ``CUDA_VISIBLE_DEVICES``. Numbers are the same for both where GPUs are alike or ``CUDA_DEVICE_ORDER=PCI_BUS_ID``.

    As in CUDA, names from the first on that is no GPU, several or one named before do not count (CUDA C++ Programming Guide,
    environment variables). Parts of a GPU (MIG) are not listed.

    Args:
        fields: of ``nvidia-smi --help-query-gpu``, such as ``memory.used``; sizes come in MiB.

    Returns:
        A list of values for each GPU; an empty list where nvidia-smi is missing or fails.
    """
    told = _nvidia_smi(f"--query-gpu={','.join(('index', 'uuid', *fields))}")
    listed = [cells for cells in told if len(cells) == 2 + len(fields)]
    names = visible()
    if names is None:
        return [values for _, _, *values in listed]
    chosen: list[list[str]] = []
    for name in names:
        found = [cells for cells in listed if name == cells[0] or (name.startswith("GPU-") and cells[1].startswith(name))]
        if len(found) != 1 or found[0] in chosen:
            break
        chosen += found
    return [values for _, _, *values in chosen]


def computing_processes() -> list[list[str]]:
    """``[the GPU's UUID, number]`` of every process that computes on a GPU, by nvidia-smi."""
    return _nvidia_smi("--query-compute-apps=gpu_uuid,pid")


def _nvidia_smi(query: str) -> list[list[str]]:
    try:
        asked = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
        done = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=NVIDIA_SMI_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return []
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if "," in line]


def processes() -> int:
    """How many processes train together, by torchrun's ``WORLD_SIZE``; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


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

    There PyTorch compiles attention with a mask again when the first row length of the other kind comes along, a multiple of 8 or
    none (aten/src/ATen/native/transformers/attention.cpp, ``preprocess_mask``; github.com/pytorch/pytorch/pull/163083). That is
    the likeliest cause of a step of 16 s in the middle of a training on an H200 (bench-train-end-to-end-16-none-h200.json). No
    step padded so that was timed there since took long; nor did five unpadded ones of an earlier training.
    """
    import torch

    return 8 if torch.cuda.is_available() else 1


def recomputing(on: bool) -> str | bool:
    """Unsloth's ``use_gradient_checkpointing``: its own, which parks hidden states in main memory; plain when GPUs share it."""
    return on and ("unsloth" if processes() == 1 else True)


def keep_blocks_whole() -> None:
    """Compiled blocks stay whole where several processes train; call it after Unsloth is imported, which sets the opposite, and
    before the first forward pass.

    Unsloth compiles each block on its own. For DDP, torch would cut such a graph at the borders of gradient buckets
    (`torch._dynamo.backends.distributed.DDPOptimizer`), which is meant for a whole model in one graph. It does so in the forward
    pass only: a block that is compiled anew while checkpointing runs it again is not cut and keeps other tensors, an error
    (github.com/pytorch/pytorch/issues/144035). Two H200s met that error in their first step (torch 2.11), and not in the
    nine steps run since; why blocks were compiled anew there is not known. `tests/compiled_blocks.py` makes it so on a CPU.

    From torch 2.12 on each thread has this setting for itself. The backward pass, on another thread, needs none: graphs are cut
    in DDP's forward pass only.
    """
    import torch._dynamo

    torch._dynamo.config.optimize_ddp = False
