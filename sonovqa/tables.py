"""The results table of experiments.md, made from committed run records; nothing in it is typed by hand.

python -m sonovqa.tables                          # write the table between its markers
python -m sonovqa.tables --check                  # exit 1 if it is not what the records say
python -m sonovqa.tables --add outputs/demo       # copy a finished run's record to outputs/records/ first
"""

from __future__ import annotations

import json
from pathlib import Path

from sonovqa import cli, files, records
from sonovqa.cli import UserError, console

START, END = "<!-- table: python -m sonovqa.tables -->", "<!-- end of table -->"
ROOT = Path(__file__).resolve().parents[1]
LARGEST = 20_000  # bytes of a committed record
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
)


def slim(run: dict) -> dict:
    """A run record without what only the machine it ran on needs: rows of the merge check and live tokens; a thinner curve.

    Raises:
        UserError: if it is still larger than `LARGEST` bytes.
    """
    made = {key: value for key, value in run.items() if key not in ("check_items", "live")}
    curve = made["training"]["curve"]
    made["training"] = made["training"] | {"curve": curve[:: -(-len(curve) // 20) or 1]}
    made["arguments"] = {key: value for key, value in made["arguments"].items() if key not in ("outputs",)}
    for name in ("data", "model"):
        made["arguments"][name] = (
            Path(str(made["arguments"][name])).name if str(made["arguments"][name]).startswith("/") else made["arguments"][name]
        )
    made["base"] = Path(made["base"]).name if made["base"].startswith("/") else made["base"]
    size = len(json.dumps(made, indent=2, ensure_ascii=False).encode())
    if size > LARGEST:
        raise UserError(f"the record of {run['run']}; {size} bytes; at most {LARGEST} are kept in the repository; log less often")
    return made


def row(name: str, run: dict) -> list[str]:
    """One line of the table, in the order of `COLUMNS`."""
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


def table(folder: Path) -> str:
    """The Markdown table of all records under ``folder``, by name."""
    found = sorted(folder.glob("*.json"))
    rows = [row(path.name, files.read_json(path)) for path in found]
    lines = ["| " + " | ".join(cells) + " |" for cells in (COLUMNS, ["---"] * len(COLUMNS), *rows)]
    return "\n".join(lines)


def rewritten(text: str, made: str) -> str:
    """``text`` with the part between the markers replaced. Raises `UserError` if the markers are not there once, in order."""
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise UserError(
            f"experiments.md lacks its markers; {START} and {END} must stand there once, in this order; put them back"
        )
    return text[: text.index(START) + len(START)] + f"\n{made}\n" + text[text.index(END) :]


def main(argv: list[str] | None = None) -> int:
    """Add records, then write or check the table."""
    parser = cli.Parser(description=__doc__, prog="python -m sonovqa.tables")
    parser.add_argument("--add", type=Path, action="append", default=[], metavar="RUN", help="a finished run's folder")
    parser.add_argument("--weights", help="with --add: what the weights were, such as 'random weights of the real architecture'")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the table is out of date")
    args = parser.parse_args(argv)
    folder, page = ROOT / "outputs" / "records", ROOT / "experiments.md"
    for run_folder in args.add:
        run = records.read_run(run_folder)
        if run is None:
            raise UserError(
                f"--add {run_folder}; no run.json there, so the run is not finished; "
                "a finished run's folder is allowed; train it first"
            )
        files.write_json(folder / f"{run['run']}.json", slim(run | ({"weights": args.weights} if args.weights else {})))
    text = page.read_text(encoding="utf-8")
    new = rewritten(text, table(folder))
    if args.check:
        console.print(
            "experiments.md is what the records say" if new == text else "experiments.md is out of date: python -m sonovqa.tables"
        )
        return int(new != text)
    files.write_text(page, new)
    return 0


if __name__ == "__main__":
    cli.run(main)
