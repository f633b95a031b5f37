"""Native parameters as a Hugging Face folder: shards, index, config and tokenizer files.

One layer of one leaf is in host memory at a time. The folder appears complete or not at all.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
from absl import logging

from qwen_jax.errors import UserError
from qwen_jax.interop import hf_config_write, mapping, safetensors_io
from qwen_jax.model.config import ModelConfig
from qwen_jax.parallel.distributed import on_first_process
from qwen_jax.progress import Progress

DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}


def save_hf(
    folder: str | pathlib.Path,
    params: Mapping[str, Any],
    cfg: ModelConfig,
    *,
    dtype: str = "bfloat16",
    max_shard_bytes: int = 5_000_000_000,
    tokenizer_files: Sequence[str | pathlib.Path] = (),
    generation_config: Mapping[str, Any] | None = None,
    config_extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes a folder that transformers and other engines load as a released Qwen.

    Tensors are cast to `dtype`, so weights that came from a folder in that dtype go back bit for
    bit. With several processes all must call it; process 0 writes.

    Args:
      folder: where to write; it must not exist or be empty.
      params: the native tree of `jax.Array` (any sharding) or numpy arrays.
      cfg: its network.
      dtype: "bfloat16", "float16" or "float32".
      max_shard_bytes: a file holds at most this many bytes of data, or a single tensor.
      tokenizer_files: files copied in under their own names.
      generation_config: written as `generation_config.json`.
      config_extra: further `config.json` keys such as `eos_token_id`.

    Raises:
      UserError: the folder is not empty, the disk is too small, a file to copy is missing, `cfg`
        or a leaf has no Hugging Face name, a value overflows float16.
    """
    folder = pathlib.Path(folder)
    config = _check(params, cfg, dtype, tokenizer_files, config_extra)
    shards = _plan(cfg, DTYPES[dtype], max_shard_bytes)
    partial = folder.parent / f".{folder.name}.hf-export-partial"
    on_first_process(lambda: prepare_folder(folder, partial, _total_bytes(cfg, dtype)))
    writes = jax.process_index() == 0
    try:
        if writes:
            write_json(partial / "config.json", config)
            if generation_config is not None:
                write_json(partial / "generation_config.json", generation_config)
            if len(shards) > 1:
                write_json(partial / "model.safetensors.index.json", _index(shards, dtype))
            for file in tokenizer_files:
                shutil.copyfile(file, partial / pathlib.Path(file).name)
        _write_shards(partial if writes else None, params, shards, dtype)
        on_first_process(lambda: os.replace(partial, folder))
    except BaseException:
        if writes:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    logging.info("saved %s to %s", cfg.family, folder)


def _write_shards(folder: pathlib.Path | None, params, shards: Mapping, dtype: str) -> None:
    """Writes all files into `folder`; with None takes part in collecting the arrays only."""
    sizes = (t.size for tensors in shards.values() for t in tensors.values())
    progress = Progress("save", sum(sizes) * DTYPES[dtype].itemsize, "B", every=5.0)
    for name, tensors in shards.items():
        blocks = _blocks(params, tensors, DTYPES[dtype])
        if folder is None:
            for _ in blocks:
                pass
            continue
        stored = {n: (t.shape, DTYPES[dtype]) for n, t in tensors.items()}
        for nbytes in safetensors_io.write_file(folder / name, stored, blocks):
            progress.add(nbytes)


def _total_bytes(cfg: ModelConfig, dtype: str) -> int:
    return sum(t.size for t in mapping.hf_tensors(cfg).values()) * DTYPES[dtype].itemsize


def _check(params, cfg, dtype, tokenizer_files, config_extra) -> dict[str, Any]:
    """Refuses what cannot be written; returns the `config.json` object."""
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    config = hf_config_write.config_to_hf(cfg, dtype=dtype, extra=config_extra)
    for file in map(pathlib.Path, tokenizer_files):
        if not file.is_file():
            raise UserError(f"{file}, to be copied, does not exist; correct its name")
    known = {slot.path: slot.shape for slot in mapping.slots(cfg)}
    found = {
        tuple(key.key for key in path): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    for path in sorted(known.keys() ^ found.keys()):
        state = "is missing from the parameters" if path in known else "has no Hugging Face name"
        raise UserError(
            f"parameter {'/'.join(path)} {state} for family {cfg.family!r}; save the language "
            "model alone, with the config it was made from"
        )
    for path, shape in known.items():
        if found[path] != shape:
            raise UserError(
                f"parameter {'/'.join(path)} has shape {list(found[path])}, but the config asks "
                f"for {list(shape)}; save with the config the parameters were made from"
            )
    return config


def prepare_folder(folder: pathlib.Path, partial: pathlib.Path, need: int) -> None:
    """Makes the hidden folder beside the target, empty even after a killed run.

    Raises:
      UserError: the target is not an empty folder, or `need` bytes don't fit beside it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} already exists and is not an empty folder; choose a new one")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(partial.parent).free
        if free >= need:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
    except OSError as e:
        raise UserError(
            f"{partial.parent} cannot be written to ({e.strerror}); choose another place"
        ) from e
    if free < need:
        raise UserError(
            f"{partial.parent} has {free / 1e9:.1f} GB free, but the weights take "
            f"{need / 1e9:.1f} GB; free some space or choose another place"
        )


def plan_files(
    stored: Mapping[str, tuple[tuple[int, ...], np.dtype]], max_bytes: int
) -> dict[str, list[str]]:
    """File name → its tensors: filled in the order of `stored`, sorted by name inside a file.

    Raises:
      UserError: `max_bytes` below 1.
    """
    if max_bytes < 1:
        raise UserError(f"max_shard_bytes is {max_bytes}; it must be at least 1")
    groups: list[list[str]] = [[]]
    used = 0
    for name, (shape, dtype) in stored.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if groups[-1] and used + nbytes > max_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += nbytes
    ordered = [sorted(group) for group in groups]
    if len(ordered) == 1:
        return {"model.safetensors": ordered[0]}
    total = len(ordered)
    return {f"model-{i + 1:05d}-of-{total:05d}.safetensors": g for i, g in enumerate(ordered)}


def _plan(cfg: ModelConfig, dtype: np.dtype, max_bytes: int) -> dict[str, dict]:
    """File name → its tensors by name."""
    tensors = mapping.hf_tensors(cfg)
    stored = {name: (tensor.shape, dtype) for name, tensor in tensors.items()}
    files = plan_files(stored, max_bytes)
    return {file: {name: tensors[name] for name in names} for file, names in files.items()}


def _index(shards: Mapping[str, Mapping[str, mapping.HFTensor]], dtype: str) -> dict[str, Any]:
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    size = sum(t.size for tensors in shards.values() for t in tensors.values())
    return {
        "metadata": {"total_size": size * DTYPES[dtype].itemsize},
        "weight_map": dict(sorted(weight_map.items())),
    }


def write_json(file: pathlib.Path, value: Mapping[str, Any]) -> None:
    """One JSON object, indented."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _blocks(params, tensors: Mapping[str, mapping.HFTensor], dtype) -> Iterator[np.ndarray]:
    """The data of `tensors` in order, one (leaf, layer) block at a time, in host memory."""
    for name, tensor in tensors.items():
        for slot, layer in tensor.parts:
            leaf = mapping.leaf_of(params, slot.path)
            block = _fetch(leaf, layer if slot.stacked else None, dtype)
            # Cast from a finite float32 or bfloat16: infinity can only be an overflow.
            if dtype == np.float16 and not np.isfinite(block).all():
                raise UserError(
                    f"{name} has values that float16 cannot hold; use dtype bfloat16 or float32"
                )
            block = slot.to_hf(block)
            yield block
            del block  # Before the next one is fetched.


def _fetch(leaf, layer: int | None, dtype: np.dtype) -> np.ndarray:
    """`leaf[layer]` (or the whole leaf) in `dtype` on this host, whatever its sharding."""
    with np.errstate(over="ignore"):  # Reported by the caller.
        if isinstance(leaf, np.ndarray):
            return (leaf if layer is None else leaf[layer]).astype(dtype)
        if leaf.is_fully_addressable:
            return _assemble(leaf, layer, dtype)
    replicated = jax.NamedSharding(leaf.sharding.mesh, jax.P())
    cut = jax.jit(_cut, static_argnames=("whole", "dtype"), out_shardings=replicated)
    out = cut(leaf, layer or 0, whole=layer is None, dtype=dtype)
    return np.asarray(out.addressable_data(0))


def _cut(x: jax.Array, layer: jax.Array, *, whole: bool, dtype: np.dtype) -> jax.Array:
    """x[layer] (x when `whole`) in `dtype`; the layer is traced, so one program does all layers."""
    return (x if whole else jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False)).astype(dtype)


_cut_on_device = jax.jit(_cut, static_argnames=("whole", "dtype"))


def _assemble(leaf: jax.Array, layer: int | None, dtype: np.dtype) -> np.ndarray:
    """Puts the shards together on the host, so that no device needs room for the whole."""
    out = np.empty(leaf.shape if layer is None else leaf.shape[1:], dtype)
    for shard in leaf.addressable_shards:
        index, own = shard.index, layer
        if layer is not None:
            first, stop = index[0].indices(leaf.shape[0])[:2]
            if not first <= layer < stop:
                continue
            index, own = index[1:], layer - first
        if shard.replica_id == 0:
            if shard.device.platform == "cpu":  # Its memory is the host's: no program, no copy.
                data = np.asarray(shard.data)
                out[index] = data if layer is None else data[own]
            else:
                out[index] = _cut_on_device(shard.data, own or 0, whole=layer is None, dtype=dtype)
    return out
