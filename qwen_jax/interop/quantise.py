"""A plain model folder as a quantised one in AutoGPTQ's layout, a tensor at a time.

Other engines read it as any GPTQ folder: groups in order, symmetric, `desc_act` false; one scale
per output channel is `group_size` −1. The numbers come from rounding to nearest with a search for
the best scale (`model.quantised`), not from GPTQ's calibration; only the layout is GPTQ's.
"""

from __future__ import annotations

import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging

from qwen_jax.errors import UserError
from qwen_jax.interop import folder as hf_folder
from qwen_jax.interop import gptq, hf_config, mapping, safetensors_io
from qwen_jax.interop.safetensors_io import TensorFiles
from qwen_jax.interop.save import plan_files, prepare_folder, write_json
from qwen_jax.model.config import ModelConfig
from qwen_jax.model.quantised import QuantFormat, check_group, quantise_matrix
from qwen_jax.progress import Progress

Stored = dict[str, tuple[tuple[int, ...], np.dtype]]
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".index.json")


def quantise_folder(
    src: str | pathlib.Path,
    out: str | pathlib.Path,
    fmt: QuantFormat,
    *,
    max_shard_bytes: int = 5_000_000_000,
) -> ModelConfig:
    """Writes the folder `src` quantised to `out`, whole or not at all; returns its network.

    Matrices of the layers are packed, with `fmt.head` the output head too, to int8; everything else
    is copied as it is stored, the folder's other files (tokenizer, generation config) too. One
    matrix at a time is in memory.

    Args:
      src: Hugging Face folder of plain weights.
      out: folder to write; it must not exist or be empty.
      fmt: how.
      max_shard_bytes: a file holds at most this many bytes of data, or a single tensor.

    Raises:
      UserError: `src` is not such a folder, or is quantised already; `out` is taken or does not
        fit on the disk; the format does not divide the model's matrices.
    """
    src, out = pathlib.Path(src), pathlib.Path(out)
    config = hf_folder.read_config_json(src)
    cfg = hf_config.config_from_hf(config)
    before, packing = hf_folder.read_packing(src), gptq.Packing(fmt)
    if before is not None:
        raise UserError(
            f"{src} is already quantised, to {before.format.name}; give the unquantised release"
        )
    infos = hf_folder.scan(src)
    hf_folder.check(infos, cfg, src)
    _check(cfg, packing)
    stored = _stored(infos, cfg, packing)
    files = plan_files(stored, max_shard_bytes)
    partial = out.parent / f".{out.name}.quantise-partial"
    prepare_folder(out, partial, _bytes(stored))
    try:
        _copy_others(src, partial)
        description = gptq.describe(fmt)
        write_json(partial / "config.json", config | {"quantization_config": description})
        write_json(partial / "quantize_config.json", description)
        if len(files) > 1:
            weight_map = {n: file for file, names in files.items() for n in names}
            index = {"metadata": {"total_size": _bytes(stored)}, "weight_map": weight_map}
            write_json(partial / "model.safetensors.index.json", index)
        progress = Progress("quantise", _bytes(stored), "B", every=5.0)
        with TensorFiles(infos) as source:
            for file, names in files.items():
                blocks = _blocks(source, names, packing, cfg)
                part = {name: stored[name] for name in names}
                for nbytes in safetensors_io.write_file(partial / file, part, blocks):
                    progress.add(nbytes)
        os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    logging.info("quantised %s to %s (%s)", src, out, fmt.name)
    return cfg


def _check(cfg: ModelConfig, packing: gptq.Packing) -> None:
    """Refuses what the format can't hold, before anything is written."""
    fmt = packing.format
    if fmt.head and cfg.tie_embeddings:
        raise UserError(
            "this model's output head is its embedding table (tied), which stays as it is; leave "
            "the head out of quantisation"
        )
    for tensor in mapping.hf_tensors(cfg).values():
        how = packing.of(tensor.parts[0][0])
        if how is not None:
            check_group(how, tensor.shape[1])
    gptq.expected(cfg, packing)


def _bytes(stored: Stored) -> int:
    return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in stored.values())


def _stored(infos, cfg: ModelConfig, packing: gptq.Packing) -> Stored:
    """Every tensor that is written, in model order: name → (shape, dtype)."""
    wanted = gptq.expected(cfg, packing)
    out: Stored = {}
    for name, tensor in mapping.hf_tensors(cfg).items():
        if name in wanted:
            out[name] = (tensor.shape, safetensors_io.DTYPES[infos[name].dtype])
            continue
        base = name.removesuffix(".weight")
        for part in ("qweight", "qzeros"):
            out[f"{base}.{part}"] = (wanted[f"{base}.{part}"][0], np.dtype(np.int32))
        out[base + ".scales"] = (wanted[base + ".scales"][0], np.dtype(np.float16))
        out[base + ".g_idx"] = (tensor.shape[1:], np.dtype(np.int32))
    return out


def _blocks(source: TensorFiles, names, packing, cfg: ModelConfig) -> Iterator[np.ndarray]:
    """The data of `names` in order; a layer's packed parts come from one quantisation."""
    known = mapping.hf_tensors(cfg)
    parts: dict[str, np.ndarray] = {}
    for name in names:
        if name in known:
            yield source.tensor(name)
        else:
            if name not in parts:
                base = name.rpartition(".")[0]
                how = packing.of(known[base + ".weight"].parts[0][0])
                parts = _pack(source.tensor(base + ".weight"), how, base)
            yield parts.pop(name)
        source.release()


def _pack(weight: np.ndarray, fmt: QuantFormat, base: str) -> dict[str, np.ndarray]:
    """A Linear's weight [out, in] as the four tensors of its packed form."""
    outputs, inputs = weight.shape
    codes, scales = map(
        np.asarray, quantise_matrix(jnp.asarray(weight).T, bits=fmt.bits, group=fmt.group)
    )
    if not np.isfinite(scales).all():
        raise UserError(
            f"{base}.weight has values that are not finite, or scales that float16 cannot hold; it "
            "can't be quantised"
        )
    middle = 2 ** (fmt.bits - 1)
    zeros = np.full((outputs, scales.shape[0]), middle - 1, np.uint8)
    groups = np.arange(inputs, dtype=np.int32) // (fmt.group or inputs)
    return {
        base + ".qweight": gptq.pack_rows((codes.astype(np.int16) + middle), fmt.bits),
        base + ".qzeros": np.ascontiguousarray(gptq.pack_rows(zeros, fmt.bits).T),
        base + ".scales": scales.astype(np.float16),
        base + ".g_idx": groups,
    }


def _copy_others(src: pathlib.Path, out: pathlib.Path) -> None:
    """Everything of the folder that is neither weights nor written anew."""
    for file in sorted(src.iterdir()):
        if file.is_file() and file.name != "config.json" and not file.name.endswith(_WEIGHTS):
            shutil.copyfile(file, out / file.name)


def folder_bytes(folder: str | pathlib.Path) -> int:
    """Bytes of a folder's weights."""
    return sum(info.nbytes for info in hf_folder.scan(folder).values())


def bits_per_weight(folder: str | pathlib.Path) -> float:
    """Bits a number of the quantised (or plain) matrices takes, scales and zeros included."""
    cfg = hf_config.config_from_hf(hf_folder.read_config_json(folder))
    packing = hf_folder.read_packing(folder) or gptq.Packing(QuantFormat())
    infos: dict[str, Any] = hf_folder.scan(folder)
    bits = numbers = 0
    for name, tensor in mapping.hf_tensors(cfg).items():
        if packing.of(tensor.parts[0][0]) is None:
            continue
        numbers += tensor.size
        base = name.removesuffix(".weight")
        stored = ("weight", "qweight", "qzeros", "scales")
        bits += sum(8 * infos[f"{base}.{p}"].nbytes for p in stored if f"{base}.{p}" in infos)
    return bits / numbers
