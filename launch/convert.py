"""Hugging Face folder ⇄ native checkpoint.

    python -m launch.convert --hf_dir=DIR --out=CHECKPOINTS
    python -m launch.convert --checkpoint=CHECKPOINTS --out=DIR --assets=FOLDER_WITH_TOKENIZER

The first writes step 0 of a checkpoint folder, float32 unless --dtype says otherwise; stages start
from it. The second writes a folder that transformers loads, bfloat16 unless --dtype says otherwise,
from any training checkpoint. The model must fit in the memory of this host's devices together (on
CPU: in RAM).
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

# Files of a model folder that are not weights: carried along unchanged.
ASSETS = (
    "qwen.tiktoken", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def to_native(hf_dir: str, out: str, *, dtype: str = "float32") -> ModelConfig:
    """Writes the weights of `hf_dir` as checkpoint 0 of the folder `out`; returns their network.

    The state is `{"params": tree}`, the fingerprint `{"model": ModelConfig as a dict}`, the info
    names source and `param_dtype`.

    Raises:
      UserError: a bad model folder or dtype, or checkpoints already in `out`.
    """
    _check_dtype(dtype)
    cfg = interop.read_config(hf_dir)
    target = pathlib.Path(out)
    if target.exists() and (not target.is_dir() or any(map(_finished, target.iterdir()))):
        raise UserError(f"{out} already exists and is not an empty folder; choose a new one")
    params = interop.load_params(hf_dir, cfg, _abstract(cfg, dtype))
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
    """Writes the parameters of a checkpoint as a Hugging Face folder; returns their network.

    Args:
      checkpoint: folder that has the `step_N` folders.
      out: folder to write; it must not exist or be empty.
      dtype: of the written tensors.
      step: which checkpoint; the newest by default.
      assets: folder whose tokenizer files, generation config and special token ids are carried
        along.

    Raises:
      UserError: no such checkpoint, damage, or anything `interop.save_hf` refuses.
    """
    _check_dtype(dtype)
    extras = _assets(assets) if assets else {}
    header = read_header(checkpoint, step)
    if "model" not in header.fingerprint:
        raise UserError(f"{checkpoint} does not say which model it is of; give one of a training")
    cfg = from_config_dict(ModelConfig, header.fingerprint["model"], "model")
    # Training keeps float32 parameters; only converted checkpoints may have another dtype.
    stored = header.info.get("param_dtype", "float32")
    params = restore_params(checkpoint, _abstract(cfg, stored), step=header.step)
    interop.save_hf(out, params, cfg, dtype=dtype, **extras)
    return cfg


def _finished(path: pathlib.Path) -> bool:
    """Whether an entry is more than what a killed conversion leaves, which a new one replaces."""
    return not path.name.endswith(".orbax-checkpoint-tmp")


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise UserError(
            f"dtype is {dtype!r}{nearest(dtype, DTYPES)}; it must be one of {', '.join(DTYPES)}"
        )


def _abstract(cfg: ModelConfig, dtype: str) -> Any:
    """The parameter tree in `dtype`, spread over as many devices as divide the channels."""
    devices = jax.devices()[: math.gcd(len(jax.devices()), cfg.d_model)]
    mesh = parallel.make_mesh(parallel.MeshConfig(fsdp=len(devices)), devices)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding),
        abstract_params(cfg, mesh),
    )


def _assets(path: str) -> dict[str, Any]:
    """Arguments of `save_hf` that carry a model folder's tokenizer and token ids along."""
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
    flags.DEFINE_string("hf_dir", None, "Hugging Face model folder to read")
    flags.DEFINE_string("checkpoint", None, "native checkpoint folder to read")
    flags.DEFINE_string("out", None, "folder to write", required=True)
    flags.DEFINE_string("dtype", None, "float32 (default into native), bfloat16 (out) or float16")
    flags.DEFINE_integer("step", None, "checkpoint to read; the newest by default")
    flags.DEFINE_string("assets", None, "model folder whose tokenizer files go into --out")


def main() -> None:
    """Converts in the direction that the flags say."""
    args = flags.FLAGS
    dtype = {"dtype": args.dtype} if args.dtype else {}
    if (args.hf_dir is None) == (args.checkpoint is None):
        raise UserError("give one of --hf_dir (into native) and --checkpoint (out of it)")
    if args.hf_dir is not None:
        if args.step is not None or args.assets is not None:
            raise UserError("--step and --assets go with --checkpoint; leave them out")
        cfg = to_native(args.hf_dir, args.out, **dtype)
    else:
        cfg = to_hf(args.checkpoint, args.out, step=args.step, assets=args.assets, **dtype)
    print(f"wrote {args.out}: {cfg.family}, {cfg.n_layers} layers, {cfg.d_model} channels")


if __name__ == "__main__":
    _define_flags()
    program.run(main)
