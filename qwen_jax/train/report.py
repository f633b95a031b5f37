"""A training run as one HTML page without outside resources: scores, curves, samples.

It shows what it is given and knows nothing of where it comes from: numbers of a `metrics.jsonl`,
a table of scores, texts. Everything is escaped by the template; plots are inline SVG images.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import io
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

import jinja2
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qwen_jax.artifact import write_text

Rows = Sequence[Mapping[str, float]]
"""Rows of `metrics.jsonl`, as `metrics.read_metrics` gives them."""

_STYLE = {
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
    "svg.hashsalt": "qwen_jax",  # The same numbers give the same file.
}
_BLUE, _PALE, _GREY = "#3b5bdb", "#b6c2f2", "#667080"


@dataclasses.dataclass(frozen=True)
class Sample:
    """prompt: the text given to the model; continuations: how it was drawn -> what it wrote."""

    prompt: str
    continuations: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Report:
    """What the page shows, from top to bottom.

    Attributes:
      title, summary: head of the page; one sentence on what was done.
      facts: short name -> value, shown as tiles.
      scores: who -> held-out source -> bits per byte; the model itself is the first.
      sees: who -> what this score counts or has to go by, in plain words.
      metrics: rows of the run; `loss`, `lr`, `grad_norm`, and `eval/<source>/bits_per_byte`.
      samples: prompts and continuations.
      config: the whole recipe, as text.
    """

    title: str
    summary: str
    facts: Mapping[str, str]
    scores: Mapping[str, Mapping[str, float]]
    sees: Mapping[str, str]
    metrics: Rows
    samples: Sequence[Sample]
    config: str


def write_report(path: str | os.PathLike, report: Report) -> None:
    """Writes the page, whole or not at all."""
    write_text(path, render(report))


def render(report: Report) -> str:
    """The page as HTML."""
    columns = list(next(iter(report.scores.values())))
    best = {c: min(row[c] for row in report.scores.values()) for c in columns}
    return _template().render(
        report=report,
        columns=columns,
        best=best,
        plots=plots(report.metrics, report.scores),
    )


def score_table(scores: Mapping[str, Mapping[str, float]]) -> str:
    """The scores as aligned lines of text, the lowest of each column marked with `*`."""
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
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,  # Samples are whatever the model wrote.
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")


# --- plots ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plot:
    """caption: what it shows; image: `data:` URI; wide: takes half of the page, not a third."""

    caption: str
    image: str
    wide: bool


def plots(metrics: Rows, scores: Mapping[str, Mapping[str, float]]) -> list[Plot]:
    """Held-out scores while training, one plot per source, then loss, rate and gradient norm."""
    model, *others = scores
    made = []
    for source in scores[model]:
        levels = {who: scores[who][source] for who in others}
        draw = functools.partial(_held_out, metrics=metrics, source=source, levels=levels)
        made.append(_plot(f"Held-out {source}, bits per byte", draw, wide=True))
    line = functools.partial(_line, metrics=metrics)
    made += [
        _plot("Training loss, nats per token", functools.partial(_loss, metrics=metrics)),
        _plot("Learning rate", functools.partial(line, name="lr")),
        _plot("Gradient norm before clipping", functools.partial(line, name="grad_norm")),
    ]
    return made


def _plot(caption: str, draw: Callable[[Axes], None], wide: bool = False) -> Plot:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.6, 3.4) if wide else (3.9, 3.0), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(caption)
        axes.set_xlabel("step")
        draw(axes)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    image = "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Plot(caption, image, wide)


def series(metrics: Rows, name: str) -> tuple[list[float], list[float]]:
    """Steps and values of the rows that have `name`."""
    rows = [row for row in metrics if name in row]
    return [row["step"] for row in rows], [row[name] for row in rows]


def smoothed(values: Sequence[float], reach: int = 8) -> list[float]:
    """Mean of each value and up to `reach` on either side, fewer near the ends but as many."""
    result = []
    for i in range(len(values)):
        r = min(reach, i, len(values) - 1 - i)
        result.append(sum(values[i - r : i + r + 1]) / (2 * r + 1))
    return result


def _loss(axes: Axes, metrics: Rows) -> None:
    steps, values = series(metrics, "loss")
    axes.plot(steps, values, color=_PALE, linewidth=1, label="of one batch")
    axes.plot(steps, smoothed(values), color=_BLUE, linewidth=2, label="moving average")
    axes.legend(frameon=False)


def _line(axes: Axes, metrics: Rows, name: str) -> None:
    axes.plot(*series(metrics, name), color=_BLUE, linewidth=1.5)
    axes.set_ylim(bottom=0)


def _held_out(axes: Axes, metrics: Rows, source: str, levels: Mapping[str, float]) -> None:
    """The model's curve, and a level with its name at the right edge for each other score."""
    steps, values = series(metrics, f"eval/{source}/bits_per_byte")
    axes.plot(steps, values, color=_BLUE, linewidth=2, marker="o", markersize=5, zorder=3)
    axes.annotate(
        f"{values[-1]:.3f}", (steps[-1], values[-1]), color=_BLUE, weight="bold",
        textcoords="offset points", xytext=(-4, 8), ha="right",
    )  # fmt: skip
    shown = [*values, *levels.values()]
    low, high = min(shown), max(shown)
    room = max(high - low, 0.1)
    axes.set_ylim(low - 0.08 * room, high + 0.12 * room)
    axes.set_xlim(0, max(steps) * 1.02)
    for value in levels.values():
        axes.axhline(value, color=_GREY, linewidth=1, linestyle=(0, (4, 3)))
    at = spread(list(levels.values()), 0.07 * room)
    for (name, value), y in zip(levels.items(), at, strict=True):
        axes.annotate(
            f"{name}  {value:.3f}", (1.02, y), xycoords=axes.get_yaxis_transform(),
            color=_GREY, va="center", annotation_clip=False,
        )  # fmt: skip


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Places for labels: as near to the values as a distance of `gap` between any two allows."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    # Groups of labels that touch, each centred on the mean of what it names.
    groups: list[list[int]] = []
    for index in order:
        groups.append([index])
        while len(groups) > 1 and _touch(groups[-2], groups[-1], values, gap):
            last = groups.pop()
            groups[-1] += last
    places = [0.0] * len(values)
    for group in groups:
        for index, place in zip(group, _places(group, values, gap), strict=True):
            places[index] = place
    return places


def _places(group: Sequence[int], values: Sequence[float], gap: float) -> list[float]:
    middle = sum(values[i] for i in group) / len(group)
    return [middle + gap * (k - (len(group) - 1) / 2) for k in range(len(group))]


def _touch(lower: Sequence[int], upper: Sequence[int], values, gap: float) -> bool:
    return _places(upper, values, gap)[0] - _places(lower, values, gap)[-1] < gap
