"""The four models of the documents' sizes, as shapes on the meta device: nothing is allocated, nothing downloaded.

Numbers are those of the published configurations (config.json on the hub).
"""

from __future__ import annotations

import functools

from sonovqa.weights import Tensor


def _qwen2_5_vl_7b():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
            "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False}  # fmt: skip
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    return Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)


def _qwen3_vl_8b():
    from transformers import Qwen3VLForConditionalGeneration

    from sonovqa import architectures

    return Qwen3VLForConditionalGeneration, architectures.config("8B")


def _llama_3_2_11b_vision():
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    text = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 40,
            "num_attention_heads": 32, "num_key_value_heads": 8, "cross_attention_layers": list(range(3, 40, 5))}  # fmt: skip
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_global_layers": 8,
              "attention_heads": 16, "vision_output_dim": 7680, "image_size": 560, "patch_size": 14, "max_num_tiles": 4,
              "intermediate_layers_indices": [3, 7, 15, 23, 30]}  # fmt: skip
    return MllamaForConditionalGeneration, MllamaConfig(text_config=text, vision_config=vision)


def _llava_1_5_7b():
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    text = {"model_type": "llama", "vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 11008,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32}  # fmt: skip
    vision = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
              "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768}  # fmt: skip
    return LlavaForConditionalGeneration, LlavaConfig(text_config=text, vision_config=vision)


MODELS = {
    "Qwen2.5-VL-7B": _qwen2_5_vl_7b,
    "Qwen3-VL-8B": _qwen3_vl_8b,
    "Llama-3.2-11B-Vision": _llama_3_2_11b_vision,
    "LLaVA-1.5-7B": _llava_1_5_7b,
}


@functools.cache
def meta_model(name: str):
    """One of `MODELS` without its numbers."""
    import torch

    kind, config = MODELS[name]()
    with torch.device("meta"):
        return kind(config)


@functools.cache
def shapes(name: str) -> dict[str, Tensor]:
    """Its tensors as a safetensors header would name them."""
    return {key: Tensor(tuple(t.shape), "BF16") for key, t in meta_model(name).state_dict().items()}
