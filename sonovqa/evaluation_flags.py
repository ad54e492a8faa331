"""evaluate.py's flags that several of its commands share: who answers, an endpoint elsewhere, resampling, scores, confidence."""

from __future__ import annotations

import argparse
from pathlib import Path

FLAG = argparse.BooleanOptionalAction


def add_who(who) -> None:
    """The model or endpoint that answers; ``who`` is an argument group."""
    who.add_argument("run", nargs="?", metavar="RUN_OR_MODEL", help="outputs/<run>, a model folder, a hub id or tiny")
    who.add_argument("--adapter", action="store_true", help="the run's base with its adapter instead of its merged weights")
    who.add_argument("--bits", type=int, choices=(4, 8, 16), default=16, help="precision the weights are loaded in")
    who.add_argument("--endpoint", metavar="URL", help="OpenAI-compatible server instead; key in VLLM_API_KEY or OPENAI_API_KEY")
    who.add_argument("--model", "--endpoint-model", metavar="NAME", help="its name at the endpoint (unset: the only one)")
    who.add_argument("--head", type=Path, metavar="RUN", help="the choice run that the endpoint serves: answer by its labels")
    who.add_argument("--in-flight", type=int, default=16, help="requests at once to the endpoint")
    who.add_argument("--batch-images", type=int, default=8, help="images answered together by a local model")
    who.add_argument("--shared-prefix", action=FLAG, default=True, help="a local model encodes an image once for all questions")


def add_elsewhere(group) -> None:
    """What an endpoint beyond this machine needs: consent, its key and its prices; ``group`` is an argument group."""
    group.add_argument("--yes", action="store_true", help="send images to an endpoint that is not on this machine")
    group.add_argument("--api-key-env", metavar="NAME", help="environment variable that holds the endpoint's key")
    group.add_argument("--price-input", type=float, metavar="P", help="price of a million input tokens, to estimate the cost")
    group.add_argument("--price-output", type=float, metavar="P", help="price of a million output tokens")


def add_resampling(group) -> None:
    """How intervals are drawn."""
    group.add_argument("--resamples", type=int, default=1000, help="bootstrap resamples of groups for intervals; 0: none")
    group.add_argument("--seed", type=int, default=42, help="of all draws")


def add_scoring(group) -> None:
    """What is scored and shown."""
    group.add_argument("--bertscore", metavar="MODEL", help="BERTScore by a model folder or downloaded hub id")
    group.add_argument("--gallery", type=int, default=200, help="most answers with their images in report.html")
    group.add_argument(
        "--strict",
        action="store_true",
        help="exit 1 if any finding is serious (marked “!”; “·” is a caution)",
    )


def add_confidence(sure) -> None:
    """Label probabilities and what is made of them."""
    sure.add_argument("--confidence", action="store_true", help="probability of every label of closed questions")
    sure.add_argument("--abstain-below", type=float, metavar="P", help="with --confidence: hold back answers less likely")
    sure.add_argument("--most-useful", type=int, metavar="N", help="list the N images of --images to label next")
    sure.add_argument("--images", type=Path, metavar="FOLDER", help="a folder of images, Folder/File, for --most-useful")
