"""Draws the pictures of the README as SVG files beside this script.

    PYTHONPATH=. python docs/pictures/draw.py
    PYTHONPATH=. python docs/pictures/draw.py runs/demo

`overview.svg` shows the stages and what each passes to the next; `layers.svg` the subpackages in
their import order, read from the docstring of `qwen_jax`. A test compares both files with what this
script draws. With the folder of a finished demo, `demo.svg` shows its held-out scores.
"""

from __future__ import annotations

import dataclasses
import html
import json
import pathlib
import re
import sys

import qwen_jax
from qwen_jax.evaluate.baselines import CONTEXT_OF
from qwen_jax.train.metrics import read_metrics
from qwen_jax.train.report import held_out_figure

FOLDER = pathlib.Path(__file__).parent
FONT = "font-family='system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif'"
INK, MUTED, LINE = "#1f2937", "#6b7280", "#9ca3af"
DATA, TRAIN, USE, PODS = "#e0f2fe", "#ede9fe", "#dcfce7", "#fef3c7"


@dataclasses.dataclass(frozen=True)
class Box:
    """A labelled rectangle: position and size in pixels, a title, and lines of small print."""

    x: int
    y: int
    width: int
    height: int
    title: str
    lines: tuple[str, ...]
    fill: str

    def svg(self) -> str:
        """Returns the rectangle and its texts as SVG elements."""
        middle = self.x + self.width / 2
        top = self.y + self.height / 2 - 9 * len(self.lines) + 5
        parts = [
            f"<rect x='{self.x}' y='{self.y}' width='{self.width}' height='{self.height}' rx='8'"
            f" fill='{self.fill}' stroke='{LINE}'/>",
            f"<text x='{middle:g}' y='{top:g}' text-anchor='middle' font-size='16'"
            f" font-weight='600' fill='{INK}'>{html.escape(self.title)}</text>",
        ]
        for number, line in enumerate(self.lines, 1):
            parts.append(
                f"<text x='{middle:g}' y='{top + 18 * number:g}' text-anchor='middle'"
                f" font-size='13' fill='{MUTED}'>{html.escape(line)}</text>"
            )
        return "\n".join(parts)


def arrow(points: list[tuple[int, int]], *, both_ways: bool = False) -> str:
    """Returns a polyline through the points with a head at its end, or at both ends."""
    path = " ".join(f"{x},{y}" for x, y in points)
    start = " marker-start='url(#head)'" if both_ways else ""
    return (
        f"<polyline points='{path}' fill='none' stroke='{MUTED}' stroke-width='1.6'"
        f" marker-end='url(#head)'{start}/>"
    )


def text(x: int, y: int, content: str, *, size: int = 13, anchor: str = "start") -> str:
    """Returns one line of text with its baseline at y."""
    return (
        f"<text x='{x}' y='{y}' font-size='{size}' text-anchor='{anchor}' fill='{MUTED}'>"
        f"{html.escape(content)}</text>"
    )


def page(width: int, height: int, parts: list[str], title: str) -> str:
    """Returns a complete SVG document on a white ground."""
    return "\n".join(
        [
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}'"
            f" width='{width}' height='{height}' role='img' {FONT}>",
            f"<title>{html.escape(title)}</title>",
            "<defs><marker id='head' viewBox='0 0 10 10' refX='9' refY='5' markerWidth='7'"
            f" markerHeight='7' orient='auto-start-reverse'><path d='M0,0 L10,5 L0,10 z'"
            f" fill='{MUTED}'/></marker></defs>",
            f"<rect width='{width}' height='{height}' rx='12' fill='#ffffff'/>",
            *parts,
            "</svg>\n",
        ]
    )


def overview() -> str:
    """Returns the picture of the stages, from documents to a served model."""
    top, middle, bottom, w, h, pitch = 24, 158, 292, 184, 86, 216
    columns = [20 + pitch * i for i in range(5)]

    def box(column: int, y: int, title: str, lines: tuple[str, ...], fill: str) -> Box:
        return Box(columns[column], y, w, h, title, lines, fill)

    boxes = [
        box(0, top, "Documents", ("JSON lines, or the", "Python standard library"), DATA),
        box(1, top, "Tokenizer", ("byte-level BPE,", "trained or as released"), DATA),
        box(2, top, "Packed shards", ("fixed-length records,", "batch = f(step)"), DATA),
        box(3, top, "Pretraining", ("FSDP × TP × context,", "exact resume"), TRAIN),
        box(4, top, "Checkpoints", ("Orbax, any mesh,", "checksums"), TRAIN),
        box(0, middle, "Hugging Face", ("Qwen, 1.5, 2, 2.5, 3,", "GPTQ Int4 and Int8"), USE),
        box(1, middle, "Load, convert", ("sharded, in and out,", "quantise"), USE),
        box(2, middle, "Engine", ("continuous batching,", "paged KV cache"), USE),
        box(3, middle, "Chat and server", ("terminal, notebook,", "OpenAI's API, web page"), USE),
        box(4, middle, "Evaluation", ("perplexity by length,", "compressors, n-grams"), USE),
        box(0, bottom, "Recipe", ("ml_collections config,", "1.8B to 72B"), PODS),
        box(1, bottom, "Compile ahead", ("the train step, for TPU", "slices and GPU nodes"), PODS),
        box(2, bottom, "Memory and time", ("per device, predicted", "MFU and cost"), PODS),
        box(3, bottom, "Cluster jobs", ("GKE, xpk, TPU VMs,", "SLURM"), PODS),
        box(4, bottom, "Own kernels", ("Pallas, for TPU and", "Hopper, with references"), PODS),
    ]
    gaps = [(x + w + 2, x + pitch - 2) for x in columns[:-1]]

    def across(y: int, gap: int, *, both_ways: bool = False) -> str:
        start, end = gaps[gap]
        return arrow([(start, y + h // 2), (end, y + h // 2)], both_ways=both_ways)

    below = columns[4] + w // 2
    lane = middle - 24
    arrows = [
        *(across(top, i) for i in range(4)),
        across(middle, 0, both_ways=True),
        across(middle, 1),
        across(middle, 2),
        arrow([(below, top + h + 2), (below, middle - 2)]),
        arrow(
            [
                (below - 40, top + h + 2),
                (below - 40, lane),
                (columns[1] + w // 2, lane),
                (columns[1] + w // 2, middle - 2),
            ],
            both_ways=True,
        ),
        *(across(bottom, i) for i in range(3)),
    ]
    parts = [shape.svg() for shape in boxes] + arrows
    return page(columns[-1] + w + 20, bottom + h + 24, parts, "The stages of qwen_jax")


PURPOSE = {
    "server": "OpenAI-compatible API, chat page",
    "evaluate": "perplexity, baselines",
    "generate": "load, sessions, streaming service",
    "engine": "continuous batching, sampling",
    "aot": "compile for pods without hardware",
    "train": "objectives, step, loop, checkpoints",
    "data": "shards to global batches",
    "corpus": "documents to shards",
    "interop": "Hugging Face weights in and out",
    "model": "the network as pure functions",
    "kernels": "attention, paged decoding, quantised",
    "parallel": "mesh, axis rules, start-up",
    "chat": "ChatML, templates, tool calls",
    "tokenizer": "text to ids and back",
}


def order() -> list[str]:
    """Returns the subpackages, highest first, as the docstring of `qwen_jax` lists them."""
    block = str(qwen_jax.__doc__).split("::\n\n", 1)[1].split("\n\n", 1)[0]
    return re.findall(r"\w+", block.replace("->", " "))


def layers() -> str:
    """Returns the picture of the subpackages as floors, with the direction of imports."""
    names, left, width, height = order(), 96, 560, 34
    groups = {"server": USE, "evaluate": USE, "generate": USE, "engine": USE, "aot": PODS}
    groups |= dict.fromkeys(("train", "data", "corpus"), TRAIN)
    parts = []
    rows = [("launch, configs", "one program per job; recipes", "#f3f4f6")]
    rows += [(name, PURPOSE[name], groups.get(name, DATA)) for name in names]
    for number, (name, purpose, fill) in enumerate(rows):
        y = 16 + number * (height + 6)
        parts += [
            f"<rect x='{left}' y='{y}' width='{width}' height='{height}' rx='6' fill='{fill}'"
            f" stroke='{LINE}'/>",
            f"<text x='{left + 16}' y='{y + 23}' font-size='16' font-weight='600'"
            f" fill='{INK}'>{html.escape(name)}</text>",
            text(left + 190, y + 22, purpose, size=14),
        ]
    end = 16 + len(rows) * (height + 6)
    parts.append(arrow([(60, 20), (60, end - 12)]))
    parts.append(
        f"<text x='44' y='{end // 2}' font-size='14' text-anchor='middle' fill='{MUTED}'"
        f" transform='rotate(-90 44 {end // 2})'>imports go down only</text>"
    )
    return page(left + width + 24, end + 10, parts, "Subpackages of qwen_jax in import order")


def demo(folder: pathlib.Path) -> bytes:
    """Returns the plot of a demo's held-out bits per byte beside those of the baselines."""
    results = folder / "results"
    held_out = json.loads((results / "held_out.json").read_text())["result"]
    scores = {"Qwen": {name: found["bits_per_byte"] for name, found in held_out.items()}}
    for field, (baseline, _) in CONTEXT_OF.items():
        scores[baseline] = {
            name: json.loads((results / f"baselines-{name}.json").read_text())["result"][field]
            for name in held_out
        }
    return held_out_figure(read_metrics(folder / "metrics.jsonl"), scores)


def main() -> None:
    """Writes the diagrams, and the plot of a demo if its folder is given."""
    if len(sys.argv) > 1:
        (FOLDER / "demo.svg").write_bytes(demo(pathlib.Path(sys.argv[1])))
    (FOLDER / "overview.svg").write_text(overview(), encoding="utf-8")
    (FOLDER / "layers.svg").write_text(layers(), encoding="utf-8")


if __name__ == "__main__":
    main()
