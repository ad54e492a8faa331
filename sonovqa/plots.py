"""The report's figures, drawn by matplotlib as SVG text: no network, no script, sharp at any width."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping

MODEL, MAJORITY, BLIND = "#1f6fb4", "#8a8a8a", "#d9812e"
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def _svg(figure) -> str:
    """The figure as an ``<svg>`` element that takes the width it is given."""
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": "sonovqa"}):
        figure.savefig(stream, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


def _axes(width: float, height: float):
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height))
        return figure, figure.add_subplot()


def overview(questions: Mapping[str, Mapping]) -> str:
    """Every question's headline score with its 95 % interval, beside the majority's and the blind answer's."""
    kinds = list(questions)
    figure, axes = _axes(6.4, 0.9 + 0.42 * len(kinds))
    for at, kind in enumerate(kinds):
        found = questions[kind]["metrics"][questions[kind]["headline"]]
        for name, colour, mark in (("majority", MAJORITY, "D"), ("blind", BLIND, "s")):
            other = found.get(name)
            if other and other["value"] is not None:
                axes.plot(other["value"], at, mark, color=colour, markersize=6, label=name, zorder=3)
        if found["value"] is not None:
            low, high = found["interval"] or (found["value"],) * 2
            axes.plot([low, high], [at, at], color=MODEL, linewidth=2.5, solid_capstyle="round", zorder=2)
            axes.plot(found["value"], at, "o", color=MODEL, markersize=8, label="model", zorder=4)
    axes.set_yticks(range(len(kinds)), [f"{kind}  {questions[kind]['headline']}" for kind in kinds])
    axes.invert_yaxis()
    axes.set_xlim(-0.02, 1.02)
    axes.grid(axis="x", alpha=0.3)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if handles:
        axes.legend(handles.values(), handles.keys(), loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3, frameon=False)
    return _svg(figure)


def confusion(table: Mapping) -> str:
    """Counts, references down and answers across, shaded by share of the row."""
    rows, columns, counts = table["rows"], table["columns"], table["counts"]
    size = 0.42
    figure, axes = _axes(1.6 + size * len(columns), 1.2 + size * len(rows))
    shares = [[n / max(sum(row), 1) for n in row] for row in counts]
    edges = ([at - 0.5 for at in range(len(names) + 1)] for names in (columns, rows))
    axes.pcolormesh(*edges, shares, cmap="Blues", vmin=0, vmax=1, edgecolors="white", linewidth=1)
    axes.invert_yaxis()
    for y, row in enumerate(counts):
        for x, n in enumerate(row):
            if n:
                axes.text(x, y, str(n), ha="center", va="center", fontsize=9, color="white" if shares[y][x] > 0.55 else "black")
    axes.set_xticks(range(len(columns)), [_short(name) for name in columns], rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), [_short(name) for name in rows])
    axes.set_xlabel("answer")
    axes.set_ylabel("reference")
    return _svg(figure)


def slices(found: Mapping[str, Mapping], score: str) -> str:
    """A score in every slice with its interval, the worst on top."""
    names = [name for name, figure in found.items() if figure["value"] is not None]
    figure, axes = _axes(6.4, 0.8 + 0.32 * len(names))
    for at, name in enumerate(names):
        low, high = found[name]["interval"] or (found[name]["value"],) * 2
        axes.plot([low, high], [at, at], color=MODEL, linewidth=2, solid_capstyle="round")
        axes.plot(found[name]["value"], at, "o", color=MODEL, markersize=6)
    axes.set_yticks(range(len(names)), [f"{_short(name)} (n={found[name]['n']})" for name in names])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel(score)
    if all(0 <= found[name]["value"] <= 1 for name in names):
        axes.set_xlim(-0.02, 1.02)
    return _svg(figure)


def _short(name: str) -> str:
    return textwrap.shorten(name or "-", 28, placeholder="…")
