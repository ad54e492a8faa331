"""Random checkpoints of real architectures, for measuring speed and memory where no weights can be had.

    python -m sonovqa.architectures 8B /tmp/qwen3-vl-8b --processor FOLDER            # Qwen3-VL-8B-Instruct
    python -m sonovqa.architectures qwen2.5-vl-7b /tmp/qwen2.5-vl-7b --processor FOLDER

Numbers are those of the published configurations (`sonovqa.architectures_sizes`). Random weights answer nothing; a table
made with them says so. FOLDER holds a Qwen-VL processor: Qwen3-VL takes it as it is, the others get a processor of their
own class and published image size around its tokenizer, cut to as many tokens as their own has.
"""

from __future__ import annotations

import contextlib
import functools
import json
from pathlib import Path

from sonovqa import cli, files, torchvision_ops
from sonovqa.architectures_sizes import SIZES
from sonovqa.weights import Tensor

#: The chat formats that Llama 3.2 Vision and LLaVA-1.5 were published with, for one image in front of its question.
LLAMA_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'system' -%}{{- raise_exception('a system turn beside an image') -}}{%- endif -%}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' -}}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{- '<|image|>' -}}{%- else -%}{{- part.text -}}{%- endif -%}
{%- endfor -%}
{{- '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""
LLAVA_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role != 'system' -%}{{- message.role.upper() + ': ' -}}{%- endif -%}
{%- for part in message.content -%}{%- if part.type == 'image' -%}{{- '<image>\\n' -}}{%- endif -%}{%- endfor -%}
{%- for part in message.content -%}{%- if part.type == 'text' -%}{{- part.text + ' ' -}}{%- endif -%}{%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""
LLAMA_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|start_header_id|>", "<|end_header_id|>",
                "<|eot_id|>", "<|python_tag|>", "<|image|>")  # fmt: skip
LLAVA_TOKENS = ("<s>", "</s>", "<image>", "<pad>")


def config(size: str):
    """The configuration of one of `architectures_sizes.SIZES`."""
    from transformers import AutoConfig

    given = dict(SIZES[size])
    return AutoConfig.for_model(given.pop("model_type"), **given, dtype="bfloat16")


@functools.cache
def shapes(size: str) -> dict[str, Tensor]:
    """The tensors of a size as a safetensors header would name them; nothing is allocated."""
    torchvision_ops.declare()
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config(size))
    return {name: Tensor(tuple(tensor.shape), "BF16") for name, tensor in model.state_dict().items()}


def cut_tokenizer(tokenizer, count: int, special: tuple[str, ...], **roles):
    """A byte-level BPE tokenizer of its first ``count`` tokens and merges, then ``special`` ones.

    Tokens of a BPE are numbered in the order of their merges, so that the first ones are a whole, smaller tokenizer.

    Args:
        tokenizer: a fast tokenizer whose first 256 tokens are bytes, such as Qwen's.
        roles: which special token is which: ``bos_token="<s>"``, ``extra_special_tokens={"image_token": "<image>"}``.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    made = json.loads(tokenizer.backend_tokenizer.to_str())
    model = made["model"]
    model["vocab"] = {token: number for token, number in model["vocab"].items() if number < count}
    pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    model["merges"] = [list(pair) for pair in pairs if all(part in model["vocab"] for part in (*pair, "".join(pair)))]
    made["added_tokens"] = []
    cut = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(made)), model_max_length=131072, **roles)
    cut.add_tokens(list(special), special_tokens=True)
    return cut


def with_processor(made, given) -> tuple:
    """``(configuration, processor)``: a processor of the configuration's own class and image size.

    Args:
        made: a configuration from `config`.
        given: a Qwen-VL processor.
    """
    build = {"qwen2_5_vl": _qwen2_5_vl, "mllama": _mllama, "llava": _llava}.get(made.model_type)
    return made, (build(made, given) if build else given)


def _qwen2_5_vl(made, given):
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    images = {"patch_size": made.vision_config.patch_size, "size": {"shortest_edge": 56 * 56, "longest_edge": 16384 * 28 * 28}}
    template = given.chat_template
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**images), given.tokenizer, Qwen2VLVideoProcessor(**images), chat_template=template
    )


def _mllama(made, given):
    from transformers import MllamaImageProcessor, MllamaProcessor

    roles = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|finetune_right_pad_id|>"}
    tokenizer = cut_tokenizer(given.tokenizer, 128000, LLAMA_TOKENS, **roles)
    _point(made, tokenizer, "<|image|>")
    side, tiles = made.vision_config.image_size, made.vision_config.max_num_tiles
    images = MllamaImageProcessor(size={"height": side, "width": side}, max_image_tiles=tiles)
    return MllamaProcessor(images, tokenizer, chat_template=LLAMA_TEMPLATE)


def _llava(made, given):
    from transformers import CLIPImageProcessor, LlavaProcessor

    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = cut_tokenizer(given.tokenizer, 31998, LLAVA_TOKENS, **roles)
    _point(made, tokenizer, "<image>")
    side = made.vision_config.image_size
    images = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return LlavaProcessor(images, tokenizer, patch_size=made.vision_config.patch_size, vision_feature_select_strategy="default",
                          num_additional_image_tokens=1, chat_template=LLAVA_TEMPLATE)  # fmt: skip


def _point(made, tokenizer, image: str) -> None:
    """Make the configuration's token numbers those of the tokenizer at hand."""
    made.image_token_index = tokenizer.convert_tokens_to_ids(image)
    for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(made.text_config, role, getattr(tokenizer, role))


def write_random(size: str, folder: Path, processor, seed: int = 0) -> None:
    """Write a complete bf16 checkpoint with random weights, initialised on the GPU where there is one.

    Args:
        size: a key of `architectures_sizes.SIZES`.
        folder: where it goes; whole or not at all.
        processor: a Qwen-VL processor; see `with_processor`.
        seed: of the weights.
    """
    import torch
    from transformers import AutoModelForImageTextToText, GenerationConfig

    torch.manual_seed(seed)
    made, processor = with_processor(config(size), processor)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"), _default_dtype(torch.bfloat16):
        model = AutoModelForImageTextToText.from_config(made)
    ends = processor.tokenizer
    model.generation_config = GenerationConfig(eos_token_id=ends.eos_token_id, pad_token_id=ends.pad_token_id, do_sample=False)
    with files.replacing_folder(folder) as part:
        model.save_pretrained(part)
        processor.save_pretrained(part)


@contextlib.contextmanager
def _default_dtype(dtype):
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def main(argv: list[str] | None = None) -> None:
    """Write one checkpoint."""
    parser = cli.Parser(description=__doc__, prog="python -m sonovqa.architectures")
    parser.add_argument("size", choices=sorted(SIZES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--processor", required=True, help="folder or hub id of a Qwen-VL processor")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    from sonovqa.models import load_processor

    write_random(args.size, args.folder, load_processor(args.processor), args.seed)
    cli.console.print(f"{args.folder}: {args.size}, random weights")


if __name__ == "__main__":
    cli.run(main)
