"""How likely a model finds every answer that a closed question can have, not only the one it writes.

A label's likelihood is the sum over its wordings of ``P(wording and end of turn | image, question)``: with several ways
of saying the same, one wording alone would stand for a part of what the model means (Holtzman et al., Surface form
competition, 2021, arXiv:2104.08315). Since the end of turn is counted, wordings are whole answers that exclude each other
and longer ones need no length normalisation. Probabilities are these sums divided by their total, the ``mass``: the
model's own probability that it says any of them. A mass near 0 says that the model answers in other words.

The local engine weighs all wordings of all questions of an image in one pass with a shared prefix
(`generation.LocalEngine.likelihoods`); a vLLM endpoint gives the prompt log-probabilities of each wording
(`endpoint_likelihoods`).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from sonovqa import answers, asking, chat, cli, measures, predictions
from sonovqa.asking import Item
from sonovqa.engines import LabelRequest, Weigher
from sonovqa.predictions import Key
from sonovqa.questions import TEXT_LABEL

CLOSED = ("Q3", "Q5", "Q6", "Q7")  # one label an answer; Q1, Q4 and Q8 are sets, Q2 has parts
YES_NO, TEXT = "closed", TEXT_LABEL  # answer types: yes-or-no questions, labels of texts
MOST_WORDINGS = 8  # of one label; the commonest of the training split

#: label -> its wordings
Wordings = Mapping[str, tuple[str, ...]]


def label_of(row: Mapping, text: str) -> str:
    """The label that an answer stands for, ``unread`` if it is unread: Q5's bin, else the meaning's key."""
    return measures.key_of(row, text)


def closed_kind(entry: Mapping) -> str | None:
    """Under which kind a question has one label for its answer: its id for `CLOSED`, `YES_NO`, `TEXT`; ``None`` for open ones,
    sets, and closed ones of the form "… or …".

    Args:
        entry: a stored question, or anything else with its ``question_id``, ``question`` and ``answer_type``.
    """
    if entry["question_id"] in CLOSED:
        return entry["question_id"]
    if entry["answer_type"] == YES_NO:
        return YES_NO if chat.is_yes_no(entry) else None
    return TEXT if entry["answer_type"] == TEXT else None


class Labels:
    """The labels of each closed question and their wordings: the canonical ones, and what the training split says for them.

    Args:
        train: the training split's questions; may be empty.
    """

    def __init__(self, train: Sequence[Item]):
        said: dict[str, dict[str, Counter]] = defaultdict(lambda: defaultdict(Counter))
        for item in train:
            if item.question_id in CLOSED:
                said[item.question_id][label_of(vars(item), item.reference)][item.reference] += 1
        self._of = {question_id: _wordings(question_id, said[question_id]) for question_id in CLOSED}

    def of(self, item: Item) -> Wordings:
        """Empty for questions without labels: open ones, sets, and closed ones of the form "… or …"."""
        kind = closed_kind(vars(item))
        return self.of_id(kind) if kind in self._of else {"yes": ("yes",), "no": ("no",)} if kind == YES_NO else {}

    def of_id(self, question_id: str) -> Wordings:
        """The labels of one of `CLOSED`."""
        return self._of[question_id]


def canonical_answers(kind: str) -> dict[str, str]:
    """By label, the canonical wording of its answer, in the order of `answers.CANONICAL`; empty for kinds without any."""
    if kind == YES_NO:
        return {"yes": "yes", "no": "no"}
    found = {}
    for name in answers.CANONICAL.get(kind, ()):
        text = f"{name} weeks" if kind == "Q5" else name
        found[label_of({"question_id": kind}, text)] = answers.normalise(kind, text)
    return found


def _wordings(question_id: str, said: Mapping[str, Counter]) -> Wordings:
    canonical, found = canonical_answers(question_id), {}
    for label in dict.fromkeys((*canonical, *(name for name in said if name != "unread"))):
        often = sorted(said.get(label, {}).items(), key=lambda entry: (-entry[1], entry[0]))
        texts = dict.fromkeys([text for text, _ in often[:MOST_WORDINGS]] + [canonical[label]] * (label in canonical))
        found[label] = tuple(texts)
    return found


def probabilities(log_likelihoods: Sequence[float], wordings: Wordings) -> tuple[dict[str, float], float]:
    """``({label: probability}, mass)`` from the log-likelihoods of the wordings, in the order of ``wordings``."""
    told = iter(log_likelihoods)
    sums = {label: _log_sum_exp([next(told) for _ in texts]) for label, texts in wordings.items()}
    total = _log_sum_exp(list(sums.values()))
    return {label: math.exp(value - total) for label, value in sums.items()}, math.exp(total)


def _log_sum_exp(values: Sequence[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(value - top) for value in values))


def requests(raw_split, items: Iterable[Item], labels: Labels) -> Iterator[LabelRequest]:
    """One request an image with its closed questions; ``items`` must be in row order."""
    items = list(items)
    wanted = {item.key: item for item in items}
    for request in asking.requests(raw_split, items):
        prompts = tuple((q, p, texts_of(labels.of(wanted[request.image_id, q]))) for q, p in request.prompts)
        yield LabelRequest(request.image_id, request.image, request.context, prompts)


def texts_of(wordings: Wordings) -> tuple[str, ...]:
    """All wordings in the order in which `probabilities` wants their log-likelihoods."""
    return tuple(text for texts in wordings.values() for text in texts)


def weigh(engine: Weigher, asked: Iterable[LabelRequest], wordings: Mapping[Key, Wordings], path: Path) -> None:
    """Write the probabilities of every question's labels to ``path`` (.jsonl) as they come, with a progress bar.

    Args:
        asked: what to weigh, read as needed.
        wordings: by ``(image_id, question_id)``, what the reply's log-likelihoods are of.

    Raises:
        UserError: if the engine can no longer be reached (`asking.Patience`).
    """
    patience = asking.Patience(engine.name)
    with predictions.Log(path) as log, asking.progress() as bar:
        task = bar.add_task("label probabilities", total=len(wordings), failed="")
        for reply in engine.likelihoods(asked):
            row = {"image_id": reply.image_id, "question_id": reply.question_id, "error": reply.error}
            if reply.error is None:
                found, mass = probabilities(reply.log_likelihoods, wordings[reply.image_id, reply.question_id])
                row |= {"probabilities": {name: _digits(p) for name, p in found.items()}, "mass": _digits(mass)}
            log.append(row)
            bar.update(task, advance=1)
            patience.heard(reply.error)


def _digits(value: float) -> float:
    return float(f"{value:.6g}")  # significant ones: 1e-9 and 1e-12 are not a tie


def read(path: Path) -> dict[Key, dict]:
    """What `weigh` wrote, by key; failed ones left out."""
    return {key: row for key, row in predictions.latest(predictions.read(path)).items() if row["error"] is None}


def engine_of(engine) -> Weigher:
    """The engine itself if it can weigh answers.

    Raises:
        cli.UserError: if it cannot.
    """
    if not hasattr(engine, "likelihoods"):
        raise cli.UserError(f"--confidence; {engine.name} gives no likelihoods; a local model or a vLLM endpoint does")
    return engine
