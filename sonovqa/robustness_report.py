"""The record of `robustness` as a Markdown table, a plot and a few sentences."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from sonovqa import files

_COLOURS = ("#1f6fb4", "#d9812e", "#7a4fa3", "#3a8f5c", "#b43a4a")  # the first as `plots.MODEL`
_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "sonovqa", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def series(record: Mapping, run: str, kind: str) -> list[Mapping]:
    """One run's entries under one kind by rising strength, the clean one first."""
    mine = [one for one in record["curves"] if one["run"] == run and one["kind"] in ("clean", kind)]
    return sorted(mine, key=lambda one: one["strength"])


def names(record: Mapping) -> dict[str, str]:
    """Run -> a short name: the folder's, or the whole path where two share it."""
    short = {run: Path(run).name for run in record["runs"]}
    return {run: run if list(short.values()).count(name) > 1 else name for run, name in short.items()}


def measured(record: Mapping) -> Iterator[tuple[str, tuple[str, ...], Mapping]]:
    """What has a curve: its title, where its figure stands in an entry, and what it is (``score``, ``n``, ``majority``)."""
    about = record["measured"]
    if "overall" in about:
        yield f"all but {record['spoilt']}, accuracy", ("overall",), about["overall"]
    for group in ("questions", "slices"):
        for name, one in about[group].items():
            yield f"{name}, {one['score']} (n={one['n']})", (group, name), one


def figure_of(entry: Mapping, place: tuple[str, ...]) -> list[float] | None:
    """``[value, low, high]`` or ``[value]`` at a place of an entry; ``None`` where it is not defined."""
    for key in place:
        entry = (entry or {}).get(key)
    return entry


def _cell(figure: list[float] | None, form: str = ".2f") -> str:
    if not figure:
        return "-"
    value, *span = (format(number, form) for number in figure)
    return f"{value} [{', '.join(span)}]" if span else value


def markdown(record: Mapping) -> str:
    """The table: a line for every score, kind and run, a column for every strength."""
    called = names(record)
    strengths = sorted({one["strength"] for one in record["curves"]})
    head = ["score", "kind", "run", *(f"strength {s:g}" if s else "clean" for s in strengths), "majority"]
    lines = [head, ["---"] * len(head)]
    for title, place, about in measured(record):
        for kind in record["kinds"]:
            for run in record["runs"]:
                found = {one["strength"]: figure_of(one, place) for one in series(record, run, kind)}
                majority = "-" if about["majority"] is None else f"{about['majority']:.2f}"
                lines.append([title, kind, called[run], *(_cell(found.get(s)) for s in strengths), majority])
    told = [f"- {kind}: strength 1 is {one['strength 1']:g} {one['unit']}" for kind, one in record["kinds"].items()]
    about = (
        f"{record['measured']['images']} images of the {record['data']['split']} split of {record['data']['name']} "
        f"(`{record['data']['fingerprint'][:8]}`); 95 % intervals by group. {record['spoilt']} asks for what is being changed: "
        "its references are those of the clean pictures, so a fall there is no fault, and no other score counts it."
    )
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return f"{about}\n\n" + "\n".join(told) + f"\n\n{table}\n"


def summary(record: Mapping) -> str:
    """A line for every kind and run: the first's overall scores by strength, and the others' paired differences to it."""
    called, lines = names(record), []
    first = next(iter(called))
    for run in called:
        for kind in record["kinds"]:
            steps = series(record, run, kind)
            if run == first:
                told, place, form = called[run], ("overall",), ".3f"
            else:
                told, place, form = f"{called[run]} less {called[first]}", ("against_first", "overall"), "+.3f"
            lines.append(f"{told}, {kind}: " + ", ".join(f"{s['strength']:g}: {_cell(figure_of(s, place), form)}" for s in steps))
    return "\n".join(lines)


def write(record: Mapping, path: Path) -> None:
    """Write the record, a line a curve's point, with its table (``.md``) and plot (``.svg``) beside it."""
    points = ",\n".join(json.dumps(one, ensure_ascii=False) for one in record["curves"])
    rest = json.dumps({key: value for key, value in record.items() if key != "curves"}, ensure_ascii=False)
    files.write_text(path, f'{rest[:-1]},\n"curves": [\n{points}\n]}}\n')
    files.write_text(path.with_suffix(".md"), markdown(record))
    draw(record, path.with_suffix(".svg"))


def draw(record: Mapping, path: Path) -> None:
    """Write the plot, by ``path``'s ending SVG or PNG: a row a score, a column a kind, a line with its interval a run."""
    import matplotlib
    from matplotlib.figure import Figure

    rows, kinds, called = list(measured(record)), list(record["kinds"]), names(record)
    with matplotlib.rc_context(_STYLE):
        drawn = Figure(figsize=(1.2 + 2.9 * len(kinds), 0.8 + 1.75 * len(rows)), layout="constrained")
        grid = drawn.subplots(len(rows), len(kinds), squeeze=False, sharey="row", sharex="col")
        for axes, (title, place, _) in zip(grid, rows, strict=True):
            for ax, kind in zip(axes, kinds, strict=True):
                for run, colour in zip(record["runs"], _COLOURS * len(record["runs"]), strict=False):
                    _curve(ax, series(record, run, kind), place, called[run], colour)
                ax.grid(alpha=0.3)
                ax.set_ylim(-0.02, 1.02)
            axes[0].set_title(title, loc="left", fontsize=9)
        for ax, kind in zip(grid[-1], kinds, strict=True):
            ax.set_xlabel(f"strength of {kind}")
        handles = dict(zip(*reversed(grid[0][0].get_legend_handles_labels()), strict=True))
        drawn.legend(
            handles.values(), handles.keys(), loc="outside upper center", ncols=max(1, min(4, len(handles))), frameon=False
        )
        with files.replacing(path) as part:
            drawn.savefig(part, format=path.suffix[1:], metadata={"Date": None} if path.suffix == ".svg" else None)


def _curve(ax, entries: list[Mapping], place: tuple[str, ...], name: str, colour: str) -> None:
    found = [(one["strength"], figure) for one in entries if (figure := figure_of(one, place))]
    if not found:  # one class only, say: there is no balanced accuracy
        ax.text(0.5, 0.5, "not defined", transform=ax.transAxes, ha="center", color="#8a8a8a")
    ax.plot([at for at, _ in found], [figure[0] for _, figure in found], marker="o", markersize=3, color=colour, label=name)
    spans = [(at, *figure[1:]) for at, figure in found if len(figure) == 3]
    if spans:
        ax.fill_between(*zip(*spans, strict=True), color=colour, alpha=0.15, linewidth=0)
