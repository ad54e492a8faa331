"""The report's figures, drawn by matplotlib as SVG text: no network, no script, sharp at any width."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping

MODEL, MAJORITY, BLIND, BASE = "#1f6fb4", "#8a8a8a", "#d9812e", "#7a4fa3"
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def svg(figure) -> str:
    """The figure as an ``<svg>`` element that takes the width it is given."""
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": "sonovqa"}):
        figure.savefig(stream, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


def axes_of(width: float, height: float):
    """A figure of so many inches and its axes."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height))
        return figure, figure.add_subplot()


def overview(questions: Mapping[str, Mapping]) -> str:
    """Every question's headline score with its 95 % interval, beside the majority's and the blind answer's."""
    kinds = list(questions)
    figure, axes = axes_of(4.6, 0.9 + 0.42 * len(kinds))  # a phone shows all of it
    for at, kind in enumerate(kinds):
        found = questions[kind]["metrics"][questions[kind]["headline"]]
        for name, colour, mark in (("majority", MAJORITY, "D"), ("blind", BLIND, "s"), ("base", BASE, "^")):
            other = found.get(name)
            if other and other["value"] is not None:
                axes.plot(other["value"], at, mark, color=colour, markersize=6, label=name, zorder=3)
        if found["value"] is not None:
            low, high = found["interval"] or (found["value"],) * 2
            axes.plot([low, high], [at, at], color=MODEL, linewidth=2.5, solid_capstyle="round", zorder=2)
            axes.plot(found["value"], at, "o", color=MODEL, markersize=8, label="model", zorder=4)
    axes.set_yticks(range(len(kinds)), [f"{short(kind)}  {questions[kind]['headline']}" for kind in kinds])
    axes.invert_yaxis()
    axes.set_xlim(-0.02, 1.02)
    axes.grid(axis="x", alpha=0.3)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if handles:
        place = {"loc": "lower center", "bbox_to_anchor": (0.35, 1.0), "ncols": 4, "columnspacing": 1}
        axes.legend(handles.values(), handles.keys(), frameon=False, **place)
    return svg(figure)


def confusion(table: Mapping) -> str:
    """Counts, references down and answers across, shaded by share of the row."""
    rows, columns, counts = table["rows"], table["columns"], table["counts"]
    size = 0.42
    figure, axes = axes_of(1.6 + size * len(columns), 1.2 + size * len(rows))
    shares = [[n / max(sum(row), 1) for n in row] for row in counts]
    edges = ([at - 0.5 for at in range(len(names) + 1)] for names in (columns, rows))
    axes.pcolormesh(*edges, shares, cmap="Blues", vmin=0, vmax=1, edgecolors="white", linewidth=1)
    axes.invert_yaxis()
    for y, row in enumerate(counts):
        for x, n in enumerate(row):
            if n:
                axes.text(x, y, str(n), ha="center", va="center", fontsize=9, color="white" if shares[y][x] > 0.55 else "black")
    axes.set_xticks(range(len(columns)), [short(name) for name in columns], rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), [short(name) for name in rows])
    axes.set_xlabel("answer")
    axes.set_ylabel("reference")
    return svg(figure)


def reliability(found: Mapping) -> str:
    """Mean probability against the share that came true, a dot a bin, its area by its rows; on the diagonal it is calibrated."""
    figure, axes = axes_of(3.6, 3.6)
    axes.plot([0, 1], [0, 1], color=MAJORITY, linewidth=1, linestyle="--")
    bins, most = found["reliability"], max((one["n"] for one in found["reliability"]), default=1)
    chances, shares = [one["probability"] for one in bins], [one["share"] for one in bins]
    axes.plot(chances, shares, color=MODEL, linewidth=1)
    axes.scatter(chances, shares, s=[20 + 100 * one["n"] / most for one in bins], color=MODEL)
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel(f"probability of {found['of']}" if found["of"][:2] != "P(" else found["of"])
    axes.set_ylabel("share that came true")
    axes.grid(alpha=0.3)
    return svg(figure)


def coverage(curves: Mapping[str, Mapping]) -> str:
    """Accuracy of the answers that are given when the least confident are held back, a line a question."""
    figure, axes = axes_of(4.6, 3.6)
    for kind, found in curves.items():
        axes.plot([p["coverage"] for p in found["curve"]], [p["accuracy"] for p in found["curve"]], marker=".", label=short(kind))
    axes.set_xlim(0, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("coverage: share answered, the surest first")
    axes.set_ylabel("accuracy")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=max(len(curves), 1), frameon=False)
    return svg(figure)


def slices(found: Mapping[str, Mapping], score: str) -> str:
    """A score in every slice with its interval, the worst on top."""
    names = [name for name, figure in found.items() if figure["value"] is not None]
    figure, axes = axes_of(4.2, 0.8 + 0.32 * len(names))
    for at, name in enumerate(names):
        low, high = found[name]["interval"] or (found[name]["value"],) * 2
        axes.plot([low, high], [at, at], color=MODEL, linewidth=2, solid_capstyle="round")
        axes.plot(found[name]["value"], at, "o", color=MODEL, markersize=6)
    axes.set_yticks(range(len(names)), [f"{short(name)} (n={found[name]['n']})" for name in names])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel(score)
    if all(0 <= found[name]["value"] <= 1 for name in names):
        axes.set_xlim(-0.02, 1.02)
    return svg(figure)


def short(name: str) -> str:
    """A name that an axis has room for, none of it taken for a formula."""
    return textwrap.shorten(name or "-", 28, placeholder="…").replace("$", r"\$")
