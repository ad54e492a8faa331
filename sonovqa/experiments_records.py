"""What is kept of a run and its evaluations: a record small enough for the repository, and the same figures in MLflow."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from sonovqa import files, records, tracking
from sonovqa.cli import UserError

LARGEST = 20_000  # bytes of a committed record
CURVE_POINTS = 20  # of a training curve; with scores beside it half as many
BESIDE = ("majority", "blind", "base", "references", "beyond references")  # what a score stands beside
LEFT_OUT = ("check_items", "live", "started_with")  # only the machine that ran it needs them
#: Scores kept of an evaluated question beside its headline, and of its label probabilities.
SCORES = ("accuracy", "sensitivity", "specificity", "F1", "complete", "coherent")
RANKED = ("AUROC", "average precision", "sensitivity at specificity 0.90", "sensitivity at specificity 0.95")


def slim(run: Mapping, points: int = CURVE_POINTS) -> dict:
    """A run record without what only the machine it ran on needs: rows of the merge check, live tokens, folders; a thinner curve.

    Args:
        run: run.json.
        points: of the curve, at most.
    """
    made = {key: value for key, value in run.items() if key not in LEFT_OUT}
    curve = made["training"]["curve"]
    made["training"] = made["training"] | {"curve": curve[:: -(-len(curve) // points) or 1]}
    given = {key: value for key, value in made["arguments"].items() if key != "outputs"}
    made["arguments"] = given | {name: _unrooted(given[name]) for name in ("data", "model")}
    made["base"] = _unrooted(made["base"])
    return made


def _unrooted(name) -> str:
    return Path(str(name)).name if str(name).startswith("/") else name


def slim_scores(scores: Mapping) -> dict:
    """Of an evaluation what a table tells: headlines, a few scores beside them, each with n, interval and baselines."""
    given = scores["arguments"]
    asked = {name: given.get(name) for name in ("task", "prompt", "adapter", "bits", "max_images", "seed")}
    return {
        "asked": asked | {"run": _unrooted(given["run"]), "data": _unrooted(given["data"])},
        "verdict": scores["verdict"],
        "data": {key: scores["data"][key] for key in ("fingerprint", "split", "images")},
        "groups": scores["intervals"]["groups"],
        "overall": _metrics(scores["overall"]["metrics"]),
        "questions": {kind: _question(about) for kind, about in scores["questions"].items()},
        **({"report": _metrics(scores["report"]["metrics"])} if "report" in scores else {}),
        **({"coherent": _coherent(scores["coherence"])} if "coherence" in scores else {}),
        "speed": scores["speed"],
        "finished": scores["finished"],
    }


def _coherent(about: Mapping) -> dict:
    """Beside it the references' own, and what it is where only contradictions count that the references do not hold."""
    return _figure(about["coherent"] | {"beyond references": about["beyond_references"]})


def _question(about: Mapping) -> dict:
    kept = dict.fromkeys((about["headline"], *SCORES))
    made = {name: _figure(about["metrics"][name]) for name in kept if name in about["metrics"]}
    sure = about.get("confidence", {})
    told = {name: _figure(sure[name]) for name in RANKED if isinstance(sure.get(name), dict) and "value" in sure[name]}
    return {"headline": about["headline"], "unread": about["unread"], "failed": about["failed"], "metrics": made} | (
        {"by probability": told} if told else {}
    )


def _metrics(found: Mapping) -> dict:
    return {name: _figure(figure) for name, figure in found.items()}


def _figure(figure: Mapping) -> dict:
    """``{value, interval, n, groups, higher_is_better}`` and `BESIDE` where there are; four decimals."""
    made = {key: figure[key] for key in ("n", "groups", "higher_is_better") if figure.get(key) is not None}
    span = figure.get("interval")
    beside = {name: _round(figure[name]["value"]) for name in BESIDE if figure.get(name)}
    return {"value": _round(figure["value"]), "interval": span and [_round(end) for end in span], **made, **beside}


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def evaluations(run: Path) -> dict[str, dict]:
    """The scores of a run's evaluations by folder name."""
    return {path.parent.name: files.read_json(path) for path in sorted(run.glob("eval-*/scores.json"))}


def record_of(folder: Path, weights: str | None = None) -> dict:
    """The record of a finished run with its evaluations.

    Args:
        folder: the run's.
        weights: what its weights were, such as ``random weights of the real architecture``.

    Raises:
        UserError: if the run is not finished.
    """
    run = records.read_run(folder)
    if run is None:
        raise UserError(
            f"{folder}; no run.json there, so the run is not finished; a finished run's folder is allowed; train it first"
        )
    scores = {name: slim_scores(found) for name, found in evaluations(folder).items()}
    made = slim(run, CURVE_POINTS // 2 if scores else CURVE_POINTS)
    made |= {"weights": weights} if weights else {}
    made |= {"evaluations": scores} if scores else {}
    return made


def comparison_of(made: Mapping) -> dict:
    """What `evaluate.py compare --out` wrote, as rows: headline, accuracy and ranking of every question, with its difference."""
    rows = []
    for second, one in made["comparisons"].items():
        for kind, scores in one["questions"].items():
            for name in dict.fromkeys((next(iter(scores)), "accuracy", *RANKED)):
                if scores.get(name, {}).get("difference") is not None:
                    kept = {key: _round(scores[name][key]) for key in ("first", "second", "difference")}
                    span = scores[name]["interval"]
                    about = {"with": Path(second).name, "kind": kind, "score": name, "n": scores[name]["n"]}
                    rows.append(about | kept | {"interval": span and [_round(end) for end in span]})
    return {"first": Path(made["first"]).name, "differences": rows} | _stamp(made)


def prompts_of(made: Mapping) -> dict:
    """What `evaluate.py prompts` wrote, as rows: score, difference to the run's own prompt, same meaning, form."""
    rows = []
    for kind, about in made["questions"].items():
        for name, found in about["prompts"].items():
            score = found["metrics"][about["headline"]]
            row = {"kind": kind, "prompt": name, "own": name == about["own"], "score": about["headline"], "n": score["n"]}
            row |= {"value": _span(score), "majority": _round(score.get("majority", {}).get("value"))}
            row |= {"against own": _span(score.get("own"), "difference"), "same meaning": _span(found.get("agreement"))}
            row |= {
                "by chance": _round(found.get("agreement_by_chance")),
                "in form": _span((found["form"] or {}).get("compliance")),
            }
            rows.append(row)
    return {"trained_with": made["trained_with"], "run": Path(made["arguments"]["run"]).name, "prompts": rows} | _stamp(made)


def _span(figure: Mapping | None, name: str = "value") -> list | None:
    """``[value, low, high]``, ``[value]``, or ``None``."""
    if not figure or figure.get(name) is None:
        return None
    between = figure.get("interval" if name == "value" else f"{name}_interval") or ()
    return [_round(value) for value in (figure[name], *between)]


def robustness_of(made: Mapping) -> dict:
    """What `sonovqa.robustness` wrote; single questions are left out where they would not fit in `LARGEST`."""
    if _size(made) <= LARGEST:
        return dict(made)
    kept = [{k: v for k, v in one.items() if k not in ("questions", "against_first")} for one in made["curves"]]
    return dict(made) | {"measured": made["measured"] | {"questions": {}}, "curves": kept}


def _stamp(made: Mapping) -> dict:
    return {key: made[key] for key in ("data", "commit", "dirty", "finished") if key in made}


def _size(record: Mapping) -> int:
    return len(json.dumps(record, indent=2, ensure_ascii=False).encode())


def write(path: Path, record: Mapping, experiment: str | None = None, command: str | None = None) -> None:
    """Write a record for the repository; one that is there already keeps the experiments it belongs to.

    Args:
        path: the JSON file.
        experiment: whose block of experiments.md it belongs to.
        command: that made it.

    Raises:
        UserError: if it is larger than `LARGEST`.
    """
    before = files.read_json(path) if path.exists() else {}
    belongs = sorted({*before.get("experiments", []), *([experiment] if experiment else [])})
    made = {**record, **({"experiments": belongs} if belongs else {}), **({"command": command} if command else {})}
    if _size(made) > LARGEST:
        raise UserError(f"{path.name}; {_size(made)} bytes; at most {LARGEST} are kept in the repository; log less often")
    files.write_json(path, made)


def track(run: Path) -> None:
    """Tell the trackers that know a run of its evaluations' scores, and hand them their files (`tracking.attach`)."""
    for name, scores in evaluations(run).items():
        made = {"overall accuracy": scores["overall"]["metrics"]["accuracy"]["value"]}
        made |= {
            f"{kind} {one['headline']}": one["metrics"][one["headline"]]["value"] for kind, one in scores["questions"].items()
        }
        shown = {key: value for key, value in made.items() if value is not None}
        tracking.attach(run, [run / name / "scores.json"], [run / name / "report.html"], shown)
