"""Renders a table of perplexity by length as text, JSON and PNG."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from qwen_jax.evaluate.long_context import PerplexityTable
from qwen_jax.evaluate.perplexity import Perplexity

_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "axes.grid": True,
    "grid.color": "#e6e9ee",
}
# Distinguishable without colour too: by marker and lightness.
_COLOURS = ("#b3362b", "#e0962e", "#3f9c6d", "#3b5bdb", "#7a3fa0", "#3c4654")
_MARKERS = ("x", "s", "^", "o", "D", "v")


def as_text(table: PerplexityTable) -> str:
    """Returns Markdown tables of perplexity and bits per byte, and what was scored."""
    plan = table.plan
    parts = [
        _markdown(table, "perplexity", lambda cell: _format(cell.perplexity)),
        _markdown(table, "bits per byte", lambda cell: f"{cell.bits_per_byte(table.n_bytes):.3f}"),
        f"{table.tokens:,} tokens ({table.n_bytes:,} bytes) of {table.documents:,} documents of "
        f"more than {plan.longest:,} tokens, the same in every cell: windows of each length that "
        f"do not overlap, every target of a window scored. Trained at "
        f"{plan.config.trained_length:,}.",
    ]
    return "\n\n".join(parts)


def _format(value: float) -> str:
    """Formats a perplexity with two decimals, or two digits if it is large."""
    return f"{value:.2f}" if value < 1e5 else f"{value:.2g}"


def _markdown(table: PerplexityTable, name: str, show: Callable[[Perplexity], str]) -> str:
    """Returns a Markdown table of all cells.

    Args:
      table: the results.
      name: heading of the first column.
      show: formats one cell.
    """
    plan = table.plan
    rows = [[name, *(f"{length:,}" for length in plan.lengths)]]
    rows += [[m, *(show(table.cells[m, n]) for n in plan.lengths)] for m in plan.modes]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: list[str]) -> str:
        cells = [row[0].ljust(widths[0])]
        cells += [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        return "| " + " | ".join(cells) + " |"

    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    return "\n".join(map(line, [rows[0], rule, *rows[1:]]))


def as_json(table: PerplexityTable) -> dict[str, Any]:
    """Returns all results as JSON values; `nats_by_position` is the mean loss by part of the
    window.
    """
    plan = table.plan
    return {
        "trained_length": plan.config.trained_length,
        "lengths": list(plan.lengths),
        "modes": list(plan.modes),
        "layers_per_window": plan.layers_per_window,
        "dtype": plan.options.dtype,
        "model": dataclasses.asdict(plan.config),
        "documents": table.documents,
        "tokens": table.tokens,
        "bytes": table.n_bytes,
        "cells": [
            {
                "mode": mode,
                "length": length,
                "nll": cell.nll,
                "perplexity": cell.perplexity if cell.loss < 700 else None,
                "bits_per_byte": cell.bits_per_byte(table.n_bytes),
                "nats_by_position": list(cell.curve),
            }
            for (mode, length), cell in table.cells.items()
        ],
    }


def plot_png(table: PerplexityTable) -> bytes:
    """Returns a PNG of perplexity by length and by position in the longest window."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 3.9), layout="constrained", dpi=110)
        by_length, by_position = figure.subplots(1, 2, sharey=True)
        _plot_by_length(by_length, table)
        _plot_by_position(by_position, table)
        low, high = by_length.get_ylim()  # both panels share it
        labelled = (1, 2, 5) if high > 10 * low else (1, 1.2, 1.5, *range(2, 10))
        by_length.yaxis.set_major_locator(LogLocator(subs=labelled, numticks=12))
        by_length.yaxis.set_major_formatter("{x:,.4g}")
        figure.legend(
            *by_length.get_legend_handles_labels(),
            loc="outside lower center",
            ncols=len(table.plan.modes) + 1,
            frameon=False,
        )
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _line_style(i: int) -> dict[str, Any]:
    """Returns matplotlib line properties of the i-th mode."""
    return {"color": _COLOURS[i % len(_COLOURS)], "linewidth": 1.8, "zorder": 3}


def _plot_by_length(axes: Axes, table: PerplexityTable) -> None:
    """Plots perplexity against window length, one line per mode."""
    plan = table.plan
    axes.set_title("Perplexity by length of the window")
    lengths = sorted(plan.lengths)
    for i, mode in enumerate(plan.modes):
        values = [table.cells[mode, n].perplexity for n in lengths]
        marker = _MARKERS[i % len(_MARKERS)]
        axes.plot(lengths, values, label=mode, marker=marker, markersize=5, **_line_style(i))
    _mark_trained_length(axes, plan.config.trained_length)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.minorticks_off()
    axes.set_xlabel("tokens")


def _plot_by_position(axes: Axes, table: PerplexityTable) -> None:
    """Plots perplexity against the position in the longest window, one line per mode."""
    plan = table.plan
    axes.set_title(f"Along the window of {plan.longest:,}")
    for i, mode in enumerate(plan.modes):
        cell = table.cells[mode, plan.longest]
        each = plan.longest / len(cell.nll_by_position)
        middles = [(k + 0.5) * each for k in range(len(cell.nll_by_position))]
        points = [Perplexity((n,), (1,)).perplexity for n in cell.curve]
        axes.plot(middles, points, **_line_style(i))
    _mark_trained_length(axes, plan.config.trained_length)
    axes.set_xlim(0, plan.longest)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("position")


def _mark_trained_length(axes: Axes, length: int) -> None:
    """Draws a dashed vertical line at the trained length."""
    axes.axvline(
        length, color="#667080", linewidth=1, linestyle=(0, (4, 3)), label="trained length"
    )
