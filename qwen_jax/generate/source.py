"""Whatever can be generated from, read from a path: network, parameters, tokenizer, defaults.

A path is a Hugging Face folder, a working folder of `launch.pretrain` or `launch.demo`, or a folder
of native checkpoints such as `launch.convert` writes.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from typing import Any

import jax

from qwen_jax import interop
from qwen_jax.config import from_config_dict
from qwen_jax.errors import UserError, nearest
from qwen_jax.generate.generation_config import Defaults, read_defaults
from qwen_jax.model import ModelConfig, Params, abstract_params
from qwen_jax.model.quantised import QuantFormat, quantise_params
from qwen_jax.tokenizer import Tokenizer, load_tokenizer
from qwen_jax.train.checkpoint import read_header, restore_params

WEIGHTS = {"int8": QuantFormat(bits=8, group=None), "int4": QuantFormat(bits=4, group=128)}
"""Ways to quantise plain weights on the way in: a scale per output channel, or per 128 inputs."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model is; nothing large has been read.

    Attributes:
      name: of the folder, for people.
      config: the network.
      tokenizer: its tokenizer.
      defaults: how it wants to be sampled.
      folder: the Hugging Face folder, or the one that has the checkpoints.
      step: of the checkpoint; None for a Hugging Face folder.
      stored: dtype of a checkpoint's parameters.
    """

    name: str
    config: ModelConfig
    tokenizer: Tokenizer
    defaults: Defaults
    folder: pathlib.Path
    step: int | None = None
    stored: str = "float32"


def find_model(
    path: str | os.PathLike,
    *,
    tokenizer: str | os.PathLike | None = None,
    step: int | None = None,
    chat_format: str | None = None,
) -> Source:
    """Says what is at `path`.

    Args:
      path: see above; also one `step_N` folder of a checkpoint.
      tokenizer: a vocabulary file or a folder that has one; by default the model's own folder, or
        for checkpoints the one around it. The generation config of such a folder holds, too.
      step: which checkpoint; the newest by default.
      chat_format: "chatml" or "raw"; what the folder says by default.

    Raises:
      UserError: nothing that can be read is there, parts are missing or don't fit together.
    """
    path = pathlib.Path(path).expanduser()
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise UserError(
            f"{path} {what}; give a Hugging Face model folder, a working folder of a training, or "
            "a folder of checkpoints."
        )
    if (path / "config.json").is_file():
        if step is not None:
            raise UserError(f"{path} is a Hugging Face folder, which has no steps; leave out step.")
        config, facts = interop.read_config(path), {}
        folder, places = path, [path]
    else:
        folder, step = _checkpoints(path, step)
        header = read_header(str(folder), step)
        step, facts = header.step, header.info | header.fingerprint
        if "model" not in facts:
            raise UserError(f"{folder} does not say which model it is of; give one of a training.")
        config = from_config_dict(ModelConfig, facts["model"], "model")
        places = [folder, folder.parent]
    place = _tokenizer_place(places, tokenizer)
    vocabulary = load_tokenizer(place)
    if facts.get("tokenizer_sha256", vocabulary.sha256) != vocabulary.sha256:
        raise UserError(f"{place} is not the vocabulary that {folder} was trained with; name it.")
    if vocabulary.n_ranks > config.vocab_size:
        raise UserError(
            f"{place} has {vocabulary.n_ranks:,} ranks, but the model at {path} has only "
            f"{config.vocab_size:,} ids; give the tokenizer of this model."
        )
    source = place if place.is_dir() else place.parent
    return Source(
        name=path.resolve().name,
        config=config,
        tokenizer=vocabulary,
        defaults=read_defaults(source, vocabulary, chat_format=chat_format),
        folder=folder,
        step=step,
        stored=facts.get("param_dtype", "float32"),
    )


def load_weights(source: Source, dtype: str, weights: str | None = None) -> Params:
    """The parameters in `dtype`, sharded over the mesh in force, or on the first device.

    A GPTQ folder stays quantised. `weights`, a name in `WEIGHTS`, quantises plain ones.

    Raises:
      UserError: the files are incomplete or damaged; an unknown name; weights that are quantised
        already, or cannot be; a checkpoint that is to be quantised and split over devices at once.
    """
    mesh = None if jax.sharding.get_mesh().empty else jax.sharding.get_mesh()
    if weights is not None and weights not in WEIGHTS:
        raise UserError(
            f"weights is {weights!r}{nearest(weights, WEIGHTS)}; it must be one of "
            f"{', '.join(WEIGHTS)}."
        )
    fmt = WEIGHTS[weights] if weights else None

    def wanted(name: str) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, name, sharding=x.sharding),
            abstract_params(source.config, mesh),
        )

    if source.step is None:
        return interop.load_params(source.folder, source.config, wanted(dtype), quantise=fmt)
    if fmt and mesh is not None and mesh.size > 1:
        raise UserError(
            f"{source.folder} is a checkpoint, which is quantised on one device only; write it as "
            "a Hugging Face folder with launch.convert first."
        )
    params = restore_params(str(source.folder), wanted(source.stored), step=source.step)
    if source.stored != dtype:
        # One leaf at a time: the whole must not be there twice.
        cast = jax.jit(lambda x: x.astype(dtype))
        leaves, tree = jax.tree.flatten(params)
        del params
        for i in range(len(leaves)):
            leaves[i] = jax.block_until_ready(cast(leaves[i]))
        params = tree.unflatten(leaves)
    return quantise_params(params, fmt, consume=True) if fmt else params


def _checkpoints(path: pathlib.Path, step: int | None) -> tuple[pathlib.Path, int | None]:
    """The folder that has the step folders, and the step."""
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


def _tokenizer_place(places: list[pathlib.Path], given: str | os.PathLike | None) -> pathlib.Path:
    """The file or folder to load the tokenizer from."""
    if given is not None:
        return pathlib.Path(given).expanduser()
    for place in places:
        if any(place.glob("*.tiktoken")) or any(
            (place / name).is_file() for name in ("tokenizer.json", "vocab.json")
        ):
            return place
    raise UserError(
        f"No vocabulary lies in {' or '.join(map(str, places))}; name one with tokenizer=FILE "
        "(--tokenizer=FILE)."
    )
