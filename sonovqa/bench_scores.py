"""Scores beside speeds: every model of `bench answer` on the same rows of a data set, as evaluate.py scores them.

Each is asked once, by its fastest engine here and once more through a server, with the prompts that its run was trained
with. Answers are kept, and a stopped scoring goes on where it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from sonovqa import (
    answer_limits,
    asking,
    bench_records,
    comparing,
    dataset,
    endpoint_cost,
    files,
    predictions,
    scoretable,
    scoring,
)
from sonovqa.bench_cases import SHARED, VLLM, Case, Scoring
from sonovqa.cli import UserError
from sonovqa.engines import Engine

RESAMPLES = 1000  # of groups, for the intervals, evaluate.py's default


def with_scoring(
    found: Sequence[Case], how: Scoring, done: Iterable[tuple], prompts: Mapping[str, str], folder: Path
) -> list[Case]:
    """The cases, one of each model, precision and place (here, or behind a server) made to score as well.

    Args:
        found: cases in the order measured.
        how: which rows; its prompts and folder are filled in.
        done: `key_of` of what the record has scores of.
        prompts: by label, the line of prompt variants that a run was trained with.
        folder: where answers are kept.
    """
    chosen: dict[tuple, int] = {}
    for at, case in enumerate(found):  # the shared engine before one-at-a-time: the same answers in less time
        if key_of(vars(case)) not in chosen or (case.engine == SHARED and found[chosen[key_of(vars(case))]].engine != SHARED):
            chosen[key_of(vars(case))] = at
    told = list(found)
    for key, at in chosen.items():
        if key not in set(done):
            case, own = found[at], folder / f"scores-{files.sha256(*map(str, key))[:16]}"
            prompt = prompts.get(case.label, how.prompt)
            told[at] = replace(case, scoring=replace(how, prompt=prompt, folder=str(own), at_once=max(case.levels)))
    return told


def key_of(entry: Mapping) -> tuple:
    """What tells one model's scores from others: its name, precision, and whether a server answered."""
    return entry["model"] if "where" in entry else entry["label"], entry["bits"], entry.get("where") or place(entry["engine"])


def place(engine: str) -> str:
    """Where an engine answers: ``vllm`` or ``local``."""
    return "vllm" if engine == VLLM else "local"


def _asked(how: Scoring) -> tuple:
    """The rows that are scored, images not decoded; their questions and the training split's; an answer's limit."""
    splits = dataset.load_undecoded(Path(how.data))
    raw = dataset.subset(splits[how.split], how.rows, how.seed) if how.rows else splits[how.split]
    items, train = (asking.items_of(split, "all", how.prompt) for split in (raw, splits["train"]))
    return raw, items, train, how.new_tokens or answer_limits.usual(items, train)


def with_work(case: Case) -> Case:
    """The case with what a local engine has in work while it scores, see `asking.batch_of`. It is told before the case's own
    process begins, whose memory and load time are measured."""
    if case.scoring is None or case.engine == VLLM:
        return case
    raw, items, _, limit = _asked(case.scoring)
    batch = asking.batch_of(items, asking.image_sizes(raw, range(len(raw))), case.scoring.at_once, limit, blind=True)
    work = asdict(replace(batch, share=case.engine == SHARED))
    return replace(case, scoring=replace(case.scoring, work=work))


def to_send(how: Scoring) -> endpoint_cost.Estimate:
    """What `score` has still to ask, grey images too."""
    raw, items, _, limit = _asked(how)
    sizes = asking.image_sizes(raw, range(len(raw)))
    return endpoint_cost.estimate(endpoint_cost.still_to_ask(items, sizes, Path(how.folder), True), sizes, limit)


def score(case: Case, engine: Engine) -> dict:
    """Ask and score what ``case.scoring`` says.

    Returns:
        One entry of the record's ``scores``: overall accuracy and each question's headline score, both as `scoring.figure`
        gives them, with intervals and baselines.

    Raises:
        UserError: if there is nothing to ask, or the data set is gone.
    """
    how, out = case.scoring, Path(case.scoring.folder)
    raw, items, train, limit = _asked(how)
    if not items:
        raise UserError(f"--scores; the {how.split} split of {how.data} has no questions; choose another --split")
    settings = {"model": case.label, "bits": case.bits, "where": place(case.engine), "prompt": how.prompt}
    settings |= {"max_new_tokens": limit}
    predictions.claim(out, settings | {"data": dataset.about(Path(how.data))["fingerprint"], "split": how.split})
    by_key, blind = asking.ask_all(raw, items, out, lambda: (engine, 0.0), True, limit)
    baselines = replace(scoring.without_blind(train, items), blind=blind)
    made = scoring.score(list(by_key.values()), baselines, RESAMPLES, how.seed)
    files.write_json(out / "scores.json", made)
    return entry_of(case, made, len(raw), limit)


def entry_of(case: Case, made: Mapping, images: int, limit: int) -> dict:
    """What the record keeps of `scoring.score`'s result, answers cut at ``limit`` tokens among it; the rest lies in the folder
    of the answers."""
    kept = ("headline", "asked", "failed", "unread", "cut", "groups")
    return {
        "model": case.label, "bits": case.bits, "where": place(case.engine), "images": images, "folder": case.scoring.folder,
        "error": None, "overall": made["overall"]["metrics"]["accuracy"],
        "asked": made["overall"]["asked"], "failed": made["overall"]["failed"], "intervals": made["intervals"],
        "new_tokens": limit, "cut": sum(about["cut"] for about in made["questions"].values()),
        "questions": {kind: {name: about[name] for name in kept} | {"figure": about["metrics"][about["headline"]]}
                      for kind, about in made["questions"].items()},
    }  # fmt: skip


def failed(case: Case, reason: str) -> dict:
    """The entry of a model that could not be scored."""
    return {"model": case.label, "bits": case.bits, "where": place(case.engine), "folder": case.scoring.folder, "error": reason}


def verdicts(found: Sequence[Mapping]) -> list[str]:
    """One sentence for each model beside the first that was scored: on which questions it is clearly better or worse, by the
    paired difference's interval (`comparing.compare`)."""
    whole = [entry for entry in found if entry["error"] is None and (Path(entry["folder"]) / "predictions.jsonl").exists()]
    if len(whole) < 2:
        return []
    first, sides = whole[0], [comparing.load(Path(entry["folder"])) for entry in whole]
    told = []
    for entry, rows in zip(whole[1:], sides[1:], strict=True):
        made = comparing.compare(sides[0], rows, RESAMPLES, entry["intervals"]["seed"])
        told.append(comparing.verdict(made, named(first), named(entry)))
    return told


def named(entry: Mapping) -> str:
    """``tuned: merged, 16 bits, local``."""
    return f"{entry['model']}, {entry['bits']} bits, {entry['where']}"


_WHO: bench_records.Columns = {
    "model": lambda entry: entry["model"],
    "bits": lambda entry: str(entry["bits"]),
    "by": lambda entry: entry["where"],
}
#: Accuracy over all questions beside its baselines, a row a model.
OVERALL: bench_records.Columns = _WHO | {
    "accuracy [95 %] ↑": lambda entry: value(entry.get("overall")),
    "majority": lambda entry: baseline(entry.get("overall"), "majority"),
    "blind": lambda entry: baseline(entry.get("overall"), "blind"),
    "images": lambda entry: str(entry.get("images", "–")),
    "asked/failed": lambda entry: f"{entry['asked']}/{entry['failed']}" if "asked" in entry else "–",
    "cut": lambda entry: str(entry.get("cut", "–")),
}
#: Each question's main score beside its baselines, a row a question and model (`by_question`).
QUESTIONS: bench_records.Columns = {"question": lambda row: row["kind"]} | _WHO | {
    "score": lambda row: f"{row['headline']} {scoretable.arrow(row['figure'])}".strip(),
    "value [95 %]": lambda row: value(row["figure"]),
    "majority": lambda row: baseline(row["figure"], "majority"),
    "blind": lambda row: baseline(row["figure"], "blind"),
    "n/groups": lambda row: f"{row['figure']['n']}/{row['figure']['groups']}",
    "unread/failed": lambda row: f"{row['unread']}/{row['failed']}",
    "cut": lambda row: str(row.get("cut", "–")),
}  # fmt: skip


def cut_note(entry: Mapping) -> str:
    """How many answers of a scored model were cut, as `findings.cut` says it of a question; "" where none was."""
    if not entry.get("cut"):  # nor in records made before cut answers were counted
        return ""
    told = answer_limits.cut_in_words(entry["cut"], entry["asked"] - entry["failed"], "--scores-new-tokens")
    return f"{named(entry)}: {told} above {entry['new_tokens']}"


def by_question(found: Sequence[Mapping]) -> list[dict]:
    """A row for each question of each model, the same question of all models together."""
    scored = [entry for entry in found if entry["error"] is None]
    kinds = dict.fromkeys(kind for entry in scored for kind in entry["questions"])
    who = ("model", "bits", "where")
    return [{name: entry[name] for name in who} | entry["questions"][kind] | {"kind": kind}
            for kind in kinds for entry in scored if kind in entry["questions"]]  # fmt: skip


def value(figure: Mapping | None) -> str:
    """``0.81 [0.74, 0.88]``, a dash where there is none."""
    return scoretable.value(figure).replace("\\[", "[") if figure else "–"


def baseline(figure: Mapping | None, name: str) -> str:
    """A baseline's value, a dash where there is none."""
    return scoretable.baseline(figure, name) if figure else "–"
