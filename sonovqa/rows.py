"""What a data set holds: rows, their groups and splits, leakage between these, and `dataset.json` that says it all."""

from __future__ import annotations

import functools
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from sonovqa import __version__, answers, duplicates
from sonovqa.files import sha256
from sonovqa.images import Checked
from sonovqa.questions import QUESTIONS, TEXT_LABEL
from sonovqa.sheets import Drops
from sonovqa.sources import Record, left_out
from sonovqa.splits import SPLITS, assign

LABELLED = (*QUESTIONS, TEXT_LABEL)  # questions whose labels are counted


@dataclass
class Row:
    """A record whose image is good, with the answers as stored.

    Attributes:
        record: where it came from; ``record.questions`` keeps the answers as written.
        checked: what decoding the image found out.
        questions: the stored form, ``{question_id, question, answer, label, answer_type}``.
        group: what never crosses a split.
        cluster: number of its cluster of near-duplicates.
        split: index into `SPLITS`.
    """

    record: Record
    checked: Checked
    questions: list[dict]
    group: str = ""
    cluster: int = -1
    split: int = -1

    @property
    def stratum(self) -> tuple[str, str]:
        """Category and Q7 label (where Q7 is not asked, Q5's, or a text's): what splits are stratified by."""
        labels = {q["question_id"]: q["label"] for q in self.questions}
        return self.record.category, labels.get("Q7", labels.get("Q5", labels.get(TEXT_LABEL, "")))


@functools.lru_cache(maxsize=1 << 16)  # 15,446 rows hold about 7,000 distinct answers
def stored_answer(question_id: str, text: str, raw: bool) -> tuple[str, str]:
    """The answer as stored (as written with ``raw``) and its label ("" where its meaning is not read)."""
    answer = text if raw else answers.normalise(question_id, text) or text
    return answer, answers.label(question_id, text)


def make_row(record: Record, checked: Checked, raw: bool) -> Row:
    """Normalise a record's answers, in the order of the questions."""
    stored = []
    for entry in sorted(record.questions, key=lambda q: (len(q["question_id"]), q["question_id"])):
        answer, label = stored_answer(entry["question_id"], entry["answer"], raw)
        stored.append({**entry, "answer": answer, "label": answer if entry["answer_type"] == TEXT_LABEL else label})
    return Row(record, checked, stored)


def split_rows(rows: list[Row], ratios: Sequence[float], seed: int, distance: int, drops: Drops) -> None:
    """Set ``group``, ``cluster`` and ``split`` of every row.

    A group is the patient; without one, the cluster of near-duplicates (perceptual hashes at most ``distance`` bits apart),
    or the patient of a near-duplicate that has one. Records that bring a split keep it, and validation rows are drawn
    from their training groups.

    Raises:
        UserError: there are fewer groups than splits; it names ``drops``, which are often why.
    """
    rows.sort(key=lambda row: (row.record.image_id, row.record.split))
    numbers = duplicates.clusters([row.checked.phash for row in rows], distance)
    named: dict[int, str] = {}
    for row, number in zip(rows, numbers.tolist(), strict=True):
        row.cluster = number
        if row.record.group:
            named[number] = min(named.get(number, row.record.group), row.record.group)
    for row in rows:
        row.group = row.record.group or named.setdefault(row.cluster, row.record.image_id)
    given = [row for row in rows if row.record.split == "test"]
    drawn = [row for row in rows if row.record.split != "test"]
    shares = ratios[:2] if given else ratios
    for row in given:
        row.split = SPLITS.index("test")
    found = assign([r.group for r in drawn], [r.stratum for r in drawn], shares, seed, left_out(drops))
    for row, split in zip(drawn, found, strict=True):
        row.split = split


def leakage(rows: list[Row]) -> dict:
    """What is in more than one split: groups, images byte for byte, near-duplicates; and what it means for the test."""
    seen = {kind: defaultdict(set) for kind in ("groups", "identical_images", "near_duplicates")}
    for row in rows:
        for kind, key in zip(seen, (row.group, row.checked.sha256, row.cluster), strict=True):
            seen[kind][key].add(row.split)
    across = {kind: {key for key, splits in found.items() if len(splits) > 1} for kind, found in seen.items()}
    near = defaultdict(list)
    for row in rows:
        if row.cluster in across["near_duplicates"]:
            near[row.cluster].append(f"{SPLITS[row.split]}: {row.record.image_id}")
    test = SPLITS.index("test")
    trained = {row.checked.sha256 for row in rows if row.split != test}
    leaked = sum(len(row.questions) for row in rows if row.split == test and row.checked.sha256 in trained)
    return {
        "groups": sorted(across["groups"]),
        "identical_images": sorted({row.record.image_id for row in rows if row.checked.sha256 in across["identical_images"]}),
        "near_duplicates": sorted(near.values()),
        "test_questions": sum(len(row.questions) for row in rows if row.split == test),
        "test_questions_on_images_outside_test": leaked,
    }


def describe(rows: list[Row]) -> dict:
    """Counts of one split: images, groups, questions, distinct answers, categories, and labels of Q1 … Q8 and of texts."""
    labels = defaultdict(Counter)
    types = Counter(q["answer_type"] for row in rows for q in row.questions if q["answer_type"])
    for row in rows:
        for entry in row.questions:
            if entry["question_id"] in LABELLED:
                labels[entry["question_id"]][entry["label"] or "(unread)"] += 1
    return {
        "images": len(rows),
        "groups": len({row.group for row in rows}),
        "questions": sum(len(row.questions) for row in rows),
        "distinct_answers": len(_distinct(q for row in rows for q in row.questions)),
        "fingerprint": fingerprint(rows),
        "categories": dict(sorted(Counter(row.record.category for row in rows).items())),
        "answer_types": dict(sorted(types.items())),
        "labels": {key: dict(labels[key].most_common()) for key in LABELLED if key in labels},
    }


def _distinct(entries) -> set[tuple[str, str]]:
    """Distinct answers; those of Q1 … Q8 are counted a question, since the same word answers different things."""
    return {(q["question_id"] if q["question_id"] in QUESTIONS else "", q["answer"]) for q in entries}


def fingerprint(rows: list[Row]) -> str:
    """SHA-256 over images and questions, the same whatever the order of the rows."""
    lines = sorted(
        sha256(row.record.image_id, row.checked.sha256, row.group, row.record.context, json.dumps(row.questions, sort_keys=True))
        for row in rows
    )
    return sha256(*lines)


def distinct_answers(rows: list[Row]) -> dict[str, dict[str, int]]:
    """For each of Q1 … Q8 (or "all" for other sets) the number of distinct answers as written and as stored."""
    before, after = defaultdict(set), defaultdict(set)
    for row in rows:
        for entry in row.record.questions:
            before[entry["question_id"] if entry["question_id"] in QUESTIONS else "all"].add(entry["answer"])
        for entry in row.questions:
            after[entry["question_id"] if entry["question_id"] in QUESTIONS else "all"].add(entry["answer"])
    return {key: {"before": len(before[key]), "after": len(after[key])} for key in sorted(before)}


def summary(rows: list[Row], about: dict, arguments: dict, drops: dict[str, list[str]], notes: list[str]) -> dict:
    """The content of ``dataset.json``. It holds no date and no machine's name: the same input gives the same file."""
    by_split = {name: [row for row in rows if row.split == index] for index, name in enumerate(SPLITS)}
    by_answers = distinct_answers(rows)
    found = leakage(rows)
    constant = [key for key, count in by_answers.items() if count["after"] == 1]
    remarks = [*notes, *_remarks(by_split, arguments.get("ratios")), *_leak_remarks(found)]
    if constant:
        remarks.append(f"the same answer for every image, so no score can be earned on it: {', '.join(constant)}")
    return {
        "version": __version__,
        "source": about,
        "arguments": arguments,
        "fingerprint": sha256(*(fingerprint(members) for members in by_split.values())),
        "splits": {name: describe(members) for name, members in by_split.items()},
        "answers": by_answers,
        "constant_questions": constant,
        "leakage": found,
        "dropped": {reason: drops[reason] for reason in sorted(drops)},
        "notes": remarks,
    }


def _remarks(by_split: dict[str, list[Row]], ratios: Sequence[float] | None) -> list[str]:
    """What a reader must know about the splits, in words."""
    total = sum(map(len, by_split.values()))
    labels = {name: {row.stratum[1] for row in members} for name, members in by_split.items()}
    found = []
    for (name, members), ratio in zip(by_split.items(), ratios or (None,) * len(by_split), strict=True):
        if ratio and abs(len(members) / total - ratio) > 0.05:
            found.append(f"{name} holds {len(members) / total:.0%} of the images instead of {ratio:.0%}: groups are not cut")
        if len({row.group for row in members}) == 1:
            found.append(f"{name} holds one group only: no interval can be computed from it")
        if "abnormal" in set().union(*labels.values()) - labels[name]:
            found.append(f"{name} holds no abnormal image: its sensitivity cannot be measured")
    return found


def _leak_remarks(found: dict) -> list[str]:
    if leaked := found["test_questions_on_images_outside_test"]:
        return [f"LEAK: {leaked} of {found['test_questions']} test questions are about images outside the test split"]
    if near := len(found["near_duplicates"]):
        return [f"near-duplicate images lie in more than one split: {near} {'cluster' if near == 1 else 'clusters'}"]
    return []
