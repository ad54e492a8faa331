"""Before images are sent to an endpoint beyond this machine: how many, to whom, about how many tokens, and what they cost.

An estimate errs on the side of too much: an image counts a token for each `PIXELS_A_TOKEN` pixels, as the provider that counts
most does, a text one for each `LETTERS_A_TOKEN` letters, and an answer takes all the tokens it may have. What a provider bills
for thinking that it does not show is not in it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from sonovqa import asking, images, predictions, serving_sockets
from sonovqa.cli import UserError, console
from sonovqa.engines import LETTERS_A_TOKEN, ImageRequest
from sonovqa.questions import QUESTIONS, REPORT_ID, SYSTEM_TEXT

#: Source: Anthropic's documentation of vision, "tokens = (width px * height px) / 750"; OpenAI's 512 x 512 tiles of 170 tokens
#: give 1,542 pixels, Qwen-VL's 28 x 28 or 32 x 32 patches 784 or 1,024.
PIXELS_A_TOKEN = 750


@dataclass(frozen=True)
class Estimate:
    """What is still to be sent: images, requests, and about how many tokens go in and at most come out."""

    images: int
    requests: int
    tokens_in: int
    tokens_out: int

    def __add__(self, other: Estimate) -> Estimate:
        sums = (getattr(self, name) + getattr(other, name) for name in ("images", "requests", "tokens_in", "tokens_out"))
        return Estimate(*sums)

    def cost(self, price_in: float | None, price_out: float | None) -> float | None:
        """In the prices' currency; prices are of a million tokens, and ``None`` is not known."""
        if price_in is None or price_out is None:
            return None
        return (self.tokens_in * price_in + self.tokens_out * price_out) / 1e6


NOTHING = Estimate(0, 0, 0, 0)


def is_elsewhere(url: str) -> bool:
    """Whether an endpoint is beyond this machine."""
    return not serving_sockets.is_loopback(urlsplit(url).hostname or "")


def estimate(asked: Sequence[asking.Item], sizes: Mapping[int, asking.Size | None], max_new_tokens: int) -> Estimate:
    """Of these questions, one request each with its image.

    Args:
        asked: the items (`asking.Item`).
        sizes: by row, width and height of the image in pixels; ``None`` where there is none.
        max_new_tokens: an answer's limit; a report has eight times it.
    """
    tokens_out = sum(max_new_tokens * (len(QUESTIONS) if item.question_id == REPORT_ID else 1) for item in asked)
    tokens_in = sum(_tokens_in(sizes[item.row], item.context, item.prompt) for item in asked)
    return Estimate(len({item.row for item in asked}), len(asked), tokens_in, tokens_out)


def of_requests(asked: Iterable[ImageRequest], max_new_tokens: int, times: float = 1) -> Estimate:
    """Of images with their prompts, one request each prompt, all of it ``times`` times over (rounded up)."""
    pictures = prompts = tokens = 0
    for one in asked:
        size = images.size_of(one.image)
        pictures, prompts = pictures + 1, prompts + len(one.prompts)
        tokens += sum(_tokens_in(size, one.context, prompt) for _, prompt in one.prompts)
    count = math.ceil(prompts * times)
    return Estimate(pictures, count, math.ceil(tokens * times), count * max_new_tokens)


def _tokens_in(size: asking.Size | None, context: str | None, prompt: str) -> int:
    width, height = size or (0, 0)
    letters = len(SYSTEM_TEXT) + len(context or "") + len(prompt)
    return -(-width * height // PIXELS_A_TOKEN) - (-letters // LETTERS_A_TOKEN)


def still_to_ask(items: Sequence[asking.Item], sizes: Mapping, out: Path, blind: bool) -> list[asking.Item]:
    """The items without an answer in ``out``, and those of grey images where they are asked too (`asking.ask_all`)."""
    names = {"predictions.jsonl": {item.key: item for item in items}}
    if blind:
        names["blind.jsonl"] = {key: item for key, (item, _) in asking.blind_items(items, sizes).items()}
    left = []
    for name, asked in names.items():
        done = predictions.latest(predictions.read(out / name))
        left += [item for key, item in asked.items() if key not in done or done[key]["error"] is not None]
    return left


def agree(args: argparse.Namespace, raw, items: Sequence[asking.Item], out: Path, blind: bool) -> None:
    """`consent` to what evaluate.py is about to send.

    Args:
        args: evaluate.py's.
        raw: the split, images not decoded. items: its questions that are asked.
        out: the folder in which answers lie that are not asked for again.
        blind: whether grey images are asked about too.

    Raises:
        UserError: as `consent` does.
    """
    if not _told_first(args):
        return
    sizes = asking.image_sizes(raw, sorted({item.row for item in items}))
    told = estimate(still_to_ask(items, sizes, out, blind), sizes, args.max_new_tokens)
    extra = "; --confidence asks again for every label" if getattr(args, "confidence", False) and not args.head else ""
    consent(args, told, extra)


def consent(args: argparse.Namespace, told: Estimate, extra: str = "") -> None:
    """Print what is about to be sent and what it costs; nothing where the endpoint is this machine's and has no price.

    Args:
        args: with ``endpoint`` and what `evaluation_flags.add_elsewhere` adds.
        told: all that is still to be sent.
        extra: what is not in it.

    Raises:
        UserError: if images would leave this machine and ``--yes`` was not given.
    """
    if not _told_first(args) or not told.requests:
        return
    cost = told.cost(args.price_input, args.price_output)
    price = f"about {cost:,.2f} at most" if cost is not None else "unknown: --price-input and --price-output tell it"
    console.print(
        f"{told.requests:,} requests: about {told.tokens_in:,} tokens in, at most {told.tokens_out:,} out; cost {price}{extra}",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    if not is_elsewhere(args.endpoint):
        return
    host = urlsplit(args.endpoint).hostname
    what = f"{told.images:,} images and their questions leave this machine for {host}"
    if not args.yes:
        raise UserError(f"{what}; --endpoint {args.endpoint}; nothing was sent; add --yes if they may (patients' data may not)")
    console.print(what, style="yellow", markup=False, soft_wrap=True)


def _told_first(args: argparse.Namespace) -> bool:
    """Whether anything is to be said before the endpoint is asked."""
    priced = args.price_input is not None or args.price_output is not None
    return bool(args.endpoint) and (is_elsewhere(args.endpoint) or priced)
