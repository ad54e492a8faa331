"""Answer a split's questions with a run, a base model or an endpoint, and score the answers beside their baselines.

    python evaluate.py outputs/phantoms --data data/phantoms                # the run's merged weights, on the test split
    python evaluate.py outputs/phantoms --data data/phantoms --adapter      # its base with the adapter on top
    python evaluate.py Qwen/Qwen3-VL-8B-Instruct --data data/clinic         # a base model
    python evaluate.py --endpoint http://127.0.0.1:8000/v1 --model phantoms --data data/phantoms
    python evaluate.py score answers.jsonl --data data/clinic               # answers made elsewhere
    python evaluate.py compare outputs/tiny outputs/phantoms                # paired differences

It writes outputs/<run>/eval-<split>/: predictions.jsonl and blind.jsonl as answers arrive (the same command goes on
where it stopped), then scores.json and report.html. Failed requests are asked again by the same command, never scored.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

from sonovqa import (
    asking,
    cli,
    comparing,
    dataset,
    elsewhere,
    files,
    findings,
    predictions,
    provenance,
    records,
    report_html,
    scoretable,
    scoring,
    unscored,
)  # fmt: skip
from sonovqa.cli import UserError, console
from sonovqa.questions import REPORT_ID, REPORT_PROMPTS, TASKS

SPLITS = ("test", "validation", "train")
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
    what = parser.add_argument_group("what is asked")
    what.add_argument("--data", type=Path, required=True, help="a folder made by prepare_dataset.py")
    what.add_argument("--split", choices=SPLITS, default="test", help="whose questions are asked")
    what.add_argument("--task", choices=TASKS, default="all", help="all questions, the combined report, or one question")
    what.add_argument("--prompt", default="default", choices=sorted(REPORT_PROMPTS), help="name of the prompt variant")
    what.add_argument("--max-images", type=int, metavar="N", help="ask about N images only, drawn across categories")
    what.add_argument("--blind", action=flag, default=True, help="ask again with a grey image, once a prompt and image size")
    what.add_argument("--max-new-tokens", type=int, default=128, help=f"an answer's limit; a report has {REPORT_LENGTH} times it")
    what.add_argument("--min-pixels", type=int, help="lower bound of an image's pixels (unset: as trained)")
    what.add_argument("--max-pixels", type=int, help="upper bound of an image's pixels (unset: as trained)")
    how = parser.add_argument_group("scores and files")
    add_scoring_flags(how)
    how.add_argument("--base", type=Path, metavar="DIR", help="evaluation of the run's base (unset: where this script writes it)")
    how.add_argument("--out", type=Path, help="folder for all results (unset: outputs/<run>/eval-<split>)")
    how.add_argument("--fresh", action="store_true", help="throw away what --out holds and ask everything anew")
    args = parser.parse_args(argv)
    check(args)
    return args


def add_scoring_flags(group) -> None:
    group.add_argument("--resamples", type=int, default=1000, help="bootstrap resamples of groups for intervals; 0: none")
    group.add_argument("--seed", type=int, default=42, help="of the resamples and of the draw of --max-images")
    group.add_argument("--gallery", type=int, default=200, help="most answers with their images in report.html")
    group.add_argument("--strict", action="store_true", help="exit 1 if there is any serious finding")


def check(args: argparse.Namespace) -> None:
    """Every problem with the arguments at once, before anything is loaded."""
    positive = ("in_flight", "batch_images", "max_new_tokens", "max_images", "min_pixels", "max_pixels")
    wrong = [n for n in positive if getattr(args, n) is not None and getattr(args, n) < 1]
    problems = [f"--{n.replace('_', '-')} must be at least 1; it is {getattr(args, n)}" for n in wrong]
    if args.resamples < 0:
        problems.append(f"--resamples must be 0 or more; it is {args.resamples}")
    if bool(args.run) == bool(args.endpoint):
        problems.append("nobody, or two, to answer; name either RUN_OR_MODEL or --endpoint URL")
    if args.model and not args.endpoint:
        problems.append(f"--model names a model at an endpoint; {args.model!r} has no --endpoint; a local one comes first, bare")
    if args.adapter and not (args.run and (Path(args.run) / "adapter").is_dir()):
        problems.append(f"--adapter needs a run with an adapter/ folder; {args.run} has none; leave --adapter out, or train one")
    cli.check(problems)


def output_folder(args: argparse.Namespace) -> Path:
    name = args.run or args.model or re.sub(r"^https?://", "", args.endpoint)
    slug = re.sub(r"[^\w.-]+", "-", Path(name).name if args.run else name).strip("-")
    kind = (
        f"eval-{args.split}"
        + ("" if args.task == "all" else f"-{args.task}")
        + ("-adapter" if args.adapter else "-endpoint" if args.endpoint else "")
    )
    root = Path(args.run) if args.run and (Path(args.run) / "run.json").exists() else Path("outputs") / slug
    return args.out or root / kind


def model_of(args: argparse.Namespace) -> tuple[str, Path | None]:
    """The weights to load and the adapter to put on them."""
    folder = Path(args.run)
    if not (folder / "run.json").exists():
        return args.run, None
    if args.adapter:
        return files.read_json(folder / "adapter" / "adapter_config.json")["base_model_name_or_path"], folder / "adapter"
    if not (folder / "merged").is_dir():
        raise UserError(f"{folder} has no merged/ weights; use --adapter, or train.py with --merge")
    return str(folder / "merged"), None


def settings_of(args: argparse.Namespace, about: dict) -> dict:
    """Everything that changes an answer: predictions made under other settings are never mixed with these."""
    who = {"endpoint": args.endpoint, "model": args.model}
    if not args.endpoint:
        who = {"model": args.run, "weights": identity(args), "bits": args.bits}
    return who | {
        "adapter": args.adapter, "data": about["fingerprint"], "split": args.split, "prompt": args.prompt,
        "max_new_tokens": args.max_new_tokens, "min_pixels": args.min_pixels, "max_pixels": args.max_pixels,
    }  # fmt: skip


def identity(args: argparse.Namespace) -> str | None:
    """Tells a run trained anew under the same name: a hash over the weight files' names, sizes and times."""
    folder = Path(model_of(args)[1] or model_of(args)[0])
    found = sorted(folder.glob("*.safetensors"))
    return files.sha256(*(f"{p.name} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in found))[:16] if found else None


def open_engine(args: argparse.Namespace):
    """The engine that answers, loaded now."""
    if args.endpoint:
        from sonovqa.endpoint import Endpoint

        endpoint = Endpoint(args.endpoint, args.model, args.in_flight)
        endpoint.check()
        return endpoint
    from sonovqa.generation import LocalEngine
    from sonovqa.models import load_for_inference

    name, adapter = model_of(args)
    return LocalEngine(*load_for_inference(name, args.bits, adapter, (args.min_pixels, args.max_pixels)), args.batch_images)


def ask_all(args: argparse.Namespace, out: Path, raw, items: list) -> tuple[dict, dict | None]:
    """Ask what has no answer yet, the images' questions and then the grey ones; gives the rows of both by key."""
    sizes = asking.image_sizes(raw, sorted({item.row for item in items}))
    plans = [("predictions.jsonl", {item.key: (item, sizes[item.row]) for item in items}, False)]
    if args.blind:
        plans.append(("blind.jsonl", asking.blind_items(items, sizes), True))
    limit = args.max_new_tokens * (REPORT_LENGTH if args.task == REPORT_ID else 1)
    todo = {name: _unanswered(out / name, asked) for name, asked, _ in plans}
    if any(todo.values()):
        started = time.perf_counter()
        engine = open_engine(args)
        loaded = time.perf_counter() - started
        for name, asked, blind in plans:
            open_asked = {key: asked[key] for key in todo[name]}
            if blind:
                requests = asking.blind_requests(open_asked, asking.mean_grey(raw))
            else:
                requests = asking.requests(raw, [item for item, _ in open_asked.values()])
            asking.ask(engine, requests, open_asked, out / name, limit, blind, loaded)
    rows = {name: predictions.latest(predictions.read(out / name)) for name, _, _ in plans}
    answered = {key: rows["predictions.jsonl"][key] for key in plans[0][1]}
    return answered, rows.get("blind.jsonl")


def _unanswered(path: Path, asked: dict) -> list:
    done = predictions.latest(predictions.read(path))
    return [key for key in asked if key not in done or done[key]["error"] is not None]


def evaluate(argv: list[str]) -> int:
    args = parse(argv)
    started = time.perf_counter()
    if args.endpoint and args.model is None:
        args.model = open_engine(args).model
    splits = dataset.load_undecoded(args.data)
    about = files.read_json(args.data / "dataset.json")
    raw = splits[args.split] if args.max_images is None else dataset.subset(splits[args.split], args.max_images, args.seed)
    items = asking.items_of(raw, args.task, args.prompt)
    if not items:
        asked = f"--task {args.task} on the {args.split} split of {args.data}"
        raise UserError(f"nothing to ask; {asked}; answered questions are needed; choose another --task or --split")
    out = output_folder(args)
    predictions.claim(out, settings_of(args, about), args.fresh)
    rows, blind = ask_all(args, out, raw, items)
    train = asking.items_of(splits["train"], args.task, args.prompt)
    baselines = replace(scoring.without_blind(train, items), blind=blind)
    scores = scoring.score(list(rows.values()), baselines, args.resamples, args.seed)
    scores |= {
        "speed": asking.speed(out), "wall_seconds": round(time.perf_counter() - started, 3),
        "data": {"path": str(args.data), "fingerprint": about["fingerprint"], "split": args.split, "images": len(raw)},
    }  # fmt: skip
    found = [*findings.find(scores, list(rows.values())), *known_of(args, about, raw, rows)]
    return finish(args, out, scores, found, list(rows.values()), raw)


def known_of(args: argparse.Namespace, about: dict, raw, rows: dict) -> list[findings.Finding]:
    """What the data set's and the run's own records say against these scores."""
    found = [*provenance.leaks_of_data(about, args.split)]
    run = records.read_run(Path(args.run)) if args.run else None
    if run is not None:
        found += provenance.seen_in_training(run, about, args.split, raw)
        found += provenance.unlike_training(run, args.prompt, args.task, (args.min_pixels, args.max_pixels))
        base = args.base or output_folder(
            argparse.Namespace(**vars(args) | {"run": run["arguments"]["model"], "out": None, "adapter": False})
        )
        if args.base or comparing.same_questions(base, settings_of(args, about)):
            found += provenance.below_base(rows, comparing.load(base, args.split), str(base), args.resamples, args.seed)
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
    joined = elsewhere.join(rows, items)
    elsewhere.list_unmatched(joined, console)
    scores = scoring.score(joined.rows, scoring.without_blind(train, items), args.resamples, args.seed)
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
    if args.out:
        comparing.write(args.out, [str(run) for run in args.runs], made)
    return 0


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    commands = {"score": score, "compare": compare}
    return commands[argv[0]](argv[1:]) if argv and argv[0] in commands else evaluate(argv)


if __name__ == "__main__":
    cli.run(main)
