"""Turn a sheet and folders of images (or a public set, or drawn phantoms) into a data set that train.py reads.

    python prepare_dataset.py sheet annotations.xlsx --images images/ --group-column Patient
    python prepare_dataset.py sheet *_image_list.xlsx --images images/ --group-regex '(P[0-9]+)_' --out data/clinic
    python prepare_dataset.py phantoms --images 2000
    python prepare_dataset.py vqa-rad --root "VQA-RAD/" --split grouped
    python prepare_dataset.py hc18 --root HC18/ --no-context
    python prepare_dataset.py path-vqa --root path-vqa/          # likewise pubmedvision, medpix
    python prepare_dataset.py documents --forms 400 --root mtsamples/
    python prepare_dataset.py csv-text notes.csv --text-column note --label-column urgent      # for train.py --head choice
    python prepare_dataset.py phantoms --images 200 --export-chat chat/train.jsonl --task report

Writes a Hugging Face DatasetDict (train, validation, test; one row an image with all its questions) and dataset.json, and
prints what is in it and what was left out, and why. An interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from sonovqa import cli, csv_text, dataset, images, prompt_variants, public_sets, sources
from sonovqa.cli import console
from sonovqa.duplicates import NEAR
from sonovqa.questions import TASKS
from sonovqa.rows import Row, make_row, split_rows, summary
from sonovqa.splits import SPLITS, subset_order

SHOWN = 3  # dropped items named in the terminal; dataset.json names all


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    with dataset.claimed(args.out) as journal:
        dataset.check_source(args.out, args.source, source_files(args))
        loaded = load(args)
        rows = check_rows(args, loaded, journal)
        split_rows(rows, args.ratios, args.seed, args.near_duplicates, loaded.drops)
        about = summary(rows, loaded.about, arguments(args), loaded.drops, loaded.notes)
        with progress("writing", len(rows)) as advance:
            dataset.store(args.out, rows, about, advance)
        journal.unlink(missing_ok=True)
    report(about)
    if args.export_chat:
        export(args, len(rows))
    console.print(f"data set: {args.out}")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog="prepare_dataset.py", description=__doc__)
    subparsers = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    add_sheet(subparsers)
    add_phantoms(subparsers)
    add_public_sets(subparsers)
    csv_text.add(subparsers, source_parser)
    args = parser.parse_args(argv)
    cli.check(problems(args))
    prompt_variants.check(args.prompts, args.task)
    return args


def add_sheet(subparsers) -> None:
    sheet = source_parser(subparsers, "sheet", "annotation sheets (.xlsx, .csv) beside folders of images")
    sheet.add_argument("workbooks", nargs="+", type=Path, metavar="WORKBOOK", help="one workbook, or one a category")
    sheet.add_argument("--images", type=Path, required=True, metavar="ROOT", help="folder with one folder of images a category")
    patient = sheet.add_mutually_exclusive_group()
    patient.add_argument("--group-column", metavar="NAME", help="column that names the patient")
    patient.add_argument("--group-regex", metavar="RE", help="pattern in the file name; its first group names the patient")


def add_phantoms(subparsers) -> None:
    phantoms = source_parser(subparsers, "phantoms", "synthetic ultrasound, drawn together with its sheet")
    phantoms.add_argument("--images", type=int, required=True, metavar="N", help="images to draw")
    phantoms.add_argument("--abnormal-rate", type=float, default=0.05, help="share of abnormal images, 0 to 1")
    phantoms.add_argument("--images-per-patient", type=int, default=4, help="images of one patient, on average")
    phantoms.add_argument("--size", type=size, default=(800, 600), metavar="WxH", help="pixels of an image")


def add_public_sets(subparsers) -> None:
    rad = source_parser(subparsers, "vqa-rad", "VQA-RAD: radiology questions (Lau et al., 2018)")
    rad.add_argument(
        "--root", type=Path, help="original release, or Parquet files of the hub's copy; unset: fetched from the hub"
    )
    rad.add_argument("--split", choices=("grouped", "official"), default="grouped", help="by image, or the makers', which leaks")
    heads = source_parser(subparsers, "hc18", "HC18: fetal heads with their circumference (van den Heuvel et al., 2018)")
    heads.add_argument("--root", type=Path, required=True, help="folder with training_set/ and its CSV file")
    heads.add_argument(
        "--context", action=argparse.BooleanOptionalAction, default=True, help="carry the pixel size in mm with each image"
    )
    public_sets.add(subparsers, source_parser)


def source_parser(subparsers, name: str, text: str) -> argparse.ArgumentParser:
    """A subparser with the flags that all sources share."""
    parser = subparsers.add_parser(name, help=text, description=text)
    shared = parser.add_argument_group("for every source")
    shared.add_argument(
        "--out", type=Path, default=Path("data") / name, metavar="DIR", help="the data set; one of the same source is replaced"
    )
    shared.add_argument("--ratios", type=ratios, default="70/15/15", metavar="T/V/T", help="train/validation/test shares")
    shared.add_argument("--seed", type=int, default=42, help="of splits, subsets and phantoms")
    shared.add_argument("--max-images", type=int, metavar="N", help="keep N images, drawn across the categories")
    shared.add_argument("--raw-answers", action="store_true", help="leave the answers as they were written")
    shared.add_argument(
        "--near-duplicates",
        type=int,
        default=NEAR,
        metavar="BITS",
        help="bits of 256 by which the hashes of near-duplicates may differ",
    )
    shared.add_argument("--workers", type=int, default=0, help="processes that check images; 0: one a core")
    shared.add_argument("--export-chat", type=Path, metavar="FILE.jsonl", help="also write a chat-formatted SFT set")
    shared.add_argument("--task", choices=TASKS, default="all", help="what --export-chat asks")
    shared.add_argument(
        "--prompts", default="default", metavar="NAME", help="its prompt variant, or one a question: Q7=simple,Q2=short"
    )
    return parser


def ratios(text: str) -> tuple[float, ...]:
    """``70/15/15`` as shares that add up to 1."""
    try:
        shares = tuple(float(part) for part in text.split("/"))
    except ValueError:
        shares = ()
    if len(shares) != len(SPLITS) or not all(0 < share < float("inf") for share in shares):
        raise argparse.ArgumentTypeError(f"{text} is not three numbers above 0 such as 70/15/15")
    return tuple(share / sum(shares) for share in shares)


def size(text: str) -> tuple[int, int]:
    """``800x600`` as (width, height)."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and min(int(width), int(height)) >= images.SMALLEST_SIDE):
        raise argparse.ArgumentTypeError(f"{text} is not a size in pixels such as 800x600")
    return int(width), int(height)


def problems(args: argparse.Namespace) -> list[str]:
    """Everything wrong with the arguments that the parser alone cannot see."""
    found = [
        f"a path is not valid UTF-8; {str(path).encode(errors='replace').decode()}; a name that JSON can hold; rename it"
        for value in vars(args).values()
        for path in (value if isinstance(value, list) else [value])
        if isinstance(path, Path) and any(0xD800 <= ord(letter) < 0xE000 for letter in str(path))
    ]
    if args.max_images is not None and args.max_images < len(SPLITS):
        found.append(f"--max-images is too small; {args.max_images}; {len(SPLITS)} or more; raise it")
    if not 0 <= args.near_duplicates <= 128:
        found.append(f"--near-duplicates is out of range; {args.near_duplicates}; 0 to 128 of 256 bits; mend it")
    if args.workers < 0:
        found.append(f"--workers is out of range; {args.workers}; 0 (one a core) or more; mend it")
    if args.export_chat and args.export_chat.suffix != ".jsonl":
        found.append(f"--export-chat is no .jsonl file; {args.export_chat}; a name such as chat/train.jsonl; mend it")
    if args.prompts != prompt_variants.DEFAULT and not args.export_chat:
        found.append(f"--prompts is for --export-chat only; {args.prompts}; a stored set has no prompts; give it to train.py")
    if args.export_chat and args.source == csv_text.SOURCE:
        found.append(f"--export-chat is of images; {args.source} has none; leave it out")
    if args.source == "phantoms" and args.images < len(SPLITS):
        found.append(f"--images is too small; {args.images}; {len(SPLITS)} or more; raise it")
    if args.source == "phantoms" and not 0 <= args.abnormal_rate <= 1:
        found.append(f"--abnormal-rate is out of range; {args.abnormal_rate}; 0 to 1; mend it")
    if args.source == "phantoms" and args.images_per_patient < 1:
        found.append(f"--images-per-patient is out of range; {args.images_per_patient}; 1 or more; mend it")
    return found


def load(args: argparse.Namespace) -> sources.Loaded:
    """Read the source that was asked for; what it has to write goes beside the data set, into ``<out>-source/``."""
    beside = args.out.with_name(f"{args.out.name}-source")
    if args.source == "sheet":
        return sources.sheet(args.workbooks, args.images, args.group_column, args.group_regex)
    if args.source == "hc18":
        return sources.hc18(args.root, args.context)
    if args.source == csv_text.SOURCE:
        return csv_text.load(args)
    if args.source in public_sets.LOADERS:
        return public_sets.LOADERS[args.source](args, beside)
    if args.source == "vqa-rad":
        from sonovqa.vqa_rad import vqa_rad

        return vqa_rad(args.root, beside, args.split == "official")
    return sources.phantoms(
        beside,
        images=args.images,
        seed=args.seed,
        abnormal_rate=args.abnormal_rate,
        size=args.size,
        images_per_patient=args.images_per_patient,
        workers=args.workers,
    )


def source_files(args: argparse.Namespace) -> list[Path]:
    """What tells one source from another of its kind; nothing where the kind alone does."""
    if args.source == "sheet":
        return [*args.workbooks, args.images]
    return args.tables if args.source == csv_text.SOURCE else []


def arguments(args: argparse.Namespace) -> dict:
    """The arguments that decide what the data set holds, as JSON can write them."""
    left_out = ("out", "workers", "export_chat", "task", "prompts")
    return {
        key: [str(v) for v in value] if isinstance(value, list) else str(value) if isinstance(value, Path) else value
        for key, value in sorted(vars(args).items())
        if key not in left_out
    }


def check_rows(args: argparse.Namespace, loaded: sources.Loaded, journal: Path) -> list[Row]:
    """Decode every image once and keep the good ones: all, or as many as ``--max-images`` asks, in the order drawn."""
    candidates = [make_row(record, images.Checked(), args.raw_answers) for record in loaded.records]
    wanted = min(args.max_images or len(candidates), len(candidates))
    if wanted < len(candidates):
        ids = [f"{row.record.image_id} {row.record.split}" for row in candidates]
        order = subset_order(ids, [row.stratum for row in candidates], args.seed)
        candidates = [candidates[index] for index in order]
    kept, start = [], 0
    with progress("checking images", wanted) as advance:
        while start < len(candidates) and len(kept) < wanted:
            batch = candidates[start : start + wanted - len(kept)]
            start += len(batch)
            if args.source == csv_text.SOURCE:
                found = [csv_text.checked(row.record) for row in batch]
            else:
                found = images.check_images([row.record.path for row in batch], journal, args.workers, advance)
            for row, checked in zip(batch, found, strict=True):
                row.checked = checked
                if checked.problem:
                    loaded.drops.setdefault(checked.problem, []).append(row.record.image_id)
                else:
                    kept.append(row)
    if not kept:
        loaded.records = []
        sources.need_records(loaded, "every image was left out")
    return kept


@contextlib.contextmanager
def progress(what: str, total: int):
    """A bar with time left; yields the function that moves it on."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=cli.stderr, transient=True, disable=not cli.stderr.is_terminal) as bars:
        bar = bars.add_task(what, total=total)
        yield lambda count: bars.advance(bar, count)


def report(about: dict) -> None:
    """Print what is in the data set, what was dropped and why, and how far normalisation reduced the answers."""
    counts = Table("split", title="data set")
    rows = "texts" if about["source"]["kind"] == csv_text.SOURCE else "images"
    for name in (rows, "groups", "questions", "distinct answers"):
        counts.add_column(name, justify="right")
    for name, split in about["splits"].items():
        counts.add_row(name, *(str(split[key]) for key in ("images", "groups", "questions", "distinct_answers")))
    console.print(counts)
    wording = Table("distinct answers", title="before and after normalisation")
    for key in about["answers"]:
        wording.add_column(key, justify="right")
    for when in ("before", "after"):
        wording.add_row(when, *(str(count[when]) for count in about["answers"].values()))
    console.print(wording)
    if about["dropped"]:
        dropped = Table("left out or changed", title="dropped, and why")
        dropped.add_column("count", justify="right")
        dropped.add_column("such as", overflow="fold")
        for reason, items in about["dropped"].items():
            dropped.add_row(Text(reason), str(len(items)), Text("\n".join(items[:SHOWN])))  # Text: names may hold markup
        console.print(dropped)
    for note in about["notes"]:
        console.print(f"note: {note}", markup=False)


def export(args: argparse.Namespace, count: int) -> None:
    """Write the chat-formatted set and say where it is."""
    from sonovqa.export import export_chat

    with progress("exporting", count) as advance:
        lines = export_chat(dataset.load(args.out), args.export_chat, args.task, args.prompts, advance)
    console.print(f"chat set: {args.export_chat} ({', '.join(f'{split} {count}' for split, count in lines.items())} lines)")


if __name__ == "__main__":
    cli.run(main)
