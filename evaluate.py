"""Answer a split's questions with a run, a base model or an endpoint, and score the answers beside their baselines.

    python evaluate.py outputs/phantoms --data data/phantoms                # the run's merged weights, on the test split
    python evaluate.py outputs/phantoms --data data/phantoms --adapter      # its base with the adapter on top
    python evaluate.py Qwen/Qwen3-VL-8B-Instruct --data data/clinic         # a base model
    python evaluate.py --endpoint http://127.0.0.1:8000/v1 --model phantoms --data data/phantoms
    python evaluate.py --endpoint https://api.example.com/v1 --model NAME --data data/phantoms --price-input 2 --price-output 8
    python evaluate.py outputs/phantoms --data data/phantoms --confidence   # and how likely every label of closed questions is
    python evaluate.py outputs/phantoms --data data/phantoms --most-useful 50 --images FOLDER   # and what to label next
    python evaluate.py score answers.jsonl --data data/clinic               # answers made elsewhere
    python evaluate.py compare outputs/tiny outputs/phantoms                # paired differences
    python evaluate.py prompts outputs/phantoms --data data/phantoms        # the same asked with every prompt there is

It writes outputs/<run>/eval-<split>/: predictions.jsonl, blind.jsonl and confidence.jsonl as answers arrive (the same
command goes on where it stopped), then scores.json and report.html. A run whose base was evaluated before on the same
questions is set beside it. Failed requests are asked again by the same command, never scored.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from sonovqa import (
    answer_limits,
    answering,
    asking,
    bertscore,
    calibration,
    choice,
    cli,
    coherence,
    comparing,
    confidence,
    consistency,
    dataset,
    elsewhere,
    endpoint_cost,
    files,
    findings,
    metrics,
    models,
    most_useful,
    predictions,
    prompt_variants,
    provenance,
    report_html,
    scoretable,
    scoring,
    text_only,
    unscored,
    weak_slices,
)
from sonovqa import evaluation_flags as flags
from sonovqa.cli import UserError, console
from sonovqa.questions import TASKS

SPLITS = ("test", "validation", "train")
NOT_NEGATIVE = ("resamples", "seed", "price_input", "price_output")
FILLED_IN = ("max_new_tokens",)  # by what is asked
POSITIVE = ("in_flight", "batch_images", "max_new_tokens", "max_images", "most_useful")


def parse(argv: list[str], several: bool = False) -> argparse.Namespace:
    parser = cli.Parser(prog="evaluate.py prompts" if several else None, description=consistency.__doc__ if several else __doc__)
    flags.add_who(parser.add_argument_group("who answers"))
    flags.add_elsewhere(parser.add_argument_group("an endpoint elsewhere"))
    what = parser.add_argument_group("what is asked")
    what.add_argument("--data", type=Path, required=True, help="a folder made by prepare_dataset.py")
    what.add_argument("--split", choices=SPLITS, default="test", help="whose questions are asked")
    what.add_argument("--task", choices=TASKS, default="all", help="all questions, one report, yes-or-no ones, one")
    lines = {"nargs": "+", "help": "lines as train.py takes them, compared with the run's own (unset: every prompt there is)"}
    line = {"help": "a prompt's name, or one a question: Q7=simple,Q2=short (unset: as trained)"}
    what.add_argument("--prompts", metavar="NAME", dest="prompt", **(lines if several else line))
    what.add_argument("--max-images", type=int, metavar="N", help="ask about N images only, drawn across categories")
    what.add_argument("--max-new-tokens", type=int, help="an answer's limit (unset: by what is asked); a report: 8 times it")
    what.add_argument("--min-pixels", type=int, help="lower bound of an image's pixels (unset: as trained)")
    what.add_argument("--max-pixels", type=int, help="upper bound of an image's pixels (unset: as trained)")
    how = parser.add_argument_group("scores and files")
    flags.add_resampling(how)
    how.add_argument("--out", type=Path, help="folder for all results (unset: outputs/<run>/eval-<split>)")
    how.add_argument("--fresh", action="store_true", help="throw away what --out holds and ask everything anew")
    parser.set_defaults(blind=False, confidence=False, abstain_below=None, most_useful=None, images=None)
    if not several:
        flags.add_scoring(how)
        what.add_argument("--blind", action=flags.FLAG, default=True, help="ask again with grey images, one a prompt and size")
        how.add_argument("--base", metavar="NAME", help="model evaluated before to compare with (unset: the run's base)")
        flags.add_confidence(parser.add_argument_group("confidence"))
    args = parser.parse_args(argv)
    check(args)
    args.unset = [name for name in FILLED_IN if getattr(args, name) is None]  # a sweep compares what was typed
    return args


def check(args: argparse.Namespace) -> None:
    """Every problem with the arguments at once, before anything is loaded."""
    problems = cli.out_of_range(args, POSITIVE, NOT_NEGATIVE) + models.wrong_pixels(args.min_pixels, args.max_pixels)
    if args.out is not None and args.out.exists() and not args.out.is_dir():
        problems.append(f"--out {args.out}; it is no folder; a new one, or one that an evaluation made, is allowed")
    if bool(args.run) == bool(args.endpoint):
        problems.append("nobody, or two, to answer; name either RUN_OR_MODEL or --endpoint URL")
    if args.model and not args.endpoint:
        problems.append(f"--model names a model at an endpoint; {args.model!r} has no --endpoint; a local one comes first, bare")
    if args.head and not args.endpoint:
        problems.append(f"--head {args.head} is for --endpoint, which serves that run; a local run knows its own; leave it out")
    if args.adapter and not (args.run and (Path(args.run) / "adapter").is_dir()):
        problems.append(f"--adapter needs a run with an adapter/ folder; {args.run} has none; leave --adapter out, or train one")
    if args.abstain_below is not None and not (args.confidence and 0 <= args.abstain_below <= 1):
        problems.append(f"--abstain-below goes with --confidence and is a probability, 0 to 1; it is {args.abstain_below}")
    if (args.most_useful is None) != (args.images is None):
        problems.append("--most-useful N and --images FOLDER go together; one of them is missing")
    cli.check(problems)


def open_engine(
    args: argparse.Namespace, items: Sequence[asking.Item] = (), sizes: Mapping[int, asking.Size | None] = MappingProxyType({})
):
    """The engine that answers, loaded now if there is memory for ``items``, what it will be asked about images of ``sizes``."""
    if args.endpoint:
        return answering.open_endpoint(args)
    from sonovqa.models import load_for_inference

    name, adapter = answering.model_of(args)
    batch = asking.batch_of(items, sizes, args.batch_images, args.max_new_tokens, args.blind, bool(choice.behind(args.run)))
    batch = replace(batch, share=args.shared_prefix, alone="--no-shared-prefix")
    model, processor = load_for_inference(name, args.bits, adapter, (args.min_pixels, args.max_pixels), batch)
    return answering.engine_of(args.run, model, processor, args.batch_images, args.shared_prefix)


def read_data(args: argparse.Namespace):
    """The data set's splits and description, and the evaluated split cut to --max-images; an endpoint's model gets its name."""
    if args.endpoint and args.model is None:
        args.model = open_engine(args).model
    splits = dataset.load_undecoded(args.data)
    raw = splits[args.split] if args.max_images is None else dataset.subset(splits[args.split], args.max_images, args.seed)
    return splits, dataset.about(args.data), raw


def evaluate(argv: list[str]) -> int:
    args = parse(argv)
    started = time.perf_counter()
    run = answering.run_of(args)
    args.prompt = args.prompt or provenance.own_prompts(run)
    prompt_variants.check(args.prompt, args.task)
    splits, about, raw = read_data(args)
    items, train = (asking.items_of(split, args.task, args.prompt) for split in (raw, splits["train"]))
    items, texts = choice.own_items(items, choice.of_run(run)), text_only.has_no_images(raw)
    if not items:
        asked = f"--task {args.task} on the {args.split} split of {args.data}"
        raise UserError(f"nothing to ask; {asked}; answered questions are needed; choose another --task or --split")
    args.max_new_tokens = args.max_new_tokens or answer_limits.usual(items, train)
    base = answering.base_folder(args, run, about)
    wording = bertscore.wording(args.bertscore)
    out = answering.output_folder(args)
    predictions.claim(out, answering.settings_of(args, about), args.fresh)
    endpoint_cost.agree(args, raw, items, out, args.blind and not texts)
    sizes = asking.image_sizes(raw, sorted({item.row for item in items}))
    engine = functools.cache(lambda: asking.timed(open_engine, args, items, sizes))  # loaded if and when it is needed
    by_key, blind = asking.ask_all(raw, items, out, engine, args.blind and not texts, args.max_new_tokens, sizes)
    rows, labels = list(by_key.values()), confidence.Labels(prompt_variants.wordings(train, args.prompt))
    baselines = replace(scoring.without_blind(train, items), blind=blind)
    scores = scoring.score(rows, baselines, args.resamples, args.seed, wording)
    unsure = []
    if args.confidence:
        closed, told = calibration.told_of(raw, items, labels, engine, out / "confidence.jsonl", by_key)
        draws = metrics.Resamples([row["group"] for row in rows], args.resamples, args.seed)
        calibration.add(scores, rows, told, args.abstain_below, draws)
        unsure = calibration.find(scores, closed, len(told))
    scores |= {
        "speed": asking.speed(out), "wall_seconds": round(time.perf_counter() - started, 3),
        "data": answering.data_asked(args, about, rows),
    }  # fmt: skip
    below = provenance.beside_base(scores, by_key, base, args.split, args.resamples, args.seed) if base else []
    found = [*findings.find(scores, rows), *provenance.find(args, run, about, raw), *below, *unsure]
    status = finish(args, out, scores, found, rows, None if texts else raw)
    if args.most_useful:
        new = most_useful.unannotated(args.images, splits)
        ranked = most_useful.rank(engine, new, labels, args.prompt, out / "unannotated.jsonl")[: args.most_useful]
        most_useful.write(out / "most-useful.csv", ranked)
        most_useful.show(ranked, out / "most-useful.csv", console)
    return status


def finish(args: argparse.Namespace, out: Path, scores: dict, found: list, rows: list[dict], raw=None) -> int:
    """Write scores.json and report.html, print the findings and the table; 1 with --strict and a serious finding."""
    found = sorted(found, key=lambda f: not f.serious)
    verdict = findings.describe(found, scores)
    weakest = weak_slices.worst(scores["questions"])
    record = {"verdict": verdict, "findings": [f.json() for f in found], "weakest": weakest, **scores, **answering.stamp(args)}
    files.write_json(out / "scores.json", record)
    files.write_text(out / "report.html", report_html.render(record, rows, raw, args.gallery))
    scoretable.show(scores, verdict, found, console)
    weak_slices.show(weakest, console)
    calibration.show(scores, console)
    if "coherence" in scores:
        console.print(coherence.line(scores["coherence"]), markup=False, soft_wrap=True)
    console.print(f"written: {out}/ scores.json, report.html, predictions.jsonl", soft_wrap=True)
    return 1 if args.strict and any(f.serious for f in found) else 0


def score(argv: list[str]) -> int:
    """evaluate.py score predictions.jsonl: answers made elsewhere."""
    parser = cli.Parser(prog="evaluate.py score", description=elsewhere.__doc__)
    parser.add_argument("predictions", type=Path, help="a .jsonl file")
    parser.add_argument("--data", type=Path, help="a folder made by prepare_dataset.py, or an annotation sheet without images")
    parser.add_argument("--references", action=flags.FLAG, default=True, help="off: say what shows without any")
    parser.add_argument("--split", choices=SPLITS, default="test", help="of a prepared set")
    parser.add_argument("--group-column", metavar="NAME", help="a sheet's patient column (unset: an image is its own group)")
    parser.add_argument("--out", type=Path, help="folder for the results (unset: <predictions>.scores beside the file)")
    flags.add_resampling(parser)
    flags.add_scoring(parser)
    args = parser.parse_args(argv)
    if (args.data is None) == args.references:
        raise UserError("what to score against; name --data SET-OR-SHEET, or --no-references without it")
    rows = elsewhere.read_rows(args.predictions)
    out = args.out or args.predictions.with_suffix(".scores")
    if not args.references:
        joined = elsewhere.unreferenced(rows)
        found = unscored.report(joined, out / "scores.json", console)
        return 1 if args.strict and any(f.serious for f in found) else 0
    items, train, raw = elsewhere.references(args.data, args.split, rows, args.group_column)
    wording = bertscore.wording(args.bertscore)
    joined = elsewhere.join(rows, items)
    elsewhere.list_unmatched(joined, console)
    scores = scoring.score(joined.rows, scoring.without_blind(train, items), args.resamples, args.seed, wording)
    scores |= {"unmatched": joined.unmatched, "missing": joined.missing, "repeated": joined.repeated}
    predictions.write(out / "predictions.jsonl", joined.rows)
    found = findings.find(scores, joined.rows) + elsewhere.find(joined, args.split if raw is not None else None)
    return finish(args, out, scores, found, joined.rows, raw)


def compare(argv: list[str]) -> int:
    """evaluate.py compare RUN RUN …: paired differences to the first."""
    parser = cli.Parser(prog="evaluate.py compare", description=comparing.__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="runs or evaluation folders; all against the first")
    parser.add_argument("--split", choices=SPLITS, default="test", help="whose evaluation of a run")
    flags.add_resampling(parser)
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the differences there too")
    args = parser.parse_args(argv)
    made = comparing.compare_with_first(args.runs, args.split, args.resamples, args.seed)
    if args.out:  # before anything is shown: what is piped to `head` ends there
        comparing.write(args.out, [str(run) for run in args.runs], made)
    for name, one in zip(args.runs[1:], made, strict=True):
        comparing.show(one, str(args.runs[0]), str(name), console)
    if speeds := comparing.speeds(args.runs, args.split):
        console.print(scoretable.speed_table(speeds))
    return 0


def prompts(argv: list[str]) -> int:
    """evaluate.py prompts RUN …: one model, the same images, several prompts a question."""
    args = parse(argv, several=True)
    run = answering.run_of(args)
    own, head = provenance.own_prompts(run), choice.of_run(run)
    names = consistency.names_asked(args.task, args.prompt, own)
    splits, about, raw = read_data(args)
    folder = answering.output_folder(args)
    out = args.out or folder.with_name(f"{folder.name}-prompts")
    sizes = asking.image_sizes(raw, range(len(raw)))
    engine = functools.cache(lambda: asking.timed(open_engine, args, items, sizes))  # of the first prompts that are asked
    rows, train, given = {}, asking.items_of(splits["train"], args.task), args.max_new_tokens
    for name, questions in names.items():
        asked = ",".join(f"{question}={name}" for question in sorted(questions))
        items = choice.own_items((i for i in asking.items_of(raw, args.task, asked) if i.question_id in questions), head)
        if not items:
            continue
        args.max_new_tokens = given or answer_limits.usual(items, train)
        endpoint_cost.agree(args, raw, items, out / name, False)
        settings = answering.settings_of(argparse.Namespace(**vars(args) | {"prompt": name}), about)
        predictions.claim(out / name, settings, args.fresh)
        rows[name] = list(asking.ask_all(raw, items, out / name, engine, False, args.max_new_tokens, sizes)[0].values())
    baselines = scoring.without_blind(train, [])
    made = consistency.measure(consistency.sides_of(rows), prompt_variants.variants(own), baselines, args.resamples, args.seed)
    asked = answering.data_asked(args, about, [row for found in rows.values() for row in found])
    files.write_json(out / "prompts.json", made | {"trained_with": own, "data": asked, **answering.stamp(args)})
    consistency.show(made, console)
    console.print(f"written: {out}/ prompts.json, a folder a prompt with predictions.jsonl", soft_wrap=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    commands = {"score": score, "compare": compare, "prompts": prompts}
    return commands[argv[0]](argv[1:]) if argv and argv[0] in commands else evaluate(argv)


if __name__ == "__main__":
    cli.run(main)
