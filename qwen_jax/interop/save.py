"""Writes native parameters as a Hugging Face model folder: shards, index, config, tokenizer files.

One layer of one leaf is in host memory at a time. The folder appears only when it is complete.
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
    """Writes a model folder that transformers and other engines load as a released Qwen.

    Weights are cast to `dtype`; those loaded from a folder of that dtype are written with identical
    bits. With several processes all must call this function; process 0 writes.

    Args:
      folder: folder to write; it must not exist or be empty.
      params: native tree of `jax.Array` with any sharding, or of numpy arrays.
      cfg: the network.
      dtype: "bfloat16", "float16" or "float32".
      max_shard_bytes: maximum bytes of data per file; a larger tensor gets a file of its own.
      tokenizer_files: files to copy into the folder.
      generation_config: content of `generation_config.json`; None writes no such file.
      config_extra: further `config.json` keys such as `eos_token_id`.

    Raises:
      UserError: the folder is not empty, the disk is too small, a file to copy is missing, `cfg`
        or a leaf has no Hugging Face equivalent, or a value overflows float16.
    """
    folder = pathlib.Path(folder)
    config = _check_exportable(params, cfg, dtype, tokenizer_files, config_extra)
    shards = _plan_shards(cfg, DTYPES[dtype], max_shard_bytes)
    partial = folder.parent / f".{folder.name}.hf-export-partial"
    on_first_process(lambda: prepare_partial_folder(folder, partial, _total_bytes(cfg, dtype)))
    writes = jax.process_index() == 0
    try:
        if writes:
            write_json(partial / "config.json", config)
            if generation_config is not None:
                write_json(partial / "generation_config.json", generation_config)
            if len(shards) > 1:
                write_json(partial / "model.safetensors.index.json", _shard_index(shards, dtype))
            for file in tokenizer_files:
                shutil.copyfile(file, partial / pathlib.Path(file).name)
        _write_shards(partial if writes else None, params, shards, dtype)
        on_first_process(lambda: os.replace(partial, folder))
    except BaseException:
        if writes:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    logging.info("saved %s to %s", cfg.family, folder)


def _write_shards(
    folder: pathlib.Path | None,
    params: Mapping[str, Any],
    shards: Mapping[str, Mapping[str, mapping.HFTensor]],
    dtype: str,
) -> None:
    """Writes all safetensors files of the parameters into `folder`.

    Args:
      folder: existing folder; None on processes that don't write but must take part in gathering
        the arrays.
      params: native parameter tree.
      shards: file name → its tensors by name, from `_plan_shards`.
      dtype: name of the dtype to cast to.
    """
    sizes = (t.size for tensors in shards.values() for t in tensors.values())
    progress = Progress("save", sum(sizes) * DTYPES[dtype].itemsize, "B", every=5.0)
    for name, tensors in shards.items():
        blocks = _tensor_blocks(params, tensors, DTYPES[dtype])
        if folder is None:
            for _ in blocks:
                pass
            continue
        specs = {n: (t.shape, DTYPES[dtype]) for n, t in tensors.items()}
        for nbytes in safetensors_io.write_file(folder / name, specs, blocks):
            progress.add(nbytes)


def _total_bytes(cfg: ModelConfig, dtype: str) -> int:
    """Returns the bytes of a network's weights in a dtype."""
    return sum(t.size for t in mapping.hf_tensors(cfg).values()) * DTYPES[dtype].itemsize


def _check_exportable(
    params: Mapping[str, Any],
    cfg: ModelConfig,
    dtype: str,
    tokenizer_files: Sequence[str | pathlib.Path],
    config_extra: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Checks the arguments of `save_hf` and returns the `config.json` object to write.

    Raises:
      UserError: an unknown dtype, a file that does not exist, or a config or parameter tree that
        has no Hugging Face equivalent.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    config = hf_config_write.config_to_hf(cfg, dtype=dtype, extra=config_extra)
    for file in map(pathlib.Path, tokenizer_files):
        if not file.is_file():
            raise UserError(f"{file}, to be copied, does not exist; correct its name")
    known = {leaf_map.path: leaf_map.shape for leaf_map in mapping.leaf_mappings(cfg)}
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
                f"parameter {'/'.join(path)} has shape {list(found[path])}, but by the config it "
                f"must be {list(shape)}; save with the config the parameters were made from"
            )
    return config


def prepare_partial_folder(folder: pathlib.Path, partial: pathlib.Path, need: int) -> None:
    """Creates an empty temporary folder next to the target folder of an export.

    Leftovers of an interrupted export are deleted. The caller renames it to `folder` when complete.

    Args:
      folder: the target; it must not exist or be empty.
      partial: the temporary folder, with the same parent.
      need: bytes that will be written to it.

    Raises:
      UserError: the target is not an empty folder, the parent cannot be written to, or its disk
        has less than `need` bytes free.
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


def plan_files(specs: safetensors_io.TensorSpecs, max_bytes: int) -> dict[str, list[str]]:
    """Distributes tensors over safetensors files.

    Files are filled in the order of `specs`; the names within a file are sorted.

    Args:
      specs: name → (shape, dtype) of the tensors.
      max_bytes: maximum bytes of data per file; a larger tensor gets a file of its own.

    Returns:
      File name → names of its tensors; the names are those transformers uses.

    Raises:
      UserError: `max_bytes` is below 1.
    """
    if max_bytes < 1:
        raise UserError(f"max_shard_bytes is {max_bytes}; it must be at least 1")
    groups: list[list[str]] = [[]]
    used = 0
    for name, (shape, dtype) in specs.items():
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


def _plan_shards(
    cfg: ModelConfig, dtype: np.dtype, max_bytes: int
) -> dict[str, dict[str, mapping.HFTensor]]:
    """Returns file name → its tensors by name, for a network saved in `dtype`; see `plan_files`."""
    tensors = mapping.hf_tensors(cfg)
    specs = {name: (tensor.shape, dtype) for name, tensor in tensors.items()}
    files = plan_files(specs, max_bytes)
    return {file: {name: tensors[name] for name in names} for file, names in files.items()}


def _shard_index(
    shards: Mapping[str, Mapping[str, mapping.HFTensor]], dtype: str
) -> dict[str, Any]:
    """Returns the object of `model.safetensors.index.json` for the files of `_plan_shards`."""
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    size = sum(t.size for tensors in shards.values() for t in tensors.values())
    return {
        "metadata": {"total_size": size * DTYPES[dtype].itemsize},
        "weight_map": dict(sorted(weight_map.items())),
    }


def write_json(file: pathlib.Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object to a UTF-8 file, indented by two spaces."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _tensor_blocks(
    params: Mapping[str, Any], tensors: Mapping[str, mapping.HFTensor], dtype: np.dtype
) -> Iterator[np.ndarray]:
    """Yields the data of HF tensors in order, one block of rows (a layer of a leaf) at a time.

    Args:
      params: native parameter tree.
      tensors: the HF tensors by name.
      dtype: dtype to cast to.

    Yields:
      Host arrays in the HF layout; concatenated along axis 0 they are the tensors.

    Raises:
      UserError: a value overflows float16.
    """
    for name, tensor in tensors.items():
        for leaf_map, layer in tensor.blocks:
            leaf = mapping.get_leaf(params, leaf_map.path)
            block = _layer_to_host(leaf, layer if leaf_map.stacked else None, dtype)
            # Cast from finite float32 or bfloat16: infinity can only be an overflow.
            if dtype == np.float16 and not np.isfinite(block).all():
                raise UserError(
                    f"{name} has values that overflow float16; use dtype bfloat16 or float32"
                )
            block = leaf_map.to_hf(block)
            yield block
            del block  # Free it before the next one is copied to the host.


def _layer_to_host(leaf: Any, layer: int | None, dtype: np.dtype) -> np.ndarray:
    """Returns `leaf[layer]` (the whole leaf if `layer` is None) as a host array in `dtype`.

    With several processes all must call it.

    Args:
      leaf: numpy array, or `jax.Array` with any sharding.
      layer: index along axis 0.
      dtype: dtype of the result.
    """
    with np.errstate(over="ignore"):  # The caller checks for it.
        if isinstance(leaf, np.ndarray):
            return (leaf if layer is None else leaf[layer]).astype(dtype)
        if leaf.is_fully_addressable:
            return _gather_local_shards(leaf, layer, dtype)
    replicated = jax.NamedSharding(leaf.sharding.mesh, jax.P())
    select = jax.jit(_select_layer, static_argnames=("whole", "dtype"), out_shardings=replicated)
    out = select(leaf, layer or 0, whole=layer is None, dtype=dtype)
    return np.asarray(out.addressable_data(0))


def _select_layer(x: jax.Array, layer: jax.Array, *, whole: bool, dtype: np.dtype) -> jax.Array:
    """Returns `x[layer]`, or x itself if `whole`, in `dtype`.

    `layer` is a traced int scalar, so that one compiled program serves all layers.
    """
    return (x if whole else jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False)).astype(dtype)


_select_layer_jit = jax.jit(_select_layer, static_argnames=("whole", "dtype"))


def _gather_local_shards(leaf: jax.Array, layer: int | None, dtype: np.dtype) -> np.ndarray:
    """Returns `leaf[layer]` (the whole leaf if `layer` is None) in `dtype`, assembled on the host.

    No device needs memory for the unsharded array. All shards of `leaf` must be on local devices.
    """
    out = np.empty(leaf.shape if layer is None else leaf.shape[1:], dtype)
    for shard in leaf.addressable_shards:
        index, own = shard.index, layer
        if layer is not None:
            first, stop = index[0].indices(leaf.shape[0])[:2]
            if not first <= layer < stop:
                continue
            index, own = index[1:], layer - first
        if shard.replica_id == 0:
            if shard.device.platform == "cpu":  # Device memory is host memory: no copy.
                data = np.asarray(shard.data)
                out[index] = data if layer is None else data[own]
            else:
                out[index] = _select_layer_jit(
                    shard.data, own or 0, whole=layer is None, dtype=dtype
                )
    return out
