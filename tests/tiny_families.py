"""Tiny random checkpoints of every family, each of its real class with its real processor, built offline."""

from __future__ import annotations

from pathlib import Path

from sonovqa import architectures, families, tiny

TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 2048, "initializer_range": 0.1, "tie_word_embeddings": True,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [6, 5, 5]}


def _special(tokenizer) -> dict[str, int]:
    ids = tokenizer.convert_tokens_to_ids
    return {
        "image_token_id": ids("<|image_pad|>"), "video_token_id": ids("<|video_pad|>"),
        "vision_start_token_id": ids("<|vision_start|>"), "vision_end_token_id": ids("<|vision_end|>"),
    }  # fmt: skip


def qwen2_vl(tokenizer):
    """``(model, processor)`` of Qwen2-VL."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

    vision = {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    config = Qwen2VLConfig(
        text_config=TEXT | {"vocab_size": len(tokenizer), "rope_parameters": ROPE, "bos_token_id": None, "eos_token_id": 2},
        vision_config=vision | {"spatial_merge_size": 2, "temporal_patch_size": 2},
        tie_word_embeddings=True, **_special(tokenizer),
    )  # fmt: skip
    return Qwen2VLForConditionalGeneration(config), _processor(Qwen2VLProcessor, tokenizer)


def qwen2_5_vl(tokenizer, out_hidden_size: int = 64):
    """``(model, processor)`` of Qwen2.5-VL, whose vision tower attends in windows."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

    vision = {
        "depth": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 96, "out_hidden_size": out_hidden_size,
        "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1], "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=TEXT | {"vocab_size": len(tokenizer), "rope_parameters": ROPE, "bos_token_id": None, "eos_token_id": 2},
        vision_config=vision, tie_word_embeddings=True, **_special(tokenizer),
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config), _processor(Qwen2_5_VLProcessor, tokenizer)


def qwen3_vl(tokenizer):
    """``(model, processor)`` of Qwen3-VL: the project's own tiny model, smallest size."""
    return tiny.make_model(tokenizer, "small"), tiny.make_processor(tokenizer)


def _processor(kind, tokenizer):
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    shape = {"patch_size": 14, "merge_size": 2, "size": {"shortest_edge": 56 * 56, "longest_edge": 112 * 84}}
    return kind(Qwen2VLImageProcessor(**shape), tokenizer, Qwen2VLVideoProcessor(**shape), chat_template=tiny.CHAT_TEMPLATE)


LLAMA = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5,
         "max_position_embeddings": 1024, "initializer_range": 0.1, "tie_word_embeddings": False}  # fmt: skip
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "initializer_range": 0.1}
#: As Gemma 3 was published: the system text stands in the user's first turn, in front of the image.
GEMMA_TEMPLATE = """\
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}
{%- set system = messages[0].content[0].text + '\\n\\n' -%}{%- set turns = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- set turns = messages -%}{%- endif -%}
{%- for message in turns -%}
{{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' + (system if loop.first else '') -}}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{- '<start_of_image>' -}}{%- else -%}{{- part.text | trim -}}{%- endif -%}
{%- endfor -%}
{{- '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""


def _tokenizer(tokenizer, special: tuple[str, ...], begin: bool = False, more: dict | None = None, **roles: str):
    """The small tokenizer with a family's own special tokens, some with a role (``more``); ``begin``: it sets its beginning of
    text itself."""
    from tokenizers.processors import TemplateProcessing

    made = architectures.cut_tokenizer(tokenizer, len(tokenizer), special, **roles, extra_special_tokens=more or {})
    if begin:
        start = (made.bos_token, made.bos_token_id)
        made.backend_tokenizer.post_processor = TemplateProcessing(single=f"{start[0]} $A", special_tokens=[start])
    return made


def _ids(tokenizer) -> dict[str, int]:
    return {role: getattr(tokenizer, role) for role in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _templated(processor, config):
    """The processor with its family's chat template, as `models.load_processor` gives it one."""
    processor.chat_template = families.of(config).template
    return processor


def llava(tokenizer):
    """``(model, processor)`` of LLaVA-1.5: CLIP's next to last layer in front of a Llama."""
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    own = _tokenizer(tokenizer, architectures.LLAVA_TOKENS, begin=True, **roles)
    config = LlavaConfig(
        text_config=LLAMA | {"model_type": "llama", "num_hidden_layers": 2, "vocab_size": len(own), **_ids(own)},
        vision_config=TOWER | {"model_type": "clip_vision_model", "image_size": 56, "patch_size": 14, "projection_dim": 32},
        image_token_index=own.convert_tokens_to_ids("<image>"), image_seq_length=16,
    )  # fmt: skip
    images = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    processor = LlavaProcessor(images, own, patch_size=14, vision_feature_select_strategy="default",
                               num_additional_image_tokens=1, chat_template=architectures.LLAVA_TEMPLATE)  # fmt: skip
    return LlavaForConditionalGeneration(config), processor


def mllama(tokenizer):
    """``(model, processor)`` of Llama 3.2 Vision, its cross-attention open as in trained weights: it starts closed."""
    import torch
    from transformers import MllamaConfig, MllamaForConditionalGeneration, MllamaImageProcessor, MllamaProcessor

    roles = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|finetune_right_pad_id|>"}
    own = _tokenizer(tokenizer, architectures.LLAMA_TOKENS, **roles)
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    vision = {"image_size": 28, "patch_size": 14, "max_num_tiles": 4, "num_global_layers": 1, "attention_heads": 2,
              "intermediate_layers_indices": [0], "vision_output_dim": 64}  # fmt: skip
    config = MllamaConfig(
        text_config=LLAMA | {"num_hidden_layers": 3, "cross_attention_layers": [1], "vocab_size": len(own) - 1,
                             "rope_parameters": rope, **_ids(own)},
        vision_config={key: value for key, value in TOWER.items() if key != "num_attention_heads"} | vision,
        image_token_index=own.convert_tokens_to_ids("<|image|>"),
    )  # fmt: skip
    model = MllamaForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name and parameter.numel() == 1:
                parameter.fill_(0.5)
    images = MllamaImageProcessor(size={"height": 28, "width": 28}, max_image_tiles=4)
    return model, MllamaProcessor(images, own, chat_template=architectures.LLAMA_TEMPLATE)


def gemma3(tokenizer):
    """``(model, processor)`` of Gemma 3, whose image-text form MedGemma 4B is: windows shorter than a prompt."""
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3ImageProcessor, Gemma3Processor

    special = ("<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>",
               "<image_soft_token>", *("\n" * k for k in range(1, 5)))  # fmt: skip
    marks = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    own = _tokenizer(tokenizer, special, begin=True, more=marks, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    text = LLAMA | {"num_hidden_layers": 2, "head_dim": 32, "vocab_size": len(own), "sliding_window": 16, **_ids(own),
                    "layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": True}  # fmt: skip
    config = Gemma3Config(
        text_config=text, mm_tokens_per_image=4,
        vision_config=TOWER | {"image_size": 56, "patch_size": 14, "vision_use_head": False},
        **{f"{name.replace('_token', '')}_token_index": own.convert_tokens_to_ids(token) for name, token in marks.items()},
    )  # fmt: skip
    model = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.2)  # it starts at zero
    model.generation_config.update(eos_token_id=own.convert_tokens_to_ids(["<eos>", "<end_of_turn>"]))
    images = Gemma3ImageProcessor(size={"height": 56, "width": 56})
    return model, Gemma3Processor(images, own, chat_template=GEMMA_TEMPLATE, image_seq_length=4)


def blip_2(tokenizer):
    """``(model, processor)`` of BLIP-2 with an OPT: a Q-Former between two towers, no chat template."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor, BlipImageProcessor

    roles = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"}
    own = _tokenizer(tokenizer, ("<pad>", "</s>", "<image>"), begin=True, **roles)
    text = {"model_type": "opt", "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 512, "vocab_size": len(own), "dropout": 0.0, "init_std": 0.1,
            **_ids(own)}  # fmt: skip
    former = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
              "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.1}  # fmt: skip
    config = Blip2Config(
        text_config=text, vision_config=TOWER | {"image_size": 56, "patch_size": 14}, qformer_config=former,
        num_query_tokens=4, image_token_index=own.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    images = BlipImageProcessor(size={"height": 56, "width": 56})
    processor = Blip2Processor(images, own, num_query_tokens=4)
    return Blip2ForConditionalGeneration(config), _templated(processor, config)


def florence2(tokenizer):
    """``(model, processor)`` of Florence-2: a DaViT and a BART, no chat template; its published settings ask for three beams."""
    from transformers import CLIPImageProcessor, Florence2Config, Florence2ForConditionalGeneration, Florence2Processor

    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    own = _tokenizer(tokenizer, ("<s>", "<pad>", "</s>", "<image>"), more={"image_token": "<image>"}, **roles)
    text = {"model_type": "bart", "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
            "decoder_attention_heads": 2, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "vocab_size": len(own), "dropout": 0.0,
            "max_position_embeddings": 512, "init_std": 0.4, "decoder_start_token_id": own.eos_token_id, **_ids(own)}  # fmt: skip
    vision = {"depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1],
              "patch_prenorm": [False, True], "embed_dim": [16, 32], "num_heads": [2, 2], "num_groups": [2, 2], "window_size": 4,
              "drop_path_rate": 0.0, "projection_dim": 64, "initializer_range": 0.1}  # fmt: skip
    config = Florence2Config(text_config=text, vision_config=vision, image_token_id=own.image_token_id)
    model = Florence2ForConditionalGeneration(config)
    model.generation_config.update(num_beams=3, no_repeat_ngram_size=3, forced_bos_token_id=own.bos_token_id,
                                   forced_eos_token_id=own.eos_token_id)  # fmt: skip
    images = CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False)
    images.image_seq_length = 17
    return model, _templated(Florence2Processor(images, own), config)


def write(name: str, tokenizer, folder: Path) -> None:
    """A tiny checkpoint of a family in ``folder`` as such models lie on the hub: bf16, their towers' tensors under
    ``vision_tower.vision_model.``, BLIP-2 and Florence-2 without a chat template."""
    import torch
    from safetensors.torch import load_file, save_file

    model, processor = FAMILIES[name](tokenizer)
    model.to(torch.bfloat16).save_pretrained(folder)
    if families.of(model.config).template:
        processor.chat_template = None
    processor.save_pretrained(folder)
    if name in ("llava", "gemma3"):  # saved by transformers 5 they lack it; vLLM asks for it
        weights = load_file(folder / "model.safetensors")
        renamed = {key.replace("vision_tower.", "vision_tower.vision_model."): value for key, value in weights.items()}
        save_file(renamed, folder / "model.safetensors", {"format": "pt"})


FAMILIES = {
    "qwen2_vl": qwen2_vl, "qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl, "llava": llava, "mllama": mllama, "gemma3": gemma3,
    "blip-2": blip_2, "florence2": florence2,
}  # fmt: skip
#: Those whose questions stand behind one image in a sequence.
SHARING = {name: FAMILIES[name] for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava")}
