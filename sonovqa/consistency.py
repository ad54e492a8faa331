"""One model asked the same of the same images with different prompts: is it as right, do its answers mean the same, and do
they come in the form that the prompt asks for?

A model that gives one answer to every image agrees with itself whatever it is asked, so agreement stands beside the
agreement that chance gives: what two answers drawn from different images would agree (as in Cohen's kappa, 1960).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from sonovqa import measures, metrics, prompt_variants, report_sections
from sonovqa.cli import UserError
from sonovqa.metrics import Resamples, Score, mean
from sonovqa.predictions import Key
from sonovqa.questions import REPORT_ID
from sonovqa.scoretable import PIPE_WIDTH, arrow, number, value
from sonovqa.scoring import Baselines, figure

MOST_NAMED = 6  # prompts in the sentence; the table has them all
#: By kind of question, by prompt's name, the rows by key: what a model said.
Sides = Mapping[str, Mapping[str, Mapping[Key, dict]]]


def names_asked(task: str, lines: Sequence[str] | None, own: str) -> dict[str, set[str]]:
    """Which questions are asked with which prompt: by the prompt's name, its questions.

    Args:
        lines: lines of `prompt_variants.variants`; ``None`` for all prompts that the questions have.
        own: the line the model was trained with; its prompts are always asked, for the others are compared with them.

    Raises:
        UserError: if a line cannot be read, changes nothing of the task, or nothing but ``own`` is left.
    """
    for line in lines or ():
        prompt_variants.check(line, task)
    found: dict[str, set[str]] = defaultdict(set)
    for question_id in prompt_variants.asked(task):
        every = prompt_variants.PROMPTS[question_id]
        wanted = every if lines is None else [prompt_variants.variants(line)[question_id] for line in lines]
        names = {prompt_variants.variants(own)[question_id], *wanted}
        for name in names if len(names) > 1 else ():
            found[name].add(question_id)
    if not found:
        raise UserError(f"--prompts {' '.join(lines or ())}; one prompt a question leaves nothing to compare; name another")
    return found


def sides_of(rows: Mapping[str, Sequence[dict]]) -> Sides:
    """Rows by prompt's name, sorted out by kind of question; reports give their sections and, as ``report``, themselves."""
    sides: dict[str, dict[str, dict[Key, dict]]] = defaultdict(lambda: defaultdict(dict))
    for name, found in rows.items():
        whole = [row for row in found if row["question_id"] == REPORT_ID]
        for row in (*report_sections.expand(found), *whole):
            sides[measures.kind_of(row)][name][row["image_id"], row["question_id"]] = row
    return sides


def measure(sides: Sides, own: Mapping[str, str], baselines: Baselines, resamples: int, seed: int) -> dict:
    """Scores, agreement and form under every prompt.

    Args:
        sides: from `sides_of`.
        own: by question id, the name of the prompt that the others are compared with.
        baselines: for the majority answer; blind answers are not used.

    Returns:
        JSON values: ``questions`` ``{kind: {own, headline, prompts: {name: …}}}`` and ``overall``; every prompt has ``prompt``,
        ``asked``, ``failed``, ``unread``, ``cut``, ``distinct`` (meanings), ``metrics`` (each beside ``majority`` and ``own``,
        with the paired difference), ``read``, ``form`` ``{asks, compliance}`` or ``None``, and but for the own one
        ``agreement`` and ``agreement_by_chance``.
    """
    every = [row["group"] for names in sides.values() for rows in names.values() for row in rows.values()]
    draws = Resamples(every, resamples, seed)
    questions, pairs, formed = {}, [], []
    for kind in sorted(sides, key=measures.order_of):
        mine = own[REPORT_ID if REPORT_ID in sides else kind]
        names = sorted(sides[kind], key=lambda name: (name != mine, prompt_variants.NAMES.index(name)))
        of_kind = {name: _of_prompt(kind, name, mine, sides[kind], baselines, draws) for name in names}
        scores = of_kind[mine]["metrics"]  # no positive image, no balanced accuracy: then accuracy has to do
        headline = next((name for name, found in scores.items() if found["value"] is not None), next(iter(scores)))
        questions[kind] = {"own": mine, "headline": headline, "prompts": of_kind}
        if kind != REPORT_ID:
            pairs += [pair for name in names if name != mine for pair in _agreements(sides[kind][mine], sides[kind][name])]
        formed += [pair for name in names for pair in _formed(sides[kind][name])]
    return {
        "questions": questions,
        "overall": {"agreement": _share(pairs, draws), "form": _share(formed, draws)},
        "intervals": {"level": metrics.LEVEL, "resamples": resamples, "by": "group", "groups": len(draws.codes), "seed": seed},
    }


def _of_prompt(kind: str, name: str, mine: str, names: Mapping[str, Mapping[Key, dict]], baselines: Baselines,
               draws: Resamples) -> dict:  # fmt: skip
    rows = [row for row in names[name].values() if row["error"] is None]
    groups = [row["group"] for row in rows]
    beside = [names[mine].get((row["image_id"], row["question_id"])) for row in rows]
    both = np.array([row is not None and row["error"] is None for row in beside], bool)
    own = [other if known else row | {"prediction": ""} for row, other, known in zip(rows, beside, both, strict=True)]
    others = {"own": (_scores(kind, own), both)} if name != mine else {}
    if kind != REPORT_ID:
        usual = [row | {"prediction": baselines.majority.get(kind, "")} for row in rows]
        others["majority"] = (_scores(kind, usual), np.ones(len(rows), bool))
    read = [kind == REPORT_ID or measures.meaning(row, row["prediction"]) is not None for row in rows]
    form = prompt_variants.form_of(rows[0]["question_id"], rows[0]["prompt"]) if rows else None
    made = {
        "prompt": next((row["prompt"] for row in names[name].values()), ""),
        "asked": len(names[name]), "failed": len(names[name]) - len(rows),
        "unread": read.count(False), "cut": sum(row["finish_reason"] == "length" for row in rows),
        "distinct": len({measures.key_of(row, row["prediction"]) for row in rows}) if kind != REPORT_ID else None,
        "metrics": {
            score: figure(found, groups, draws, {o: (m[score], mask) for o, (m, mask) in others.items()})
            for score, found in _scores(kind, rows).items()
        },
        "read": figure(mean(read), groups, draws, {}),
        "form": {"asks": form.asks, "compliance": _share(_formed(names[name]), draws)} if form else None,
    }  # fmt: skip
    if name == mine or kind == REPORT_ID:
        return made
    chance = _by_chance(rows, [row for row, known in zip(beside, both, strict=True) if known])
    return made | {"agreement": _share(_agreements(names[mine], names[name]), draws), "agreement_by_chance": chance}


def _scores(kind: str, rows: Sequence[dict]) -> dict[str, Score]:
    """The headline score and accuracy; of whole reports whether they are complete and coherent."""
    texts = [row["prediction"] for row in rows]
    if kind == REPORT_ID:
        return report_sections.measure(rows, texts)
    scores = measures.measure(kind, rows, texts)
    return {name: scores[name] for name in dict.fromkeys((measures.headline(kind, scores), "accuracy"))}


def _agreements(own: Mapping[Key, dict], other: Mapping[Key, dict]) -> list[tuple[str, float]]:
    """Of every question that both answered: its group, and 1 if the two answers mean the same."""
    both = [key for key in other if key in own and own[key]["error"] is None and other[key]["error"] is None]
    return [(other[key]["group"], float(measures.agree(own[key], other[key]))) for key in both]


def _formed(rows: Mapping[Key, dict]) -> list[tuple[str, float]]:
    """Of every answer to a prompt that asks for a form: its group, and 1 if it has that form."""
    answered = [
        (row, prompt_variants.form_of(row["question_id"], row["prompt"])) for row in rows.values() if row["error"] is None
    ]
    return [(row["group"], float(prompt_variants.in_form(form, row["prediction"]))) for row, form in answered if form]


def _share(pairs: Sequence[tuple[str, float]], draws: Resamples) -> dict | None:
    return figure(mean([hit for _, hit in pairs]), [group for group, _ in pairs], draws, {}) if pairs else None


def _by_chance(rows: Sequence[dict], others: Sequence[dict]) -> float | None:
    """How often the answers of one side would mean what those of the other mean if they were dealt to the images at random."""
    counts = [Counter(measures.key_of(row, row["prediction"]) for row in side) for side in (rows, others)]
    total = counts[0].total() * counts[1].total()
    agreeing = sum(n * counts[1][key] for key, n in counts[0].items() if key != "unread")
    return round(agreeing / total, 6) if total else None


def show(made: Mapping, console: Console) -> None:
    """Print what was learned in a sentence, and one row a question and prompt."""
    console.print(verdict(made), style="bold", markup=False, soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    right = ("maj.", "by chance", "in form", "read", "n/groups")
    spans = ("value \\[95 %]", "maj.", "against own \\[95 %]", "same as own \\[95 %]")
    for name in ("", "prompt", "score", *spans, "by chance", "in form", "read", "n/groups"):
        table.add_column(name, justify="right" if name in right else "left", no_wrap=True)
    for kind, about in made["questions"].items():
        for i, (name, found) in enumerate(about["prompts"].items()):
            table.add_row(*_cells("" if i else kind, name, about, found), style="dim" if name == about["own"] else None)
    wide = console if console.is_terminal else Console(file=console.file, width=PIPE_WIDTH + 20, highlight=False)
    wide.print(table)
    about = made["intervals"]
    console.print(
        f"own: the prompt it was trained with (dim). same as own: answers about one image that mean the same. in form: of "
        f"prompts that ask for a form. Intervals: 95 %, {about['resamples']} resamples of {about['groups']} groups.",
        style="dim", soft_wrap=True,
    )  # fmt: skip


def _cells(kind: str, name: str, about: Mapping, found: Mapping) -> list[str]:
    score = found["metrics"][about["headline"]]
    gap, same, form = score.get("own"), found.get("agreement"), (found["form"] or {}).get("compliance")
    span = gap and gap["difference_interval"]
    against = "" if not gap or gap["difference"] is None else f"{gap['difference']:+.2f}"
    against += f" \\[{span[0]:+.2f}, {span[1]:+.2f}]" if span else ""
    usual = number(score["majority"]["value"]) if "majority" in score else "-"
    chance = number(found["agreement_by_chance"]) if same else ""
    return [kind, name, f"{about['headline']} {arrow(score)}", value(score), usual, against, value(same) if same else "", chance,
            number(form["value"]) if form else "", number(found["read"]["value"]), f"{score['n']}/{score['groups']}"]  # fmt: skip


def verdict(made: Mapping) -> str:
    """One sentence: how often answers keep their meaning, and on which prompts the score is clearly below the own one's."""
    same, form = made["overall"]["agreement"], made["overall"]["form"]
    parts = []
    if same:
        span = f" [{same['interval'][0]:.2f}, {same['interval'][1]:.2f}]" if same["interval"] else ""
        parts.append(f"Asked otherwise, {same['value']:.2f}{span} of {same['n']} answers mean the same")
    if form:
        parts.append(f"{form['value']:.2f} of {form['n']} answers have the form that was asked for")
    worse, others = [], 0
    for kind, about in made["questions"].items():
        for name, found in about["prompts"].items():
            span = found["metrics"][about["headline"]].get("own", {}).get("difference_interval")
            worse += [f"{kind} {name}"] if span and span[1] < 0 else []
            others += name != about["own"]
    told = ", ".join(worse[:MOST_NAMED]) + (f" and {len(worse) - MOST_NAMED} more" if len(worse) > MOST_NAMED else "")
    parts.append(f"{len(worse)} of {others} prompts score clearly below the own one" + (f": {told}" if worse else ""))
    return "; ".join(parts) + "."
