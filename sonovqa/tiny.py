"""`--model tiny`: a Qwen3-VL of one to two million parameters with its own small tokenizer, built and trained here.

It exists so that the whole path (train, merge, evaluate, serve) runs for real on two CPU cores without a download. It
learnt from phantoms of patients that no data set of the project holds, with *images* of five categories only; of
the others it knows the words. The base size is shipped in `tiny_base/`; `tiny.json` beside the weights records what
it learnt from and by which recipe. Other sizes are trained at their first use.

    python -m sonovqa.tiny --size large                          # build it if it is not there yet, and say where it lies
    python -m sonovqa.tiny --rebuild sonovqa/tiny_base           # the shipped one, anew: about eight minutes on two cores
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.progress import track

from sonovqa import cli, files, torchvision_ops
from sonovqa.questions import CATEGORIES, QUESTIONS, REPORT_PROMPTS, SYSTEM_TEXT, report_text

torchvision_ops.declare()

SHIPPED = Path(__file__).parent / "tiny_base"
OUTPUTS = Path(__file__).parents[1] / "outputs"
PATIENTS = "T"  # first letter of its patients' names; those of data sets begin otherwise
#: Text and vision widths and depths; `base` is the prototype's. Heads are 32 wide in text and vision alike.
SIZES = {
    "small": {"hidden": 64, "layers": 2, "vision": 64, "vision_layers": 2},
    "base": {"hidden": 128, "layers": 3, "vision": 96, "vision_layers": 3},
    "large": {"hidden": 192, "layers": 4, "vision": 128, "vision_layers": 4},
}
#: 128 x 96: an 800 x 600 image then becomes 8 x 6 patches and 12 image tokens.
PIXELS = (64 * 64, 128 * 96)
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
#: ChatML as Qwen writes it, less the line ends after a turn: eight questions would carry eight of them.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}{{- message.content -}}{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif 'text' in part -%}{{- part.text -}}{%- endif -%}
{%- endfor -%}{%- endif -%}
{{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def make_tokenizer(corpus: Iterable[str], vocabulary: int = 1200):
    """A byte-level BPE tokenizer whose merges may cross spaces but not punctuation, digits or line ends.

    So an answer such as "routine monitoring" becomes one token, and a row of eight questions about 90. Digits stay
    single: numbers never seen in training still have their tokens. Source: SuperBPE (arXiv:2503.13423) for merges
    across spaces; the ``tokenizers`` library.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    seams = pre_tokenizers.Split(Regex(r"\n+|[0-9]|[,;:#<>|()\-] ?"), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([seams, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet)
    )
    names = dict(zip(("image_token", "video_token", "vision_start_token", "vision_end_token"),
                     ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"), strict=True))  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=names,
        additional_special_tokens=["<|im_start|>"], clean_up_tokenization_spaces=False, model_max_length=4096,
    )  # fmt: skip


def make_processor(tokenizer, pixels: tuple[int, int] = PIXELS):
    """A `Qwen3VLProcessor` around ``tokenizer`` with a pixel budget ``(fewest, most)`` an image, for 16-pixel patches."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    # Ultrasound is mostly black: its own mean and spread, not ImageNet's, keep a small vision tower awake.
    shape = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.15] * 3, "image_std": [0.2] * 3,
             "size": {"shortest_edge": pixels[0], "longest_edge": pixels[1]}}  # fmt: skip
    return Qwen3VLProcessor(
        Qwen2VLImageProcessor(**shape), tokenizer, Qwen3VLVideoProcessor(**shape), chat_template=CHAT_TEMPLATE
    )


def make_model(tokenizer, size: str = "base", seed: int = 0):
    """A randomly initialised ``Qwen3VLForConditionalGeneration`` in fp32.

    Args:
        tokenizer: from `make_tokenizer`; gives the vocabulary size and the special token ids.
        size: a key of `SIZES`.
        seed: of the initial weights.
    """
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    wide = SIZES[size]
    token = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(tokenizer), "hidden_size": wide["hidden"], "intermediate_size": 3 * wide["hidden"],
        "num_hidden_layers": wide["layers"], "num_attention_heads": wide["hidden"] // 32, "head_dim": 32,
        "num_key_value_heads": wide["hidden"] // 64, "max_position_embeddings": 4096, "initializer_range": 0.06,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5], "mrope_interleaved": True},
        "tie_word_embeddings": True, "pad_token_id": token("<|endoftext|>"), "eos_token_id": token("<|im_end|>"),
        "bos_token_id": None,
    }  # fmt: skip
    vision = {
        "depth": wide["vision_layers"], "hidden_size": wide["vision"], "intermediate_size": 3 * wide["vision"],
        "num_heads": wide["vision"] // 32, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "out_hidden_size": wide["hidden"], "num_position_embeddings": 64, "deepstack_visual_indexes": [1],
        "initializer_range": 0.06,
    }  # fmt: skip
    config = Qwen3VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"), vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config.update(do_sample=False, eos_token_id=text["eos_token_id"], pad_token_id=text["pad_token_id"])
    return model


@dataclass(frozen=True)
class Recipe:
    """How a tiny base model is made; `tiny.json` records it, and another recipe makes another model.

    Attributes:
        size: a key of `SIZES`.
        images, abnormal_rate, seed: of the phantoms drawn for it; no data set of the project uses these patients.
        steps, batch, lr: optimiser steps, images a step, and Muon's learning rate.
        seen: categories whose images it sees. Of the others it reads the answers beside a grey image: it knows their
            words, as a large model knows the words of medicine, but not what they look like.
    """

    size: str = "base"
    images: int = 3000
    abnormal_rate: float = 0.15
    seed: int = 20_001
    steps: int = 1800
    batch: int = 16
    lr: float = 3e-3
    seen: tuple[str, ...] = CATEGORIES[:5]


def folder_of(recipe: Recipe, outputs: Path = OUTPUTS) -> Path:
    """Where a recipe's model lies."""
    return outputs / f"tiny-{recipe.size}-{files.sha256(repr(recipe))[:8]}"


def ensure(size: str = "base") -> Path:
    """The folder of the tiny base model of a size: the shipped one, or one trained now at its first use.

    Raises:
        UserError: if there is no such size.
    """
    if size not in SIZES:
        raise cli.UserError(f"--model tiny-{size}; no such size; tiny, {', '.join(f'tiny-{name}' for name in SIZES)} are allowed")
    if size == "base":
        return SHIPPED
    recipe = Recipe(size)
    folder = folder_of(recipe)
    if not (folder / "tiny.json").exists():
        cli.console.print(f"building {folder.name}, a tiny base model: {recipe.steps} steps on {recipe.images} phantoms, once")
        build(recipe, folder)
    return folder


def build(recipe: Recipe, folder: Path) -> None:
    """Draw the recipe's phantoms, train tokenizer and model, write a complete bf16 checkpoint and `tiny.json`."""
    import torch

    from sonovqa import records

    started = time.perf_counter()
    specs, images, answers = _lessons(recipe)
    tokenizer = make_tokenizer(_corpus(answers))
    processor, model = make_processor(tokenizer), make_model(tokenizer, recipe.size, recipe.seed)
    loss = _train(model, processor, recipe, specs, images, answers)
    with files.replacing_folder(folder) as part:
        model.to(torch.bfloat16).save_pretrained(part)
        processor.save_pretrained(part)
        files.write_json(part / "tiny.json", {
            "recipe": asdict(recipe), "made": records.now(), "seconds": round(time.perf_counter() - started), "final_loss": loss,
            "learnt_from": f"{recipe.images} phantoms of patients {PATIENTS}*, drawn with seed {recipe.seed} for this alone; "
                           f"images of {', '.join(recipe.seen)}; of the other categories the answers only, beside a grey image",
            "parameters": sum(p.numel() for p in model.parameters()), **records.commit(), "versions": records.versions(),
        })  # fmt: skip


def lesson_specs(recipe: Recipe) -> list:
    """The specifications of the recipe's phantoms, one patient each, categories in turn."""
    import numpy as np

    from sonovqa import phantoms

    rng = np.random.default_rng(recipe.seed)
    turn = [CATEGORIES[i % len(CATEGORIES)] for i in range(recipe.images)]
    return [phantoms.sample_spec(rng, category, abnormal=bool(rng.random() < recipe.abnormal_rate)) for category in turn]


def _lessons(recipe: Recipe):
    """Specs, grey images ``[300, 400]`` and canonical answers of the recipe's phantoms."""
    from sonovqa import phantoms

    specs = lesson_specs(recipe)
    with ProcessPoolExecutor() as pool:
        drawn = pool.map(_draw, specs, chunksize=32)
        images = list(track(drawn, "drawing", len(specs), console=cli.console, transient=True))
    return specs, images, [phantoms.answers_of(spec) for spec in specs]


def _draw(spec):
    from sonovqa import phantom_drawing

    return phantom_drawing.draw(spec, (400, 300))


def _corpus(answers: list[dict[str, str]]) -> list[str]:
    """What the tokenizer learns its merges from: prompts of every variant and the answers, whole and in pieces."""
    prompts = [text for q in QUESTIONS.values() for text in q.prompts.values()] + list(REPORT_PROMPTS.values())
    turns = [f"system\n{SYSTEM_TEXT}", "user\n", "assistant\n", *prompts]
    return turns * 200 + [text for row in answers for text in row.values()] + [report_text(row) for row in answers[:200]]


def _train(model, processor, recipe: Recipe, specs, images, answers) -> float:
    """Train all weights on the lessons with shared-prefix batches; returns the mean loss of the last 50 steps.

    Muon (Jordan et al., 2024; ``torch.optim.Muon``) for the matrices inside the towers, AdamW for the rest: on two cores
    AdamW alone was several times slower to the same accuracy. All images have one size, so they are cut into patches
    once and share one prefix.
    """
    import numpy as np
    import torch

    from sonovqa import losses
    from sonovqa.batching import Encoder
    from sonovqa.layout import assemble

    encoder, rng = Encoder(processor, model), np.random.default_rng(recipe.seed + 1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).train()
    known = np.array([spec.category in recipe.seen for spec in specs])
    often = np.where(known, 4.0, 1.0)  # words are learnt sooner than sights
    shown = [image if seen else np.full_like(image, 128) for image, seen in zip(images, known, strict=True)]
    patches = torch.stack([_patches(processor, image) for image in shown]).to(device)
    (prefix,), vision = encoder.prefixes([_rgb(images[0])], [None])
    grids = vision["image_grid_thw"].to(device).expand(recipe.batch, -1)
    optimizers, schedules = _optimizers(model, recipe)
    recent = []
    for _ in track(range(recipe.steps), "training tiny", console=cli.console, transient=True):
        rows = rng.choice(len(images), recipe.batch, p=often / often.sum())
        branches = [[encoder.branch(*pair) for pair in _asked(answers[i], rng)] for i in rows]
        batch = assemble([prefix] * recipe.batch, branches, processor.tokenizer.pad_token_id)
        batch = {key: value.to(device) for key, value in batch.items()}
        batch |= {"pixel_values": patches[torch.from_numpy(rows)].flatten(0, 1).float(), "image_grid_thw": grids}
        logits, targets, weights = losses.answer_logits(model, batch)
        loss = losses.weighted_sum(logits, targets, weights) / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        recent = [*recent[-49:], loss.item()]
    model.to("cpu")
    return sum(recent) / len(recent)


def _optimizers(model, recipe: Recipe):
    import torch

    inner = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    chosen = {id(p) for p in inner}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    made = [torch.optim.Muon(inner, lr=recipe.lr, weight_decay=0.01), torch.optim.AdamW(rest, lr=recipe.lr, weight_decay=0.0)]
    cycle = torch.optim.lr_scheduler.OneCycleLR
    return made, [cycle(each, recipe.lr, recipe.steps, pct_start=0.05, cycle_momentum=False) for each in made]


def _rgb(image):
    from PIL import Image

    return Image.fromarray(image).convert("RGB")


def _patches(processor, image):
    """An image's patches as the processor makes them, ``[patches, patch values]``, in fp16 to save memory."""
    return processor.image_processor(images=[_rgb(image)], return_tensors="pt")["pixel_values"].half()


def _asked(answers: dict[str, str], rng) -> list[tuple[str, str]]:
    """(prompt, answer) of the eight questions, a random variant of each prompt; one image in eight asks for the report."""
    pairs = []
    for question_id, answer in answers.items():
        prompts = list(QUESTIONS[question_id].prompts.values())
        pairs.append((prompts[rng.integers(len(prompts))], answer))
    if rng.random() < 1 / 8:
        pairs.append((next(iter(REPORT_PROMPTS.values())), report_text(answers)))
    return pairs


def main(argv: list[str] | None = None) -> None:
    """Build one base model, or say where it lies."""
    parser = cli.Parser(description=__doc__, prog="python -m sonovqa.tiny")
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--rebuild", type=Path, metavar="FOLDER", help="train it anew into this folder")
    args = parser.parse_args(argv)
    if args.rebuild:
        build(Recipe(args.size), args.rebuild)
    cli.console.print(str(args.rebuild or ensure(args.size)))


if __name__ == "__main__":
    cli.run(main)
