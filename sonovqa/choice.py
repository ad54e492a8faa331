"""The choice head: a closed question answered at the last token of its prompt, by the LM head's rows of its labels alone.

A label is one token, and its probability the softmax over the labels' logits where the answer would begin. No answer token
stands in the sequence, in training or afterwards: one forward pass answers all closed questions of an image. A question's
labels are those that the training split holds, so no row is compared that nothing was learnt about.

Which token stands for a label: the first one of its answer, as in "yes" and "no". Where two labels begin with the same token
("axial abdomen" and "axial thorax", or any two ages, whose digits are single tokens) that token cannot tell them apart, and no
single later one can tell all of them apart either. Then capital and small letters stand for the labels in their order, each
a token of its own in every vocabulary of bytes or pieces: what a letter means is learnt in training, the prompt does not
name it. More labels than letters, or a tokenizer that has no tokens for them, is refused.

Source: the trimmed classification head of Unsloth's Llama-3 text classifier (only the label tokens' rows of the LM head, loss
on the last token), which an earlier project used; class weights, balance and focal loss are `weighting`'s and `losses`' own.
"""

from __future__ import annotations

import functools
import string
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sonovqa import chat, confidence, files, records
from sonovqa.cli import UserError, console

GENERATE, CHOICE = "generate", "choice"  # what train.py's --head takes
FILE = "choice_head.json"  # ``run["head"]`` beside pushed weights, which no run.json goes with: they cannot be asked without it
LETTERS = string.ascii_uppercase + string.ascii_lowercase
NOT_ITS_OWN = "the run's choice head was not trained on this question"


@dataclass(frozen=True)
class Label:
    """One label of a closed question.

    Attributes:
        name: as `confidence.label_of` gives it.
        answer: what a reply says for it.
        token: id of the token whose row of the LM head stands for it.
        spelt: what that token stands for in writing: the answer's beginning, or a letter.
    """

    name: str
    answer: str
    token: int
    spelt: str


@dataclass(frozen=True)
class Head:
    """The labels of every kind of closed question (`confidence.closed_kind`) that a run was trained on, in their order."""

    sets: Mapping[str, tuple[Label, ...]]

    @functools.cached_property
    def tokens(self) -> tuple[int, ...]:
        """The ids of all labels' tokens, each once: the rows of the LM head that are computed, ``U`` of them."""
        return tuple(dict.fromkeys(label.token for labels in self.sets.values() for label in labels))

    @functools.cached_property
    def columns(self) -> dict[str, list[int]]:
        """By kind, the place of each label's token among `tokens`."""
        return {kind: [self.tokens.index(label.token) for label in labels] for kind, labels in self.sets.items()}

    def place(self, kind: str, name: str) -> tuple[int, int | None]:
        """``(number of the kind, column of the label)``; the column is ``None`` for a label that training did not hold."""
        found = (column for label, column in zip(self.sets[kind], self.columns[kind]) if label.name == name)
        return list(self.sets).index(kind), next(found, None)

    def of_row(self, kind: str, logits: Sequence[float]) -> dict[str, float]:
        """Log-likelihoods or logits by label of a kind, from values over `tokens`, ``[U]``."""
        return {label.name: float(logits[at]) for label, at in zip(self.sets[kind], self.columns[kind])}

    def answer_of(self, kind: str, name: str) -> str:
        """What a reply says for a label."""
        return next(label.answer for label in self.sets[kind] if label.name == name)

    def json(self) -> dict:
        """As run.json keeps it; `from_json` reads it."""
        return {"kind": CHOICE, "sets": {kind: [asdict(label) for label in labels] for kind, labels in self.sets.items()}}

    def describe(self) -> str:
        """The labels in one line."""
        told = (f"{kind}: {', '.join(_shown(label) for label in labels)}" for kind, labels in self.sets.items())
        return f"choice of {'; '.join(told)}"


def _shown(label: Label) -> str:
    return label.answer if label.answer.startswith(label.spelt) else f"{label.answer} (as {label.spelt})"


def from_json(told: Mapping | None) -> Head | None:
    """The head of a run record (``run["head"]``); ``None`` where the run generates its answers."""
    if not told:
        return None
    return Head({kind: tuple(Label(**label) for label in labels) for kind, labels in told["sets"].items()})


def of_run(run: Mapping | None) -> Head | None:
    """The head of run.json, or ``None`` of a generative run and of what is no run."""
    return from_json((run or {}).get("head"))


def behind(path: str | Path | None) -> Head | None:
    """The head of a run's folder or its ``merged/``, or of weights that `hub` pushed, in ``path`` or its ``adapter/``.

    ``None`` where answers are generated, and of what is no folder. Raises `UserError` for a file that is no JSON.
    """
    if (run := records.run_behind(path)) is not None or not path:
        return of_run(run)
    found = (Path(path) / FILE, Path(path) / "adapter" / FILE)
    return next((from_json(files.read_made(file)) for file in found if file.exists()), None)


def of_training(split, tokenizer, task: str) -> Head:
    """The head for what a training split holds.

    Args:
        split: rows as stored; only ``questions`` is read.
        tokenizer: of the model.
        task: ``all`` for all closed questions, ``yes-no``, or one question id.

    Raises:
        UserError: if no closed question with two labels or more is asked, or labels have no tokens to stand for them.
    """
    said: dict[str, dict[str, Counter]] = defaultdict(lambda: defaultdict(Counter))
    for questions in split["questions"]:
        for entry in questions:
            kind = confidence.closed_kind(entry) if entry["answer"] and chat.is_asked(entry, task) else None
            name = kind and confidence.label_of(entry, entry["answer"])
            if name and name != "unread":
                said[kind][name][entry["answer"]] += 1
    odd = {name for name in said.get(confidence.YES_NO, ()) if name not in confidence.canonical_answers(confidence.YES_NO)}
    if odd:
        count = sum(said[confidence.YES_NO].pop(name).total() for name in odd)
        told = ", ".join(repr(name) for name in sorted(odd)[:3])
        console.print(f"choice head: {count} yes-or-no questions are left out; their answers are neither: {told}", soft_wrap=True)
    alone = [kind for kind, labels in said.items() if len(labels) < 2]
    sets = {kind: _labels(kind, labels, tokenizer) for kind, labels in sorted(said.items()) if kind not in alone}
    if not sets:
        closed = f"{', '.join(confidence.CLOSED)}, yes-or-no questions and labels of texts are"
        why = f"{', '.join(alone)} has one label only in the training split" if alone else "it asks no closed question"
        raise UserError(f"--head choice with --task {task}; {why}; {closed}, with two labels or more; choose another --task")
    if alone:
        console.print(f"choice head: {', '.join(alone)} left out: the same answer throughout the training split", soft_wrap=True)
    return Head(sets)


def _labels(kind: str, said: Mapping[str, Counter], tokenizer) -> tuple[Label, ...]:
    canonical = confidence.canonical_answers(kind)
    names = [name for name in canonical if name in said] + sorted(name for name in said if name not in canonical)
    answers = [canonical.get(name) or min(said[name], key=lambda text: (-said[name][text], text)) for name in names]
    tokens, spelt = tokens_of(answers, tokenizer)
    return tuple(Label(*four) for four in zip(names, answers, tokens, spelt, strict=True))


def tokens_of(answers: Sequence[str], tokenizer) -> tuple[list[int], list[str]]:
    """A token for each answer and how it is written: its first token, or a letter where two answers begin alike.

    Raises:
        UserError: if there are more answers than letters, or letters are no tokens of their own.
    """

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    first = [ids(answer)[0] for answer in answers]
    if len(set(first)) == len(answers) and tokenizer.unk_token_id not in first:
        return first, [tokenizer.decode([token]).strip() for token in first]
    letters = LETTERS[: len(answers)]
    found = [ids(letter) for letter in letters]
    tokens = [one[0] for one in found]
    if len(answers) > len(LETTERS) or any(len(one) != 1 for one in found) or len(set(tokens)) < len(tokens):
        raise UserError(
            f"--head choice; {len(answers)} labels, some of which begin with the same token, such as {answers[0]!r}; "
            f"at most {len(LETTERS)}, with a tokenizer that has a token a letter; use --head {GENERATE}"
        )
    return tokens, list(letters)


def tasks_of(row: Mapping, task: str, variant: str, head: Head) -> list[dict]:
    """`chat.tasks_of`, of it only the closed questions of a head's kinds, each with ``kind``, ``label`` and ``place``.

    A question whose label training did not hold is among them (its ``place`` has no column): numbers of questions are then
    the same whatever an augmentation makes of the answers.
    """
    entries = {entry["question_id"]: entry for entry in row["questions"]}
    made = []
    for asked in chat.tasks_of(row, task, variant):
        entry = entries.get(asked["question_id"])
        kind = entry and confidence.closed_kind(entry)
        if kind in head.sets:
            label = confidence.label_of(entry, entry["answer"])
            made.append(asked | {"kind": kind, "label": label, "place": head.place(kind, label)})
    return made


def kind_asked(head: Head, question_id: str, question: str = "", answer_type: str = "") -> str | None:
    """The kind under which a head answers a question, or ``None`` if it was not trained on it."""
    kind = confidence.closed_kind({"question_id": question_id, "question": question, "answer_type": answer_type})
    return kind if kind in head.sets else None


def own_items(items: Iterable, head: Head | None) -> list:
    """The items (`asking.Item`) that a run can answer: all, or those of its head's kinds; what is left out is printed."""
    items = list(items)
    if head is None:
        return items
    kept = [item for item in items if kind_asked(head, item.question_id, item.question, item.answer_type)]
    if len(kept) < len(items):
        told = f"{len(items) - len(kept)} of {len(items)} questions are not asked: {NOT_ITS_OWN}"
        console.print(f"{told} ({head.describe()})", markup=False, soft_wrap=True)
    return kept
