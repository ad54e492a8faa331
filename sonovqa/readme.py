"""The tables of README.md, made from the records under outputs/records/; no figure in them is typed by hand.

    python -m sonovqa.readme            # write them between their markers
    python -m sonovqa.readme --check    # exit 1 if they are not what the records say

A table stands between ``<!-- records: NAME -->`` and ``<!-- end of records -->``; NAME is ``shared`` (training with a shared
image against one sequence a question) or ``memory`` (peak memory by model, bits, image and batch).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from sonovqa import bench_steps, cli, files, records, tables
from sonovqa.cli import UserError, console

PAGE = tables.ROOT / "README.md"
_MARKED = re.compile(r"(<!-- records: (\w+) -->\n)(.*?)(<!-- end of records -->)", re.DOTALL)
PAIRS = 128  # QA pairs a step at which ways are compared, as in the rows of whole trainings
GPU_BACKEND = "unsloth"


def rows_of(folder: Path) -> Iterator[dict]:
    """Rows of training benchmarks of all layers on a GPU, each with ``bits``, ``device`` and what the weights were."""
    for path in sorted(folder.glob("bench-*.json")):
        record = files.read_json(path)
        if record.get("benchmark") == "train":
            about = {"bits": record["settings"]["bits"], "device": record["device"]["name"], "weights": record.get("weights")}
            about |= {"record": path.name, "started": record.get("started", "")}
            found = (row for row in record["rows"] if row.get("layers", bench_steps.ALL) == bench_steps.ALL)
            yield from (row | about | {"model": _model(row)} for row in found if row.get("backend") == GPU_BACKEND)


def _model(row: Mapping) -> str:
    size = re.fullmatch(r"(?:qwen3-vl-)?(\d+B)", str(row["model"]))
    return f"Qwen3-VL-{size[1]}" if size else str(row["model"])


def shared(found: list[dict]) -> list[list[str]]:
    """Of each model the largest image that was measured both ways in one run, at `PAIRS` or what comes nearest and in the latest
    such run, then all that was measured end to end."""
    head = ["model, images, QA pairs a step", "", "QA pairs/s ↑", "memory ↓", "ratio ↑"]
    lines = []
    raw = {(*_what(row), row["record"], row["batching"]): row for row in found if row["kind"] == "raw"}
    both = [key[:-1] for key in raw if key[-1] == "shared" and (*key[:-1], "separate") in raw]
    for model, bits in dict.fromkeys(key[:2] for key in sorted(both)):
        largest = max(
            (key for key in both if key[:2] == (model, bits)),
            key=lambda key: (_pixels(key[2]), -abs(key[3] - PAIRS), raw[*key, "shared"]["started"]),
        )
        one, other = (raw[*largest, batching] for batching in ("shared", "separate"))
        where = f"{one['model']}, {bits} bits, {largest[2]}, {largest[3]}"
        lines.append([where, "shared image", *_figures(one), f"**{one['pairs_per_second'] / other['pairs_per_second']:.1f}**"])
        lines.append(["", "a sequence a question", *_figures(other), ""])
    return [head, *lines, *_end_to_end([row for row in found if row["kind"] == "end to end" and "failed" not in row])]


def _end_to_end(found: list[dict]) -> Iterator[list[str]]:
    """train.py, and below it the peers' way in each of its settings, the fastest first, which is what it is compared with. Of
    several records of the same on one kind of GPU the one whose peers were fastest."""
    best: dict[tuple, tuple[dict, list[dict]]] = {}
    for row in (one for one in found if one.get("batching") == "shared" and "processes" not in one):
        alike = [other for other in found if _run(other) == _run(row) and "batching" not in other]
        peers = sorted(alike, key=lambda other: -other["pairs_per_second"])
        same = (*_what(row), row["device"], row["setting"])
        if same not in best or _fastest(peers) > _fastest(best[same][1]):
            best[same] = row, peers
    for row, peers in sorted(best.values(), key=lambda one: (_size_of(one[0]["model"]), one[0]["setting"].endswith(" none"))):
        gain = f"**{row['pairs_per_second'] / _fastest(peers):.1f}**" if peers else ""
        where = f"{row['model']}, {row['bits']} bits, {row['size']}, {row['pairs']}, data loading included"
        yield [where, f"train.py, shared image, {_checkpointing(row['setting'])}", *_figures(row), gain]
        for peer in peers:
            yield ["", f"{peer['way']}, {_dealt(peer['setting'])}", *_figures(peer), ""]


def _fastest(peers: list[dict]) -> float:
    return max((peer["pairs_per_second"] for peer in peers), default=0.0)


def _run(row: Mapping) -> tuple:
    return *_what(row), row["record"]


def _what(row: Mapping) -> tuple:
    return tuple(row[name] for name in ("model", "bits", "size", "pairs"))


def _dealt(setting: str) -> str:
    """A setting of the peers' way (`bench_peers.Setting`) in words."""
    return f"{setting.split()[0]} samples at a time, {_checkpointing(setting)}"


def _checkpointing(setting: str) -> str:
    """Whether it recomputes: train.py's settings (``8 x 2 none``) and the peers' (``8 none padding-free``) say it in one word."""
    return "no checkpointing" if "none" in setting.split() else "checkpointing"


def _figures(row: Mapping) -> list[str]:
    """Speed at the median step, with the slowest one where it took more than twice as long, and peak memory."""
    slowest = max(row.get("spread_seconds", [0.0]))
    slow = f" (one step of {slowest:.1f} s)" if slowest > 2 * row.get("median_seconds", slowest) else ""
    return [f"{row['pairs_per_second']:.1f}{slow}", records.gigabytes(row["peak_memory_bytes"])]


def _pixels(size: str) -> int:
    width, height = (int(side) for side in size.split("x"))
    return width * height


def memory(found: list[dict]) -> list[list[str]]:
    """Peak memory of raw steps with shared images: a line a model, bits and image size, a column a ``--batch``; of several runs
    the most."""
    rising = sorted((r for r in found if r["kind"] == "raw" and r["batching"] == "shared"), key=lambda r: r["peak_memory_bytes"])
    cells = {(r["model"], r["bits"], r["size"], r["micro_batch"]): r for r in rising}
    batches = sorted({key[3] for key in cells})
    lines = []
    for model, bits, size in sorted({key[:3] for key in cells}, key=lambda key: (_size_of(key[0]), key[1], _pixels(key[2]))):
        row = next(cell for key, cell in cells.items() if key[:3] == (model, bits, size))
        peaks = [cells.get((model, bits, size, batch)) for batch in batches]
        named = [row["model"], str(bits), f"{size} ({row['image_tokens']} tokens)"]
        lines.append([*named, *(records.gigabytes(p["peak_memory_bytes"]) if p else "–" for p in peaks)])
    return [["model", "`--bits`", "image", *(f"`--batch {batch}`" for batch in batches)], *lines]


def _size_of(model: str) -> float:
    found = re.search(r"(\d+(?:\.\d+)?)B$", model)
    return float(found[1]) if found else 0.0


def rewritten(text: str, folder: Path) -> str:
    """``text`` with the part between each pair of markers made anew from the records in ``folder``.

    Raises:
        UserError: if a marker names no table, or lacks its end.
    """
    made, found = {"shared": shared, "memory": memory}, list(rows_of(folder))
    names = [name for _, name, _, _ in _MARKED.findall(text)]
    if not set(names) <= set(made) or text.count("<!-- records: ") != len(names):
        raise UserError(f"README.md's markers name {', '.join(names) or 'nothing'}; {', '.join(made)} are known; mend them")

    def table(match: re.Match) -> str:
        lines = made[match[2]](found)
        return f"{match[1]}{tables.markdown(lines) if len(lines) > 1 else 'Not measured yet.'}\n{match[4]}"

    return _MARKED.sub(table, text)


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser(prog="python -m sonovqa.readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is out of date")
    args = parser.parse_args(argv)
    text = PAGE.read_text(encoding="utf-8")
    made = rewritten(text, tables.RECORDS)
    if args.check:
        console.print(
            "README.md is what the records say" if made == text else "README.md is out of date: python -m sonovqa.readme"
        )
        return int(made != text)
    files.write_text(PAGE, made)
    return 0


if __name__ == "__main__":
    cli.run(main)
