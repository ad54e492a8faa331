"""The peers' way of training on several questions an image, measured end to end: a chat sample a question.

On a GPU it is Unsloth's: `FastVisionModel`, TRL's `SFTTrainer` and `UnslothVisionDataCollator`, decoded PIL images in a list,
as in its vision notebooks (github.com/unslothai/notebooks, Qwen3_VL_(8B)-Vision.ipynb; arguments as in version 2026.10.7).
Without Unsloth it is TRL's own: `SFTTrainer` and its vision collator over transformers and PEFT; a row says which.

Fair to it: the collator's resizing is off, images stand in their own column (inlined in a message they would be resized once
more), so that the model's processor resizes them as it does for train.py; loss on answers and their end of turn only; the
same texts (`chat.messages`), processor, base, precision, LoRA, optimiser, schedule, workers and images.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sonovqa import adapting, bench_records, bench_steps, bench_turns, chat, devices, images, models
from sonovqa.cli import UserError, console

#: Unsloth's ``use_gradient_checkpointing`` by word of a setting: its own (offloading), torch's, none.
CHECKPOINTING = {"gc": "unsloth", "plain-gc": True, "none": False}
#: Where ChatML's turns begin: what `train_on_responses_only` is told for every Qwen-VL.
USER_TURN, ASSISTANT_TURN = "<|im_start|>user\n", "<|im_start|>assistant\n"


@dataclass(frozen=True)
class Setting:
    """How a step is dealt: samples a micro-batch, checkpointing (a key of `CHECKPOINTING`), and whether the collator joins a
    micro-batch's samples end to end instead of padding them (its ``padding_free``)."""

    batch: int
    checkpointing: str
    padding_free: bool = False

    def __str__(self) -> str:
        return f"{self.batch} {self.checkpointing}" + " padding-free" * self.padding_free


def setting_of(text: str) -> Setting:
    """``"8 gc"`` or ``"16 none padding-free"`` as a `Setting`. Raises `UserError` for anything else."""
    batch, *words = text.split()
    known = len(words) in (1, 2) and words[0] in CHECKPOINTING and words[1:] in ([], ["padding-free"])
    if not known or not batch.isdigit() or int(batch) < 1:
        raise UserError(f"--peer-settings {text!r}; samples a micro-batch, one of {', '.join(CHECKPOINTING)}, and perhaps "
                        "padding-free are allowed; such as '8 gc'")  # fmt: skip
    return Setting(int(batch), words[0], bool(words[1:]))


@dataclass(frozen=True)
class Work:
    """What one process measures: ``setting`` on ``data`` with ``model``; the rest is `bench_train`'s for train.py too.

    Attributes:
        pairs: samples an optimiser step, a multiple of the setting's batch.
        images: how many training images are drawn, see `dataset.subset`.
        size: images keep this size but for rounding up to whole patches.
        workers: processes that collate.
    """

    record: Path
    data: Path
    model: str
    size: tuple[int, int]
    pairs: int
    images: int
    setting: Setting
    warmup: int
    steps: int
    bits: int
    rank: int
    workers: int
    seed: int


def way() -> str:
    """What the peers' way is on this machine, for a row's name."""
    return "Unsloth + TRL" if models.choose_backend()[0] == "unsloth" else "TRL without Unsloth"


def row_of(work: Work) -> dict:
    """What tells a row of the peers' way from all others."""
    named = {"kind": "end to end", "model": Path(work.model).name, "size": f"{work.size[0]}x{work.size[1]}", "pairs": work.pairs}
    return named | {"way": way(), "setting": str(work.setting)}


def measure(work: Work) -> None:
    """Load, train ``warmup + steps`` steps and add the row to the record; a setting that runs out of memory says so there.

    Raises:
        UserError: if the model cannot be had.
    """
    row = row_of(work)
    started = time.perf_counter()
    if models.choose_backend()[0] == "unsloth":
        import unsloth  # noqa: F401 - it patches transformers, trl and peft, so it comes before them
    import torch

    with bench_turns.beside_others():
        loaded, model = _load(work)
    decoding = time.perf_counter()
    samples = list(chat_samples(work)) if loaded.backend == "unsloth" else prompt_completions(work, loaded.processor)
    row |= {"backend": loaded.backend, "decoding_seconds": round(time.perf_counter() - decoding, 2)}
    try:
        seconds, waited, losses = _train(work, loaded, model, samples)
        row |= bench_steps.figures(seconds, losses, work.warmup, work.pairs)
        row["data_wait_share"] = round(sum(waited[work.warmup :]) / sum(seconds[work.warmup :]), 4)
    except torch.OutOfMemoryError:
        row |= {"failed": "out of memory"}
    row["wall_seconds"] = round(time.perf_counter() - started, 1)
    bench_records.add(work.record, row)
    bench_steps.say(row)


def chat_samples(work: Work) -> Iterator[dict]:
    """One sample a question, as Unsloth's collator takes them: its decoded image in a list, shared by all samples of the image,
    and the chat."""
    for row in _rows(work):
        image = chat.open_image(row["image"]["bytes"])
        context = chat.context_for(row.get("context"), image.size)
        for task in chat.tasks_of(row):
            yield {"images": [image], "messages": chat.messages(None, task["prompt"], context, task["answer"])}


def prompt_completions(work: Work, processor):
    """One sample a question, as TRL's collator takes them: a `datasets.Dataset` of the stored image, prompt and completion."""
    from datasets import Dataset, Features, Image, List, Value

    template = chat.Template(processor)
    samples = []
    for row in _rows(work):
        context = chat.context_for(row.get("context"), images.size_of(row["image"]["bytes"]))
        for task in chat.tasks_of(row):
            prompt = template.prefix(context) + template.branch(task["prompt"])
            samples.append({"images": [row["image"]], "prompt": prompt, "completion": task["answer"] + template.end_of_turn})
    text = Value("string")
    return Dataset.from_list(samples, features=Features({"images": List(Image()), "prompt": text, "completion": text}))


def _rows(work: Work):
    """train.py's images in the order in which its sampler draws them, so that both losses are of the same pairs at each step."""
    from sonovqa.sampling import Draws

    split, _ = bench_steps.like_rows(work.data)
    return bench_steps.drawn(split, work.images, work.data, work.seed).select(Draws(work.images, work.seed).order())


def _load(work: Work):
    base = models.locate(work.model)
    how = CHECKPOINTING[work.setting.checkpointing]
    loaded = models.load_for_training(base, work.bits, checkpointing=bool(how))
    models.set_pixels(loaded.processor, None, bench_steps.budget(loaded.processor, work.size))
    if loaded.backend != "unsloth":
        return loaded, adapting.adapt(loaded, adapting.Adapting(rank=work.rank, seed=work.seed))
    import unsloth

    model = unsloth.FastVisionModel.get_peft_model(
        loaded.model, finetune_vision_layers=True, finetune_language_layers=True, finetune_attention_modules=True,
        finetune_mlp_modules=True, r=work.rank, lora_alpha=16, lora_dropout=0, bias="none", random_state=work.seed,
        use_gradient_checkpointing=how,
    )  # fmt: skip
    unsloth.FastVisionModel.for_training(model)
    return loaded, model


def _train(work: Work, loaded, model, samples) -> tuple[list[float], list[float], list[float]]:
    """Seconds, seconds waited for data, and loss of every step."""
    from transformers import PrinterCallback
    from trl import SFTTrainer

    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=devices.one_gpu(_configuration(work, folder)),
            processing_class=loaded.processor,
            data_collator=_collator(work, loaded, model),
            train_dataset=samples,
        )
        trainer.remove_callback(PrinterCallback)
        with contextlib.ExitStack() as turn:
            clock = _clock(work.warmup, turn)
            trainer.add_callback(clock)
            trainer.train()
    return clock.seconds, clock.waited, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _configuration(work: Work, folder: str):
    import torch
    from trl import SFTConfig

    cuda, dtype = torch.cuda.is_available(), devices.compute_dtype()
    return SFTConfig(
        output_dir=folder,
        max_steps=work.warmup + work.steps,
        per_device_train_batch_size=work.setting.batch,
        gradient_accumulation_steps=work.pairs // work.setting.batch,
        learning_rate=bench_steps.LEARNING_RATE,
        lr_scheduler_type="linear",
        warmup_steps=5,
        optim="adamw_8bit" if cuda else "adamw_torch",
        weight_decay=0.01,
        seed=work.seed,
        train_sampling_strategy="sequential",  # the samples are in order already
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        gradient_checkpointing=cuda and work.setting.checkpointing != "none",
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        dataloader_num_workers=work.workers,
        dataloader_persistent_workers=work.workers > 0,
        remove_unused_columns=False,
        dataset_text_field="",
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,  # else image tokens are cut
        use_cpu=not cuda,
    )


def _collator(work: Work, loaded, model):
    """Unsloth's with resizing off and loss on answers; ``None`` for TRL's own, whose loss is on completions."""
    if loaded.backend != "unsloth":
        return None
    from unsloth.trainer import UnslothVisionDataCollator

    return UnslothVisionDataCollator(
        model,
        loaded.processor,
        resize="max",  # its word for: leave images as they are
        train_on_responses_only=True,
        instruction_part=USER_TURN,
        response_part=ASSISTANT_TURN,
        padding_free=work.setting.padding_free,
    )


def _clock(warmup: int, turn: contextlib.ExitStack):
    """A callback that times steps as `training.SharedImageTrainer` does: from fetching a step's batches to its end.

    Args:
        warmup: steps before the timed ones; the last of them is run alone on the device too, see `bench_turns`.
        turn: holds this process's turn; whoever opened it ends the turn.
    """
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self):
            self.seconds, self.waited, self._began = [], [], 0.0

        def on_train_begin(self, *args, **kwargs):
            self._begin()

        def _begin(self):
            """The next step: in a turn shared by those who warm up, or in one of this process's own."""
            done = len(self.seconds)
            if done in (0, warmup - 1):
                turn.close()
                turn.enter_context(bench_turns.alone() if done >= warmup - 1 else bench_turns.beside_others())
            self._began = time.perf_counter()

        def on_step_begin(self, *args, **kwargs):
            self.waited.append(time.perf_counter() - self._began)

        def on_step_end(self, *args, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - self._began)
            console.print(f"step {len(self.seconds)}: {self.seconds[-1]:.2f} s, waited {self.waited[-1]:.2f} s for data")

        def on_log(self, *args, **kwargs):
            self._begin()

    return Clock()
