"""A Hugging Face model folder: its JSON files and tensor list, checked before any data is read."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from qwen_jax.errors import UserError
from qwen_jax.interop import gptq
from qwen_jax.interop.safetensors_io import FLOAT_DTYPES, TensorInfo, read_header
from qwen_jax.json_files import read_json
from qwen_jax.model.config import ModelConfig

# Constants some exporters stored; every one is recomputed here from the config.
_BUFFERS = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|attn\.(bias|masked_bias|logn_tensor))$"
)


def read_config_json(folder: str | pathlib.Path) -> dict[str, Any]:
    """The `config.json` of a model folder.

    Raises:
      UserError: the folder or the file is missing, or the file is not a JSON object.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {what}; give the folder of a downloaded Hugging Face model")
    return read_json(folder / "config.json")


def read_packing(folder: str | pathlib.Path) -> gptq.Packing | None:
    """How a folder's weights are packed, by its `config.json` or its `quantize_config.json`.

    None for plain weights.

    Raises:
      UserError: as `read_config_json` and `gptq.read_packing`.
    """
    config = read_config_json(folder).get("quantization_config")
    if config is None:
        file = pathlib.Path(folder) / "quantize_config.json"
        config = read_json(file) if file.is_file() else None
    return None if config is None else gptq.read_packing(config)


def scan(folder: str | pathlib.Path) -> dict[str, TensorInfo]:
    """Lists the tensors of `model.safetensors`, or of the shards its index names.

    As transformers does, a single `model.safetensors` wins over an index beside it.

    Raises:
      UserError: no safetensors files (pickled ones are not read), an index that is broken or names
        missing files, a truncated file, a corrupt header.
    """
    folder = pathlib.Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return read_header(single)
    if not index.exists():
        raise UserError(_nothing_to_read(folder))
    weight_map = read_json(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(v, str) for v in weight_map.values())
    ):
        raise UserError(f"{index} has no weight_map from tensor to file name; download it again")
    files = sorted(set(weight_map.values()))
    for name in files:
        if pathlib.PurePath(name).name != name or name in ("", ".", ".."):
            raise UserError(f"{index} names {name!r}, which is not a file of this folder")
    absent = [name for name in files if not (folder / name).is_file()]
    if absent:
        raise UserError(
            f"{index} names {len(absent)} of {len(files)} files that do not exist: "
            f"{few(absent)}; download them"
        )
    infos: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_header(folder / file).items():
            # A tensor counts in the file its index entry names; unlisted ones are checked as extra.
            if weight_map.get(name, file) == file:
                infos[name] = info
    lost = [name for name in weight_map if name not in infos]
    if lost:
        raise UserError(
            f"{index} promises {len(lost)} tensors that its files do not hold: {few(lost)}; "
            "download the folder again"
        )
    return infos


def _nothing_to_read(folder: pathlib.Path) -> str:
    pickles = sorted(
        p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")
    )
    if pickles:
        return (
            f"{folder} holds only pickled weights ({few(pickles)}), which can run code and are not "
            "read; convert them once with transformers: AutoModelForCausalLM.from_pretrained"
            f"({str(folder)!r}).save_pretrained('NEW_FOLDER')"
        )
    return (
        f"{folder} has neither model.safetensors nor model.safetensors.index.json; download the "
        "weights"
    )


def check(
    infos: Mapping[str, TensorInfo],
    cfg: ModelConfig,
    folder: str | pathlib.Path,
    packing: gptq.Packing | None = None,
) -> None:
    """Compares the tensors found with the ones `cfg` needs, before any data is read.

    Constants that are recomputed here (rotary tables, causal masks) may be present; so may an
    `lm_head.weight` of the embedding's shape when the two are tied.

    Raises:
      UserError: tensors are missing, too many, of another shape or dtype.
    """
    wanted = gptq.expected(cfg, packing)
    if packing is None and gptq.is_packed(infos):
        raise UserError(
            f"{folder} holds quantised weights ({few(n for n in infos if n.endswith('.qweight'))}),"
            " but neither its config.json nor a quantize_config.json says how they are packed; "
            "download the folder again"
        )
    missing = [name for name in wanted if name not in infos]
    if missing:
        hint = ""
        if missing == ["lm_head.weight"]:
            hint = " (config.json says tie_word_embeddings false: is that right?)"
        raise UserError(
            f"{folder} lacks {len(missing)} of the {len(wanted)} tensors that its config.json "
            f"describes: {few(missing)}{hint}; download the folder again or correct config.json"
        )
    beside = {} if packing is None else gptq.optional(cfg, packing)
    extra = [
        name
        for name, info in infos.items()
        if name not in wanted and beside.get(name) != info.shape and not _ignored(name, info, cfg)
    ]
    if extra:
        raise UserError(
            f"{folder} holds {len(extra)} tensors that the model of its config.json has no place "
            f"for: {few(extra)}; correct config.json or remove them"
        )
    wrong = [n for n, (shape, _) in wanted.items() if infos[n].shape != shape]
    if wrong:
        name = wrong[0]
        others = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise UserError(
            f"{folder}: {name} has shape {list(infos[name].shape)}, but config.json asks for "
            f"{list(wanted[name][0])}{others}; correct config.json or download the folder again"
        )
    for name, (_, dtypes) in wanted.items():
        if infos[name].dtype not in dtypes:
            advice = ": use the unquantised release" if dtypes == tuple(FLOAT_DTYPES) else ""
            raise UserError(
                f"{folder}: {name} is stored as {infos[name].dtype}; it must be one of "
                f"{', '.join(dtypes)}{advice}"
            )


def _ignored(name: str, info: TensorInfo, cfg: ModelConfig) -> bool:
    if cfg.tie_embeddings and name == "lm_head.weight":
        return info.shape == (cfg.vocab_size, cfg.d_model)
    return bool(_BUFFERS.search(name))


def few(names: Iterable[str], most: int = 3) -> str:
    """The first names of a list, with an ellipsis when there are more."""
    names = list(names)
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
