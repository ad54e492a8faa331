"""The tables of experiments.md, made from committed records; nothing in them is typed by hand.

    python -m sonovqa.tables                                       # write every table between its markers
    python -m sonovqa.tables --check                               # exit 1 if one is not what the records say
    python -m sonovqa.tables --add outputs/demo                    # copy a finished run's record to outputs/records/ first
    python -m sonovqa.tables --add outputs/tiny-0 --experiment 0   # as one of experiment 0's, with its scores
    python -m sonovqa.tables --add outputs/bench/load-cpu.json --experiment load   # a benchmark's record

A table stands between ``<!-- table: NAME | score | score -->`` and ``<!-- end of table -->``. NAME is an experiment, whose
runs are shown with the scores named (`sonovqa.experiments_table.figure_of`; ``speed`` stands for that of answering), its
comparisons, prompts and robustness below; or
``spine`` (runs of no experiment), ``bench`` (records of `sonovqa.bench`, outputs/records/bench-*.json) or ``families``
(`sonovqa.families_table`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sonovqa import cli, experiments_records, experiments_table, families_table, files, records
from sonovqa.cli import UserError, console
from sonovqa.experiments_blocks import Command

ROOT = Path(__file__).resolve().parents[1]
PAGE, RECORDS = ROOT / "experiments.md", ROOT / "outputs" / "records"
LARGEST = experiments_records.LARGEST
_MARKED = re.compile(r"(<!-- table: ([^>]*?) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)
COLUMNS = (
    "run",
    "model",
    "data",
    "device",
    "answers/s",
    "peak memory",
    "time",
    "loss",
    "merge check",
    "commit",
    "date",
    "record",
)  # fmt: skip


#: What tells the kinds of records apart, runs apart from which none has it.
_KINDS = {"benchmark": "bench", "curves": "robustness", "prompts": "prompts", "differences": "differences"}


def kind_of(record: Mapping) -> str:
    """``run``, ``bench``, ``robustness``, ``prompts`` or ``differences``."""
    return next((kind for key, kind in _KINDS.items() if key in record), "run")


def row(name: str, run: Mapping) -> list[str]:
    """A run of no experiment as a line of the table, in the order of `COLUMNS`."""
    made, check, given = run["training"], run.get("merge_check"), run["arguments"]
    what = f"{given['model']} ({run['weights']})" if run.get("weights") else str(given["model"])
    checked = f"{check['top_agreement']:.2%} of {check['positions']}, KL {check['mean_kl']:.1e}" if check else "not merged"
    return [
        run["run"],
        f"{what}, {given['bits']} bits, {run['backend']}",
        f"{given['data']} `{str(run['data'])[:8]}`",
        run["device"]["name"],
        f"{made['answers_per_second']:.1f}",
        records.gigabytes(made["peak_memory_bytes"]),
        records.duration(made["seconds"]),
        f"{made['loss']:.3f}",
        checked,
        str(run["commit"])[:8] + (" (dirty)" if run["dirty"] else ""),
        run["finished"][:10],
        f"[{name}](outputs/records/{name})",
    ]


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells, the head first, as a Markdown table. Vertical bars inside a cell are escaped."""
    head, *rest = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rest))


def table(folder: Path) -> dict[str, dict[str, dict]]:
    """The records under ``folder`` by the table they belong to, there by file name; what `rewritten` takes."""
    made: dict[str, dict[str, dict]] = {}
    for path in sorted(folder.glob("*.json")):
        record = files.read_json(path)
        for name in record.get("experiments") or ["bench" if kind_of(record) == "bench" else "spine"]:
            made.setdefault(name, {})[path.name] = record
    return made


def text_of(heading: str, found: Mapping[str, Mapping]) -> str:
    """The text between a pair of markers.

    Args:
        heading: of the marker: ``3 | Q7 | Q7 AUROC``.
        found: the records that belong there, by file name.
    """
    name, *specs = (part.strip() for part in heading.split("|"))
    if name == "families":
        return markdown(families_table.rows())
    runs = {path: record for path, record in found.items() if kind_of(record) == "run"}
    parts = []
    if runs and name == "spine":
        parts.append(markdown([COLUMNS, *(row(path, record) for path, record in runs.items())]))
    elif runs:
        parts.append(markdown(experiments_table.rows(runs, specs)))
    parts += [f"{_source(path, one)}:\n\n{_body(one)}" for path, one in found.items() if path not in runs]
    return "\n\n".join(parts) or "Not run yet."


def _body(record: Mapping) -> str:
    """The table of a record that is no run."""
    from sonovqa import bench_answer_table, bench_load, bench_records, bench_train, memory_plan, robustness_report

    kind, found = kind_of(record), record.get("rows", [])
    if kind == "robustness":
        return robustness_report.markdown(record).strip()
    if kind in ("prompts", "differences"):
        return markdown((experiments_table.prompts if kind == "prompts" else experiments_table.differences)(record))
    commands = "```bash\n" + "\n".join(record["commands"]) + "\n```"
    if record["benchmark"] == "train":
        return f"{commands}\n\n{bench_train.markdown(record).strip()}"
    if record["benchmark"] == "answer":
        found = bench_answer_table.ordered(found)
    columns = {"answer": (bench_answer_table.SPEED, bench_answer_table.ROOM), "load": (bench_load.COLUMNS,),
               "plan": (memory_plan.COLUMNS,)}[record["benchmark"]]  # fmt: skip
    return "\n\n".join([commands, *(bench_records.markdown(found, one).strip() for one in columns)])


def _source(path: str, record: Mapping) -> str:
    """Where a record lies, of what device and date it is, and the command that made it."""
    parts = [f"[{path}](outputs/records/{path})", record.get("weights"), record.get("device", {}).get("name"), record.get("run")]
    if "prompts" in record and (data := record.get("data")):
        parts.append(f"{Path(data['path']).name} `{data['fingerprint'][:8]}`, {data['split']}: {data['images']} images of "
                     f"{data['groups']} groups")  # fmt: skip
    parts += [(record.get("finished") or record.get("updated") or "")[:10]]
    if record.get("commit"):
        parts.append(f"commit {record['commit'][:8]}{' (dirty)' if record.get('dirty') else ''}")
    return ", ".join(part for part in [*parts, f"`{record['command']}`" if record.get("command") else None] if part)


def rewritten(text: str, found: Mapping[str, Mapping[str, Mapping]]) -> str:
    """``text`` with the part between each pair of markers made anew from the records of `table`.

    Raises:
        UserError: if a table stands there twice, lacks its end, or records have no table to stand in.
    """
    names = [heading.split("|")[0].strip() for _, heading, _, _ in _MARKED.findall(text)]
    opened, ended = text.count("<!-- table: "), text.count("<!-- end of table -->")
    if len(set(names)) != len(names) or not len(names) == opened == ended:
        told = f"{opened} begin, {ended} end, named {', '.join(names)}"
        raise UserError(f"the tables' markers in experiments.md; {told}; a pair a name is needed; mend them")
    homeless = sorted(set(found) - set(names))
    if homeless:
        path = next(iter(found[homeless[0]]))
        raise UserError(f"{path} belongs to table {homeless[0]}; experiments.md has {', '.join(names)}; add its markers there")
    return _MARKED.sub(lambda m: f"{m[1]}{text_of(m[2], found.get(m[2].split('|')[0].strip(), {}))}\n{m[4]}", text)


def write() -> None:
    """Write the tables into the page. Raises `UserError` as `rewritten` does."""
    files.write_text(PAGE, rewritten(PAGE.read_text(encoding="utf-8"), table(RECORDS)))


def runs_of(commands: Sequence[Command]) -> dict[Path, str]:
    """The finished runs that a block's commands train, each with its command."""
    return {one.run: one.text for one in commands if one.run and records.read_run(one.run) is not None}


def keep(name: str, commands: Sequence[Command]) -> int:
    """Put an experiment's finished runs, comparisons and other records under outputs/records/ and the tables into the page."""
    for run, text in runs_of(commands).items():
        experiments_records.write(RECORDS / f"{run.name}.json", experiments_records.record_of(run), name, text)
    for command in commands:
        for path, record in _made_beside(command):
            experiments_records.write(RECORDS / path, record, name, command.text)
    write()
    console.print(f"{RECORDS.relative_to(ROOT)}/ and {PAGE.name} are written", soft_wrap=True)
    return 0


def _made_beside(command: Command) -> Iterator[tuple[str, dict]]:
    """What a command that trains nothing has left to keep: the record's file name and content."""
    out = Path(command.value("--out", "--record") or "")
    if command.words[:2] == ("evaluate.py", "prompts"):
        split = command.value("--split") or "test"
        for path in sorted(Path(command.words[2]).glob(f"eval-{split}*-prompts/prompts.json")):
            yield f"prompts-{Path(command.words[2]).name}.json", experiments_records.prompts_of(files.read_json(path))
    elif out.suffix == ".json" and out.exists():
        record = files.read_json(out)
        if "comparisons" in record:
            yield out.name, experiments_records.comparison_of(record)
        elif kind_of(record) == "robustness":
            yield out.name, experiments_records.robustness_of(record)
        elif kind_of(record) == "bench":
            yield f"bench-{out.name}", record


def bench_record(path: Path) -> dict:
    """A record of `sonovqa.bench`. Raises `UserError` if the file holds none."""
    record = files.read_json(path) if path.is_file() else {}
    if kind_of(record) != "bench":
        raise UserError(
            f"--add {path}; no record of a benchmark there; one that python -m sonovqa.bench wrote is needed; mend it"
        )
    return record


def show(name: str, commands: Sequence[Command]) -> None:
    """Print the results table of an experiment from the runs as they are, with the scores that its marker names."""
    headings = {heading.split("|")[0].strip(): heading for _, heading, _, _ in _MARKED.findall(PAGE.read_text(encoding="utf-8"))}
    found = {run.name: experiments_records.record_of(run) for run in runs_of(commands)}
    if not found or name not in headings:
        return
    head, *lines = experiments_table.rows(found, [part.strip() for part in headings[name].split("|")[1:]])
    costs = ("seeds", "trained", "trained answers/s", "time", "peak memory")
    scores = range(3, head.index("seeds"))
    made = Table("run", "score", "value", *costs, box=box.SIMPLE_HEAD, pad_edge=False)
    for cells in lines:
        told = [cells[0], *(cells[head.index(cost)] for cost in costs)]
        for at in scores or (None,):  # a line a score: a terminal is narrow
            score = ("", "") if at is None else (head[at].replace(" [95 %]", ""), escape(cells[at]))
            made.add_row(told[0], *score, *told[1:])
            told = [""] * len(told)
    (console if console.is_terminal else Console(file=console.file, width=160, highlight=False)).print(made)
    console.print(f"kept with: python -m sonovqa.experiments {name} --records", soft_wrap=True)


def main(argv: list[str] | None = None) -> int:
    """Add records, then write or check the tables."""
    parser = cli.Parser(description=__doc__, prog="python -m sonovqa.tables")
    parser.add_argument("--add", type=Path, action="append", default=[], metavar="RUN", help="a run's folder, a bench record")
    parser.add_argument("--weights", help="with --add: what the weights were, such as 'random weights of the real architecture'")
    parser.add_argument("--experiment", metavar="N", help="with --add: whose runs they are (unset: none's)")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the table is out of date")
    args = parser.parse_args(argv)
    for run in args.add:
        if run.suffix == ".json":
            experiments_records.write(RECORDS / f"bench-{run.name}", bench_record(run), args.experiment)
            continue
        made = experiments_records.record_of(run, args.weights)
        experiments_records.write(RECORDS / f"{made['run']}.json", made, args.experiment)
    text = PAGE.read_text(encoding="utf-8")
    if args.check:
        same = rewritten(text, table(RECORDS)) == text
        console.print(
            "experiments.md is what the records say" if same else "experiments.md is out of date: python -m sonovqa.tables"
        )
        return int(not same)
    write()
    return 0


if __name__ == "__main__":
    cli.run(main)
