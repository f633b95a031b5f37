"""Reading models from a path: configuration, tokenizer and generation defaults, then weights.

A path is a Hugging Face folder, a working folder of `launch.pretrain` or `launch.demo`, or a folder
of native checkpoints such as `launch.convert` writes.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from qwen_jax import interop
from qwen_jax.config import from_config_dict
from qwen_jax.errors import UserError, nearest
from qwen_jax.generate.generation_config import GenerationDefaults, read_defaults
from qwen_jax.model import ModelConfig, Params, abstract_params
from qwen_jax.model.quantised import QuantFormat, quantise_params
from qwen_jax.tokenizer import Tokenizer, load_tokenizer
from qwen_jax.train.checkpoint import read_header, restore_params

WEIGHT_FORMATS = {
    "int8": QuantFormat(bits=8, group=None),
    "int4": QuantFormat(bits=4, group=128),
}
"""Formats to which `load_weights` can quantise: a scale per output channel, or per 128 inputs."""


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model found at a path; everything but its weights has been read.

    Attributes:
      name: name of the folder, for display.
      config: configuration of the network.
      tokenizer: tokenizer of the model.
      defaults: sampling parameters, chat format and system prompt of the model's folder.
      folder: the Hugging Face folder, or the folder with the `step_N` folders.
      step: step of the checkpoint; None for a Hugging Face folder.
      stored_dtype: dtype name of a checkpoint's parameters.
    """

    name: str
    config: ModelConfig
    tokenizer: Tokenizer
    defaults: GenerationDefaults
    folder: pathlib.Path
    step: int | None = None
    stored_dtype: str = "float32"


def find_model(
    path: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    step: int | None = None,
    chat_format: str | None = None,
) -> ModelSource:
    """Determines what kind of model is at `path` and reads everything but its weights.

    Args:
      path: a Hugging Face folder, a working folder of a training run, a folder of checkpoints, or
        one `step_N` folder.
      tokenizer: a vocabulary file or a folder with one; by default the model's own folder, for
        checkpoints also its parent. The generation config is read from the same folder.
      step: step of the checkpoint; the newest by default.
      chat_format: "chatml" or "raw"; by default the folder's.

    Raises:
      UserError: there is no readable model at `path`, parts are missing, or tokenizer and model do
        not belong together.
    """
    path = pathlib.Path(path).expanduser()
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise UserError(
            f"{path} {what}; give a Hugging Face model folder, a working folder of a training, or "
            "a folder of checkpoints."
        )
    info: dict[str, Any]
    if (path / "config.json").is_file():
        if step is not None:
            raise UserError(f"{path} is a Hugging Face folder, which has no steps; leave out step.")
        config, info = interop.read_config(path), {}
        folder, tokenizer_folders = path, [path]
    else:
        folder, step = _find_checkpoints(path, step)
        header = read_header(str(folder), step)
        step, info = header.step, header.info | header.fingerprint
        if "model" not in info:
            raise UserError(
                f"{folder} has no model configuration; give the checkpoints of a training run."
            )
        config = from_config_dict(ModelConfig, info["model"], "model")
        tokenizer_folders = [folder, folder.parent]
    tokenizer_path = _find_tokenizer(tokenizer_folders, tokenizer)
    vocabulary = load_tokenizer(tokenizer_path)
    if info.get("tokenizer_sha256", vocabulary.sha256) != vocabulary.sha256:
        raise UserError(
            f"{tokenizer_path} is not the vocabulary that {folder} was trained with; give that one "
            "with tokenizer=FILE."
        )
    if vocabulary.n_ranks > config.vocab_size:
        raise UserError(
            f"{tokenizer_path} has {vocabulary.n_ranks:,} ranks, but the model at {path} has only "
            f"{config.vocab_size:,} ids; give the tokenizer of this model."
        )
    defaults_folder = tokenizer_path if tokenizer_path.is_dir() else tokenizer_path.parent
    return ModelSource(
        name=path.resolve().name,
        config=config,
        tokenizer=vocabulary,
        defaults=read_defaults(defaults_folder, vocabulary, chat_format=chat_format),
        folder=folder,
        step=step,
        stored_dtype=info.get("param_dtype", "float32"),
    )


def load_weights(source: ModelSource, dtype: str, weights: str | None = None) -> Params:
    """Reads the parameters, sharded over the mesh in force, or on the first device without one.

    A GPTQ folder stays quantised.

    Args:
      source: the model.
      dtype: dtype name of the parameters that are not quantised.
      weights: name in `WEIGHT_FORMATS` of a format to quantise to; None does not quantise.

    Raises:
      UserError: files are incomplete or damaged; `weights` is unknown; the weights are quantised
        already or cannot be; or a checkpoint is to be quantised on several devices.
    """
    mesh = None if jax.sharding.get_mesh().empty else jax.sharding.get_mesh()
    if weights is not None and weights not in WEIGHT_FORMATS:
        raise UserError(
            f"weights is {weights!r}{nearest(weights, WEIGHT_FORMATS)}; it must be one of "
            f"{', '.join(WEIGHT_FORMATS)}."
        )
    quantise = WEIGHT_FORMATS[weights] if weights else None

    def abstract(dtype_name: str) -> Any:
        """Returns shapes and shardings of the parameters, with this dtype."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, dtype_name, sharding=x.sharding),
            abstract_params(source.config, mesh),
        )

    if source.step is None:
        return interop.load_params(source.folder, source.config, abstract(dtype), quantise=quantise)
    if quantise and mesh is not None and mesh.size > 1:
        raise UserError(
            f"{source.folder} is a checkpoint, which is quantised on one device only; write it as "
            "a Hugging Face folder with launch.convert first."
        )
    stored = abstract(source.stored_dtype)
    params = restore_params(str(source.folder), stored, step=source.step)
    if source.stored_dtype != dtype:
        # Leaf by leaf, so that at most one leaf is in memory twice.
        cast = jax.jit(lambda x: x.astype(dtype))
        leaves, tree = jax.tree.flatten(params)
        del params
        for i in range(len(leaves)):
            leaves[i] = jax.block_until_ready(cast(leaves[i]))
        params = jax.tree.unflatten(tree, leaves)
    return quantise_params(params, quantise, consume=True) if quantise else params


def _find_checkpoints(path: pathlib.Path, step: int | None) -> tuple[pathlib.Path, int | None]:
    """Returns the folder with the `step_N` folders, and the step that `path` or `step` names.

    Raises:
      UserError: there are no checkpoints, or `path` and `step` name different steps.
    """
    if path.name.startswith("step_") and path.name[5:].isdecimal():
        if step not in (None, int(path.name[5:])):
            raise UserError(f"{path} is not step {step}; leave out one of them.")
        return path.parent, int(path.name[5:])
    for folder in (path, path / "checkpoints"):
        if folder.is_dir() and any(folder.glob("step_*")):
            return folder, step
    raise UserError(
        f"{path} has neither config.json (a Hugging Face folder) nor checkpoints (folders named "
        "step_N, or checkpoints/step_N)."
    )


def _find_tokenizer(
    folders: Sequence[pathlib.Path], given: str | os.PathLike[str] | None
) -> pathlib.Path:
    """Returns the file or folder of the tokenizer: `given`, else the first folder that has one.

    Raises:
      UserError: `given` is None and no folder has a tokenizer.
    """
    if given is not None:
        return pathlib.Path(given).expanduser()
    for folder in folders:
        if any(folder.glob("*.tiktoken")) or any(
            (folder / name).is_file() for name in ("tokenizer.json", "vocab.json")
        ):
            return folder
    raise UserError(
        f"There is no vocabulary in {' or '.join(map(str, folders))}; name one with tokenizer=FILE "
        "(--tokenizer=FILE)."
    )
