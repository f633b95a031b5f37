"""Quantises a Hugging Face folder to AutoGPTQ's layout, or reports the perplexity of each format.

    python -m launch.quantise --src=DIR --out=DIR [--bits=4] [--group=128] [--head]
    python -m launch.quantise --src=DIR --report=TEXTS [--window=512] [--windows=64] [--json=FILE]

The first command writes int4 or int8 weights, rounded to nearest, with a scale per group of inputs
or, with --group=-1, per output channel; --head also quantises the output head, to int8.
`load_params` and other engines read the folder. The second prints the perplexity of each format on
texts (a text file, JSON lines or a held-out folder of launch.prepare); the model must fit on one
device in float32.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

import numpy as np
from absl import flags, logging

from launch import program
from qwen_jax import interop
from qwen_jax.artifact import write_text
from qwen_jax.corpus.texts import read_texts
from qwen_jax.errors import UserError
from qwen_jax.evaluate.perplexity import split_windows
from qwen_jax.evaluate.quantisation import as_text, compare
from qwen_jax.interop.quantise import bits_per_weight, folder_bytes, quantise_folder
from qwen_jax.model import abstract_params
from qwen_jax.model.quantised import QuantFormat
from qwen_jax.tokenizer import load_tokenizer


def _define_flags() -> None:
    """Defines the flags; only called when run as a program."""
    flags.DEFINE_string("src", None, "Hugging Face folder with unquantised weights", required=True)
    flags.DEFINE_string("out", None, "folder to write")
    flags.DEFINE_integer("bits", 4, "bits per weight: 4 or 8")
    flags.DEFINE_integer("group", 128, "inputs per scale; -1: one scale per output channel")
    flags.DEFINE_bool("head", False, "also quantise the output head, to int8")
    flags.DEFINE_string("report", None, "texts on which to measure the perplexity of each format")
    flags.DEFINE_string("tokenizer", None, "vocabulary; by default the one in --src")
    flags.DEFINE_integer("window", 512, "tokens per window")
    flags.DEFINE_integer("windows", 64, "maximum number of windows")
    flags.DEFINE_string("json", None, "file to which the report is also written, as JSON")


def write_quantised(src: str, out: str, fmt: QuantFormat) -> None:
    """Quantises the folder `src` to `out` and prints the sizes of both."""
    quantise_folder(src, out, fmt)
    before, after = folder_bytes(src), folder_bytes(out)
    print(
        f"wrote {out}: {fmt.name}, {bits_per_weight(out):.2f} bits per weight in the layers, "
        f"{after / 1e6:.1f} MB instead of {before / 1e6:.1f}"
    )


def report(src: str, texts: str, tokenizer: str | None, window: int, windows: int) -> dict:
    """Measures and prints the perplexity of each weight format.

    Args:
      src: Hugging Face folder with unquantised weights.
      texts: a text file, JSON lines or a held-out folder of `launch.prepare`.
      tokenizer: vocabulary file or folder; None for the one in `src`.
      window: tokens per window.
      windows: maximum number of windows, taken at equal distances from all texts.

    Returns:
      The settings and one row per format, as JSON types.

    Raises:
      UserError: a folder or text cannot be read, or a number is below 1.
    """
    if window < 1 or windows < 1:
        raise UserError(f"--window={window} and --windows={windows} must be at least 1")
    config = interop.read_config(src)
    vocabulary = load_tokenizer(tokenizer or src)
    ids = [vocabulary.encode(document.text) for document in read_texts(texts)]
    all_windows = split_windows(ids, window)
    # At equal distances, so that the windows are not all from the first texts.
    indices = np.linspace(0, len(all_windows) - 1, min(windows, len(all_windows)))
    chosen = all_windows[indices.astype(int)]
    params = interop.load_params(src, config, abstract_params(config))
    logging.info("%d windows of %d tokens", len(chosen), window)
    rows = compare(
        params,
        chosen,
        config,
        on_row=lambda row: logging.info("%s: perplexity %.4f", row.name, row.perplexity),
    )
    print(as_text(rows))
    return {
        "texts": texts,
        "windows": len(chosen),
        "window": window,
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def main() -> None:
    """Writes a quantised folder for --out, or measures all formats for --report."""
    args = flags.FLAGS
    if (args.out is None) == (args.report is None):
        raise UserError("give either --out (write a folder) or --report (measure on texts)")
    if args.report is not None:
        found = report(args.src, args.report, args.tokenizer, args.window, args.windows)
        if args.json:
            write_text(pathlib.Path(args.json), json.dumps(found, indent=1) + "\n")
        return
    if args.group < 1 and args.group != -1:
        raise UserError(
            f"--group={args.group} must be positive, or -1 for one scale per output channel"
        )
    group = None if args.group == -1 else args.group
    write_quantised(args.src, args.out, QuantFormat(args.bits, group, args.head))


if __name__ == "__main__":
    _define_flags()
    program.run(main)
