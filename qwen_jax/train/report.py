"""HTML report of a training run: scores, curves and samples on one self-contained page.

The page has no outside resources: plots are inline SVG images, and the template escapes all texts.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import io
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qwen_jax.artifact import write_text

MetricRows = Sequence[Mapping[str, float]]
"""Rows of `metrics.jsonl`, as returned by `metrics.read_metrics`."""

_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a94a3",
    "axes.labelcolor": "#3c4654",
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "axes.grid": True,
    "grid.color": "#e6e9ee",
    "xtick.color": "#3c4654",
    "ytick.color": "#3c4654",
    "svg.hashsalt": "qwen_jax",  # equal numbers give equal files
}
_BLUE, _PALE, _GREY = "#3b5bdb", "#b6c2f2", "#667080"


@dataclasses.dataclass(frozen=True)
class Sample:
    """Continuations of one prompt.

    Attributes:
      prompt: text given to the model.
      continuations: description of the sampling method -> generated text.
    """

    prompt: str
    continuations: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class TrainingReport:
    """Content of the page, from top to bottom.

    Attributes:
      title: heading of the page.
      summary: one sentence about the run.
      facts: short name -> value, shown as tiles.
      scores: name of a model or compressor -> held-out source -> bits per byte; the trained model
        is the first.
      notes: the same names -> what the score counts and what information it is based on.
      metrics: rows of the run with `loss`, `lr`, `grad_norm` and `eval/<source>/bits_per_byte`.
      samples: prompts and their continuations.
      config: the complete recipe, as text.
    """

    title: str
    summary: str
    facts: Mapping[str, str]
    scores: Mapping[str, Mapping[str, float]]
    notes: Mapping[str, str]
    metrics: MetricRows
    samples: Sequence[Sample]
    config: str


def write_report(path: str | os.PathLike, report: TrainingReport) -> None:
    """Writes the page to a file atomically: an interrupted call leaves no partial file."""
    write_text(path, render(report))


def render(report: TrainingReport) -> str:
    """Returns the page as HTML."""
    columns = list(next(iter(report.scores.values())))
    best = {c: min(row[c] for row in report.scores.values()) for c in columns}
    return _template().render(
        report=report,
        columns=columns,
        best=best,
        plots=plots(report.metrics, report.scores),
    )


def score_table(scores: Mapping[str, Mapping[str, float]]) -> str:
    """Formats scores as aligned lines of text, the lowest of each column marked with `*`.

    Args:
      scores: name -> held-out source -> bits per byte; every row has the same sources.
    """
    columns = list(next(iter(scores.values())))
    names = ["bits per byte, held out", *scores]
    width = max(map(len, names))
    lines = [f"{names[0]:{width}}" + "".join(f"{c:>10}" for c in columns)]
    for name, row in scores.items():
        cells = ""
        for c in columns:
            mark = "*" if row[c] == min(other[c] for other in scores.values()) else " "
            cells += f"{row[c]:9.3f}{mark}"
        lines.append(f"{name:{width}}{cells}")
    return "\n".join(lines)


@functools.cache
def _template() -> jinja2.Template:
    """Returns the template of the page, `report.html.j2` beside this file."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,  # samples may contain any text
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")


# --- plots ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plot:
    """One plot of the page.

    Attributes:
      caption: description of what it shows.
      image: the SVG image as a `data:` URI.
      wide: whether it takes half of the page's width instead of a third.
    """

    caption: str
    image: str
    wide: bool


def plots(metrics: MetricRows, scores: Mapping[str, Mapping[str, float]]) -> list[Plot]:
    """Draws held-out scores, one plot per source, then loss, learning rate and gradient norm.

    Args:
      metrics: rows of the run.
      scores: as in `TrainingReport`; scores of others than the model are drawn as levels.
    """
    held_out = _held_out_plots(metrics, scores)
    drawn = [_plot(caption, draw, wide=True) for caption, draw in held_out.items()]
    line = functools.partial(_line, metrics=metrics)
    drawn += [
        _plot("Training loss, nats per token", functools.partial(_loss, metrics=metrics)),
        _plot("Learning rate", functools.partial(line, name="lr")),
        _plot("Gradient norm before clipping", functools.partial(line, name="grad_norm")),
    ]
    return drawn


def held_out_figure(metrics: MetricRows, scores: Mapping[str, Mapping[str, float]]) -> bytes:
    """Draws the held-out scores of all sources side by side, for use outside the page.

    Args:
      metrics: rows of the run.
      scores: as in `TrainingReport`.

    Returns:
      An SVG image; equal numbers give equal bytes.
    """
    drawn = _held_out_plots(metrics, scores)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.6 * len(drawn), 3.2), layout="constrained")
        panels = figure.subplots(1, len(drawn), squeeze=False)[0]
        for axes, (caption, draw) in zip(panels, drawn.items(), strict=True):
            axes.set_title(caption)
            axes.set_xlabel("step")
            draw(axes)
        return _svg(figure)


def _held_out_plots(
    metrics: MetricRows, scores: Mapping[str, Mapping[str, float]]
) -> dict[str, Callable[[Axes], None]]:
    """Returns caption -> function that draws the held-out scores of one source into axes."""
    model, *others = scores
    drawn: dict[str, Callable[[Axes], None]] = {}
    for source in scores[model]:
        levels = {name: scores[name][source] for name in others}
        drawn[f"Held-out {source}, bits per byte"] = functools.partial(
            _held_out, metrics=metrics, source=source, levels=levels
        )
    return drawn


def _svg(figure: Figure) -> bytes:
    """Returns a figure as SVG without the date and the version of matplotlib."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _plot(caption: str, draw: Callable[[Axes], None], wide: bool = False) -> Plot:
    """Makes a plot over training steps.

    Args:
      caption: title of the axes and alternative text of the image.
      draw: draws the curves into the given axes.
      wide: as in `Plot`.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.6, 3.4) if wide else (3.9, 3.0), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(caption)
        axes.set_xlabel("step")
        draw(axes)
        image = "data:image/svg+xml;base64," + base64.b64encode(_svg(figure)).decode()
    return Plot(caption, image, wide)


def series(metrics: MetricRows, name: str) -> tuple[list[float], list[float]]:
    """Returns steps and values of the rows that have the metric `name`."""
    rows = [row for row in metrics if name in row]
    return [row["step"] for row in rows], [row[name] for row in rows]


def smoothed(values: Sequence[float], radius: int = 8) -> list[float]:
    """Returns the centred moving average: the mean of each value and `radius` on either side.

    Near the ends the radius shrinks, so that it is the same on both sides.
    """
    result = []
    for i in range(len(values)):
        r = min(radius, i, len(values) - 1 - i)
        result.append(sum(values[i - r : i + r + 1]) / (2 * r + 1))
    return result


def _loss(axes: Axes, metrics: MetricRows) -> None:
    """Draws the training loss of each step and its moving average."""
    steps, values = series(metrics, "loss")
    axes.plot(steps, values, color=_PALE, linewidth=1, label="one batch")
    axes.plot(steps, smoothed(values), color=_BLUE, linewidth=2, label="moving average")
    axes.legend(frameon=False)


def _line(axes: Axes, metrics: MetricRows, name: str) -> None:
    """Draws one metric, with an axis from 0."""
    axes.plot(*series(metrics, name), color=_BLUE, linewidth=1.5)
    axes.set_ylim(bottom=0)


def _held_out(axes: Axes, metrics: MetricRows, source: str, levels: Mapping[str, float]) -> None:
    """Draws a model's held-out bits per byte over training, and levels to compare with.

    Args:
      axes: axes to draw into.
      metrics: rows of the run with `eval/<source>/bits_per_byte`.
      source: name of the held-out source.
      levels: name -> bits per byte, drawn as dashed lines with their names at the right edge.
    """
    steps, values = series(metrics, f"eval/{source}/bits_per_byte")
    axes.plot(steps, values, color=_BLUE, linewidth=2, marker="o", markersize=5, zorder=3)
    axes.annotate(
        f"{values[-1]:.3f}",
        (steps[-1], values[-1]),
        color=_BLUE,
        weight="bold",
        textcoords="offset points",
        xytext=(-4, 8),
        ha="right",
    )
    shown = [*values, *levels.values()]
    low, high = min(shown), max(shown)
    span = max(high - low, 0.1)
    axes.set_ylim(low - 0.08 * span, high + 0.12 * span)
    axes.set_xlim(0, max(steps) * 1.02)
    for value in levels.values():
        axes.axhline(value, color=_GREY, linewidth=1, linestyle=(0, (4, 3)))
    positions = spread(list(levels.values()), 0.07 * span)
    for (name, value), y in zip(levels.items(), positions, strict=True):
        axes.annotate(
            f"{name}  {value:.3f}",
            (1.02, y),
            xycoords=axes.get_yaxis_transform(),
            color=_GREY,
            va="center",
            annotation_clip=False,
        )


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Computes positions of labels so that none overlap, each near its value.

    Args:
      values: where the labels should be.
      gap: least distance between two labels.

    Returns:
      One position per value, in the order of the values. Labels that would overlap form a group
      with gaps of `gap`, centred on the mean of its values.
    """
    order = sorted(range(len(values)), key=lambda i: values[i])
    groups: list[list[int]] = []
    for index in order:
        groups.append([index])
        while len(groups) > 1 and _overlap(groups[-2], groups[-1], values, gap):
            last = groups.pop()
            groups[-1] += last
    positions = [0.0] * len(values)
    for group in groups:
        for index, position in zip(group, _group_positions(group, values, gap), strict=True):
            positions[index] = position
    return positions


def _group_positions(group: Sequence[int], values: Sequence[float], gap: float) -> list[float]:
    """Returns ascending positions, `gap` apart, centred on the mean of a group's values.

    Args:
      group: indices into `values`.
      values: wanted positions of all labels.
      gap: distance between neighbours.
    """
    middle = sum(values[i] for i in group) / len(group)
    return [middle + gap * (k - (len(group) - 1) / 2) for k in range(len(group))]


def _overlap(
    lower: Sequence[int], upper: Sequence[int], values: Sequence[float], gap: float
) -> bool:
    """Returns whether two neighbouring groups of labels are less than `gap` apart."""
    above = _group_positions(upper, values, gap)[0]
    return above - _group_positions(lower, values, gap)[-1] < gap
