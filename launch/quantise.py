"""A plain Hugging Face folder as a quantised one, in AutoGPTQ's layout; or what that would cost.

    python -m launch.quantise --src=DIR --out=DIR [--bits=4] [--group=128] [--head]
    python -m launch.quantise --src=DIR --report=TEXTS [--window=512] [--windows=64] [--json=FILE]

The first writes int4 or int8 weights, rounded to nearest, in groups of inputs or, with --group=-1,
with one scale per output channel; --head takes the output head along, to int8. `load_params` and
other engines read the folder. The second prints the perplexity of each format on texts (a text
file, JSON lines or a held-out folder of launch.prepare); the model must fit on one device in
float32.
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
    flags.DEFINE_string("src", None, "Hugging Face folder of plain weights", required=True)
    flags.DEFINE_string("out", None, "folder to write")
    flags.DEFINE_integer("bits", 4, "bits a weight: 4 or 8")
    flags.DEFINE_integer("group", 128, "inputs that share a scale; -1: all of an output channel")
    flags.DEFINE_bool("head", False, "quantise the output head too, to int8")
    flags.DEFINE_string("report", None, "texts to measure the perplexity of each format on")
    flags.DEFINE_string("tokenizer", None, "vocabulary; by default the one in --src")
    flags.DEFINE_integer("window", 512, "tokens of a window")
    flags.DEFINE_integer("windows", 64, "at most so many windows")
    flags.DEFINE_string("json", None, "file that also gets the report, as JSON")


def write(src: str, out: str, fmt: QuantFormat) -> None:
    """Quantises a folder and says what came of it."""
    quantise_folder(src, out, fmt)
    before, after = folder_bytes(src), folder_bytes(out)
    print(
        f"wrote {out}: {fmt.name}, {bits_per_weight(out):.2f} bits a weight in the layers, "
        f"{after / 1e6:.1f} MB instead of {before / 1e6:.1f}"
    )


def report(src: str, texts: str, tokenizer: str | None, window: int, windows: int) -> dict:
    """Prints the table of all formats and returns it as JSON types.

    Raises:
      UserError: a folder, text or number that can't be used.
    """
    if window < 1 or windows < 1:
        raise UserError(f"--window={window} and --windows={windows} must be at least 1")
    config = interop.read_config(src)
    vocabulary = load_tokenizer(tokenizer or src)
    ids = [vocabulary.encode(document.text) for document in read_texts(texts)]
    cuts = split_windows(ids, window)
    # Spread over the texts, not the first ones.
    cuts = cuts[np.linspace(0, len(cuts) - 1, min(windows, len(cuts))).astype(int)]
    params = interop.load_params(src, config, abstract_params(config))
    logging.info("%d windows of %d tokens", len(cuts), window)
    rows = compare(
        params, cuts, config,
        on_row=lambda row: logging.info("%s: perplexity %.4f", row.name, row.perplexity),
    )  # fmt: skip
    print(as_text(rows))
    return {
        "texts": texts,
        "windows": len(cuts),
        "window": window,
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def main() -> None:
    """Writes or reports, as the flags say."""
    args = flags.FLAGS
    if (args.out is None) == (args.report is None):
        raise UserError("give one of --out (write a folder) and --report (measure on a text)")
    if args.report is not None:
        found = report(args.src, args.report, args.tokenizer, args.window, args.windows)
        if args.json:
            write_text(pathlib.Path(args.json), json.dumps(found, indent=1) + "\n")
        return
    if args.group < 1 and args.group != -1:
        raise UserError(f"--group={args.group} must be a positive number, or -1 for one scale each")
    group = None if args.group == -1 else args.group
    write(args.src, args.out, QuantFormat(args.bits, group, args.head))


if __name__ == "__main__":
    _define_flags()
    program.run(main)
