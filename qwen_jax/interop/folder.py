"""Reads the metadata of a Hugging Face model folder and checks it before any weights are read."""

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

# Constant buffers that some exporters stored; all of them are recomputed from the config.
_BUFFERS = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|attn\.(bias|masked_bias|logn_tensor))$"
)


def read_config_json(folder: str | pathlib.Path) -> dict[str, Any]:
    """Returns the parsed `config.json` of a model folder.

    Raises:
      UserError: the folder or the file is missing, or the file is not a JSON object.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {what}; give the folder of a downloaded Hugging Face model")
    return read_json(folder / "config.json")


def read_gptq_config(folder: str | pathlib.Path) -> gptq.GptqConfig | None:
    """Returns the GPTQ configuration of a model folder, None if its weights are not quantised.

    It is `quantization_config` in `config.json`, else the content of `quantize_config.json`.

    Raises:
      UserError: as `read_config_json` and `gptq.parse_gptq_config`.
    """
    config = read_config_json(folder).get("quantization_config")
    if config is None:
        file = pathlib.Path(folder) / "quantize_config.json"
        config = read_json(file) if file.is_file() else None
    return None if config is None else gptq.parse_gptq_config(config)


def list_tensors(folder: str | pathlib.Path) -> dict[str, TensorInfo]:
    """Returns name → location of every tensor in a model folder, from the safetensors headers.

    Reads `model.safetensors` if there is one, as transformers does, else the shards listed in
    `model.safetensors.index.json`.

    Raises:
      UserError: there are no safetensors files (pickled ones are not read), the index is broken or
        lists missing files, a file is truncated or has a corrupt header.
    """
    folder = pathlib.Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return read_header(single)
    if not index.exists():
        raise UserError(_no_weights_message(folder))
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
            raise UserError(f"{index} lists {name!r}, which is not a file of this folder")
    absent = [name for name in files if not (folder / name).is_file()]
    if absent:
        raise UserError(
            f"{index} lists {len(files)} files, of which {len(absent)} do not exist: "
            f"{abbreviate(absent)}; download them"
        )
    infos: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_header(folder / file).items():
            # Of duplicates, the one in the listed file counts; `check_tensors` handles unlisted
            # tensors.
            if weight_map.get(name, file) == file:
                infos[name] = info
    lost = [name for name in weight_map if name not in infos]
    if lost:
        raise UserError(
            f"{index} lists {len(lost)} tensors that its files do not contain: {abbreviate(lost)}; "
            "download the folder again"
        )
    return infos


def _no_weights_message(folder: pathlib.Path) -> str:
    """Returns the error message for a folder without safetensors files, with the remedy."""
    pickles = sorted(
        p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")
    )
    if pickles:
        return (
            f"{folder} contains only pickled weights ({abbreviate(pickles)}), which can run code "
            "and are not read; convert them once with transformers: "
            f"AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained('NEW_FOLDER')"
        )
    return (
        f"{folder} has neither model.safetensors nor model.safetensors.index.json; download the "
        "weights"
    )


def check_tensors(
    infos: Mapping[str, TensorInfo],
    cfg: ModelConfig,
    folder: str | pathlib.Path,
    gptq_config: gptq.GptqConfig | None = None,
) -> None:
    """Checks that a folder has exactly the tensors of a network, by name, shape and dtype.

    Constant buffers (rotary tables, causal masks) may also be present; so may an `lm_head.weight`
    of the embedding's shape when the two are tied.

    Args:
      infos: the tensors of the folder, from `list_tensors`.
      cfg: the network that its `config.json` describes.
      folder: path of the folder, for messages.
      gptq_config: its GPTQ configuration; None for plain weights.

    Raises:
      UserError: a tensor is missing, unknown, or of another shape or dtype.
    """
    wanted = gptq.expected_tensors(cfg, gptq_config)
    if gptq_config is None and gptq.has_packed_tensors(infos):
        packed = abbreviate(name for name in infos if name.endswith(".qweight"))
        raise UserError(
            f"{folder} contains quantised weights ({packed}), but neither its config.json nor a "
            "quantize_config.json gives their format; download the folder again"
        )
    missing = [name for name in wanted if name not in infos]
    if missing:
        hint = ""
        if missing == ["lm_head.weight"]:
            hint = " (config.json has tie_word_embeddings false: is that right?)"
        raise UserError(
            f"{folder} lacks {len(missing)} of the {len(wanted)} tensors that its config.json "
            f"describes: {abbreviate(missing)}{hint}; download the folder again or correct "
            "config.json"
        )
    optional = {} if gptq_config is None else gptq.optional_tensors(cfg, gptq_config)
    extra = [
        name
        for name, info in infos.items()
        if name not in wanted
        and optional.get(name) != info.shape
        and not _is_ignorable(name, info, cfg)
    ]
    if extra:
        raise UserError(
            f"{folder} contains {len(extra)} tensors that the model of its config.json does not "
            f"have: {abbreviate(extra)}; correct config.json or remove them"
        )
    wrong = [n for n, (shape, _) in wanted.items() if infos[n].shape != shape]
    if wrong:
        name = wrong[0]
        others = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise UserError(
            f"{folder}: {name} has shape {list(infos[name].shape)}, but by config.json it must be "
            f"{list(wanted[name][0])}{others}; correct config.json or download the folder again"
        )
    for name, (_, dtypes) in wanted.items():
        if infos[name].dtype not in dtypes:
            advice = ": use the unquantised release" if dtypes == tuple(FLOAT_DTYPES) else ""
            raise UserError(
                f"{folder}: {name} is stored as {infos[name].dtype}; it must be one of "
                f"{', '.join(dtypes)}{advice}"
            )


def _is_ignorable(name: str, info: TensorInfo, cfg: ModelConfig) -> bool:
    """Returns whether a tensor that is not a parameter of `cfg` may be in the folder regardless.

    True for constant buffers, and for the copy of a tied embedding as output head.
    """
    if cfg.tie_embeddings and name == "lm_head.weight":
        return info.shape == (cfg.vocab_size, cfg.d_model)
    return bool(_BUFFERS.search(name))


def abbreviate(names: Iterable[str], most: int = 3) -> str:
    """Returns the first `most` names, joined by commas, with an ellipsis if there are more."""
    names = list(names)
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
