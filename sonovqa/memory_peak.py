"""How much memory answering takes at its peak, told from safetensors headers, the configuration and the processor alone.

What is predicted is the memory of tensors (``torch.cuda.max_memory_allocated``), as the figures of papers are: torch's caching
allocator reserves more, by fragmentation, and a process holds CUDA's context besides (`memory.CUDA_CONTEXT`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sonovqa import families, memory, weights
from sonovqa.engines import BRANCHES, LETTERS_A_TOKEN, ImageRequest
from sonovqa.questions import QUESTIONS
from sonovqa.weights import Tensor

#: Parts of names of a vision tower and of what joins it to the language model.
VISION = ("visual", "vision_tower", "vision_model", "multi_modal_projector", "qformer", "language_projection")
WORKSPACE = 34e6  # bytes of cuBLAS' workspace on Hopper, which torch's allocator provides (aten/src/ATen/cuda/CUDABlas)
LORA_ELEMENT = 4  # PEFT keeps LoRA matrices in fp32 (`autocast_adapter_dtype`)


@dataclass(frozen=True)
class Workload:
    """What an engine has in work at one time.

    Attributes:
        images: images encoded together.
        rows: answers decoded together.
        prefix: tokens of the longest prefix, image tokens among them.
        branch: tokens of the longest question.
        new_tokens: tokens of an answer.
        patches: patches of all these images, before any merging.
        pixels: numbers that the processor makes of these images.
    """

    images: int
    rows: int
    prefix: int
    branch: int
    new_tokens: int
    patches: int
    pixels: int


@dataclass(frozen=True)
class Batch:
    """What a command answers at one time, as far as it is known before a model is loaded; unset: an image's eight questions.

    Attributes:
        images: answered together; where the family cannot share a prefix, or is not to, questions.
        questions: of an image, at most.
        new_tokens: an answer's limit; 0: a choice head answers, in one pass and without a cache of its own for each question.
        pixels: of the largest image as it is encoded; ``None``: not known, `memory.USUAL_PIXELS`.
        letters: of the longest question.
        share: whether an image is encoded once for all its questions, if the family can.
        alone: the flag of the command that turns this off; empty: it has none.
    """

    images: int = 1
    questions: int = len(QUESTIONS)
    new_tokens: int = 128
    pixels: int | None = None
    letters: int = 0
    share: bool = True
    alone: str = ""


@dataclass(frozen=True)
class Prediction:
    """Bytes: ``loaded`` once the weights lie where they compute, ``peak`` the most while loading or answering, and what the
    peak is made of."""

    loaded: int
    peak: int
    parts: dict[str, int]


def workload(encoder, model, requests: Sequence[ImageRequest], at_once: int, share: bool, tokens: int) -> Workload:
    """What `generation.LocalEngine` has in work.

    Args:
        encoder: the `batching.Encoder` of model and processor; the requests' first images go through it.
        model: the model, on whatever device; its configuration is read.
        requests: what will be asked.
        at_once: images answered together, with all of their questions if their image is encoded once for these; else questions.
        share: whether that was asked for; it is done where the family can (`families.Family.shares_prefix`).
        tokens: new tokens an answer.
    """
    from sonovqa import chat

    apart = not (share and families.of(model.config).shares_prefix)
    asked = [one for one in requests for _ in (one.prompts if apart else (None,))][:at_once]
    prefixes, vision = encoder.prefixes([chat.open_image(one.image) for one in asked], [one.context for one in asked])
    branches = [len(encoder.branch(prompt).ids) for one in asked for _, prompt in one.prompts]
    tower = model.config.to_dict().get("vision_config") or {}
    pixels = vision["pixel_values"].numel()
    patches = round(pixels / (3 * memory.patch_side(tower) ** 2 * _frames(vision, tower)))
    rows = len(asked) if apart else min(len(branches), BRANCHES)
    return Workload(len(asked), rows, max(len(prefix.ids) for prefix in prefixes), max(branches), tokens, patches, pixels)


def expected(config: Mapping, batch: Batch) -> Workload:
    """What `workload` tells, from config.json alone: neither processor nor images are read.

    Args:
        config: config.json.
        batch: what is answered at one time.
    """
    tower, (tokens, patches) = config.get("vision_config") or {}, memory.image_work(config, batch.pixels)
    frames = tower.get("temporal_patch_size", 2) if "spatial_merge_size" in tower else 1
    together = batch.share and families.of_type(config.get("model_type")).shares_prefix
    questions, prefix = batch.questions if together else 1, round(tokens) + memory.SYSTEM_TOKENS
    branch = max(memory.LONGEST_TOKENS, memory.QUESTION_TOKENS + batch.letters // LETTERS_A_TOKEN)
    rows = min(batch.images * questions, BRANCHES)
    if not batch.new_tokens:  # `choosing.ChoiceEngine`: prefix and questions in one sequence an image
        rows, prefix, branch = batch.images, prefix + questions * branch, 0
    patches = round(batch.images * patches)
    pixels = round(patches * memory.patch_side(tower) ** 2 * 3 * frames)
    return Workload(batch.images, rows, prefix, branch, batch.new_tokens, patches, pixels)


def adapter_bytes(adapter: str | Path | None) -> int:
    """Bytes of an adapter's matrices once they are loaded; 0 without one."""
    path = Path(adapter or "") / "adapter_model.safetensors"
    return sum(t.count for t in weights.of_file(path).values()) * LORA_ELEMENT if adapter and path.exists() else 0


def _frames(vision: Mapping, tower: Mapping) -> int:
    """How often a still image's patch stands in ``pixel_values``: Qwen-VL repeats it to the length of its time patch."""
    return tower.get("temporal_patch_size", 2) if "image_grid_thw" in vision else 1


def predict(tensors: dict[str, Tensor], config: Mapping, bits: int, element: int, work: Workload) -> Prediction:
    """Predict the memory of a model's tensors.

    Args:
        tensors: the stored tensors, see `weights.of_model`.
        config: config.json.
        bits: 4, 8 or 16.
        element: bytes of an unquantised element: 2, or 4 on a CPU.
        work: what is answered at one time.

    Sources: the KV cache holds ``2 x layers x KV heads x head size`` elements a token (Pope et al. 2022, arXiv:2211.05102,
    section 3.3); a matrix product with int8 weights gives int32 and then fp16 (LLM.int8(), arXiv:2208.07339, section 3.1,
    `bitsandbytes.backends`); with 4-bit weights the weights are put back into 16 bits (QLoRA, arXiv:2305.14314, section 3).
    """
    loaded = memory.weight_bytes(tensors, bits, element, config)
    largest = max((t.count for name, t in tensors.items() if memory.is_quantised(name, t)), default=0) * (bits != 16)
    text = {name: t for name, t in tensors.items() if not any(part in name for part in VISION)}
    tower = {name: t for name, t in tensors.items() if name not in text}
    cache, repeated = _cache_bytes(text, work, element)
    token, patch = _token_bytes(text, bits, element), _token_bytes(tower, 16, element)
    logits = work.rows * config.get("text_config", config).get("vocab_size", 0) * element
    beside = {
        "pixels": work.pixels * 4,
        "one layer's weights": largest * element * (bits == 4),
        "workspace": WORKSPACE * (element == 2),
    }
    prefill = cache * work.images / work.rows + work.images * work.prefix * token
    decoding = {"KV cache": cache, "one layer": max(repeated, work.rows * work.branch * token), "logits": logits}
    stages = {  # each beside the weights; whichever is the most is the peak
        "answers": sum((decoding | beside).values()),
        "prefix": prefill + sum(beside.values()),
        "vision": work.patches * patch + _kept_bytes(config, work, element) + beside["pixels"] + beside["workspace"],
        "loading": largest * (2 * element + 1),  # one tensor at a time: as stored, its 16-bit copy, the quantised one
    }
    parts = {"weights": loaded} | decoding | beside | {f"most at {name}": count for name, count in stages.items()}
    return Prediction(round(loaded), round(loaded + max(stages.values())), {k: round(v) for k, v in parts.items()})


def _cache_bytes(text: Mapping[str, Tensor], work: Workload, element: int) -> tuple[float, float]:
    """Bytes of the KV cache when the last token is made, and of one layer's keys and values beside it: its old ones while new
    ones are appended, or repeated for every attention head. Layers that attend to the image hold the image's tokens instead
    of the text's (Llama 3.2 Vision's cross-attention, arXiv:2407.21783, section 7.2), tower patches in number."""
    length = work.prefix + work.branch + work.new_tokens
    own, cross = (_widths(text, crossing) for crossing in (False, True))
    image = work.patches / max(work.images, 1)
    cache = work.rows * element * (length * sum(own) + image * sum(cross))
    heads = max((t.shape[0] for name, t in text.items() if name.endswith("q_proj.weight")), default=0)
    most = max(length * bool(own), image * bool(cross))
    return cache, work.rows * most * 2 * max(heads, max(own, default=0) // 2) * element


def _kept_bytes(config: Mapping, work: Workload, element: int) -> float:
    """Bytes of what a tower keeps of every patch until its last layer is through: where the language model reads several of its
    layers (Llama 3.2 Vision's), the outputs of all of them, and a mask of every patch of an image against every other
    (`transformers.models.mllama.modeling_mllama`: ``MllamaVisionEncoder``, ``_prepare_aspect_ratio_attention_mask``)."""
    tower = config.get("vision_config") or {}
    if "intermediate_layers_indices" not in tower:
        return 0
    outputs = work.patches * tower.get("num_hidden_layers", 0) * tower.get("hidden_size", 0)
    return (outputs + work.patches**2 / max(work.images, 1)) * element


def _widths(text: Mapping[str, Tensor], crossing: bool) -> list[int]:
    """Elements of keys or values a token, of every layer's projections that read the text, or (``crossing``) the image."""
    found = {name: t.shape[0] for name, t in text.items() if re.search(r"\.[kv]_proj\.weight$", name)}
    return [width for name, width in found.items() if bool(re.search("cross_attn|encoder_attn", name)) == crossing]


def _token_bytes(part: Mapping[str, Tensor], bits: int, element: int) -> float:
    """Bytes that live at once in the widest layer for each of its tokens: in a gated feed-forward layer the activated gate,
    the other half and their product beside the layer's input, its residual and the attention's output; in 8 bits the int32
    sums and their fp16 copy as well."""
    linear = [t for name, t in part.items() if len(t.shape) == 2 and memory.is_linear(name) and "lm_head" not in name]
    if not linear:
        return 0
    widest, hidden = max(t.shape[0] for t in linear), max(min(t.shape) for t in linear)
    return (3 * widest + 3 * hidden) * element + (6 * widest + 3 * hidden) * (bits == 8)
