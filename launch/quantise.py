"""A plain Hugging Face folder as a quantised one, in AutoGPTQ's layout.

    python -m launch.quantise --src=DIR --out=DIR [--bits=4] [--group=128] [--head]
    python -m launch.quantise --src=DIR --report=TEXT.txt [--window=512] [--windows=32]

The first writes int4 or int8 weights, rounded to nearest, in groups of inputs or, with --group=-1,
with one scale per output channel; --head takes the output head along, to int8. `load_params` and
other engines read the folder. The second writes nothing: it measures the perplexity that each
format loses on a text.
"""

from __future__ import annotations

from absl import flags

from launch import program
from qwen_jax.errors import UserError
from qwen_jax.interop.quantise import bits_per_weight, folder_bytes, quantise_folder
from qwen_jax.model.quantised import Format


def _define_flags() -> None:
    flags.DEFINE_string("src", None, "Hugging Face folder of plain weights", required=True)
    flags.DEFINE_string("out", None, "folder to write")
    flags.DEFINE_integer("bits", 4, "bits a weight: 4 or 8")
    flags.DEFINE_integer("group", 128, "inputs that share a scale; -1: all of an output channel")
    flags.DEFINE_bool("head", False, "quantise the output head too, to int8")


def main() -> None:
    """Quantises and says what came of it."""
    args = flags.FLAGS
    if args.group < 1 and args.group != -1:
        raise UserError(f"--group={args.group} must be a positive number, or -1 for one scale each")
    fmt = Format(args.bits, None if args.group == -1 else args.group, args.head)
    quantise_folder(args.src, args.out, fmt)
    before, after = folder_bytes(args.src), folder_bytes(args.out)
    print(
        f"wrote {args.out}: {fmt.name}, {bits_per_weight(args.out):.2f} bits a weight in the "
        f"layers, {after / 1e6:.1f} MB instead of {before / 1e6:.1f}"
    )


if __name__ == "__main__":
    _define_flags()
    program.run(main)
