"""train.py's flags of the loss and of the optimisation; what it trains, on what and where is in train.py itself."""

from __future__ import annotations

from sonovqa import choice, weighting

BEST, LAST = "best", "last"
OPTIMIZERS = ("adamw_8bit", "adamw_torch", "paged_adamw_8bit", "sgd")


def add_loss(loss) -> None:
    """What is learnt of an answer and how much each counts; ``loss`` is an argument group."""
    loss.add_argument(
        "--head",
        choices=(choice.GENERATE, choice.CHOICE),
        default=choice.GENERATE,
        help="whole answers, or closed questions by their labels' rows of the LM head at the prompt's last token",
    )
    loss.add_argument(
        "--loss-mean", choices=weighting.MEANS, default="token", help="what counts alike: tokens, answers, questions"
    )
    loss.add_argument("--question-weights", nargs="+", default=[], metavar="Q7=2", help="factor on a question's loss")
    loss.add_argument(
        "--balance",
        choices=weighting.BALANCES,
        default="none",
        help="rare classes: repeat their patients' images, or weigh the loss by inverse frequency (training split only)",
    )
    balanced = (
        "closed question whose classes are balanced; with --head choice also closed (all yes-or-no ones) or label (of texts)"
    )
    loss.add_argument("--balance-question", default="Q7", metavar="QUESTION", help=balanced)
    loss.add_argument("--focal", type=float, default=0.0, metavar="GAMMA", help="focal loss over whole answers; 0 is none")


def add_optimisation(steps) -> None:
    """How long, in what batches and by which optimiser; ``steps`` is an argument group."""
    steps.add_argument("--epochs", type=float, default=3.0, help="passes over the training images")
    steps.add_argument("--steps", type=int, help="optimiser steps; overrides --epochs")
    steps.add_argument(
        "--batch", type=int, default=2, help="sequences a device and micro-batch (shared: images; separate: questions)"
    )
    steps.add_argument("--accumulate", type=int, default=4, help="micro-batches an optimiser step")
    steps.add_argument("--lr", type=float, default=2e-4, help="learning rate")
    steps.add_argument(
        "--schedule", choices=("linear", "cosine", "constant_with_warmup"), default="linear", help="of the learning rate"
    )
    steps.add_argument("--warmup", type=int, default=5, help="steps of linear warm-up")
    steps.add_argument("--optimizer", choices=OPTIMIZERS, help="(unset: adamw_8bit with CUDA, else adamw_torch)")
    steps.add_argument("--weight-decay", type=float, default=0.01, help="decoupled weight decay")
    steps.add_argument(
        "--keep", choices=(BEST, LAST), help=f"weights of the least validation loss, or of the last step (unset: {BEST}; with "
        f"--balance or --focal {LAST})"
    )  # fmt: skip
    steps.add_argument("--seed", type=int, default=42, help="of data order, LoRA's start and dropout")


def keeps_best(args) -> bool:
    """Whether the checkpoint of the least validation loss is the result: if ``--keep`` does not say, only where that loss is
    the one trained on.

    The validation split keeps its classes as they are and is never weighted. Judged by it, a model that learns to name a rare
    class looks worse the better it does so, and the checkpoint kept would be the one before it began (experiments.md, 7).
    """
    return args.keep == BEST if args.keep else args.balance == "none" and not args.focal
