"""What fits on the machine that serves: memory, context and sequences, told from headers before vLLM is started.

vLLM takes a share of the GPU (``--gpu-memory-utilization``), puts weights and working memory into it and fills the rest with
blocks of KV cache. How many requests run at once is what that rest holds, so it is worked out here from the same numbers. A
suggestion, printed and never applied: vLLM measures for itself, and knows of quantised weights and caches what this does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from sonovqa import devices, files, memory, weights

UTILISATION = 0.92  # vLLM's own default (config/cache.py)
#: What vLLM takes on a GPU beside weights, activations and KV cache: CUDA's context, and graphs of the model.
CUDA_GRAPHS = 1e9
HELD_BACK = 0.5e9  # bytes left alone on a GPU that others use as well
#: Tokens of a step and most requests at once that vLLM plans for, by the GPU's memory (engine/arg_utils.py).
LARGE_GPU = 70 * 2**30
STEP_TOKENS, MOST_SEQUENCES = {True: 8192, False: 2048}, {True: 1024, False: 256}
TEXT_TOKENS = 512  # beside an image: system text, a question, its answer, and some history
CPU_SEQUENCES = 16  # requests at full context that a CPU's cache should hold
PARTS = (1, 2, 4, 8)  # what --tensor-parallel-size can be: the number of key-value heads is divided by it


@dataclass(frozen=True)
class Gpu:
    """One GPU: its name, its memory and what of it is free in bytes, and its compute capability."""

    name: str
    total: int
    free: int
    capability: tuple[int, int]


@dataclass(frozen=True)
class Needs:
    """What a model needs to be served.

    Attributes:
        weights: bytes of the 16-bit weights, adapters included.
        token: bytes of KV cache a token takes.
        image, context: tokens of the largest image, and of the longest request.
        hidden, vocabulary: widths, for the working memory of a step.
    """

    weights: float
    token: int
    image: int
    context: int
    hidden: int
    vocabulary: int


@dataclass(frozen=True)
class Suggestion:
    """Flags for one GPU of ``parts``, and the tokens of KV cache that vLLM then has; ``flags`` is empty where nothing fits."""

    flags: tuple[str, ...]
    tokens: int
    sequences: int
    parts: int


def needs_of(model: str, adapters: list[Path], image: int, context: int) -> Needs | None:
    """`Needs` from a model's headers and configuration; ``None`` where they cannot be had.

    Args:
        model: a folder or a hub id; adapters: folders of adapters on it; image, context: tokens.

    A token's key and value in every layer are ``2 · layers · heads · width`` elements. Source: PagedAttention, arXiv:2309.06180.
    """
    tensors, config = weights.of_model(model), weights.config_of(model)
    text = config.get("text_config") or config
    heads = text.get("num_key_value_heads") or text.get("num_attention_heads")
    if not tensors or not heads:
        return None
    width = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    stored = memory.weight_bytes(tensors, 16, 2)
    stored += sum((folder / "adapter_model.safetensors").stat().st_size for folder in adapters)
    token = 2 * text["num_hidden_layers"] * heads * width * 2
    return Needs(stored, token, image, context, text["hidden_size"], text["vocab_size"])


def working_bytes(needs: Needs, large: bool) -> float:
    """Bytes of a step beside weights and cache: activations of a layer, logits of all requests, CUDA's context and graphs.

    Source of the 34 bytes a token and hidden unit: as `memory.activation_bytes`.
    """
    activations = 34 * STEP_TOKENS[large] * needs.hidden
    logits = 2 * 4 * MOST_SEQUENCES[large] * needs.vocabulary
    return activations + logits + memory.CUDA_CONTEXT + CUDA_GRAPHS


def suggest(needs: Needs, gpu: Gpu, parts: int = 1) -> Suggestion:
    """What to give vLLM for a model on one GPU of ``parts`` that share it.

    Returns:
        ``--gpu-memory-utilization`` as free memory allows, ``--max-model-len`` no longer than the cache, ``--max-num-seqs`` as
        many requests of one image as the cache holds, ``--dtype`` where the GPU has no bf16. Without flags: not even one
        request would fit.
    """
    share = min(UTILISATION, math.floor(100 * (gpu.free - HELD_BACK * (gpu.free < 0.95 * gpu.total)) / gpu.total) / 100)
    large = gpu.total >= LARGE_GPU and "A100" not in gpu.name
    room = share * gpu.total - needs.weights / parts - working_bytes(needs, large)
    tokens = max(0, math.floor(room / (needs.token / parts)))
    one = needs.image + TEXT_TOKENS
    if tokens < one:
        return Suggestion((), tokens, 0, parts)
    context = needs.context if tokens >= needs.context else tokens // 256 * 256 or tokens
    sequences = min(tokens // min(one, context), MOST_SEQUENCES[large])
    sequences = sequences // 8 * 8 or sequences
    flags = ["--gpu-memory-utilization", f"{share:.2f}", "--max-num-seqs", str(sequences)]
    flags += ["--max-model-len", str(context)] if context != needs.context else []
    flags += ["--dtype", "float16"] if gpu.capability < (8, 0) else []  # bf16 came with compute capability 8.0
    flags += ["--tensor-parallel-size", str(parts)] if parts > 1 else []
    return Suggestion(tuple(flags), tokens, sequences, parts)


def told(needs: Needs, gpus: list[Gpu]) -> str:
    """The suggestion in two lines for the GPUs of this machine, or what would be needed where it does not fit."""
    gpu, gb = gpus[0], memory.gigabytes
    head = (
        f"{gpu.name}: {gb(gpu.free)} of {gb(gpu.total)} free; weights {gb(needs.weights)}, KV cache {needs.token:,} bytes a token"
    )
    fitting = next((found for parts in PARTS if (found := suggest(needs, gpu, parts)).flags), None)
    if fitting is None:
        return f"{head}\nthis does not fit, not even on {PARTS[-1]} of these: serve a smaller model"
    if fitting.parts > len(gpus):
        return f"{head}\nthis does not fit on {len(gpus)}; {fitting.parts} of these would do: -- {' '.join(fitting.flags)}"
    holds = f"{fitting.tokens:,} tokens: {fitting.sequences} requests of one image at once, {fitting.tokens // needs.context} of "
    return f"{head}\nsuggested: -- {' '.join(fitting.flags)}   (room for {holds}{needs.context:,} tokens)"


def cpu_told(needs: Needs, space: float, free: float) -> str:
    """The same for a CPU, whose KV cache is ``VLLM_CPU_KVCACHE_SPACE`` GiB.

    Args:
        space: GiB it is set to. free: bytes of memory that are free.
    """
    gb = memory.gigabytes
    held = math.floor(space * 2**30 / needs.token)
    wanted = math.ceil(CPU_SEQUENCES * needs.context * needs.token / 2**30)
    most = max(1, math.floor((free - needs.weights) / 2 / 2**30))
    head = f"CPU: {gb(free)} free; weights {gb(needs.weights)}, KV cache {needs.token:,} bytes a token"
    advice = f"suggested: VLLM_CPU_KVCACHE_SPACE={min(wanted, most)}"
    return (
        f"{head}\n{advice}   ({space:g} GiB has room for {held:,} tokens: {held // needs.context} requests of {needs.context:,})"
    )


def gpus() -> list[Gpu]:
    """The NVIDIA GPUs that vLLM would see, in its order, without those that share main memory and tell no size of their own; none
    where nvidia-smi is missing or fails."""
    told = devices.ask_nvidia_smi("name", "memory.total", "memory.free", "compute_cap")
    return [gpu_of(*about) for about in told if about[1].isdigit() and about[2].isdigit()]


def gpu_of(name: str, total: str, free: str, capability: str) -> Gpu:
    """A GPU as nvidia-smi tells it: ``NVIDIA H200``, ``143771``, ``143000``, ``9.0``, memory in MiB."""
    major, minor = capability.split(".")
    return Gpu(name, int(total) * 2**20, int(free) * 2**20, (int(major), int(minor)))


def image_tokens(folder: Path, unknown: int) -> int:
    """Tokens of an image at the upper end of a folder's pixel budget; ``unknown`` where its processor files do not say."""
    budget, processor = pixel_budget(folder), _image_processor(folder)
    sides = processor.get("patch_size"), processor.get("merge_size")
    if budget is None or not all(isinstance(side, int) for side in sides):
        return unknown
    return math.ceil(budget[1] / (sides[0] * sides[1]) ** 2)


def pixel_budget(folder: Path) -> tuple[int, int] | None:
    """``(fewest, most)`` pixels an image is resized to, from a folder's processor files; ``None`` if they do not say."""
    size = _image_processor(folder).get("size") or {}
    return (size["shortest_edge"], size["longest_edge"]) if "longest_edge" in size and "shortest_edge" in size else None


def _image_processor(folder: Path) -> dict:
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).exists():
            stored = files.read_json(folder / name)
            return stored.get("image_processor") or stored
    return {}
