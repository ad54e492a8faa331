"""How scores fall as pictures get worse: a split answered under noise, blur and gain of rising strength, run beside run.

    python -m sonovqa.robustness outputs/clean outputs/augmented --data data/phantoms --out outputs/robustness.json
    python -m sonovqa.robustness outputs/clean --data data/phantoms --kinds blur --strengths 1 2 --limit 100 --out blur.json

Blur and gain of strength 1 are as large as a phantom's fault that makes quality "medium", 2 as one that makes it "low". The
noise of an image, and whether its gain goes up or down, are its own and the same at every strength. Beside --out are written
a table (.md), a plot (.svg) and, as they come, the answers: the same command goes on where it stopped and asks nothing twice.
Q6 asks for what is being changed, so its references stop being true: it is shown, and left out of all other scores.
"""

from __future__ import annotations

import argparse
import functools
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sonovqa import (
    answer_limits,
    answering,
    answers,
    asking,
    choice,
    cli,
    comparing,
    dataset,
    files,
    measures,
    predictions,
    records,
    scoring,
)
from sonovqa import augmentation_effects as effects
from sonovqa.cli import UserError, console
from sonovqa.engines import ImageRequest
from sonovqa.metrics import Resamples, mean
from sonovqa.questions import REPORT_ID, TASKS
from sonovqa.report_sections import expand

#: Kind -> (how much strength 1 is, its unit). Chosen beside `phantoms.BLUR` and `phantoms.GAIN_DB`.
KINDS = {
    "noise": (20.0, "grey levels of 255, standard deviation of white Gaussian noise"),
    "blur": (0.01, "heights of the image, standard deviation of a Gaussian"),
    "gain": (7.0, f"dB of a {effects.DISPLAY_DB:g} dB display, up in half of the images and down in the others"),
}
STRENGTHS = (0.5, 1.0, 2.0, 4.0)
SPOILT = "Q6"  # the question whose reference is of the picture as it was
OVERALL = f"all but {SPOILT}"


@dataclass(frozen=True)
class Condition:
    """A run's answers to the split made worse in one way; strength 0 is the split as it is, of no kind."""

    run: str
    kind: str
    strength: float

    @property
    def folder(self) -> str:
        return f"{slug(self.run)}/{self.kind}-{self.strength:g}" if self.strength else f"{slug(self.run)}/clean"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__, prog="python -m sonovqa.robustness")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="finished runs; the others are set beside the first")
    parser.add_argument("--data", type=Path, required=True, help="a folder made by prepare_dataset.py")
    parser.add_argument("--split", choices=("test", "validation", "train"), default="test", help="whose questions are asked")
    parser.add_argument("--task", choices=TASKS, default="all", help="all questions, one report, yes-or-no ones, one")
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=list(KINDS), help="how the pictures are made worse")
    parser.add_argument("--strengths", nargs="+", type=float, default=list(STRENGTHS), help="above 0; 0 is always asked too")
    parser.add_argument("--limit", type=int, metavar="N", help="N images only, drawn across categories")
    parser.add_argument("--adapter", action="store_true", help="each run's base with its adapter instead of its merged weights")
    parser.add_argument("--bits", type=int, choices=(4, 8, 16), default=16, help="precision the weights are loaded in")
    parser.add_argument("--batch-images", type=int, default=8, help="images answered together")
    parser.add_argument("--max-new-tokens", type=int, help="an answer's limit (unset: by what is asked); a report: 8 times it")
    parser.add_argument("--resamples", type=int, default=1000, help="bootstrap resamples of groups for intervals; 0: none")
    parser.add_argument("--seed", type=int, default=42, help="of noise, signs of gain, resamples and the draw of --limit")
    parser.add_argument("--out", type=Path, required=True, help="the record to write, ending in .json")
    parser.add_argument("--fresh", action="store_true", help="throw away the answers that --out has and ask everything anew")
    args = parser.parse_args(argv)
    check(args)
    args.strengths = sorted(set(args.strengths))
    return args


def check(args: argparse.Namespace) -> None:
    """Every problem with the arguments at once, before anything is loaded."""
    counts, not_negative = ("limit", "batch_images", "max_new_tokens"), ("resamples", "seed")
    problems = cli.out_of_range(args, counts, not_negative, ("strengths",))  # strength 0 is always asked
    if args.out.suffix != ".json":
        problems.append(f"--out must end in .json; it is {args.out}; a table and a plot are written beside it")
    twice = {run for run in args.runs if sum(slug(run) == slug(other) for other in args.runs) > 1}
    problems += [f"a run is named twice, or two would share a folder; {run}; name each once" for run in sorted(twice)]
    problems += [f"not a finished run; {run}; a folder with run.json; train it first" for run in args.runs if not _finished(run)]
    cli.check(problems)


def _finished(run: str) -> bool:
    return (Path(run) / "run.json").is_file()


def slug(run: str) -> str:
    """A run's folder as a single name."""
    return re.sub(r"[^\w.-]+", "-", str(Path(run))).strip("-.")


def worsened(image, kind: str, strength: float, image_id: str, seed: int = 0):
    """A picture made worse.

    Args:
        image: a PIL image, RGB.
        kind: a key of `KINDS`.
        strength: in the kind's unit; 0 changes nothing.
        image_id, seed: decide the noise and the sign of the gain, the same at every strength.

    Returns:
        A PIL image, RGB, of the same size.

    Raises:
        KeyError: if there is no such kind.
    """
    from PIL import Image, ImageFilter

    amount = KINDS[kind][0] * strength
    if not strength:
        return image
    rng = np.random.default_rng([seed, int(files.sha256(image_id)[:16], 16)])
    sign = (-1, 1)[rng.integers(2)]
    if kind == "blur":
        return image.filter(ImageFilter.GaussianBlur(amount * image.size[1]))
    if kind == "gain":
        levels = np.arange(256.0)
        table = levels + sign * amount * effects.LEVELS_A_DB * np.minimum(levels / effects.FLOOR, 1)
        return image.point(np.rint(table.clip(0, 255)).astype(int).tolist() * 3)
    noise = rng.standard_normal((*image.size[::-1], 1), dtype=np.float32) * np.float32(amount)
    return Image.fromarray(np.clip(np.asarray(image) + noise + 0.5, 0, 255).astype(np.uint8))


def requests(raw, items: Iterable[asking.Item], at: Condition, seed: int) -> Iterator[ImageRequest]:
    """`asking.requests` with every image made worse, as a PNG file; at strength 0 the files as they are."""
    from sonovqa import chat

    for request in asking.requests(raw, items):
        if at.strength:
            stream = io.BytesIO()
            worse = worsened(chat.open_image(request.image), at.kind, at.strength, request.image_id, seed)
            worse.save(stream, "PNG", compress_level=1)
            request = replace(request, image=stream.getvalue())
        yield request


def answer(args: argparse.Namespace, about: Mapping, raw, at: Condition, engine) -> list[dict]:
    """A condition's rows (`asking.row_of`), asked now as far as they are not on disk yet.

    Args:
        about: content of ``dataset.json``.
        raw: the split's rows to ask about, images not decoded.
        engine: gives the run's engine; called only if there is something to ask.
    """
    items, prompt = _items(args, raw, at.run)
    if not items:
        what = f"--task {args.task} on the {args.split} split of {args.data}"
        raise UserError(f"nothing to ask; {what}; answered questions are needed; choose another --task or --split")
    folder = args.out.with_suffix("") / at.folder
    settings = {"run": at.run, "weights": answering.identity(_who(args, at.run)), "adapter": args.adapter, "bits": args.bits}
    settings |= {"data": about["fingerprint"], "split": args.split, "prompt": prompt}
    settings |= {"max_new_tokens": args.max_new_tokens, "seed": args.seed}
    settings |= {"kind": at.kind, "amount": KINDS[at.kind][0] * at.strength} if at.strength else {}
    predictions.claim(folder, settings, args.fresh)
    path, wanted = folder / "predictions.jsonl", {item.key: item for item in items}
    done = predictions.latest(predictions.read(path))
    todo = [item for item in items if item.key not in done or done[item.key]["error"] is not None]
    if todo:
        console.print(f"{at.folder}: {len(todo)} of {len(items)} questions to ask", soft_wrap=True)
        limit = args.max_new_tokens * (8 if args.task == REPORT_ID else 1)
        asking.ask(engine(), requests(raw, todo, at, args.seed), {i.key: (i, None) for i in todo}, path, limit)
        done = predictions.latest(predictions.read(path))
    return [done[key] for key in wanted]


def _who(args: argparse.Namespace, run: str) -> argparse.Namespace:
    return argparse.Namespace(run=run, adapter=args.adapter)


def _items(args: argparse.Namespace, raw, run: str) -> tuple[list[asking.Item], str]:
    """What a run is asked, and the line of prompt variants that it is asked with."""
    told = records.read_run(Path(run))
    prompt = told.get("prompt_variant", "default")
    return choice.own_items(asking.items_of(raw, args.task, prompt), choice.of_run(told)), prompt


def _engine(args: argparse.Namespace, run: str, raw):
    from sonovqa.models import load_for_inference

    name, adapter = answering.model_of(_who(args, run))
    sizes, head = asking.image_sizes(raw, range(len(raw))), choice.behind(run) is not None
    batch = asking.batch_of(_items(args, raw, run)[0], sizes, args.batch_images, args.max_new_tokens, head=head)
    model, processor = load_for_inference(name, args.bits, adapter, (None, None), batch)
    return answering.engine_of(run, model, processor, args.batch_images)


def slices(rows: Sequence[Mapping]) -> dict[str, set[str]]:
    """Images apart: those of the lowest quality, and those of views that are not the standard one, by their references.

    A view is non-standard by the name of its category (``Non_standard_NT``) or where Q3's answer says so. Empty ones are left
    out.
    """
    lowest = answers.labels_of("Q6")[-1]
    found: dict[str, set[str]] = {"lowest quality": set(), "non-standard views": set()}
    for row in expand(rows):
        read = answers.read(row["question_id"], row["reference"]) if row["question_id"] in ("Q3", "Q6") else None
        if row["question_id"] == "Q6" and read is not None and read.labels == {lowest}:
            found["lowest quality"].add(row["image_id"])
        named = re.match(r"non[\W_]*standard", row["category"] or "", re.IGNORECASE)
        if named or (row["question_id"] == "Q3" and read is not None and ("standard", "no") in read.parts):
            found["non-standard views"].add(row["image_id"])
    return {name: images for name, images in found.items() if images}


def scored(rows: Sequence[Mapping], majority: scoring.Baselines, resamples: int, seed: int) -> dict:
    """``{"overall": figure, "questions": {kind: figure}, "slices": {name: figure}}`` of one condition's rows.

    A question's figure is its headline's in `scoring.score`; those of all questions but `SPOILT`, of all images and of each of
    the `slices`, are accuracies. Figures are `scoring.score`'s, with the score's name as ``score``.
    """
    made = scoring.score(rows, majority, resamples, seed)["questions"]
    counted = [row for row in expand(rows) if row["question_id"] != SPOILT]
    apart = {name: [row for row in counted if row["image_id"] in images] for name, images in slices(rows).items()}

    def accuracy(some: Sequence[Mapping]) -> dict:
        return {"score": "accuracy", **scoring.score(some, majority, resamples, seed)["overall"]["metrics"]["accuracy"]}

    return {
        **({"overall": accuracy(counted)} if counted else {}),
        "questions": {kind: {"score": one["headline"], **one["metrics"][one["headline"]]} for kind, one in made.items()},
        "slices": {name: accuracy(some) for name, some in apart.items() if some},
    }


def beside(first: Sequence[Mapping], rows: Sequence[Mapping], resamples: int, seed: int) -> dict:
    """A run less the first under one condition, paired and resampled by group: ``{"overall": figure, "questions": {…}}``."""
    pair = [{(r["image_id"], r["question_id"]): r for r in side} for side in (first, rows)]
    both = [key for key in pair[0] if key in pair[1] and all(side[key]["error"] is None for side in pair)]
    theirs, ours = ([r for r in expand(side[key] for key in both) if r["question_id"] != SPOILT] for side in pair)
    groups = [row["group"] for row in ours]
    new, old = (mean([measures.right(row, row["prediction"]) for row in side]) for side in (ours, theirs))
    interval = Resamples(groups, resamples, seed).difference(new, old, groups)
    questions = comparing.compare(*pair, resamples, seed)["questions"]
    return {
        **({"overall": {"value": new.value - old.value, "interval": interval}} if groups else {}),
        "questions": {
            kind: {"value": figure["difference"], "interval": figure["interval"]}
            for kind, found in questions.items()
            for figure in [next(iter(found.values()))]
        },
    }


def compact(figures: Mapping) -> dict:
    """Nested figures as lists ``[value, low, high]`` of four decimals, or ``[value]``; ``None`` for what is not defined."""
    if "value" not in figures:
        return {name: compact(inner) for name, inner in figures.items()}
    if figures["value"] is None:
        return None
    return [round(value, 4) for value in (figures["value"], *(figures["interval"] or ()))]


def conditions(run: str, kinds: Sequence[str], strengths: Sequence[float]) -> list[Condition]:
    """All conditions of a run, the clean one first."""
    return [Condition(run, "clean", 0.0), *(Condition(run, kind, strength) for kind in kinds for strength in strengths)]


def curves(args: argparse.Namespace, about: Mapping) -> tuple[list[dict], dict]:
    """Ask and score every condition of every run.

    Returns:
        The record's ``curves``, an entry a condition, and its ``measured``: what every figure is, how many rows and groups it
        is of, and the majority's, which are the same under all conditions.
    """
    splits = dataset.load_undecoded(args.data)
    raw = splits[args.split] if args.limit is None else dataset.subset(splits[args.split], args.limit, args.seed)
    train, asked = (asking.items_of(split, args.task) for split in (splits["train"], raw))
    args.max_new_tokens = args.max_new_tokens or answer_limits.usual(asked, train)
    majority = scoring.without_blind(train, asked)
    found, of_first, measured = [], {}, {}
    for run in args.runs:
        engine = functools.cache(functools.partial(_engine, args, run, raw))  # loaded if something is left to ask
        for at in conditions(run, args.kinds, args.strengths):
            rows = answer(args, about, raw, at, engine)
            made = scored(rows, majority, args.resamples, args.seed)
            measured = measured or {"images": len(raw), **_kinds_of_figures(made)}
            first = of_first.setdefault((at.kind, at.strength), rows)
            told = {} if first is rows else {"against_first": beside(first, rows, args.resamples, args.seed)}
            failed = sum(row["error"] is not None for row in rows)
            found.append({"run": run, "kind": at.kind, "strength": at.strength, "failed": failed, **compact(made | told)})
        engine.cache_clear()  # the next run needs the memory
    return found, measured


def _kinds_of_figures(figures: Mapping) -> dict:
    if "value" not in figures:
        return {name: _kinds_of_figures(inner) for name, inner in figures.items()}
    return {"score": figures["score"], "n": figures["n"], "groups": figures["groups"], "majority": figures["majority"]["value"]}


def _trained(run: str) -> dict:
    """What of a run's training belongs beside its curves."""
    arguments = records.read_run(Path(run))["arguments"]
    return {key: arguments[key] for key in ("augmentation", "epochs", "steps", "seed") if key in arguments}


def main(argv: list[str] | None = None) -> int:
    from sonovqa import robustness_report

    args = parse(argv)
    about = dataset.about(args.data)
    made, measured = curves(args, about)
    record = {
        "runs": {run: _trained(run) for run in args.runs},
        "data": {"name": args.data.name, "fingerprint": about["fingerprint"], "split": args.split},
        "kinds": {kind: {"strength 1": KINDS[kind][0], "unit": KINDS[kind][1]} for kind in args.kinds},
        "spoilt": SPOILT, "task": args.task, "resamples": args.resamples, "seed": args.seed, "measured": measured,
        "curves": made, "versions": records.versions(), **records.commit(), "finished": records.now(),
    }  # fmt: skip
    robustness_report.write(record, args.out)
    console.print(robustness_report.summary(record), markup=False, soft_wrap=True)
    console.print(f"written: {args.out}, {args.out.with_suffix('.md').name}, {args.out.with_suffix('.svg').name}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    cli.run(main)
