"""Before images are sent to an endpoint beyond this machine: how many, to whom, about how many tokens, and what they cost.

An estimate errs on the side of too much: an image counts a token for each `PIXELS_A_TOKEN` pixels, as the provider that counts
most does, a text one for each `LETTERS_A_TOKEN` letters, and an answer takes all the tokens it may have. What a provider bills
for thinking that it does not show is not in it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from sonovqa import asking, predictions, serving_plan
from sonovqa.cli import UserError, console
from sonovqa.questions import QUESTIONS, REPORT_ID, SYSTEM_TEXT

#: Source: Anthropic's documentation of vision, "tokens = (width px * height px) / 750"; OpenAI's 512 x 512 tiles of 170 tokens
#: give 1,542 pixels, Qwen-VL's 28 x 28 or 32 x 32 patches 784 or 1,024.
PIXELS_A_TOKEN = 750
LETTERS_A_TOKEN = 4  # of English; source: OpenAI's rule of thumb, "1 token ~= 4 chars in English"


@dataclass(frozen=True)
class Estimate:
    """What is still to be sent: images, requests, and about how many tokens go in and at most come out."""

    images: int
    requests: int
    tokens_in: int
    tokens_out: int

    def cost(self, price_in: float | None, price_out: float | None) -> float | None:
        """In the prices' currency; prices are of a million tokens, and ``None`` is not known."""
        if price_in is None or price_out is None:
            return None
        return (self.tokens_in * price_in + self.tokens_out * price_out) / 1e6


def is_elsewhere(url: str) -> bool:
    """Whether an endpoint is beyond this machine."""
    return not serving_plan.is_loopback(urlsplit(url).hostname or "")


def estimate(asked: Sequence[asking.Item], sizes: Mapping[int, asking.Size | None], max_new_tokens: int) -> Estimate:
    """Of these questions, one request each with its image.

    Args:
        asked: the items (`asking.Item`).
        sizes: by row, width and height of the image in pixels; ``None`` where there is none.
        max_new_tokens: an answer's limit; a report has eight times it.
    """
    tokens_in = tokens_out = 0
    for item in asked:
        width, height = sizes[item.row] or (0, 0)
        letters = len(SYSTEM_TEXT) + len(item.context or "") + len(item.prompt)
        tokens_in += -(-width * height // PIXELS_A_TOKEN) - (-letters // LETTERS_A_TOKEN)
        tokens_out += max_new_tokens * (len(QUESTIONS) if item.question_id == REPORT_ID else 1)
    return Estimate(len({item.row for item in asked}), len(asked), tokens_in, tokens_out)


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
    """Print what is about to be sent and what it costs; nothing where the endpoint is this machine's and has no price.

    Args:
        args: evaluate.py's.
        raw: the split, images not decoded. items: its questions that are asked.
        out: the folder in which answers lie that are not asked for again.
        blind: whether grey images are asked about too.

    Raises:
        UserError: if images would leave this machine and ``--yes`` was not given.
    """
    priced = args.price_input is not None or args.price_output is not None
    if not args.endpoint or not (is_elsewhere(args.endpoint) or priced):
        return
    sizes = asking.image_sizes(raw, sorted({item.row for item in items}))
    left = still_to_ask(items, sizes, out, blind)
    if not left:
        return
    told = estimate(left, sizes, args.max_new_tokens)
    cost = told.cost(args.price_input, args.price_output)
    price = f"about {cost:,.2f} at most" if cost is not None else "unknown: --price-input and --price-output tell it"
    extra = "; --confidence asks again for every label" if getattr(args, "confidence", False) and not args.head else ""
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
