"""Which rows and branches make a training sequence, and how long each is, before anything is decoded or trained."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from sonovqa import chat
from sonovqa.cli import UserError, console


@dataclass(frozen=True)
class Plan:
    """The sequences of one split.

    Attributes:
        items: ``{split, row, branches, tokens}`` each: the split's name, the row's
            number, its branches' numbers and the sequence's length.
        questions: branches in all. dealt: rows whose branches had to be dealt over several sequences.
        prefix_tokens, branch_tokens, answer_tokens: tokens in all, each prefix counted once a sequence.
    """

    items: list[dict]
    questions: int
    dealt: int
    prefix_tokens: int
    branch_tokens: int
    answer_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens of one pass over the split."""
        return self.prefix_tokens + self.branch_tokens


def plan_split(source, name: str, encoder, task: str, variant: str, shared: bool, max_tokens: int) -> Plan:
    """Deal a split's questions over sequences of at most ``max_tokens`` tokens.

    Args:
        source: the split, its images not decoded; only their headers are read here.
        name: the split's name.
        encoder: the run's `batching.Encoder`.
        task, variant: what is asked, see `chat.tasks_of`.
        shared: all questions of an image in one sequence, as far as they fit; else one question a sequence.
        max_tokens: the longest sequence.

    Raises:
        UserError: if no row has anything to learn, or one image and question alone pass the limit: nothing is cut.
    """
    items, dealt, prefix_tokens, branch_tokens, answer_tokens, too_long = [], 0, 0, 0, 0, []
    prefixes = encoder.prefix_lengths([image_size(row["image"]["bytes"]) for row in source], _contexts(source))
    lengths: dict[tuple[str, str], tuple[int, int]] = {}
    rows = source.remove_columns("image")
    for number, (row, prefix) in enumerate(zip(rows, prefixes, strict=True)):
        branches = []
        for task_ in chat.tasks_of(row, task, variant):
            key = (task_["prompt"], task_["answer"])
            if key not in lengths:  # answers repeat: 15,000 rows hold a few hundred different ones
                branch = encoder.branch(*key)
                lengths[key] = (len(branch.ids), len(branch.ids) - branch.asked)
            branches.append(lengths[key])
        groups = _deal([total for total, _ in branches], max_tokens - prefix, shared)
        if groups is None:
            too_long.append((number, prefix + max(total for total, _ in branches)))
            continue
        dealt += shared and len(groups) > 1
        for group in groups:
            length = prefix + sum(branches[k][0] for k in group)
            items.append({"split": name, "row": number, "branches": group, "tokens": length})
            prefix_tokens += prefix
        branch_tokens += sum(total for total, _ in branches)
        answer_tokens += sum(told for _, told in branches)
    if too_long:
        longest = max(length for _, length in too_long)
        raise UserError(
            f"--max-tokens {max_tokens}; {len(too_long)} images have a question that needs up to {longest} tokens with its "
            f"image; nothing is cut in silence; use --max-tokens {longest} or a smaller --max-pixels"
        )
    if not items:
        raise UserError(
            f"--task {task}; no row of the split has an answer to it; see the questions in dataset.json; choose another --task"
        )
    questions = sum(len(item["branches"]) for item in items)
    return Plan(items, questions, dealt, prefix_tokens, branch_tokens, answer_tokens)


def image_size(data: bytes) -> tuple[int, int]:
    """``(width, height)`` from an image file's header, EXIF rotation counted; no pixel is decoded."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        return image.size[::-1] if turned else image.size


def show(args, base: str, loaded, model, plans: dict[str, Plan]) -> None:
    """Print what a run is about to do.

    Args:
        args: train.py's arguments, all filled in.
        base: folder or hub id of the base weights. loaded: the `models.Loaded` base. model: with what is trained attached.
        plans: by split.
    """
    from rich.table import Table

    from sonovqa.models import pixel_budget

    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    table = Table("plan", "", title=f"run {args.run}", title_justify="left", show_header=False)
    for name, made in plans.items():
        longest = max(item["tokens"] for item in made.items)
        dealt = f"; {made.dealt} rows dealt over several sequences" if made.dealt else ""
        table.add_row(
            name,
            f"{len(made.items)} sequences, {made.questions} answers, {made.tokens} tokens (prefixes {made.prefix_tokens}, "
            f"branches {made.branch_tokens}, of them answers {made.answer_tokens}), longest {longest}{dealt}",
        )
    named = args.model if args.model == base else f"{args.model} ({base})"
    table.add_row("model", f"{named}, {args.bits} bits, {loaded.backend}: {loaded.why}")
    table.add_row("trainable", f"{trained:,} parameters" + ("" if args.full else f", LoRA r={args.rank} alpha={args.alpha}"))
    table.add_row("pixels", f"fewest and most an image: {pixel_budget(loaded.processor) or 'fixed by the model'}")
    rows = f"{args.steps} of {args.batch} x {args.accumulate} sequences"
    table.add_row("steps", f"{rows}, {args.optimizer}, lr {args.lr}, {args.schedule}")
    console.print(table)


def _contexts(source) -> list[str | None]:
    return list(source["context"]) if "context" in source.column_names else [None] * len(source)


def _deal(lengths: Sequence[int], room: int, shared: bool) -> list[list[int]] | None:
    """Branch numbers in order, grouped so that each group fits ``room`` tokens; ``None`` if one alone does not."""
    if any(length > room for length in lengths):
        return None
    if not shared:
        return [[k] for k in range(len(lengths))]
    groups, used = [], room + 1
    for k, length in enumerate(lengths):
        if used + length > room:
            groups.append([])
            used = 0
        groups[-1].append(k)
        used += length
    return groups
