"""Quantises a plain Hugging Face model folder into a GPTQ folder, one tensor at a time.

The output has AutoGPTQ's layout (groups in order, symmetric, `desc_act` false; `group_size` −1 for
one scale per output channel), so other engines read it as any GPTQ folder. The values come from
rounding to nearest with a search for the best scale (`model.quantised`), not from GPTQ's
calibration: only the layout is GPTQ's.
"""

from __future__ import annotations

import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping

import jax.numpy as jnp
import numpy as np
from absl import logging

from qwen_jax.errors import UserError
from qwen_jax.interop import folder as hf_folder
from qwen_jax.interop import gptq, hf_config, mapping, safetensors_io
from qwen_jax.interop.safetensors_io import TensorFiles, TensorInfo, TensorSpecs
from qwen_jax.interop.save import plan_files, prepare_partial_folder, write_json
from qwen_jax.model.config import ModelConfig
from qwen_jax.model.quantised import QuantFormat, check_group, quantise_matrix
from qwen_jax.progress import Progress

# Suffixes of the files that are not copied: weights of any kind, and their index.
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".index.json")


def quantise_folder(
    src: str | pathlib.Path,
    out: str | pathlib.Path,
    fmt: QuantFormat,
    *,
    max_shard_bytes: int = 5_000_000_000,
) -> ModelConfig:
    """Quantises the model folder `src` and writes the result to the new folder `out`.

    The matrices of the layers are quantised to `fmt`, and with `fmt.head` the output head to int8.
    All other tensors are copied unchanged, and so are the folder's other files (tokenizer,
    generation config). One matrix at a time is in memory. The output folder appears only when it is
    complete.

    Args:
      src: Hugging Face folder with plain weights.
      out: folder to write; it must not exist or be empty.
      fmt: format of the quantised weights.
      max_shard_bytes: maximum bytes of data per file; a larger tensor gets a file of its own.

    Returns:
      The network's config.

    Raises:
      UserError: `src` is not such a folder or is already quantised; `out` is not empty or does not
        fit on the disk; or the format's groups do not divide the model's matrices.
    """
    src, out = pathlib.Path(src), pathlib.Path(out)
    config = hf_folder.read_config_json(src)
    cfg = hf_config.config_from_hf(config)
    before, gptq_config = hf_folder.read_gptq_config(src), gptq.GptqConfig(fmt)
    if before is not None:
        raise UserError(
            f"{src} is already quantised, to {before.format.name}; give the unquantised release"
        )
    infos = hf_folder.list_tensors(src)
    hf_folder.check_tensors(infos, cfg, src)
    _check_quantisable(cfg, gptq_config)
    specs = _output_specs(infos, cfg, gptq_config)
    files = plan_files(specs, max_shard_bytes)
    partial = out.parent / f".{out.name}.quantise-partial"
    prepare_partial_folder(out, partial, _total_bytes(specs))
    try:
        _copy_other_files(src, partial)
        description = gptq.to_quantization_config(fmt)
        write_json(partial / "config.json", config | {"quantization_config": description})
        write_json(partial / "quantize_config.json", description)
        if len(files) > 1:
            weight_map = {n: file for file, names in files.items() for n in names}
            index = {"metadata": {"total_size": _total_bytes(specs)}, "weight_map": weight_map}
            write_json(partial / "model.safetensors.index.json", index)
        progress = Progress("quantise", _total_bytes(specs), "B", every=5.0)
        with TensorFiles(infos) as source:
            for file, names in files.items():
                blocks = _tensor_data(source, names, gptq_config, cfg)
                part = {name: specs[name] for name in names}
                for nbytes in safetensors_io.write_file(partial / file, part, blocks):
                    progress.add(nbytes)
        os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    logging.info("quantised %s to %s (%s)", src, out, fmt.name)
    return cfg


def _check_quantisable(cfg: ModelConfig, gptq_config: gptq.GptqConfig) -> None:
    """Checks that the format can represent the network's matrices.

    Raises:
      UserError: groups do not divide a matrix, or the head is to be quantised and is tied.
    """
    fmt = gptq_config.format
    if fmt.head and cfg.tie_embeddings:
        raise UserError(
            "this model's output head is its embedding table (tied), which stays as it is; leave "
            "the head out of quantisation"
        )
    for tensor in mapping.hf_tensors(cfg).values():
        layer_fmt = gptq_config.format_of(tensor.blocks[0][0])
        if layer_fmt is not None:
            check_group(layer_fmt, tensor.shape[1])
    gptq.expected_tensors(cfg, gptq_config)


def _total_bytes(specs: TensorSpecs) -> int:
    """Returns the bytes of data of all tensors in `specs`."""
    return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in specs.values())


def _output_specs(
    infos: Mapping[str, TensorInfo], cfg: ModelConfig, gptq_config: gptq.GptqConfig
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Returns name → (shape, dtype) of every tensor of the output folder, in model order.

    Args:
      infos: the tensors of the plain folder; those that are copied keep their dtype.
      cfg: the network.
      gptq_config: settings of the output folder.
    """
    wanted = gptq.expected_tensors(cfg, gptq_config)
    out: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
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


def _tensor_data(
    source: TensorFiles, names: list[str], gptq_config: gptq.GptqConfig, cfg: ModelConfig
) -> Iterator[np.ndarray]:
    """Yields the data of the output tensors `names` in order, each as one array.

    `names` must list the packed tensors of a layer one after the other: they come from one
    quantisation of its matrix.

    Args:
      source: the open plain folder.
      names: output tensors of one file.
      gptq_config: settings of the output folder.
      cfg: the network.
    """
    known = mapping.hf_tensors(cfg)
    parts: dict[str, np.ndarray] = {}
    for name in names:
        if name in known:
            yield source.tensor(name)
        else:
            if name not in parts:
                base = name.rpartition(".")[0]
                fmt = gptq_config.format_of(known[base + ".weight"].blocks[0][0])
                assert fmt is not None, f"{base} is not quantised"
                parts = _quantise_linear(source.tensor(base + ".weight"), fmt, base)
            yield parts.pop(name)
        source.release()


def _quantise_linear(weight: np.ndarray, fmt: QuantFormat, base: str) -> dict[str, np.ndarray]:
    """Quantises the weight of one linear layer into its packed GPTQ tensors.

    Args:
      weight: float [out, in].
      fmt: format to quantise to.
      base: name of the layer, the prefix of the tensor names.

    Returns:
      The arrays `base`.qweight, .qzeros, .scales and .g_idx, by name.

    Raises:
      UserError: a weight is not finite, or a scale overflows float16.
    """
    outputs, inputs = weight.shape
    codes, scales = map(
        np.asarray, quantise_matrix(jnp.asarray(weight).T, bits=fmt.bits, group=fmt.group)
    )
    if not np.isfinite(scales).all():
        raise UserError(
            f"{base}.weight has values that are not finite, or scales that overflow float16; it "
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


def _copy_other_files(src: pathlib.Path, out: pathlib.Path) -> None:
    """Copies the files of folder `src` that are neither weights nor `config.json` to `out`."""
    for file in sorted(src.iterdir()):
        if (
            file.is_file()
            and file.name != "config.json"
            and not file.name.endswith(_WEIGHT_SUFFIXES)
        ):
            shutil.copyfile(file, out / file.name)


def folder_bytes(folder: str | pathlib.Path) -> int:
    """Returns the bytes of all tensors in a Hugging Face model folder."""
    return sum(info.nbytes for info in hf_folder.list_tensors(folder).values())


def bits_per_weight(folder: str | pathlib.Path) -> float:
    """Returns the stored bits per weight of a model folder's quantisable matrices.

    Scales and zero points count too. For a plain folder it is the bits of the weights' dtype.
    """
    cfg = hf_config.config_from_hf(hf_folder.read_config_json(folder))
    gptq_config = hf_folder.read_gptq_config(folder) or gptq.GptqConfig(QuantFormat())
    infos = hf_folder.list_tensors(folder)
    bits = numbers = 0
    for name, tensor in mapping.hf_tensors(cfg).items():
        if gptq_config.format_of(tensor.blocks[0][0]) is None:
            continue
        numbers += tensor.size
        base = name.removesuffix(".weight")
        stored = ("weight", "qweight", "qzeros", "scales")
        bits += sum(8 * infos[f"{base}.{p}"].nbytes for p in stored if f"{base}.{p}" in infos)
    return bits / numbers
