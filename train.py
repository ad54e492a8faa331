"""Fine-tune a Qwen-VL on a prepared data set: LoRA in 4 bits by default, through Unsloth on a GPU.

    python train.py --data data/phantoms --model tiny                       # two CPU cores, two minutes
    python train.py --data data/clinic --run clinic-8b                      # Qwen3-VL-8B-Instruct, 4 bits, one GPU
    python train.py --data data/clinic --run q7 --task Q7 --epochs 1
    python train.py --data data/clinic --run q7-choice --task Q7 --head choice   # by the labels' rows of the LM head
    python train.py --data data/clinic --dry-run                            # plan, lengths, time and memory
    torchrun --nproc_per_node=2 train.py --data data/clinic --run-name clinic-2gpu

It writes outputs/<run>/: adapter/, merged/ (16-bit, as vLLM loads it), checkpoints/, run.json (last). Every answer is
supervised on itself and its end of turn only; all questions of an image train in one sequence (--batching shared).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from sonovqa import (
    adapting,
    choice,
    cli,
    devices,
    families,
    hub,
    memory,
    models,
    planning,
    prompt_variants,
    records,
    resuming,
    tracking,
    training_flags,
)
from sonovqa.cli import UserError, console
from sonovqa.questions import REPORT_ID, TASKS

TIMED_STEPS = 4  # of a dry run; the first one compiles and is not counted


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__)
    flag = argparse.BooleanOptionalAction
    data = parser.add_argument_group("data")
    data.add_argument("--data", type=Path, required=True, help="a folder that prepare_dataset.py wrote")
    data.add_argument("--task", choices=TASKS, default="all", help="all questions, one report, yes-or-no ones, one")
    data.add_argument(
        "--prompts", default="default", metavar="NAME", help="prompt variant, or one a question: Q7=clinical,Q2=short"
    )
    data.add_argument("--max-images", type=int, help="train on this many images, drawn across categories (unset: all)")
    data.add_argument("--min-pixels", type=int, help="fewest pixels an image is resized to (unset: the model's own)")
    data.add_argument(
        "--max-pixels", type=int, help="most pixels an image is resized to (unset: 262144 = 512x512 worth; tiny: 12288)"
    )
    data.add_argument(
        "--max-tokens", type=int, default=4096, help="longest training sequence; longer rows are dealt over several"
    )
    data.add_argument(
        "--batching",
        choices=("shared", "separate"),
        default="shared",
        help="all questions of an image in one sequence, or one each",
    )
    data.add_argument("--workers", type=int, help="processes that decode images (unset: 4 with CUDA, else none)")
    levels = ("none", "basic", "advanced")
    data.add_argument("--augmentation", choices=levels, default="none", help="of training images; answers stay true")
    model = parser.add_argument_group("model")
    model.add_argument("--model", default="Qwen/Qwen3-VL-8B-Instruct", help="hub id, local folder, or tiny")
    model.add_argument(
        "--backend", choices=("auto", "unsloth", "transformers"), default="auto", help="auto: Unsloth wherever CUDA allows"
    )
    model.add_argument("--bits", type=int, choices=(4, 8, 16), help="of the frozen base (unset: 4, BLIP-2: 8, tiny: 16)")
    model.add_argument("--full", action="store_true", help="train all weights instead of LoRA; needs --bits 16")
    model.add_argument("--rank", type=int, help="LoRA rank (unset: 16, BLIP-2: 8)")
    model.add_argument("--alpha", type=int, help="LoRA alpha; updates are scaled by alpha / rank (unset: 16)")
    model.add_argument("--dropout", type=float, help="LoRA dropout (unset: 0, BLIP-2: 0.05)")
    for name in ("vision", "language", "attention", "mlp"):
        model.add_argument(f"--{name}", action=flag, default=True, help=f"train {name} layers")
    model.add_argument("--checkpointing", action=flag, default=True, help="recompute activations: less memory, a third slower")
    training_flags.add_loss(parser.add_argument_group("loss"))
    training_flags.add_optimisation(parser.add_argument_group("optimisation"))
    run = parser.add_argument_group("run")
    # torchrun's own parser takes --run for an abbreviation of its --run-path, hence the longer name.
    run.add_argument("--run", "--run-name", help="name of the run and its folder (unset: <model>-<data>-<task>)")
    run.add_argument("--outputs", type=Path, default=Path("outputs"), help="folder of all runs")
    run.add_argument("--log-every", type=int, default=10, help="steps between log lines")
    run.add_argument("--eval-every", type=int, help="steps between validation losses and checkpoints (unset: a tenth of the run)")
    run.add_argument("--patience", type=int, help="stop after this many validations without a better loss (unset: never)")
    run.add_argument("--resume", action="store_true", help="go on from the run's last whole checkpoint")
    run.add_argument("--merge", action=flag, default=True, help="write and check merged/ at the end")
    run.add_argument("--report-to", choices=tracking.CHOICES, default=tracking.MLFLOW, help="tracker: MLFLOW_TRACKING_URI or "
                     "outputs/mlflow.db, outputs/<run>/tensorboard, Weights & Biases; or run.json alone")  # fmt: skip
    run.add_argument("--push-to-hub", metavar="OWNER/NAME", help="push the weights there at the end; token in HF_TOKEN")
    run.add_argument("--public", action="store_true", help="with --push-to-hub: everybody may read them (unset: private)")
    run.add_argument(
        "--dry-run", action="store_true", help="load, check lengths, time a few steps, print the plan, write nothing"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    console.quiet = int(os.environ.get("RANK", 0)) > 0  # of several processes one prints
    args = parse(argv)
    check(args)
    folder, settings = name_run(args), resuming.settings(args)
    if args.resume and not args.dry_run:
        from sonovqa import finishing

        resuming.check_same(folder, settings)
        if finishing.no_step_is_left(args, folder):
            return
    loaded, base = load(args)
    model = adapting.adapt(loaded, adapting.of_arguments(args))
    splits, encoder = read_data(args, loaded, model)
    plans = plan(args, splits, encoder)
    trainer, progress = make_trainer(args, folder, model, loaded.processor, splits, encoder, plans)
    planning.show(args, base, loaded, model, plans, encoder.head)
    with devices.training_in_memory():
        if args.dry_run:
            return dry_run(args, trainer)
        resuming.start(folder, settings)
        trainer.train(resume_from_checkpoint=resume_from(args, folder))
    if progress.stopped:
        raise KeyboardInterrupt
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        from sonovqa import finishing

        record = finishing.record(args, base, loaded, trainer, plans["train"], progress, encoder.head)
        finishing.finish(args, folder, loaded, trainer, record, progress.tracker)


def check(args: argparse.Namespace) -> None:
    """Every problem of the arguments at once, before anything is loaded."""
    problems = []
    if not (args.data / "dataset.json").exists():
        problems.append(
            f"--data {args.data}; no data set there; a folder that prepare_dataset.py wrote is needed; "
            f"run `python prepare_dataset.py phantoms --images 2000 --out {args.data}`"
        )
    counts = ("batch", "accumulate", "rank", "alpha", "log_every", "eval_every", "steps", "patience", "max_images", "max_tokens")
    problems += cli.out_of_range(
        args, counts, ("focal", "weight_decay", "warmup", "workers", "seed", "dropout"), ("epochs", "lr")
    )
    if args.dropout is not None and args.dropout >= 1:
        problems.append(f"--dropout {args.dropout}; must be below 1")
    if args.full and args.bits in (4, 8):
        problems.append(f"--full with --bits {args.bits}; quantised weights cannot be trained; use --bits 16 with --full")
    if args.patience and not training_flags.keeps_best(args):
        problems.append("--patience with --keep last, --balance or --focal; validation loss does not tell when to stop there; "
                        "leave --patience out")  # fmt: skip
    if args.head == choice.CHOICE and args.task == REPORT_ID:
        problems.append(f"--head choice with --task {REPORT_ID}; a report has no labels; name a closed question, or all of them")
    problems += models.wrong_pixels(args.min_pixels, args.max_pixels)
    problems += tracking.problems(args.report_to)
    cli.check(problems)
    prompt_variants.check(args.prompts, args.task)
    planning.check_weighting(args)
    hub.check_asked(args)
    tiny = args.model.partition("-")[0] == "tiny"
    family = families.of_model(args.model if tiny else models.locate(args.model))
    if args.head == choice.CHOICE and family.encoder_decoder:
        raise UserError(
            f"--head choice; {family.name} answers with a decoder of its own; leave --head out or name another --model"
        )
    families.fill_in(args, family, tiny)


def name_run(args: argparse.Namespace) -> Path:
    model = Path(args.model).name.lower()
    args.run = args.run or f"{model}-{args.data.name}-{args.task}"
    folder = (args.outputs / args.run).resolve()
    if args.dry_run:
        return folder
    resuming.hold(folder)
    stage = resuming.stage(folder)
    if stage == "finished" and not args.resume:
        raise UserError(
            f"--run {args.run}; {folder} holds a finished run; it is never overwritten; choose another --run or delete it"
        )
    if stage != "new" and not args.resume:
        raise UserError(f"--run {args.run}; {folder} holds an unfinished run; add --resume to go on, or delete it")
    return folder


def load(args: argparse.Namespace):
    devices.take_gpu()
    family = families.of_model(args.model)
    backend, why = models.choose_backend(args.backend, family)
    if backend == "unsloth":
        import unsloth  # noqa: F401 - it patches transformers, trl and peft, so it comes before them
    base = models.locate(args.model)
    memory.check_training(base, args.bits, memory.of_run(args, family, backend))
    console.print(f"loading {args.model} in {args.bits} bits with {backend}: {why}")
    devices.tell_idle()
    loaded = models.load_for_training(base, args.bits, (args.min_pixels, args.max_pixels), args.backend, args.checkpointing)
    return loaded, base


def read_data(args: argparse.Namespace, loaded, model):
    from sonovqa import dataset, text_only
    from sonovqa.batching import encoder_for

    splits, chooses = dataset.load_undecoded(args.data), args.head == choice.CHOICE
    text_only.check(splits, loaded.processor, chooses, args.model)
    if args.augmentation != "none" and text_only.has_no_images(splits["train"]):
        raise UserError(f"--augmentation {args.augmentation}; texts have no picture to change; leave it out")
    family = families.of(model.config)
    if args.batching == "shared" and not family.shares_prefix:
        args.batching = "separate"
        if not text_only.has_no_images(splits["train"]):
            told = f"{family.name} cannot share an image among its questions ({family.why_not})"
            console.print(f"one question a sequence: {told}")
    if args.max_images:
        splits["train"] = dataset.subset(splits["train"], args.max_images, args.seed)
    head = choice.of_training(splits["train"], loaded.processor.tokenizer, args.task) if chooses else None
    return splits, encoder_for(loaded.processor, model, head)


def plan(args: argparse.Namespace, splits, encoder) -> dict:
    shared = args.batching == "shared"
    how = planning.weighting_of(args)
    asked = (encoder, args.task, args.prompts, shared, args.max_tokens)
    plans = {"train": planning.plan_split(splits["train"], "train", *asked, how)}
    if args.patience and not len(splits["validation"]):
        raise UserError(f"--patience {args.patience}; {args.data} has no validation split to lose patience with; leave it out")
    if len(splits["validation"]):
        plans["validation"] = planning.plan_split(splits["validation"], "validation", *asked, how.for_validation())
    return plans


def make_trainer(args, folder: Path, model, processor, splits, encoder, plans):
    import torch
    from datasets import Dataset
    from transformers import EarlyStoppingCallback, PrinterCallback
    from transformers.trainer_callback import ProgressCallback

    from sonovqa import training
    from sonovqa.augmentation import Augmentation
    from sonovqa.batching import Collator

    steps_a_pass = -(-len(plans["train"].items) // (args.batch * args.accumulate * devices.processes()))
    args.steps = args.steps or max(1, round(args.epochs * steps_a_pass))
    args.eval_every = args.eval_every or max(1, args.steps // 10)
    args.optimizer = args.optimizer or ("adamw_8bit" if torch.cuda.is_available() else "adamw_torch")
    validate = "validation" in plans and not args.dry_run
    place = Path(tempfile.gettempdir()) if args.dry_run else folder / "checkpoints"
    config = training.configure(args, place, validate, TIMED_STEPS if args.dry_run else args.steps)
    tracked = int(os.environ.get("RANK", 0)) == 0 and not args.dry_run
    tracker = tracking.start(args.report_to, args.outputs, args.run, vars(args)) if tracked else None
    progress = training.Progressing(plans["train"].questions, plans["train"].tokens, tracker)
    callbacks = [progress]
    if args.patience and validate:
        callbacks.append(EarlyStoppingCallback(args.patience))
    rows = {name: Dataset.from_list(made.items) for name, made in plans.items()}
    augment = None if args.augmentation == "none" else Augmentation(args.augmentation, args.seed)
    trainer = training.SharedImageTrainer(
        model=model,
        args=config,
        processing_class=processor.tokenizer if processor.image_processor is None else processor,
        callbacks=callbacks,
        gamma=args.focal,
        mass=plans["train"].mass if args.balance == "loss" else None,
        data_collator=Collator(splits, encoder, args.task, args.prompts, augment, devices.row_multiple()),
        train_dataset=rows["train"],
        eval_dataset=rows.get("validation"),
    )
    for default in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(default)
    return trainer, progress


def dry_run(args: argparse.Namespace, trainer) -> None:
    from sonovqa import training

    each = training.time_steps(trainer, args.accumulate, TIMED_STEPS - 1)
    console.print(
        f"dry run: {each:.2f} s a step over {TIMED_STEPS - 1} steps, so about {records.duration(each * args.steps)} for "
        f"{args.steps} steps (validation, merging and its check not counted); peak memory "
        f"{records.gigabytes(records.peak_memory())}; nothing was written"
    )


def resume_from(args: argparse.Namespace, folder: Path) -> str | None:
    found = resuming.last_checkpoint(folder / "checkpoints")
    if args.resume:
        console.print(f"going on from {found}" if found else "no whole checkpoint yet: starting at step 0", soft_wrap=True)
    return str(found) if found else None


if __name__ == "__main__":
    cli.run(main, resume=resuming.way_on(sys.argv))
