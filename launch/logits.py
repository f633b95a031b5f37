"""Computes the logits of a Hugging Face Qwen folder on given token ids.

    python -m launch.logits --hf_dir=DIR --ids=IDS.npz --out=OUT.npz

IDS.npz contains integer arrays `ids_X`, [T] or [B, T] for B rows of T tokens. OUT.npz gets
`logits_X`, float32 with one more axis for the vocabulary. Qwen v1 uses dynamic NTK and LogN if its
config.json enables them, as the release does at inference.
"""

from __future__ import annotations

from absl import flags

from launch import program
from qwen_jax.interop import logits


def _define_flags() -> None:
    """Defines the flags; only called when run as a program."""
    flags.DEFINE_string("hf_dir", None, "folder with config.json and safetensors", required=True)
    flags.DEFINE_string("ids", None, ".npz with integer arrays ids_*", required=True)
    flags.DEFINE_string("out", None, ".npz to write", required=True)
    flags.DEFINE_string(
        "dtype", "float32", "dtype of weights and computation: float32, bfloat16 or float16"
    )
    flags.DEFINE_string("precision", "highest", "matmul precision: highest or default")
    flags.DEFINE_integer("tensor", 1, "number of devices over which the model is sharded")


def main() -> None:
    """Writes the logits as the flags specify."""
    args = flags.FLAGS
    logits.write_logits(
        args.hf_dir,
        args.ids,
        args.out,
        dtype=args.dtype,
        precision=args.precision,
        tensor=args.tensor,
    )
    print(f"wrote {args.out}")


if __name__ == "__main__":
    _define_flags()
    program.run(main)
