"""Loads Hugging Face weights into sharded arrays; each process reads only its devices' slices."""

from __future__ import annotations

import collections
import concurrent.futures
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from qwen_jax.errors import UserError
from qwen_jax.interop import folder as hf_folder
from qwen_jax.interop import gptq, hf_config, mapping
from qwen_jax.interop.safetensors_io import TensorFiles
from qwen_jax.model.config import ModelConfig
from qwen_jax.model.quantised import (
    HEAD,
    INPUT_AXES,
    QuantFormat,
    QuantisedWeight,
    abstract_leaf,
    format_of,
    quantise_leaf,
    quantised_paths,
)
from qwen_jax.progress import Progress

_NUM_READERS = min(8, os.cpu_count() or 1)  # Threads that read layers of a leaf.
_TILE = 256  # Columns of a transposed copy at a time: 2.5x faster than row by row (measured).

Bounds = tuple[tuple[int, int], ...]
"""A slice of an array: (start, stop) along each axis."""
LayerReader = Callable[[int], QuantisedWeight]
"""Function from a layer index to that layer of a quantised leaf, as numpy arrays."""


def read_config(folder: str | pathlib.Path) -> ModelConfig:
    """Returns the config of the network in a Hugging Face model folder, from its `config.json`.

    Raises:
      UserError: the folder or file does not exist, or the network is not supported.
    """
    return hf_config.config_from_hf(hf_folder.read_config_json(folder))


def load_params(
    folder: str | pathlib.Path,
    cfg: ModelConfig,
    abstract: Mapping[str, Any],
    *,
    quantise: QuantFormat | None = None,
) -> dict[str, Any]:
    """Loads the weights of a Hugging Face model folder as sharded native parameters.

    Names, shapes and file sizes are checked before any tensor data is read. Each distinct slice
    that this process's devices hold is read once, cast, and copied to its devices before the next
    one is read, so host memory beyond the parameters is one device's slice of one leaf.

    A GPTQ folder gives quantised weights (`model.quantised`) for its packed matrices; `quantise`
    makes them from plain weights, one layer at a time. This host's part of a quantised leaf is in
    host memory as a whole while it is read.

    Args:
      folder: Hugging Face model folder, with one `model.safetensors` or shards with an index.
      cfg: the network; see `read_config`.
      abstract: tree of `jax.ShapeDtypeStruct` from `model.abstract_params(cfg)`. Leaves are cast
        to its dtypes and placed by its `.sharding`; a leaf without one goes to the first local
        device. Quantised leaves are sharded like the dense leaf they replace, except that they are
        replicated along `fsdp`.
      quantise: format to quantise plain weights to; None leaves them as they are.

    Returns:
      The parameter tree of `jax.Array`, with the structure of `abstract` except for quantised
      leaves.

    Raises:
      UserError: the folder is incomplete, damaged, pickled, or does not match `cfg`; its
        quantisation is not supported; `quantise` is given for packed weights; or a group of inputs
        would be split over devices.
    """
    infos, gptq_config = hf_folder.list_tensors(folder), hf_folder.read_gptq_config(folder)
    hf_folder.check_tensors(infos, cfg, folder, gptq_config)
    if gptq_config is not None and quantise is not None:
        raise UserError(
            f"{folder} contains weights already quantised to {gptq_config.format.name}; load it "
            "without quantising again, or give the unquantised release"
        )
    with TensorFiles(infos) as files:
        if gptq_config is not None:
            gptq.check_small_tensors(files, cfg, gptq_config)
        return load_from_files(files, cfg, abstract, gptq_config=gptq_config, quantise=quantise)


def load_from_files(
    files: TensorFiles,
    cfg: ModelConfig,
    abstract: Mapping[str, Any],
    *,
    gptq_config: gptq.GptqConfig | None = None,
    quantise: QuantFormat | None = None,
) -> dict[str, Any]:
    """Loads sharded native parameters from open and checked safetensors files.

    The bytes read are added to `files.bytes_read`.

    Args:
      files: the open tensors.
      cfg: the network.
      abstract: target shapes, dtypes and shardings, as in `load_params`.
      gptq_config: how the files' weights are quantised; None for plain weights.
      quantise: format to quantise plain weights to, as in `load_params`.

    Returns:
      The parameter tree of `jax.Array`.
    """
    params: dict[str, Any] = {}
    table = mapping.leaf_mappings(cfg)
    assert len(jax.tree.leaves(abstract)) == len(table), "a leaf has no HF tensor"
    paths = {} if quantise is None else quantised_paths(abstract, quantise)
    readers: dict[tuple[str, ...], LayerReader] = {}  # Of the quantised leaves.
    leaves: dict[tuple[str, ...], Any] = {}  # Abstract leaves: their targets.
    for leaf_map in table:
        path = leaf_map.path
        leaf = mapping.get_leaf(abstract, path)
        assert tuple(leaf.shape) == leaf_map.shape, (path, leaf.shape, leaf_map.shape)
        if gptq_config is not None and gptq_config.format_of(leaf_map) is not None:
            leaf, readers[path] = _packed_leaf(files, leaf_map, leaf, gptq_config)
        elif quantise is not None and path in paths:
            fmt = format_of(path, quantise)
            readers[path] = _quantising_reader(files, leaf_map, fmt, paths[path])
            leaf = abstract_leaf(leaf, fmt, int(leaf_map.stacked), paths[path])
        leaves[path] = leaf
    total = sum(map(_local_bytes, jax.tree.leaves(leaves)))
    progress = Progress("load", total, "B", every=5.0)
    with concurrent.futures.ThreadPoolExecutor(_NUM_READERS) as pool:
        for leaf_map in table:
            path, leaf = leaf_map.path, leaves[leaf_map.path]
            loaded: Any
            if path in readers:
                layers = len(leaf_map.names) if leaf_map.stacked else None
                loaded = _load_quantised(files, readers[path], leaf, layers, progress)
            else:
                loaded = _load_leaf(files, leaf_map, leaf, pool, progress)
            mapping.set_leaf(params, path, loaded)
            files.release()
    logging.info("loaded %s (%.2f GB read)", cfg.family, files.bytes_read / 1e9)
    return params


def _sharding(leaf: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
    """Returns the sharding of an abstract leaf; the first local device if it has none."""
    return leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _local_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    """Returns an abstract leaf's bytes on this process's devices, replicas included."""
    shards = len(_sharding(leaf).addressable_devices)
    shape = _sharding(leaf).shard_shape(tuple(leaf.shape))
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(leaf.dtype).itemsize * shards


def distinct_slices(
    sharding: jax.sharding.Sharding, shape: tuple[int, ...]
) -> dict[Bounds, list[jax.Device]]:
    """Returns the distinct slices of an array on this process's devices.

    Args:
      sharding: the array's sharding.
      shape: its global shape.

    Returns:
      Bounds of a slice → the local devices that hold a copy of it.
    """
    holders = collections.defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        holders[bounds].append(device)
    return dict(holders)


def _load_leaf(
    files: TensorFiles,
    leaf_map: mapping.LeafMapping,
    leaf: jax.ShapeDtypeStruct,
    pool: concurrent.futures.Executor,
    progress: Progress,
) -> jax.Array:
    """Loads one unquantised parameter: reads each distinct slice once and copies it to its devices.

    Args:
      files: the open safetensors files.
      leaf_map: where the parameter is stored in them.
      leaf: its target dtype and sharding.
      pool: executor that reads layers in parallel.
      progress: is increased by the bytes placed on local devices.
    """
    sharding = _sharding(leaf)
    arrays = []
    for bounds, devices in distinct_slices(sharding, leaf_map.shape).items():
        host = _read_slice(files, leaf_map, bounds, np.dtype(leaf.dtype), pool)
        # Wait: queued transfers would keep their host buffers alive.
        arrays += jax.block_until_ready([jax.device_put(host, device) for device in devices])
        progress.add(host.nbytes * len(devices))
        del host
    return jax.make_array_from_single_device_arrays(leaf_map.shape, sharding, arrays)


def _packed_leaf(
    files: TensorFiles,
    leaf_map: mapping.LeafMapping,
    leaf: jax.ShapeDtypeStruct,
    gptq_config: gptq.GptqConfig,
) -> tuple[QuantisedWeight, LayerReader]:
    """Returns the target and the layer reader of a leaf that the files store GPTQ-packed.

    Args:
      files: the open tensors.
      leaf_map: position of the leaf in them.
      leaf: abstract dense leaf whose sharding the quantised one follows.
      gptq_config: the folder's quantisation settings.

    Returns:
      (quantised weight of `ShapeDtypeStruct`s, function from layer index to that layer in numpy).
    """
    fmt = gptq_config.format_of(leaf_map)
    assert fmt is not None, f"{leaf_map.path} is not quantised"
    inputs = 1 if leaf_map.path == HEAD else INPUT_AXES[leaf_map.path[1:]]
    zeros = not gptq.is_symmetric(files, leaf_map, gptq_config)
    target = abstract_leaf(leaf, fmt, int(leaf_map.stacked), inputs, zeros=zeros)
    return target, gptq.layer_reader(files, leaf_map, gptq_config, type(target))


def _quantising_reader(
    files: TensorFiles, leaf_map: mapping.LeafMapping, fmt: QuantFormat, inputs: int
) -> LayerReader:
    """Returns a function that reads one layer of a dense leaf by index and quantises it.

    Args:
      files: the open tensors.
      leaf_map: position of the dense leaf in them.
      fmt: format to quantise to.
      inputs: number of leading axes of a layer that are inputs.
    """

    def read(layer: int) -> QuantisedWeight:
        source = leaf_map.to_native(files.tensor(leaf_map.names[layer]))
        files.bytes_read += source.nbytes
        dense = np.empty(source.shape, source.dtype)
        _copy_cast(dense, source)
        return jax.tree.map(np.asarray, quantise_leaf(jnp.asarray(dense), fmt, inputs))

    return read


def _load_quantised(
    files: TensorFiles,
    read: LayerReader,
    leaf: QuantisedWeight,
    layers: int | None,
    progress: Progress,
) -> QuantisedWeight:
    """Loads one quantised leaf: layer by layer into host buffers, then onto the local devices.

    Args:
      files: the open tensors that `read` uses; their pages are released after each layer.
      read: function from layer index to that layer as a quantised weight of numpy arrays.
      leaf: target quantised weight of `ShapeDtypeStruct`s.
      layers: number of layers; None for a leaf without a layer axis.
      progress: gets the bytes placed on local devices.
    """
    targets, tree = jax.tree.flatten(leaf)
    slices = [distinct_slices(_sharding(t), tuple(t.shape)) for t in targets]
    buffers = [
        {bounds: np.empty([b - a for a, b in bounds], t.dtype) for bounds in parts}
        for t, parts in zip(targets, slices, strict=True)
    ]
    for layer in range(layers or 1):
        for source, own in zip(jax.tree.leaves(read(layer)), buffers, strict=True):
            for bounds, buffer in own.items():
                inner = bounds if layers is None else bounds[1:]
                assert layers is None or bounds[0] == (0, layers), "layers are not sharded"
                row = buffer if layers is None else buffer[layer]
                row[...] = source[tuple(slice(*b) for b in inner)]
        files.release()
    out = []
    for target, parts, own in zip(targets, slices, buffers, strict=True):
        shards = []
        for bounds, devices in parts.items():
            shards += jax.block_until_ready([jax.device_put(own[bounds], d) for d in devices])
        out.append(
            jax.make_array_from_single_device_arrays(tuple(target.shape), _sharding(target), shards)
        )
        progress.add(_local_bytes(target))
    return jax.tree.unflatten(tree, out)


def _read_slice(
    files: TensorFiles,
    leaf_map: mapping.LeafMapping,
    bounds: Bounds,
    dtype: np.dtype,
    pool: concurrent.futures.Executor,
) -> np.ndarray:
    """Reads one slice of a dense leaf from the files and casts it.

    Args:
      files: the open tensors; the bytes read are added to `files.bytes_read`.
      leaf_map: position of the leaf in them.
      bounds: the slice, along the axes of the native leaf.
      dtype: dtype of the result.
      pool: executor that reads layers in parallel.
    """
    out = np.empty([stop - start for start, stop in bounds], dtype)
    layers = range(*bounds[0]) if leaf_map.stacked else [0]
    inner = tuple(slice(*b) for b in (bounds[1:] if leaf_map.stacked else bounds))
    rows = out if leaf_map.stacked else out[None]

    def read(row: int) -> int:
        source = leaf_map.to_native(files.tensor(leaf_map.names[layers[row]]))[inner]
        _copy_cast(rows[row], source)
        return source.size * source.dtype.itemsize

    files.bytes_read += sum(pool.map(read, range(len(layers))))
    return out


def _copy_cast(target: np.ndarray, source: np.ndarray) -> None:
    """Copies `source` into `target` of the same shape, casting; transposed ones tile by tile.

    Tiles stay in the CPU's cache, which makes copying a transposed view several times faster.
    """
    if source.flags.c_contiguous:
        np.copyto(target, source, casting="same_kind")
    elif source.ndim == 3:
        # One head at a time is a plain transpose. The head axis is the one that is neither
        # contiguous in the file nor last in the native layout.
        heads = 1 if source.strides[0] < source.strides[1] else 0
        targets, sources = np.moveaxis(target, heads, 0), np.moveaxis(source, heads, 0)
        for out, part in zip(targets, sources, strict=True):
            _copy_cast(out, part)
    else:
        for start in range(0, source.shape[-1], _TILE):
            tile = (..., slice(start, start + _TILE))
            np.copyto(target[tile], source[tile], casting="same_kind")
