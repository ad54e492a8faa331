"""Random checkpoints of the real Qwen3-VL architectures, for measuring speed and memory where no weights can be had.

    python -m sonovqa.architectures 8B /tmp/qwen3-vl-8b --processor FOLDER

Numbers are those of the published configurations (Qwen/Qwen3-VL-*-Instruct, config.json). Random weights answer nothing;
a table made with them says so.
"""

from __future__ import annotations

from pathlib import Path

from sonovqa import cli, files

_VISION = {"patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 2304, "in_channels": 3}
_SMALL_TOWER = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_heads": 16,
    "deepstack_visual_indexes": [5, 11, 17],
}
_LARGE_TOWER = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "deepstack_visual_indexes": [8, 16, 24],
}


def _text(hidden: int, intermediate: int, layers: int, heads: int, tied: bool) -> dict:
    return {
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "pad_token_id": 151643,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5_000_000,
            "mrope_section": [24, 20, 20],
            "mrope_interleaved": True,
        },
    }


QWEN3_VL = {
    "2B": (_text(2048, 6144, 28, 16, True), _SMALL_TOWER),
    "4B": (_text(2560, 9728, 36, 32, True), _SMALL_TOWER),
    "8B": (_text(4096, 12288, 36, 32, False), _LARGE_TOWER),
    "32B": (_text(5120, 25600, 64, 64, False), _LARGE_TOWER),
}


def config(size: str):
    """The configuration of Qwen3-VL-``size``-Instruct (a key of `QWEN3_VL`)."""
    from transformers import Qwen3VLConfig

    text, tower = QWEN3_VL[size]
    vision = _VISION | tower | {"out_hidden_size": text["hidden_size"]}
    return Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=text["tie_word_embeddings"],
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        dtype="bfloat16",
    )


def write_random(size: str, folder: Path, processor, seed: int = 0) -> None:
    """Write a complete bf16 checkpoint with random weights, initialised on the GPU where there is one.

    Args:
        size: a key of `QWEN3_VL`.
        folder: where it goes; whole or not at all.
        processor: a Qwen3-VL processor, saved beside the weights.
        seed: of the weights.
    """
    import torch
    from transformers import GenerationConfig, Qwen3VLForConditionalGeneration

    torch.manual_seed(seed)
    made = config(size)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"), _default_dtype(torch.bfloat16):
        model = Qwen3VLForConditionalGeneration(made)
    model.generation_config = GenerationConfig(eos_token_id=[151645, 151643], pad_token_id=151643, do_sample=False)
    with files.replacing_folder(folder) as part:
        model.save_pretrained(part)
        processor.save_pretrained(part)


def _default_dtype(dtype):
    import contextlib

    import torch

    @contextlib.contextmanager
    def scope():
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)

    return scope()


def main(argv: list[str] | None = None) -> None:
    """Write one checkpoint."""
    parser = cli.Parser(description=__doc__, prog="python -m sonovqa.architectures")
    parser.add_argument("size", choices=sorted(QWEN3_VL))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--processor", required=True, help="folder or hub id of a Qwen3-VL processor")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    from sonovqa.models import load_processor

    write_random(args.size, args.folder, load_processor(args.processor), args.seed)
    cli.console.print(f"{args.folder}: Qwen3-VL-{args.size}, random weights")


if __name__ == "__main__":
    cli.run(main)
