"""Logits of a Hugging Face Qwen folder on given token ids.

    python -m launch.logits --hf_dir=DIR --ids=IDS.npz --out=OUT.npz

IDS.npz holds integer arrays `ids_X` ([T] or [B, T]); OUT.npz gets `logits_X` in float32. Qwen v1
runs as released at inference: dynamic NTK and LogN where its config.json has them.
"""

from __future__ import annotations

import sys

from absl import app, flags

from qwen_jax.errors import UserError
from qwen_jax.interop import logits


def _define_flags() -> None:
    flags.DEFINE_string("hf_dir", None, "folder with config.json and safetensors", required=True)
    flags.DEFINE_string("ids", None, ".npz with integer arrays ids_*", required=True)
    flags.DEFINE_string("out", None, ".npz to write", required=True)
    flags.DEFINE_string("dtype", "float32", "float32, bfloat16 or float16: weights and compute")
    flags.DEFINE_string("precision", "highest", "matmul precision: highest or default")
    flags.DEFINE_integer("tensor", 1, "devices the model is split over")


def main(argv: list[str]) -> None:
    """Runs the program; bad input ends it with one sentence and status 2."""
    args = flags.FLAGS
    try:
        if len(argv) > 1:
            raise UserError(f"{argv[1]!r} is not a flag; see --help")
        logits.write_logits(
            args.hf_dir, args.ids, args.out,
            dtype=args.dtype, precision=args.precision, tensor=args.tensor,
        )  # fmt: skip
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    _define_flags()
    app.run(main)
