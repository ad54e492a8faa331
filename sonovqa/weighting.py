"""How much each training answer counts: the kind of mean, weights a question or class, oversampled patients. No torch.

Everything here is decided when the run is planned, from the training split alone, and handed to the batches as one weight
a branch and a number of repeats a row. Validation keeps its rows and, but for the kind of mean, its weights.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from sonovqa.cli import UserError

MEANS = ("token", "sample", "question")
BALANCES = ("none", "oversample", "loss")


@dataclass(frozen=True)
class Weighting:
    """What train.py was told.

    Attributes:
        mean: ``token``: every supervised token counts alike, which is what samples trained one by one give under TRL's
            normalisation; ``sample``: every answer alike, however long; ``question``: every question id alike, however often
            it is asked.
        questions: factor by question id; those not named have 1.
        balance: ``oversample`` repeats the rows of patients that hold a rare answer to ``target``, ``loss`` weights answers to
            ``target`` by inverse class frequency, ``none`` does neither.
        target: the closed question whose classes are balanced.
    """

    mean: str = "token"
    questions: dict[str, float] = field(default_factory=dict)
    balance: str = "none"
    target: str = "Q7"

    def for_validation(self) -> Weighting:
        """The same mean and nothing else: a validation loss speaks of the data as it is."""
        return Weighting(mean=self.mean)


@dataclass(frozen=True)
class Sample:
    """One answer of the training split: its row, patient, question, class and length in tokens (end of turn included)."""

    row: int
    group: str
    question_id: str
    label: str
    tokens: int


def parse_question_weights(texts: Sequence[str]) -> dict[str, float]:
    """``["Q7=2", "Q2=0.5"]`` to factors by question id.

    Raises:
        UserError: for a text of another form or a factor below 0.
    """
    made = {}
    for text in texts:
        name, sign, value = text.partition("=")
        try:
            made[name] = float(value)
        except ValueError:
            made[name] = -1.0
        if not sign or not name or not 0 <= made[name] < float("inf"):
            raise UserError(f"--question-weights {text}; QUESTION=FACTOR with a factor of 0 or more is allowed; such as Q7=2")
    return made


def check_asked(how: Weighting, asked: Sequence[str], with_classes: Sequence[str]) -> None:
    """Whether the split asks what is weighed.

    Args:
        asked: question ids. with_classes: those of them with answers that have a class.

    Raises:
        UserError: if a question weight names another one, or the target of a balance is another one.
    """
    unknown = sorted(set(how.questions) - set(asked))
    if unknown:
        raise UserError(f"--question-weights {unknown[0]}; not asked in this split; {', '.join(asked[:12])} are; choose one")
    if how.balance != "none" and how.target not in with_classes:
        raise UserError(f"--balance-question {how.target}; not asked in this split; {', '.join(asked[:12])} are; choose one")


def weigh(samples: Sequence[Sample], how: Weighting) -> list[float]:
    """The loss weight of each token of each sample; a step's loss is divided by the sum over its tokens.

    Class weights are ``N / (K * n_c)`` of ``N`` answers to the target in ``K`` classes (King and Zeng, Logistic Regression
    in Rare Events Data, 2001, as in scikit-learn's ``class_weight="balanced"``).

    Raises:
        UserError: if a question weight names no question of the split, or the target of a balance is never asked.
    """
    asked, classes = Counter(sample.question_id for sample in samples), _classes(samples, how.target)
    check_asked(how, list(asked), [how.target] if classes else [])
    made = []
    for sample in samples:
        weight = how.questions.get(sample.question_id, 1.0)
        if how.mean != "token":
            weight /= sample.tokens
        if how.mean == "question":
            weight *= len(samples) / (len(asked) * asked[sample.question_id])
        if how.balance == "loss" and sample.question_id == how.target and sample.label:
            weight *= classes.total() / (len(classes) * classes[sample.label])
        made.append(weight)
    return made


def repeats(samples: Sequence[Sample], how: Weighting) -> dict[int, int]:
    """How often each row is drawn in a pass, by row number; rows not named once.

    Patients with an answer to the target other than the commonest are repeated as a whole, their common answers too: their
    images then differ by the finding and not by the patient. They are drawn about as often as all other patients together.
    """
    if how.balance != "oversample":
        return {}
    target = [sample for sample in samples if sample.question_id == how.target]
    common = _classes(samples, how.target).most_common(1)[0][0]
    rare = {sample.group for sample in target if sample.label not in ("", common)}
    rows = {sample.row: sample.group in rare for sample in target}
    affected = sum(rows.values())
    times = round((len(rows) - affected) / affected) if affected else 1
    return {row: times for row, chosen in rows.items() if chosen and times > 1}


def _classes(samples: Sequence[Sample], target: str) -> Counter:
    """How often each class of a question occurs. An answer that was not read (label ``""``) is of no class, so never rare."""
    return Counter(sample.label for sample in samples if sample.question_id == target and sample.label)


def effective_size(weights: Sequence[float]) -> float:
    """Number of equally weighted samples whose mean is as certain: ``(sum w)^2 / sum w^2`` (Kish, Survey Sampling, 1965)."""
    return sum(weights) ** 2 / sum(w * w for w in weights) if any(weights) else 0.0


def class_table(samples: Sequence[Sample], weights: Sequence[float], drawn: dict[int, int], target: str) -> list[dict]:
    """What each class of ``target`` weighs: ``{label, answers, groups, share, weight}``, the commonest first, then one entry of
    all with the ``effective`` number of answers (its label is empty). ``share`` is of the loss, ``weight`` that of one answer."""
    found = defaultdict(list)
    for sample, weight in zip(samples, weights, strict=True):
        if sample.question_id == target:
            found[sample.label].append((sample, weight * sample.tokens * drawn.get(sample.row, 1)))
    total = sum(mass for entries in found.values() for _, mass in entries)
    rows = [
        {
            "label": label,
            "answers": len(entries),
            "groups": len({sample.group for sample, _ in entries}),
            "share": sum(mass for _, mass in entries) / total if total else 0.0,
        }
        for label, entries in sorted(found.items(), key=lambda item: -len(item[1]))
    ]
    everything = [entry for entries in found.values() for entry in entries]
    groups = len({sample.group for sample, _ in everything})
    effective = effective_size([mass for _, mass in everything])
    return [*rows, {"label": "", "answers": len(everything), "groups": groups, "share": 1.0, "effective": effective}]
