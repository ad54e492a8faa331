"""Which rows and branches make a training sequence, and how long each is, before anything is decoded or trained."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass

from sonovqa import chat, choice, confidence, images, weighting
from sonovqa.cli import UserError, console
from sonovqa.weighting import Sample, Weighting

PLAIN = Weighting()


def weighting_of(args: argparse.Namespace) -> Weighting:
    """What train.py's flags say of how much each answer counts. Raises `UserError` for weights of another form."""
    questions = weighting.parse_question_weights(args.question_weights)
    return Weighting(args.loss_mean, questions, args.balance, args.balance_question)


def check_weighting(args: argparse.Namespace) -> None:
    """Whether train.py's flags weigh questions that the training split asks, before a model is loaded.

    Raises:
        UserError: as `weighting.check_asked` does.
    """
    from sonovqa import dataset

    how = weighting_of(args)
    if not how.questions and how.balance == "none":
        return
    kinds = {}
    for questions in dataset.load_undecoded(args.data)["train"]["questions"]:
        if args.head == choice.CHOICE:
            found = [confidence.closed_kind(entry) for entry in questions if entry["answer"] and chat.is_asked(entry, args.task)]
        else:
            found = [one["question_id"] for one in chat.tasks_of({"questions": questions}, args.task)]
        kinds |= dict.fromkeys(kind for kind in found if kind)
    weighting.check_asked(how, list(kinds), list(kinds))


@dataclass(frozen=True)
class Plan:
    """The sequences of one split.

    Attributes:
        items: ``{split, row, branches, weights, tokens}`` each: the split's name, the row's number, its branches' numbers,
            the loss weight of their tokens and the sequence's length.
        questions: branches in all, repeats of oversampling among them. dealt: rows whose branches had to be dealt over
            several sequences. repeated: sequences that are repeats.
        prefix_tokens, branch_tokens, answer_tokens: tokens in all, each prefix counted once a sequence.
        classes: of a balanced question, see `weighting.class_table`.
        mass: loss weights over all tokens of a sequence, the mean of those sequences that have any.
    """

    items: list[dict]
    questions: int
    dealt: int
    repeated: int
    prefix_tokens: int
    branch_tokens: int
    answer_tokens: int
    classes: list[dict]
    mass: float

    @property
    def tokens(self) -> int:
        """Tokens of one pass over the split."""
        return self.prefix_tokens + self.branch_tokens


def plan_split(
    source, name: str, encoder, task: str, variant: str, shared: bool, max_tokens: int, how: Weighting = PLAIN
) -> Plan:
    """Deal a split's questions over sequences of at most ``max_tokens`` tokens.

    Args:
        source: the split, its images not decoded: their sizes are told by the files' heads.
        name: the split's name.
        encoder: the run's `batching.Encoder`.
        task, variant: what is asked, see `chat.tasks_of`.
        shared: all questions of an image in one sequence, as far as they fit; else one question a sequence.
        max_tokens: the longest sequence.
        how: what each answer counts; see `weighting`.

    Raises:
        UserError: if no row has anything to learn, or one image and question alone pass the limit: nothing is cut.
    """
    rows = _measured(source, encoder, task, variant)
    samples = [sample for row in rows for sample, _ in row.branches.values()]
    if not samples:
        raise UserError(
            f"--task {task}; no row of the {name} split has an answer to it; see the questions in dataset.json; choose another "
            "--task, or prepare the set with a larger share for that split"
        )
    weighed, drawn = weighting.weigh(samples, how), weighting.repeats(samples, how)
    weights = iter(weighed)
    once, again, dealt, too_long = [], [], 0, []
    for number, row in enumerate(rows):
        mine = {k: next(weights) for k in row.branches}
        lengths = {k: length for k, (_, length) in row.branches.items()}
        groups = _deal(lengths, max_tokens - row.prefix, shared)
        if groups is None:
            too_long.append(row.prefix + max(lengths.values()))
            continue
        dealt += shared and len(groups) > 1
        made = [_item(name, number, row, group, mine) for group in groups]
        once += made
        again += made * (drawn.get(number, 1) - 1)
    if too_long:
        raise UserError(
            f"--max-tokens {max_tokens}; {len(too_long)} images have a question that needs up to {max(too_long)} tokens with its "
            f"image; nothing is cut in silence; use --max-tokens {max(too_long)} or a smaller --max-pixels"
        )
    classes = weighting.class_table(samples, weighed, drawn, how.target) if how.balance != "none" else []
    return _counted([*once, *again], rows, dealt, len(again), classes)


@dataclass(frozen=True)
class _Row:
    """A row measured: tokens of its prefix; by number in `Encoder.tasks_of` each branch's sample and length in tokens."""

    prefix: int
    branches: dict[int, tuple[Sample, int]]


def _measured(source, encoder, task: str, variant: str) -> list[_Row]:
    sizes = [None if row["image"] is None else images.size_of(row["image"]["bytes"]) for row in source]
    prefixes = encoder.prefix_lengths(sizes, _contexts(source))
    lengths: dict[tuple[str, str], tuple[int, int]] = {}
    made = []
    for number, (row, prefix) in enumerate(zip(source.remove_columns("image"), prefixes, strict=True)):
        labels = {question["question_id"]: question["label"] for question in row["questions"]}
        branches = {}
        for k, asked in enumerate(encoder.tasks_of(row, task, variant)):
            key = (asked["prompt"], asked["answer"])
            if key not in lengths:  # answers repeat: 15,000 rows hold a few hundred different ones
                branch = encoder.branch_of(asked)
                lengths[key] = (len(branch.ids), len(branch.ids) - branch.asked or 1)  # a label has the weight of one token
            total, told = lengths[key]
            name, label = asked.get("kind", asked["question_id"]), asked.get("label", labels.get(asked["question_id"]))
            if "place" not in asked or asked["place"][1] is not None:
                branches[k] = Sample(number, row["group"], name, label or "", told), total
        made.append(_Row(prefix, branches))
    return made


def _item(split: str, number: int, row: _Row, group: list[int], weights: dict[int, float]) -> dict:
    length = row.prefix + sum(row.branches[k][1] for k in group)
    return {"split": split, "row": number, "branches": group, "weights": [weights[k] for k in group], "tokens": length}


def _counted(items: list[dict], rows: list[_Row], dealt: int, repeated: int, classes: list[dict]) -> Plan:
    chosen = [(rows[item["row"]], k) for item in items for k in item["branches"]]
    masses = [_mass(rows[item["row"]], item) for item in items]
    return Plan(
        items=items,
        questions=len(chosen),
        dealt=dealt,
        repeated=repeated,
        prefix_tokens=sum(rows[item["row"]].prefix for item in items),
        branch_tokens=sum(row.branches[k][1] for row, k in chosen),
        answer_tokens=sum(row.branches[k][0].tokens for row, k in chosen),
        classes=classes,
        mass=sum(masses) / max(1, sum(mass > 0 for mass in masses)),
    )


def _mass(row: _Row, item: dict) -> float:
    pairs = zip(item["branches"], item["weights"], strict=True)
    return sum(weight * row.branches[k][0].tokens for k, weight in pairs)


def show(args, base: str, loaded, model, plans: dict[str, Plan], head=None) -> None:
    """Print what a run is about to do.

    Args:
        args: train.py's arguments, all filled in.
        base: folder or hub id of the base weights. loaded: the `models.Loaded` base. model: with what is trained attached.
        plans: by split. head: the `choice.Head` that is trained, or ``None``.
    """
    from rich.table import Table

    from sonovqa.models import pixel_budget

    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    table = Table("plan", "", title=f"run {args.run}", title_justify="left", show_header=False)
    for name, made in plans.items():
        longest = max(item["tokens"] for item in made.items)
        dealt = f"; {made.dealt} rows dealt over several sequences" if made.dealt else ""
        dealt += f"; {made.repeated} sequences are repeats of rare classes" if made.repeated else ""
        table.add_row(
            name,
            f"{len(made.items)} sequences, {made.questions} answers, {made.tokens} tokens (prefixes {made.prefix_tokens}, "
            f"branches {made.branch_tokens}, of them answers {0 if head else made.answer_tokens}), longest {longest}{dealt}",
        )
    if head:
        table.add_row("head", head.describe())
    named = args.model if args.model == base else f"{args.model} ({base})"
    table.add_row("model", f"{named}, {args.bits} bits, {loaded.backend}: {loaded.why}")
    table.add_row("trainable", f"{trained:,} parameters" + ("" if args.full else f", LoRA r={args.rank} alpha={args.alpha}"))
    table.add_row("pixels", f"fewest and most an image: {pixel_budget(loaded.processor) or 'fixed by the model'}")
    rows = f"{args.steps} of {args.batch} x {args.accumulate} sequences"
    table.add_row("steps", f"{rows}, {args.optimizer}, lr {args.lr}, {args.schedule}")
    console.print(table)
    if plans["train"].classes:
        show_classes(plans["train"].classes, args.balance_question, args.balance)


def show_classes(classes: list[dict], question_id: str, balance: str) -> None:
    """Print what a balanced question's classes weigh, from `weighting.class_table`, and the effective sample size."""
    from rich.table import Table

    table = Table("class", "answers", "patients", "share of the loss", title=f"{question_id} balanced by {balance}")
    for row in classes[:-1]:
        table.add_row(row["label"] or "(unread)", str(row["answers"]), str(row["groups"]), f"{row['share']:.1%}")
    everything = classes[-1]
    console.print(table)
    console.print(
        f"effective sample size {everything['effective']:.0f} of {everything['answers']} answers from {everything['groups']} "
        "patients or groups (Kish): the price of balancing in certainty"
    )


def _contexts(source) -> list[str | None]:
    return list(source["context"]) if "context" in source.column_names else [None] * len(source)


def _deal(lengths: Mapping[int, int], room: int, shared: bool) -> list[list[int]] | None:
    """Branch numbers in order, grouped so that each group fits ``room`` tokens; ``None`` if one alone does not."""
    if any(length > room for length in lengths.values()):
        return None
    if not shared:
        return [[k] for k in lengths]
    groups, used = [], room + 1
    for k, length in lengths.items():
        if used + length > room:
            groups.append([])
            used = 0
        groups[-1].append(k)
        used += length
    return groups
