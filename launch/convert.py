"""Converts a Hugging Face folder to a native checkpoint, or a checkpoint to such a folder.

    python -m launch.convert --hf_dir=DIR --out=CHECKPOINTS
    python -m launch.convert --checkpoint=CHECKPOINTS --out=DIR --assets=FOLDER_WITH_TOKENIZER

The first command writes step 0 of a checkpoint folder, from which training stages start; --dtype is
float32 by default. The second writes a folder that transformers loads, from any checkpoint; --dtype
is bfloat16 by default. The model must fit in the combined memory of this host's devices (on CPU: in
RAM).
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Any

import jax
from absl import flags

from launch import program
from qwen_jax import interop, parallel
from qwen_jax.config import from_config_dict
from qwen_jax.errors import UserError, nearest
from qwen_jax.interop import folder as hf_folder
from qwen_jax.json_files import read_json
from qwen_jax.model import ModelConfig, abstract_params
from qwen_jax.train.checkpoint import Checkpoints, read_header, restore_params

DTYPES = ("float32", "bfloat16", "float16")

# Files of a model folder that are copied unchanged, beside the weights.
ASSETS = (
    "qwen.tiktoken", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def to_native(hf_dir: str, out: str, *, dtype: str = "float32") -> ModelConfig:
    """Writes the weights of a Hugging Face folder as step 0 of a checkpoint folder.

    The state of the checkpoint is `{"params": tree}`, its fingerprint `{"model": ModelConfig as a
    dict}`, its info the name of the source folder and `param_dtype`.

    Args:
      hf_dir: Hugging Face model folder.
      out: checkpoint folder to write; it must not contain checkpoints.
      dtype: dtype name of the written parameters.

    Returns:
      The configuration of the model.

    Raises:
      UserError: the model folder is missing or damaged, the dtype is unknown, or `out` is not
        empty.
    """
    _check_dtype(dtype)
    cfg = interop.read_config(hf_dir)
    target = pathlib.Path(out)
    if target.exists() and (not target.is_dir() or any(map(_is_result, target.iterdir()))):
        raise UserError(f"{out} already exists and is not an empty folder; choose a new one")
    params = interop.load_params(hf_dir, cfg, _abstract_params(cfg, dtype))
    fingerprint = {"model": dataclasses.asdict(cfg)}
    info = {"source": pathlib.Path(hf_dir).resolve().name, "param_dtype": dtype}
    with Checkpoints(out, keep_last=1, keep_every=None, fingerprint=fingerprint) as checkpoints:
        checkpoints.save(0, {"params": params}, info, wait=True)
    return cfg


def to_hf(
    checkpoint: str,
    out: str,
    *,
    dtype: str = "bfloat16",
    step: int | None = None,
    assets: str | None = None,
) -> ModelConfig:
    """Writes the parameters of a checkpoint as a Hugging Face folder.

    Args:
      checkpoint: folder with the `step_N` folders.
      out: folder to write; it must be empty or not exist.
      dtype: dtype name of the written tensors.
      step: step of the checkpoint; the newest by default.
      assets: model folder from which tokenizer files, generation config and special token ids are
        copied; None copies none.

    Returns:
      The configuration of the model.

    Raises:
      UserError: the checkpoint is missing or damaged, the dtype is unknown, or as
        `interop.save_hf`.
    """
    _check_dtype(dtype)
    extras = _read_assets(assets) if assets else {}
    header = read_header(checkpoint, step)
    if "model" not in header.fingerprint:
        raise UserError(
            f"{checkpoint} has no model configuration; give the checkpoints of a training run"
        )
    cfg = from_config_dict(ModelConfig, header.fingerprint["model"], "model")
    # Training writes float32 parameters; only converted checkpoints can have another dtype.
    stored_dtype = header.info.get("param_dtype", "float32")
    params = restore_params(checkpoint, _abstract_params(cfg, stored_dtype), step=header.step)
    interop.save_hf(out, params, cfg, dtype=dtype, **extras)
    return cfg


def _is_result(path: pathlib.Path) -> bool:
    """Returns whether a file or folder is not a remainder of an interrupted conversion.

    Remainders are replaced by the next conversion.
    """
    return not path.name.endswith(".orbax-checkpoint-tmp")


def _check_dtype(dtype: str) -> None:
    """Raises UserError unless `dtype` is one of `DTYPES`."""
    if dtype not in DTYPES:
        raise UserError(
            f"dtype is {dtype!r}{nearest(dtype, DTYPES)}; it must be one of {', '.join(DTYPES)}"
        )


def _abstract_params(cfg: ModelConfig, dtype: str) -> Any:
    """Returns the abstract parameter tree in `dtype`, sharded over this host's devices.

    The number of devices is the largest that divides both their total and `cfg.d_model`.
    """
    devices = jax.devices()[: math.gcd(len(jax.devices()), cfg.d_model)]
    mesh = parallel.make_mesh(parallel.MeshConfig(fsdp=len(devices)), devices)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding),
        abstract_params(cfg, mesh),
    )


def _read_assets(path: str) -> dict[str, Any]:
    """Returns keyword arguments of `save_hf`: tokenizer files, token ids and generation config.

    Args:
      path: Hugging Face model folder that they are read from.
    """
    source = pathlib.Path(path)
    config = hf_folder.read_config_json(source)
    extras: dict[str, Any] = {
        "tokenizer_files": [source / name for name in ASSETS if (source / name).is_file()],
        "config_extra": {name: config[name] for name in TOKEN_IDS if config.get(name) is not None},
    }
    if (source / "generation_config.json").is_file():
        extras["generation_config"] = read_json(source / "generation_config.json")
    return extras


def _define_flags() -> None:
    """Defines the flags; only called when run as a program."""
    flags.DEFINE_string("hf_dir", None, "Hugging Face model folder to read")
    flags.DEFINE_string("checkpoint", None, "folder of native checkpoints to read")
    flags.DEFINE_string("out", None, "folder to write", required=True)
    flags.DEFINE_string(
        "dtype", None, "float32 (default with --hf_dir), bfloat16 (with --checkpoint) or float16"
    )
    flags.DEFINE_integer("step", None, "step of the checkpoint; the newest by default")
    flags.DEFINE_string("assets", None, "model folder whose tokenizer files are copied")


def main() -> None:
    """Converts in the direction that --hf_dir or --checkpoint determines."""
    args = flags.FLAGS
    dtype = {"dtype": args.dtype} if args.dtype else {}
    if (args.hf_dir is None) == (args.checkpoint is None):
        raise UserError("give either --hf_dir (to a checkpoint) or --checkpoint (to a folder)")
    if args.hf_dir is not None:
        if args.step is not None or args.assets is not None:
            raise UserError("--step and --assets apply to --checkpoint only; leave them out")
        cfg = to_native(args.hf_dir, args.out, **dtype)
    else:
        cfg = to_hf(args.checkpoint, args.out, step=args.step, assets=args.assets, **dtype)
    print(f"wrote {args.out}: {cfg.family}, {cfg.n_layers} layers, {cfg.d_model} channels")


if __name__ == "__main__":
    _define_flags()
    program.run(main)
