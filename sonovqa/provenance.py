"""What a run's record says against its own evaluation: patients seen in training, other prompts or pixels, a better base."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from sonovqa import asking, comparing, dataset, prompt_variants
from sonovqa.cli import UserError
from sonovqa.findings import Finding
from sonovqa.metrics import FEWEST_GROUPS
from sonovqa.predictions import Key


def find(args: argparse.Namespace, run: Mapping | None, about: Mapping, raw) -> list[Finding]:
    """What the data set's and the run's own records say against an evaluation.

    Args:
        args: evaluate.py's, ``--prompts`` filled in.
        run: run.json, or ``None`` for what is no run. about: dataset.json. raw: the evaluated rows, images not decoded.
    """
    found = [*leaks_of_data(about, args.split)]
    if run is not None:
        found += seen_in_training(run, about, args.split, raw)
        found += unlike_training(run, args.prompt, args.task, (args.min_pixels, args.max_pixels))
    return found


def leaks_of_data(about: Mapping, split: str) -> Iterable[Finding]:
    """What `prepare_dataset.py` found to be in more than one split of the data set."""
    leak = about.get("leakage", {})
    asked, leaked = leak.get("test_questions", 0), leak.get("test_questions_on_images_outside_test", 0)
    if split == "test" and leaked:
        text = f"{leaked} of {asked} test questions ({leaked / asked:.1%}) are about images that are in another split too"
        yield Finding("leak", None, leaked / asked, text)
    if split == "test" and leak.get("groups"):
        yield Finding("leak", None, len(leak["groups"]), f"{len(leak['groups'])} groups are in the test split and in another one")


def seen_in_training(run: Mapping, about: Mapping, split: str, raw) -> Iterable[Finding]:
    """Images and groups of the evaluated split that the run was trained on.

    Args:
        run: run.json.
        about: dataset.json of the evaluated set.
        split: its evaluated split.
        raw: the split's rows, images not decoded.

    Groups are compared where the run was trained on the same data set (names of patients mean nothing across sets), images
    by their bytes where it was trained on another one.
    """
    if split != "test":
        yield Finding(
            "not held out", None, 0, f"the {split} split is not held out: the run was trained or chosen on it", split == "train"
        )
        return
    path = Path(run["arguments"]["data"])
    try:
        train = dataset.load_undecoded(path)["train"]
    except UserError:
        yield Finding(
            "training data not at hand", None, 0, f"the run's training data is not at {path}, so overlap is not checked", False
        )
        return
    if run.get("data") == about["fingerprint"]:
        shared = set(train["group"]) & set(raw["group"])
        what, total = "groups", len(set(raw["group"]))
    else:
        shared = _hashes(train) & _hashes(raw)
        what, total = "images", len(raw)
    if shared:
        text = f"{len(shared)} of {total} test {what} were seen in training, such as {sorted(shared)[0]}"
        yield Finding("seen in training", None, len(shared) / total, text)


def _hashes(raw) -> set[str]:
    """Of each row its image's, or the texts' where there is none."""
    found = ((asking.image_bytes(raw, row), raw[row]["questions"]) for row in range(len(raw)))
    return {hashlib.sha256(image or "".join(q["question"] for q in asked).encode()).hexdigest() for image, asked in found}


def own_prompts(run: Mapping | None) -> str:
    """The line of prompt variants that a run was trained with (`prompt_variants.variants`); of what is no run, the default."""
    return (run or {}).get("prompt_variant") or prompt_variants.DEFAULT


def unlike_training(run: Mapping, prompt: str, task: str, pixels: Sequence[int | None]) -> Iterable[Finding]:
    """A prompt variant, task or pixel budget that differs from the run's own."""
    unlike = prompt_variants.differing(prompt, own_prompts(run), task)
    if unlike:
        told = ", ".join(f"{q} with its prompt “{name}”, trained with “{own}”" for q, (name, own) in unlike.items())
        yield Finding("prompt unlike training", None, len(unlike), f"asked unlike in training: {told}")
    learnt = run["arguments"].get("task", "all")
    if learnt not in ("all", task):
        yield Finding("task unlike training", None, 0, f"asked --task {task}; the run was trained on --task {learnt}")
    budget = run.get("pixels") or (None, None)
    if any(asked is not None and asked != own for asked, own in zip(pixels, budget, strict=True)):
        text = f"images of {pixels[0]} to {pixels[1]} pixels; the run was trained with {budget[0]} to {budget[1]}"
        yield Finding("pixels unlike training", None, 0, text)


def beside_base(scores: dict, rows: Mapping[Key, dict], folder: Path, split: str, resamples: int, seed: int) -> list[Finding]:
    """Put the base a run started from beside its scores, paired (`comparing.compare`), and find where the run is below it.

    Args:
        scores: what `scoring.score` returned; ``base`` is added to every score that both have, and the comparison's sentence.
        folder: the base's evaluation.
    """
    made = comparing.compare(comparing.load(folder, split), rows, resamples, seed)
    scores["base"] = {"path": str(folder), "verdict": comparing.verdict(made, "its base", "The run"), "shared": made["shared"]}
    for kind, compared in made["questions"].items():
        for name, figure in compared.items():
            if name in scores["questions"].get(kind, {"metrics": {}})["metrics"]:
                scores["questions"][kind]["metrics"][name]["base"] = {
                    "value": figure["first"], "difference": figure["difference"], "difference_interval": figure["interval"],
                    "n": figure["n"],
                }  # fmt: skip
    return [*below_base(made, str(folder))]


def below_base(made: Mapping, name: str) -> Iterable[Finding]:
    """Questions on which a tuned run is below the base it started from, serious where the interval leaves no doubt."""
    for kind, scores in made["questions"].items():
        score, figure = next(iter(scores.items()))
        if figure["difference"] is not None and figure["difference"] < 0:
            between = " [{:+.2f}, {:+.2f}]".format(*figure["interval"]) if figure["interval"] else ""
            text = (
                f"{kind}: {score} {figure['second']:.2f} is below its own base's {figure['first']:.2f} "
                f"(difference {figure['difference']:+.2f}{between}; {name})"
            )
            doubtful = figure["interval"][1] >= 0 if between else figure["carriers"] < FEWEST_GROUPS
            yield Finding("below base", kind, figure["difference"], text, not doubtful)
