"""Figures of `bench answer`'s report: a row of the table is a row of the figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sonovqa import plots
from sonovqa.plots import BLIND, MAJORITY, MODEL

LOADED, PEAK, PREDICTED = "#1f6fb4", "#a9cbe8", "#b3261e"
WIDTH, ROW = 4.6, 0.5  # inches: a phone shows all of it


def memory(names: Sequence[str], rows: Sequence[Mapping]) -> str:
    """Memory after load and at peak in GB, with what was predicted of both."""
    figure, axes = _rows(names)
    for at, row in enumerate(rows):
        for what, colour, height in (("peak", PEAK, 0.62), ("loaded", LOADED, 0.36)):
            if row.get(f"memory_{what}") is not None:
                axes.barh(at, row[f"memory_{what}"] / 1e9, height, color=colour, label="at peak" if what == "peak" else "loaded")
            if f"predicted_{what}" in row:
                axes.plot(row[f"predicted_{what}"] / 1e9, at, "d", color=PREDICTED, markersize=6, label="predicted")
    return _done(figure, axes, "memory, GB")


def latency(names: Sequence[str], rows: Sequence[Mapping]) -> str:
    """Seconds until an image's eight questions are answered: least to most, the mean and the 95th percentile."""
    figure, axes = _rows(names)
    for at, row in enumerate(rows):
        told = row["image_seconds"]
        axes.plot([told["min"], told["max"]], [at, at], color=MODEL, linewidth=2.5, solid_capstyle="round", label="min to max")
        axes.plot(told["mean"], at, "o", color=MODEL, markersize=8, label="mean")
        axes.plot(told["p95"], at, "|", color=BLIND, markersize=14, markeredgewidth=2.5, label="p95")
    axes.set_xlim(left=0)
    return _done(figure, axes, "s for the eight questions")


def speed(names: Sequence[str], rows: Sequence[Mapping]) -> str:
    """New tokens a second."""
    figure, axes = _rows(names)
    for at, row in enumerate(rows):
        axes.barh(at, row["tokens_per_second"], 0.5, color=MODEL)
        axes.annotate(f"{row['tokens_per_second']:.0f}", (row["tokens_per_second"], at), (4, 0), textcoords="offset points",
                      va="center", fontsize=9)  # fmt: skip
    axes.margins(x=0.15)
    return _done(figure, axes, "new tokens/s")


def accuracy(names: Sequence[str], figures: Sequence[Mapping]) -> str:
    """Accuracy over all questions with its 95 % interval, beside the majority's and the blind answer's."""
    figure, axes = _rows(names)
    for at, found in enumerate(figures):
        low, high = found["interval"] or (found["value"],) * 2
        axes.plot([low, high], [at, at], color=MODEL, linewidth=2.5, solid_capstyle="round")
        axes.plot(found["value"], at, "o", color=MODEL, markersize=8, label="model")
        for name, colour, mark in (("majority", MAJORITY, "D"), ("blind", BLIND, "s")):
            if name in found and found[name]["value"] is not None:
                axes.plot(found[name]["value"], at, mark, color=colour, markersize=6, label=name)
    axes.set_xlim(-0.02, 1.02)
    return _done(figure, axes, "accuracy over all questions")


def _rows(names: Sequence[str]):
    figure, axes = plots.axes_of(WIDTH, 0.9 + ROW * len(names))
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def _done(figure, axes, what: str) -> str:
    axes.set_xlabel(what)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if handles:
        place = {"loc": "lower center", "bbox_to_anchor": (0.35, 1.0), "ncols": 3, "columnspacing": 1}
        axes.legend(handles.values(), handles.keys(), frameon=False, **place)
    return plots.svg(figure)
