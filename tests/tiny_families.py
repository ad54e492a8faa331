"""Tiny random checkpoints of the Qwen-VL families, each of its real class with its real processor."""

from __future__ import annotations

from sonovqa import tiny

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


FAMILIES = {"qwen2_vl": qwen2_vl, "qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl}
