"""Answer a split's questions with a run, a base model or an endpoint, and score the answers beside their baselines.

    python evaluate.py outputs/phantoms --data data/phantoms                # the run's merged weights, on the test split
    python evaluate.py outputs/phantoms --data data/phantoms --adapter      # its base with the adapter on top
    python evaluate.py Qwen/Qwen3-VL-8B-Instruct --data data/clinic         # a base model
    python evaluate.py --endpoint http://127.0.0.1:8000/v1 --model phantoms --data data/phantoms
    python evaluate.py outputs/phantoms --data data/phantoms --confidence   # and how likely every label of closed questions is
    python evaluate.py outputs/phantoms --data data/phantoms --most-useful 50 --images FOLDER   # and what to label next
    python evaluate.py score answers.jsonl --data data/clinic               # answers made elsewhere
    python evaluate.py compare outputs/tiny outputs/phantoms                # paired differences

It writes outputs/<run>/eval-<split>/: predictions.jsonl, blind.jsonl and confidence.jsonl as answers arrive (the same
command goes on where it stopped), then scores.json and report.html. A run whose base was evaluated before on the same
questions is set beside it. Failed requests are asked again by the same command, never scored.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from dataclasses import replace
from pathlib import Path

from sonovqa import (
    answering,
    asking,
    bertscore,
    calibration,
    cli,
    comparing,
    confidence,
    dataset,
    elsewhere,
    files,
    findings,
    metrics,
    most_useful,
    predictions,
    provenance,
    records,
    report_html,
    scoretable,
    scoring,
    unscored,
)  # fmt: skip
from sonovqa.cli import UserError, console
from sonovqa.questions import QUESTIONS, REPORT_ID, REPORT_PROMPTS, TASKS

SPLITS = ("test", "validation", "train")
POSITIVE = ("in_flight", "batch_images", "max_new_tokens", "max_images", "min_pixels", "max_pixels", "most_useful")
PROMPTS = sorted({name for q in QUESTIONS.values() for name in q.prompts} | {*REPORT_PROMPTS})
REPORT_LENGTH = 8  # a report holds eight answers


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__)
    flag = argparse.BooleanOptionalAction
    who = parser.add_argument_group("who answers")
    who.add_argument("run", nargs="?", metavar="RUN_OR_MODEL", help="outputs/<run>, a model folder, a hub id or tiny")
    who.add_argument("--adapter", action="store_true", help="the run's base with its adapter instead of its merged weights")
    who.add_argument("--bits", type=int, choices=(4, 8, 16), default=16, help="precision the weights are loaded in")
    who.add_argument("--endpoint", metavar="URL", help="OpenAI-compatible server instead; key in VLLM_API_KEY")
    who.add_argument("--model", "--endpoint-model", metavar="NAME", help="its name at the endpoint (unset: the only one)")
    who.add_argument("--in-flight", type=int, default=16, help="requests at once to the endpoint")
    who.add_argument("--batch-images", type=int, default=8, help="images answered together by a local model")
    who.add_argument("--shared-prefix", action=flag, default=True, help="a local model encodes an image once for all questions")
    what = parser.add_argument_group("what is asked")
    what.add_argument("--data", type=Path, required=True, help="a folder made by prepare_dataset.py")
    what.add_argument("--split", choices=SPLITS, default="test", help="whose questions are asked")
    what.add_argument("--task", choices=TASKS, default="all", help="all questions, the combined report, or one question")
    what.add_argument("--prompt", default="default", choices=PROMPTS, help="name of the prompt variant")
    what.add_argument("--max-images", type=int, metavar="N", help="ask about N images only, drawn across categories")
    what.add_argument("--blind", action=flag, default=True, help="ask again with a grey image, once a prompt and image size")
    what.add_argument("--max-new-tokens", type=int, default=128, help=f"an answer's limit; a report has {REPORT_LENGTH} times it")
    what.add_argument("--min-pixels", type=int, help="lower bound of an image's pixels (unset: as trained)")
    what.add_argument("--max-pixels", type=int, help="upper bound of an image's pixels (unset: as trained)")
    how = parser.add_argument_group("scores and files")
    add_scoring_flags(how)
    how.add_argument("--base", metavar="NAME", help="model evaluated before to compare with (unset: the run's base)")
    how.add_argument("--out", type=Path, help="folder for all results (unset: outputs/<run>/eval-<split>)")
    how.add_argument("--fresh", action="store_true", help="throw away what --out holds and ask everything anew")
    sure = parser.add_argument_group("confidence")
    sure.add_argument("--confidence", action="store_true", help="probability of every label of closed questions")
    sure.add_argument("--abstain-below", type=float, metavar="P", help="with --confidence: hold back answers less likely than P")
    sure.add_argument("--most-useful", type=int, metavar="N", help="list the N images of --images to label next")
    sure.add_argument("--images", type=Path, metavar="FOLDER", help="a folder of images, Folder/File, for --most-useful")
    args = parser.parse_args(argv)
    check(args)
    return args


def add_scoring_flags(group) -> None:
    group.add_argument("--resamples", type=int, default=1000, help="bootstrap resamples of groups for intervals; 0: none")
    group.add_argument("--seed", type=int, default=42, help="of the resamples and of the draw of --max-images")
    group.add_argument("--bertscore", metavar="MODEL", help="BERTScore by a model folder or downloaded hub id")
    group.add_argument("--gallery", type=int, default=200, help="most answers with their images in report.html")
    group.add_argument("--strict", action="store_true", help="exit 1 if there is any serious finding")


def check(args: argparse.Namespace) -> None:
    """Every problem with the arguments at once, before anything is loaded."""
    wrong = [n for n in POSITIVE if getattr(args, n) is not None and getattr(args, n) < 1]
    problems = [f"--{n.replace('_', '-')} must be at least 1; it is {getattr(args, n)}" for n in wrong]
    if args.resamples < 0:
        problems.append(f"--resamples must be 0 or more; it is {args.resamples}")
    if bool(args.run) == bool(args.endpoint):
        problems.append("nobody, or two, to answer; name either RUN_OR_MODEL or --endpoint URL")
    if args.model and not args.endpoint:
        problems.append(f"--model names a model at an endpoint; {args.model!r} has no --endpoint; a local one comes first, bare")
    if args.adapter and not (args.run and (Path(args.run) / "adapter").is_dir()):
        problems.append(f"--adapter needs a run with an adapter/ folder; {args.run} has none; leave --adapter out, or train one")
    asked = [REPORT_PROMPTS] if args.task == REPORT_ID else [q.prompts for q in QUESTIONS.values() if args.task in ("all", q.id)]
    if not all(args.prompt in prompts for prompts in asked):
        problems.append(f"--prompt {args.prompt} is no variant of --task {args.task}; choose among its own")
    if args.abstain_below is not None and not (args.confidence and 0 <= args.abstain_below <= 1):
        problems.append(f"--abstain-below goes with --confidence and is a probability, 0 to 1; it is {args.abstain_below}")
    if (args.most_useful is None) != (args.images is None):
        problems.append("--most-useful N and --images FOLDER go together; one of them is missing")
    cli.check(problems)


def open_engine(args: argparse.Namespace):
    """The engine that answers, loaded now."""
    if args.endpoint:
        from sonovqa.endpoint import Endpoint

        endpoint = Endpoint(args.endpoint, args.model, args.in_flight)
        endpoint.check()
        return endpoint
    from sonovqa.generation import LocalEngine
    from sonovqa.models import load_for_inference

    name, adapter = answering.model_of(args)
    model, processor = load_for_inference(name, args.bits, adapter, (args.min_pixels, args.max_pixels))
    return LocalEngine(model, processor, args.batch_images, args.shared_prefix)


def ask_all(args: argparse.Namespace, out: Path, raw, items: list, engine) -> tuple[dict, dict | None]:
    """Ask what has no answer yet, the images' questions and then the grey ones; gives the rows of both by key."""
    sizes = asking.image_sizes(raw, sorted({item.row for item in items}))
    plans = [("predictions.jsonl", {item.key: (item, sizes[item.row]) for item in items}, False)]
    if args.blind:
        plans.append(("blind.jsonl", asking.blind_items(items, sizes), True))
    limit = args.max_new_tokens * (REPORT_LENGTH if args.task == REPORT_ID else 1)
    for name, asked, blind in plans:
        done = predictions.latest(predictions.read(out / name))
        todo = {key: value for key, value in asked.items() if key not in done or done[key]["error"] is not None}
        if todo and blind:
            requests = asking.blind_requests(todo, asking.mean_grey(raw))
        else:
            requests = asking.requests(raw, [item for item, _ in todo.values()])
        if todo:
            asking.ask(engine()[0], requests, todo, out / name, limit, blind, engine()[1])
    rows = {name: predictions.latest(predictions.read(out / name)) for name, _, _ in plans}
    answered = {key: rows["predictions.jsonl"][key] for key in plans[0][1]}
    return answered, rows.get("blind.jsonl")


def weigh(args: argparse.Namespace, out: Path, raw, items: list, labels: confidence.Labels, engine, scores: dict, rows: list):
    """Weigh the labels of closed questions that have no probabilities yet, and score them all; gives findings."""
    wordings = {item.key: labels.of(item) for item in items if labels.of(item)}
    if not wordings:
        closed = ", ".join(confidence.CLOSED)
        raise UserError(f"--confidence; --task {args.task} asks no closed question; {closed} are; choose another --task")
    path = out / "confidence.jsonl"
    done = confidence.read(path)
    todo = {key: texts for key, texts in wordings.items() if key not in done}
    if todo:
        asked = confidence.requests(raw, [item for item in items if item.key in todo], labels)
        confidence.weigh(confidence.engine_of(engine()[0]), asked, todo, path)
    told = {key: row for key, row in confidence.read(path).items() if key in wordings}
    draws = metrics.Resamples([row["group"] for row in rows], args.resamples, args.seed)
    calibration.add(scores, rows, told, args.abstain_below, draws)
    return calibration.find(scores, len(wordings), len(told))


def evaluate(argv: list[str]) -> int:
    args = parse(argv)
    started = time.perf_counter()
    if args.endpoint and args.model is None:
        args.model = open_engine(args).model
    splits = dataset.load_undecoded(args.data)
    about = files.read_json(args.data / "dataset.json")
    raw = splits[args.split] if args.max_images is None else dataset.subset(splits[args.split], args.max_images, args.seed)
    items, train = (asking.items_of(split, args.task, args.prompt) for split in (raw, splits["train"]))
    if not items:
        asked = f"--task {args.task} on the {args.split} split of {args.data}"
        raise UserError(f"nothing to ask; {asked}; answered questions are needed; choose another --task or --split")
    base = answering.base_folder(args, records.read_run(Path(args.run)) if args.run else None, about)
    wording = bertscore.wording(args.bertscore)
    out = answering.output_folder(args)
    predictions.claim(out, answering.settings_of(args, about), args.fresh)
    engine = functools.cache(lambda: asking.timed(open_engine, args))  # loaded if and when it is needed
    by_key, blind = ask_all(args, out, raw, items, engine)
    rows, labels = list(by_key.values()), confidence.Labels(train)
    baselines = replace(scoring.without_blind(train, items), blind=blind)
    scores = scoring.score(rows, baselines, args.resamples, args.seed, wording)
    unsure = weigh(args, out, raw, items, labels, engine, scores, rows) if args.confidence else []
    scores |= {
        "speed": asking.speed(out), "wall_seconds": round(time.perf_counter() - started, 3),
        "data": {"path": str(args.data), "fingerprint": about["fingerprint"], "split": args.split, "images": len(raw)},
    }  # fmt: skip
    below = provenance.beside_base(scores, by_key, base, args.split, args.resamples, args.seed) if base else []
    found = [*findings.find(scores, rows), *known_of(args, about, raw), *below, *unsure]
    status = finish(args, out, scores, found, rows, raw)
    if args.most_useful:
        new = most_useful.unannotated(args.images, splits)
        ranked = most_useful.rank(engine, new, labels, args.prompt, out / "unannotated.jsonl")[: args.most_useful]
        most_useful.write(out / "most-useful.csv", ranked)
        most_useful.show(ranked, out / "most-useful.csv", console)
    return status


def known_of(args: argparse.Namespace, about: dict, raw) -> list[findings.Finding]:
    """What the data set's and the run's own records say against these scores."""
    found = [*provenance.leaks_of_data(about, args.split)]
    run = records.read_run(Path(args.run)) if args.run else None
    if run is not None:
        found += provenance.seen_in_training(run, about, args.split, raw)
        found += provenance.unlike_training(run, args.prompt, args.task, (args.min_pixels, args.max_pixels))
    return found


def finish(args: argparse.Namespace, out: Path, scores: dict, found: list, rows: list[dict], raw=None) -> int:
    """Write scores.json and report.html, print the findings and the table; 1 with --strict and a serious finding."""
    found = sorted(found, key=lambda f: not f.serious)
    verdict = findings.describe(found, scores)
    arguments = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    record = {"verdict": verdict, "findings": [f.json() for f in found], **scores, "arguments": arguments}
    record |= {"versions": records.versions(), **records.commit(), "finished": records.now()}
    files.write_json(out / "scores.json", record)
    files.write_text(out / "report.html", report_html.render(record, rows, raw, args.gallery))
    scoretable.show(scores, verdict, found, console)
    console.print(f"written: {out}/ scores.json, report.html, predictions.jsonl", soft_wrap=True)
    return 1 if args.strict and any(f.serious for f in found) else 0


def score(argv: list[str]) -> int:
    """evaluate.py score predictions.jsonl: answers made elsewhere."""
    parser = cli.Parser(prog="evaluate.py score", description=elsewhere.__doc__)
    flag = argparse.BooleanOptionalAction
    parser.add_argument("predictions", type=Path, help="a .jsonl file")
    parser.add_argument("--data", type=Path, help="a folder made by prepare_dataset.py, or an annotation sheet without images")
    parser.add_argument("--references", action=flag, default=True, help="off: say what shows without any")
    parser.add_argument("--split", choices=SPLITS, default="test", help="of a prepared set")
    parser.add_argument("--group-column", metavar="NAME", help="a sheet's patient column (unset: an image is its own group)")
    parser.add_argument("--out", type=Path, help="folder for the results (unset: <predictions>.scores beside the file)")
    add_scoring_flags(parser)
    args = parser.parse_args(argv)
    if (args.data is None) == args.references:
        raise UserError("what to score against; name --data SET-OR-SHEET, or --no-references without it")
    rows = elsewhere.read_rows(args.predictions)
    out = args.out or args.predictions.with_suffix(".scores")
    if not args.references:
        joined = elsewhere.unreferenced(rows)
        found = unscored.report(joined, out / "scores.json", console)
        return 1 if args.strict and any(f.serious for f in found) else 0
    items, train, raw = elsewhere.references(args.data, args.split, args.group_column)
    wording = bertscore.wording(args.bertscore)
    joined = elsewhere.join(rows, items)
    elsewhere.list_unmatched(joined, console)
    scores = scoring.score(joined.rows, scoring.without_blind(train, items), args.resamples, args.seed, wording)
    scores |= {"unmatched": joined.unmatched, "missing": joined.missing}
    predictions.write(out / "predictions.jsonl", joined.rows)
    return finish(args, out, scores, findings.find(scores, joined.rows) + elsewhere.find(joined), joined.rows, raw)


def compare(argv: list[str]) -> int:
    """evaluate.py compare RUN RUN …: paired differences to the first."""
    parser = cli.Parser(prog="evaluate.py compare", description=comparing.__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="runs or evaluation folders; all against the first")
    parser.add_argument("--split", choices=SPLITS, default="test", help="whose evaluation of a run")
    parser.add_argument("--resamples", type=int, default=1000, help="bootstrap resamples of groups for the intervals")
    parser.add_argument("--seed", type=int, default=42, help="of the resamples")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the differences there too")
    args = parser.parse_args(argv)
    if len(args.runs) < 2:
        raise UserError(f"one run to compare; {args.runs[0]}; two or more are needed; name another")
    found = [comparing.load(run, args.split) for run in args.runs]
    made = [comparing.compare(found[0], other, args.resamples, args.seed) for other in found[1:]]
    for name, one in zip(args.runs[1:], made, strict=True):
        comparing.show(one, str(args.runs[0]), str(name), console)
    if speeds := comparing.speeds(args.runs, args.split):
        console.print(scoretable.speed_table(speeds))
    if args.out:
        comparing.write(args.out, [str(run) for run in args.runs], made)
    return 0


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    commands = {"score": score, "compare": compare}
    return commands[argv[0]](argv[1:]) if argv and argv[0] in commands else evaluate(argv)


if __name__ == "__main__":
    cli.run(main)
