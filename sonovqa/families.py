"""What differs between model families, in one table; nothing else in the project asks for a family by name."""

from __future__ import annotations

from dataclasses import dataclass, field

from sonovqa import weights


@dataclass(frozen=True)
class Lora:
    """What ``train.py`` takes where ``--rank``, ``--alpha`` and ``--dropout`` are not given.

    Attributes:
        targets: last parts of the names of the layers that are trained; empty: every linear layer.
    """

    rank: int = 16
    alpha: int = 16
    dropout: float = 0.0
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """One family of vision-language models.

    Attributes:
        name: as its makers write it.
        shares_prefix: whether several questions can stand in one sequence behind their image: the model takes a mask of
            ``[rows, 1, length, length]`` and positions of one's own. `tests/test_shared_prefix.py` proves those that say so.
        why_not: why it does not, in a few words.
        template: a chat template (Jinja) for processors that have none; ``None``: the processor's own.
        system_turn: whether the template takes a system turn beside an image; if not, the system text begins the question.
        encoder_decoder: image and question are read by an encoder, the answer is written by a decoder of its own.
        vision: parts of the names of vision modules.
        pixel_budget: whether an image keeps its proportions within fewest and most pixels, or each gets as many tokens; ``None``:
            not known, the processor counts each image's.
        lora, bits: train.py's defaults.
        unsloth: whether Unsloth's ``FastVisionModel`` loads it; tried where there is CUDA.
        not_served: why vLLM does not serve it; empty: it does.
        hub: a published checkpoint with weights for the native class of transformers.
    """

    name: str
    shares_prefix: bool = False
    why_not: str = "no test has shown that it takes this mask and these positions"
    template: str | None = None
    system_turn: bool = True
    encoder_decoder: bool = False
    vision: tuple[str, ...] = ("visual", "vision")
    pixel_budget: bool | None = None
    lora: Lora = field(default_factory=Lora)
    bits: int = 4
    unsloth: bool = False
    not_served: str = ""
    hub: str = ""


_TEXT = "{%- for part in message.content -%}{%- if part.type == 'text' -%}{{- part.text -}}{%- endif -%}{%- endfor -%}"
#: BLIP-2's prompt for questions (arXiv:2301.12597, section 4.1); its processor sets the image's tokens before the text.
QUESTION_ANSWER = (
    "{{- bos_token -}}{%- for message in messages -%}"
    "{%- if message.role == 'user' -%}{{- 'Question: ' -}}" + _TEXT + "{{- ' Answer:' -}}"
    "{%- elif message.role == 'assistant' -%}{{- ' ' -}}" + _TEXT + "{%- if not loop.last -%}{{- ' ' -}}{%- endif -%}"
    "{%- endif -%}{%- endfor -%}"
)
#: Florence-2 reads one instruction (arXiv:2311.06242) and remembers no earlier ones.
LAST_QUESTION = (
    "{%- set last = messages | map(attribute='role') | list | length - 1 -%}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'user' and loop.index0 >= last - 1 -%}" + _TEXT + "{%- endif -%}"
    "{%- if message.role == 'assistant' and loop.last -%}" + _TEXT + "{%- endif -%}"
    "{%- endfor -%}"
)

_QWEN = {"shares_prefix": True, "why_not": "", "vision": ("visual",), "pixel_budget": True, "unsloth": True}
_FIXED = {"pixel_budget": False}
_TOWER, _MODEL = ("vision_tower", "multi_modal_projector"), ("vision_model", "multi_modal_projector")
#: By ``model_type`` of the configuration.
FAMILIES = {
    "qwen2_vl": Family("Qwen2-VL", hub="Qwen/Qwen2-VL-7B-Instruct", **_QWEN),
    "qwen2_5_vl": Family("Qwen2.5-VL", hub="Qwen/Qwen2.5-VL-7B-Instruct", **_QWEN),
    "qwen3_vl": Family("Qwen3-VL", hub="Qwen/Qwen3-VL-8B-Instruct", **_QWEN),
    "llava": Family("LLaVA-1.5", True, "", vision=_TOWER, unsloth=True, hub="llava-hf/llava-1.5-7b-hf", **_FIXED),
    "mllama": Family(
        "Llama 3.2 Vision", why_not="its image stands in cross-attention, not in the sequence", system_turn=False,
        vision=_MODEL, unsloth=True, not_served="supported until vLLM 0.10.2", hub="meta-llama/Llama-3.2-11B-Vision-Instruct",
        **_FIXED,
    ),
    "gemma3": Family(
        "Gemma 3 (MedGemma 4B)", why_not="its image tokens see each other both ways, in windows", vision=_TOWER,
        unsloth=True, hub="google/medgemma-4b-it", **_FIXED,
    ),
    "blip-2": Family(
        "BLIP-2 OPT", why_not="it takes no positions of one's own", template=QUESTION_ANSWER,
        vision=("vision_model", "qformer", "language_projection"),
        lora=Lora(8, 16, 0.05, ("q_proj", "v_proj")), bits=8, hub="Salesforce/blip2-opt-2.7b", **_FIXED,
    ),
    "florence2": Family(
        "Florence-2", why_not="its encoder reads image and question both ways", template=LAST_QUESTION, encoder_decoder=True,
        vision=_TOWER, not_served="vLLM has it in a plugin only", hub="florence-community/Florence-2-base", **_FIXED,
    ),
}  # fmt: skip


def of(config) -> Family:
    """The family of a model's configuration; one that nothing is known of trains separate rows."""
    return of_type(config.model_type)


def of_type(kind: str | None) -> Family:
    """The family of a ``model_type``; see `of`."""
    return FAMILIES.get(kind) or Family(kind or "this model")


def of_model(name: str) -> Family:
    """The family of a model folder, a hub id whose config.json is in the cache, or ``tiny``, before anything is loaded."""
    return of_type("qwen3_vl" if name.partition("-")[0] == "tiny" else weights.config_of(name).get("model_type"))


def fill_in(args, family: Family, tiny: bool) -> None:
    """Set what train.py's command line leaves open: bits, most pixels of an image and LoRA's size.

    Args:
        args: the parsed command line, changed in place.
        tiny: the model is the project's own, which computes in 16 bits and has the pixel budget it was made with.
    """
    args.bits = args.bits or (16 if tiny or args.full else family.bits)
    if args.max_pixels is None and family.pixel_budget and not tiny:
        args.max_pixels = 512 * 512
    for name in ("rank", "alpha", "dropout"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(family.lora, name))


def unread_layers(config) -> tuple[str, ...]:
    """Parts of the names of vision layers whose output nothing reads: LLaVA-1.5 takes its image from the last layer but one
    (arXiv:2304.08485, section 4.1), and an adapter on the last would never learn anything."""
    chosen = getattr(config, "vision_feature_layer", None)
    if not isinstance(chosen, int):
        return ()
    count = config.vision_config.num_hidden_layers
    first = chosen if chosen >= 0 else count + 1 + chosen
    return tuple(f"encoder.layers.{k}." for k in range(first, count))
