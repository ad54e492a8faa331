"""From predictions to scores: what `scores.json`, the table and the report say. Failed requests are listed, never scored."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sonovqa import asking, coherence, measures, metrics, report_sections
from sonovqa.asking import Item
from sonovqa.findings import ENOUGH
from sonovqa.metrics import Resamples, Score
from sonovqa.predictions import Key
from sonovqa.questions import REPORT_ID

#: Scores of wording stand without baselines, for nobody should be led by them.
WORDING = ("exact match", "normalised match", "ROUGE-L", "BLEU-4")
#: With fewer rows than this share behind the commonest of many values, the median value stands for "the majority".
RARE_MODE = 0.05
MOST_CLASSES = 20  # a confusion matrix, or slices, of more is a wall of numbers
MOST_NAMES = 60  # whose recall is told, the commonest first
SLICES = ("category", "quality", "answer")


@dataclass(frozen=True)
class Baselines:
    """What every score stands beside.

    Attributes:
        majority: by kind of question, the commonest answer.
        majority_of: where it was counted: ``the training split`` or ``the references themselves``.
        blind: by `asking.blind_key`, rows of blind.jsonl; ``None`` if the model was not asked blind.
    """

    majority: Mapping[str, str]
    majority_of: str
    blind: Mapping[Key, dict] | None

    def blind_text(self, row: Mapping) -> str | None:
        """The model's answer to the row's question without its image, or ``None`` if there is none."""
        if self.blind is None or not row.get("size"):
            return None
        found = self.blind.get(asking.blind_key(row["size"], row["context"], row["prompt"]))
        if found is None or found["error"] is not None:
            return None
        text = found["prediction"]
        return report_sections.sections_of(text).get(row["question_id"], "") if row.get("section") else text


def majority_answers(rows: Iterable[Mapping]) -> dict[str, str]:
    """The commonest answer to each kind of question: of the commonest meaning its commonest wording, ties by alphabet.

    Where answers are measured values that hardly repeat, no answer is common; the median value is the harder baseline.

    Args:
        rows: dictionaries with ``question_id``, ``question``, ``answer_type`` and ``reference``; reports count by section.
    """
    by_kind: dict[str, list[Mapping]] = defaultdict(list)
    for row in report_sections.expand(rows):
        by_kind[measures.kind_of(row)].append(row)
    return {kind: _commonest(found) for kind, found in by_kind.items()}


def without_blind(train: Sequence[Item], items: Sequence[Item]) -> Baselines:
    """The majority of the training split's questions, or of the evaluated ones themselves where there is no such split."""
    where = "the training split" if train else "the references themselves"
    return Baselines(majority_answers([vars(item) for item in train or items]), where, None)


def _commonest(rows: Sequence[Mapping]) -> str:
    keys = [measures.key_of(row, row["reference"]) for row in rows]
    counts = Counter(keys)
    best = min(counts, key=lambda k: (-counts[k], k))
    meanings = [(measures.meaning(row, row["reference"]), row["reference"]) for row in rows]
    valued = [(found.values[0].value, text) for found, text in meanings if found and len(found.values) == 1]
    if counts[best] < RARE_MODE * len(rows) and len(valued) > len(rows) / 2:
        return sorted(valued)[len(valued) // 2][1]
    wordings = Counter(row["reference"] for row, key in zip(rows, keys, strict=True) if key == best)
    return min(wordings, key=lambda text: (-wordings[text], text))


#: Further scores of wording by name, from references and answers.
Wording = Mapping[str, Callable[[Sequence[str], Sequence[str]], Score]]


def score(
    rows: Sequence[Mapping], baselines: Baselines, resamples: int = 1000, seed: int = 0, wording: Wording | None = None
) -> dict:
    """Score predictions.

    Args:
        rows: one a question asked (`asking.row_of`), failed ones with ``error``.
        resamples: bootstrap resamples of groups for the 95 % intervals; 0 leaves them out.
        wording: scores of wording to have beside `WORDING`, such as `bertscore.BertScore`.

    Returns:
        ``{"questions": {kind: {...}}, "overall": {...}, "majority_of", "blind", "intervals"}``, JSON values only;
        ``"report"`` where reports were asked for, ``"coherence"`` where answers can be held against each other.
    """
    draws = Resamples([row["group"] for row in rows], resamples, seed)
    reports = [row for row in rows if row["question_id"] == REPORT_ID]
    kinds: dict[str, list[dict]] = defaultdict(list)
    parts = report_sections.expand(rows)
    quality = {row["image_id"]: measures.key_of(row, row["reference"]) for row in parts if row["question_id"] == "Q6"}
    for row in parts:
        kinds[measures.kind_of(row)].append({**row, "quality": quality.get(row["image_id"], "")})
    ordered = sorted(kinds, key=measures.order_of)
    return {
        "questions": {kind: _score_kind(kind, kinds[kind], baselines, draws, wording or {}) for kind in ordered},
        "overall": _overall(rows, [row for found in kinds.values() for row in found], baselines, draws),
        **({"report": _score_reports(reports, draws)} if reports else {}),
        **_coherence(parts, draws),
        "majority_of": baselines.majority_of,
        "blind": baselines.blind is not None,
        "intervals": {"level": metrics.LEVEL, "resamples": resamples, "by": "group", "groups": len(draws.codes), "seed": seed},
    }


def _score_kind(kind: str, rows: list[dict], baselines: Baselines, draws: Resamples, wording: Wording) -> dict:
    answered = [row for row in rows if row["error"] is None]
    texts, groups = [row["prediction"] for row in answered], [row["group"] for row in answered]
    scores = measures.measure(kind, answered, texts)
    others = _others(answered, baselines, lambda said: measures.measure(kind, answered, said))
    verdicts = [
        (
            measures.name_of(row, row["reference"]),
            measures.name_of(row, row["prediction"]),
            measures.right(row, row["prediction"]),
        )
        for row in answered
    ]
    headline = measures.headline(kind, scores)
    for other, _ in others.values():  # scores of wording stand without baselines
        for name in WORDING:
            other.pop(name)
    scores |= {name: measure([row["reference"] for row in answered], texts) for name, measure in wording.items()}
    return {
        "asked": len(rows),
        "failed": len(rows) - len(answered),
        "n": len(answered),
        "groups": len(set(groups)),
        "unread": sum(measures.meaning(row, text) is None for row, text in zip(answered, texts, strict=True)),
        "references_unread": sum(measures.meaning(row, row["reference"]) is None for row in answered),
        "cut": sum(row["finish_reason"] == "length" for row in answered),
        "majority_answer": baselines.majority.get(kind),
        "headline": headline,
        "metrics": {
            name: figure(s, groups, draws, {o: (m[name], r) for o, (m, r) in others.items() if name in m})
            for name, s in scores.items()
        },
        "answers": _distribution(answered, verdicts),
        "slices": {by: found for by in SLICES if (found := _slices(answered, verdicts, scores, headline, by, draws))},
    }


def _others(rows: list[dict], baselines: Baselines, measure) -> dict[str, tuple[dict[str, Score], np.ndarray]]:
    """The baselines' scores of the same rows, each with a mask of the rows that have such an answer."""
    majority = [baselines.majority.get(measures.kind_of(row), "") for row in rows]
    others = {"majority": (measure(majority), np.ones(len(rows), bool))}
    if baselines.blind is not None:
        blind = [baselines.blind_text(row) for row in rows]
        others["blind"] = (measure([text or "" for text in blind]), np.array([text is not None for text in blind], bool))
    return others


def figure(score: Score, groups: Sequence[str], draws: Resamples, others: Mapping[str, tuple[Score, np.ndarray]]) -> dict:
    """One score as JSON: value, interval, n, groups, those that carry it (`Score.carriers`), direction, what it stands beside.

    Args:
        groups: of the score's rows.
        others: by name, another score of the same rows and a mask ``[n]`` of those it has; each comes with the paired
            difference to it over these.
    """
    counted = score.columns.any(axis=1)
    made = {
        "value": _number(score.value),
        "interval": _numbers(draws.interval(score, groups)),
        "n": int(counted.sum()),
        "groups": len({g for g, c in zip(groups, counted, strict=True) if c}),
        "carriers": score.carriers(groups),
        "higher_is_better": score.higher,
    }
    for name, (other, rows) in others.items():
        here = [g for g, r in zip(groups, rows, strict=True) if r]
        mine, theirs = score.take(rows), other.take(rows)
        made[name] = {
            "value": _number(theirs.value),
            "interval": _numbers(draws.interval(theirs, here)),
            "n": int(rows.sum()),
            "difference": _number(mine.value - theirs.value),
            "difference_interval": _numbers(draws.difference(mine, theirs, here)),
        }
    return made


def _overall(asked: Sequence[Mapping], parts: Sequence[dict], baselines: Baselines, draws: Resamples) -> dict:
    """Accuracy over all questions (of reports: over all sections), every answer counted once."""
    rows = [row for row in parts if row["error"] is None]

    def accuracy(texts: Sequence[str]) -> dict[str, Score]:
        return {"accuracy": metrics.mean([measures.right(row, text) for row, text in zip(rows, texts, strict=True)])}

    others = {o: (m["accuracy"], seen) for o, (m, seen) in _others(rows, baselines, accuracy).items()}
    right = figure(accuracy([row["prediction"] for row in rows])["accuracy"], [row["group"] for row in rows], draws, others)
    failed = sum(row["error"] is not None for row in asked)
    images = len({row["image_id"] for row in asked})
    return {"asked": len(asked), "failed": failed, "images": images, "metrics": {"accuracy": right}}


def _score_reports(rows: Sequence[Mapping], draws: Resamples) -> dict:
    answered = [row for row in rows if row["error"] is None]
    scores = report_sections.measure(answered, [row["prediction"] for row in answered])
    return {
        "asked": len(rows),
        "failed": len(rows) - len(answered),
        "metrics": {name: figure(s, [row["group"] for row in answered], draws, {}) for name, s in scores.items()},
        "violations": report_sections.listed(answered),
    }


def _coherence(parts: Sequence[dict], draws: Resamples) -> dict:
    """Whether the answers about an image go together, beside its references; nothing where no two questions are tied."""
    group = {row["image_id"]: row["group"] for row in parts}
    said, meant = (coherence.by_image(parts, column) for column in ("prediction", "reference"))
    images = [image for image in said if said[image] or meant[image]]
    if not images:
        return {}
    groups, all_rows = [group[image] for image in images], np.ones(len(images), bool)
    references = {"references": (coherence.score(meant, images), all_rows)}
    coherent = figure(coherence.score(said, images), groups, draws, references)
    beyond = figure(coherence.score(said, images, meant), groups, draws, {})
    about = {"images": len(images), "coherent": coherent, "beyond_references": beyond, "rules": coherence.tally(said)}
    return {"coherence": about | {"references_rules": coherence.tally(meant), "violations": coherence.listed(said)}}


#: A row's reference and answer by name (`measures.name_of`), and whether the answer is right.
Verdict = tuple[str, str, bool]


def _distribution(rows: Sequence[dict], verdicts: Sequence[Verdict]) -> dict:
    """How much the answers vary, what they have to do with the image's category, what is found and what is taken for what."""
    said, meant = [s for _, s, _ in verdicts], [m for m, _, _ in verdicts]
    taken = [m if ok else s for m, s, ok in verdicts]  # a right answer is no confusion
    categories = [row["category"] or "" for row in rows]
    return {
        "predicted": labels(said, categories),
        "reference": labels(meant, categories),
        "recall": _recall(rows, [ok for _, _, ok in verdicts]),
        "confused": _confused(verdicts, 20),
        "confusion": _confusion(meant, taken) if len(set(meant)) <= MOST_CLASSES else None,
    }


def _recall(rows: Sequence[dict], right: Sequence[bool]) -> dict:
    """By name how often references that can be read hold it and answers find it: of a set each member counts by itself."""
    counts, hits = Counter(), Counter()
    for row, ok in zip(rows, right, strict=True):
        if measures.meaning(row, row["reference"]) is None:
            continue
        wanted = measures.names_in(row, row["reference"])
        counts.update(sorted(wanted))
        of_set = row["question_id"] in measures.SETS
        hits.update(wanted if ok else wanted & measures.names_in(row, row["prediction"]) if of_set else ())
    return {name: {"found": hits[name], "n": n} for name, n in counts.most_common(MOST_NAMES)}


def _confused(verdicts: Iterable[Verdict], most: int) -> list[dict]:
    """What wrong answers take for what, the commonest first."""
    wrong = Counter((m, s) for m, s, ok in verdicts if not ok)
    return [{"reference": m, "predicted": s, "n": n} for (m, s), n in wrong.most_common(most)]


def _confusion(meant: list[str], said: list[str]) -> dict:
    """Counts, references by row; answers that no reference has are gathered in the last columns, ``other`` and ``unread``."""
    rows = sorted(set(meant))
    columns = rows + [name for name in ("other", "unread") if name not in rows]
    pairs = Counter((m, s if s in columns else "other") for m, s in zip(meant, said, strict=True))
    return {"rows": rows, "columns": columns, "counts": [[pairs[r, c] for c in columns] for r in rows]}


def labels(names: Sequence[str], categories: Sequence[str]) -> dict:
    """How a list of labels is distributed: distinct ones, the commonest and its share, entropy, bits shared with the category."""
    counts = Counter(names)
    top = counts.most_common(1)
    return {
        "distinct": len(counts),
        "commonest": top[0][0] if top else None,
        "share": _number(top[0][1] / len(names)) if top else None,
        "entropy_bits": _number(metrics.entropy(names)),
        "category_bits": _number(metrics.mutual_information(names, categories)),
    }


def _slices(rows: Sequence[dict], verdicts: Sequence[Verdict], scores: Mapping[str, Score], headline: str, by: str,
            draws: Resamples) -> dict:  # fmt: skip
    """The headline in each slice, worst first, and what its answers are most often confused with; empty for one slice.

    Slices by answer hold the rows whose reference names it, a set being in the slice of each of its members. Where the
    headline needs two classes, a slice that holds one class has its accuracy instead.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for at, row in enumerate(rows):
        for name in measures.names_in(row, row["reference"]) if by == "answer" else (row[by] or "",):
            members[name].append(at)
    if by == "answer":
        often = sorted((entry for entry in members.items() if len(entry[1]) >= ENOUGH), key=lambda e: (-len(e[1]), e[0]))
        members = dict(often[:MOST_CLASSES])
    if len(members) < 2:
        return {}
    name = "accuracy" if by == "answer" and scores[headline].classes else headline
    found = {}
    for value, places in sorted(members.items()):
        found[value] = figure(scores[name].take(np.array(places)), [rows[at]["group"] for at in places], draws, {})
        found[value] |= {"score": name, "confused": _confused((verdicts[at] for at in places), 3)}
    return dict(sorted(found.items(), key=lambda entry: (entry[1]["value"] is None, entry[1]["value"] or 0)))


def _number(value: float) -> float | None:
    return round(float(value), 6) if math.isfinite(value) else None


def _numbers(pair: tuple[float, float] | None) -> list[float] | None:
    return None if pair is None else [_number(pair[0]), _number(pair[1])]
