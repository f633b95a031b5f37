"""Computes logits of a Hugging Face model folder on given token ids, to compare implementations.

Token ids are read from an `.npz` of integer arrays `ids_*`; logits are written to an `.npz` of
arrays `logits_*`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from qwen_jax import parallel
from qwen_jax.errors import UserError
from qwen_jax.interop.load import load_params, read_config
from qwen_jax.model import ForwardOptions, ModelConfig, abstract_params, forward, ntk_alphas

PRECISIONS = ("highest", "default")
"""Matmul precisions: float32 products everywhere, or the accelerator's fast default."""


def prompt_logits(
    params: dict[str, Any], ids: np.ndarray, cfg: ModelConfig, options: ForwardOptions
) -> jax.Array:
    """Computes the logits of complete prompts as the released code does at inference.

    For Qwen v1, dynamic NTK (with the factor of the prompt's length) and LogN attention (past the
    trained length) are applied if its config has them (modeling_qwen.py of Qwen/Qwen-7B).

    Args:
      params: the parameters of `cfg`.
      ids: integers [B, T] (batch, sequence) in [0, vocab_size); every row is a complete prompt.
      cfg: the network.
      options: dtype and attention implementation.

    Returns:
      float32 [B, T, V] (V: vocabulary size).
    """
    alpha = None
    if cfg.dynamic_ntk:
        alpha = np.tile(ntk_alphas(ids.shape[-1], cfg), (ids.shape[0], 1))
    return _forward(cfg, options)(params, jnp.asarray(ids, jnp.int32), alpha)


@functools.lru_cache(maxsize=4)
def _forward(cfg: ModelConfig, options: ForwardOptions) -> Callable[..., jax.Array]:
    """Returns the jitted function from (params, tokens, NTK factors) to the logits of a network.

    Shapes: tokens int32 [B, T] (batch, sequence); NTK factors as `forward` takes them, or None;
    logits float32 [B, T, V] (vocabulary size). LogN is applied if `cfg` has it.
    """

    @jax.jit
    def run(params: dict[str, Any], tokens: jax.Array, alpha: jax.Array | None) -> jax.Array:
        return forward(params, tokens, cfg, options, ntk_alpha=alpha, logn=cfg.logn)[0]

    return run


def write_logits(
    hf_dir: str | pathlib.Path,
    ids_file: str | pathlib.Path,
    out_file: str | pathlib.Path,
    *,
    dtype: str = "float32",
    precision: str = "highest",
    tensor: int = 1,
) -> None:
    """Runs the model of a folder on the prompts of a file and writes their logits.

    For each array `ids_X`, [T] or [B, T] (batch, sequence), `logits_X` float32 [..., V] (vocabulary
    size) is written.

    Args:
      hf_dir: model folder with config.json and safetensors.
      ids_file: `.npz` with integer arrays whose names start with `ids_`; others are ignored.
      out_file: `.npz` to write; it appears only when complete.
      dtype: dtype of the weights and of the computation.
      precision: matmul precision, "highest" (float32 products everywhere) or "default" (the
        accelerator's fast one).
      tensor: number of devices for tensor parallelism.

    Raises:
      UserError: a bad folder, ids file or option; ids outside the vocabulary; or prompts longer
        than the model's maximum length.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}")
    options = ForwardOptions(dtype=dtype)
    cfg = read_config(hf_dir)
    prompts = read_ids(ids_file, cfg)
    mesh = _mesh(cfg, tensor)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, options.compute_dtype, sharding=x.sharding),
        abstract_params(cfg, mesh),
    )
    params = load_params(hf_dir, cfg, abstract)
    out = {}
    with (
        contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh),
        jax.default_matmul_precision(precision),
    ):
        for i, (name, ids) in enumerate(prompts.items()):
            logging.info("%s %s (%d of %d)", name, list(ids.shape), i + 1, len(prompts))
            result = np.asarray(prompt_logits(params, np.atleast_2d(ids), cfg, options))
            out["logits_" + name.removeprefix("ids_")] = result.reshape(*ids.shape, cfg.vocab_size)
    _write_npz(pathlib.Path(out_file), out)


def longest_sequence(cfg: ModelConfig) -> int:
    """Returns the longest sequence a model supports: `max_length`, or YaRN's extended length."""
    stretched = int(cfg.yarn.factor * cfg.yarn.original_length) if cfg.yarn else 0
    return max(cfg.max_length, stretched)


def read_ids(file: str | pathlib.Path, cfg: ModelConfig) -> dict[str, np.ndarray]:
    """Reads the `ids_*` arrays of an `.npz` and checks them against the network.

    Returns:
      Array name → integers [T] or [B, T] (batch, sequence).

    Raises:
      UserError: the file is no readable `.npz`, has no such arrays, or one has another dtype or
        rank, an id outside the vocabulary, or a prompt that is empty or too long.
    """
    try:
        stored = np.load(file, allow_pickle=False)
        if not isinstance(stored, np.lib.npyio.NpzFile):
            raise ValueError("it contains a single array, without a name")
        with stored:
            prompts = {name: stored[name] for name in stored.files if name.startswith("ids_")}
            others = [name for name in stored.files if not name.startswith("ids_")]
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as e:
        raise UserError(f"{file} is not a readable .npz of plain arrays ({e})") from e
    if not prompts:
        raise UserError(
            f"{file} has no array whose name starts with 'ids_' (found: "
            f"{', '.join(others) or 'nothing'}); name the token ids ids_something"
        )
    for name, ids in prompts.items():
        where = f"{file}: {name}"
        if not np.issubdtype(ids.dtype, np.integer):
            raise UserError(f"{where} is {ids.dtype}; token ids must be integers")
        if ids.ndim not in (1, 2) or not ids.size:
            raise UserError(f"{where} has shape {list(ids.shape)}; it must be [T] or [B, T], T ≥ 1")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= cfg.vocab_size:
            raise UserError(
                f"{where} has the id {low if low < 0 else high}; ids of this model are 0 to "
                f"{cfg.vocab_size - 1}"
            )
        if ids.shape[-1] > longest_sequence(cfg):
            raise UserError(
                f"{where} has {ids.shape[-1]} tokens; the longest sequence of this model is "
                f"{longest_sequence(cfg)} (max_position_embeddings in config.json): shorten it"
            )
    return prompts


def _mesh(cfg: ModelConfig, tensor: int) -> jax.sharding.Mesh | None:
    """Returns a mesh with tensor parallelism over `tensor` devices; None for a single device.

    Raises:
      UserError: `tensor` does not divide the network's dimensions, or there are fewer devices.
    """
    if tensor == 1:
        return None
    devices = jax.devices()
    sizes = {
        "kv heads": cfg.n_kv_heads,
        "FFN width": cfg.d_ff,
        "vocabulary": cfg.vocab_size,
        "channels": cfg.d_model,
    }
    for name, size in sizes.items():
        if tensor < 1 or size % tensor:
            raise UserError(f"tensor={tensor} must divide the model's {name} {size}; change it")
    if tensor > len(devices):
        raise UserError(f"tensor={tensor} needs that many devices, but there are {len(devices)}")
    return parallel.make_mesh(parallel.MeshConfig(1, 1, 1, tensor), devices[:tensor])


def _write_npz(file: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes named arrays to an `.npz`, replacing the file atomically; creates its folder.

    Raises:
      UserError: the file cannot be written.
    """
    partial = file.with_name(file.name + ".partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as f:
            np.savez(f, **arrays)  # type: ignore[arg-type]  # The stub confuses **kwds and flags.
        os.replace(partial, file)
    except OSError as e:
        raise UserError(f"{file} cannot be written ({e.strerror}); choose another place") from e
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
