"""Logits of a Hugging Face Qwen folder on given token ids.

    python -m launch.logits --hf_dir=DIR --ids=IDS.npz --out=OUT.npz

IDS.npz holds integer arrays `ids_X` ([T] or [B, T]); OUT.npz gets `logits_X` in float32. Qwen v1
runs as released at inference: dynamic NTK and LogN where its config.json has them.
"""

from __future__ import annotations

from absl import flags

from launch import program
from qwen_jax.interop import logits


def _define_flags() -> None:
    flags.DEFINE_string("hf_dir", None, "folder with config.json and safetensors", required=True)
    flags.DEFINE_string("ids", None, ".npz with integer arrays ids_*", required=True)
    flags.DEFINE_string("out", None, ".npz to write", required=True)
    flags.DEFINE_string("dtype", "float32", "float32, bfloat16 or float16: weights and compute")
    flags.DEFINE_string("precision", "highest", "matmul precision: highest or default")
    flags.DEFINE_integer("tensor", 1, "devices the model is split over")


def main() -> None:
    """Reads, computes, writes."""
    args = flags.FLAGS
    logits.write_logits(
        args.hf_dir, args.ids, args.out,
        dtype=args.dtype, precision=args.precision, tensor=args.tensor,
    )  # fmt: skip
    print(f"wrote {args.out}")


if __name__ == "__main__":
    _define_flags()
    program.run(main)
