"""Perplexity beyond the trained length, in the form of the report's Table 3.

    python -m launch.perplexity --checkpoint=runs/demo --out=runs/demo/perplexity \
        --corpus=runs/demo/data/code/heldout,runs/demo/data/prose/heldout \
        --lengths=128,256,512,1024,2048,4096 --layers_per_window=1

`--checkpoint` is a Hugging Face folder, a folder of native checkpoints, or a working folder that
has one (of launch.demo or launch.pretrain). `--corpus` is a list of text files, JSON lines and
held-out folders of launch.prepare; documents of more than the longest length are used, cut into
windows that do not overlap. Prints the table, and writes OUT/perplexity.json and
OUT/perplexity.png. Can be killed and started again: finished cells are kept in OUT/cells.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import flags, logging

from launch import program
from qwen_jax import interop
from qwen_jax.artifact import write_text
from qwen_jax.config import from_config_dict
from qwen_jax.corpus.texts import read_texts
from qwen_jax.errors import UserError
from qwen_jax.evaluate.long_context import MODES, Plan, measure
from qwen_jax.evaluate.long_context_report import as_json, as_text, picture
from qwen_jax.model import ForwardOptions, ModelConfig, Params, abstract_params
from qwen_jax.parallel import MeshConfig, batch_devices, make_mesh
from qwen_jax.tokenizer import Tokenizer, load_tokenizer
from qwen_jax.train.checkpoint import read_identity, restore_params
from qwen_jax.train.step import check_mesh

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of the model.", required=True)
STEP = flags.DEFINE_integer("step", None, "Native checkpoint to read; the newest by default.")
TOKENIZER = flags.DEFINE_string("tokenizer", None, "Vocabulary; by default the checkpoint's.")
CORPUS = flags.DEFINE_list("corpus", [], "Text files, .jsonl files and held-out folders.")
OUT = flags.DEFINE_string("out", None, "Folder to write.", required=True)
LENGTHS = flags.DEFINE_list("lengths", [], "Tokens; by default 1/2 to 8 times the trained length.")
TABLE_MODES = flags.DEFINE_list("modes", list(MODES), "none, or ntk, logn, window joined by +.")
TRAINED = flags.DEFINE_integer("trained_length", None, "Instead of what the checkpoint says.")
PER_WINDOW = flags.DEFINE_integer("layers_per_window", 4, "Layers until the window doubles.")
DTYPE = flags.DEFINE_string("dtype", "bfloat16", "Of weights and computation.")
BATCH = flags.DEFINE_integer(
    "batch_tokens", 0, "Tokens at a time; 0: the longest length, at least 8192."
)
DOCUMENTS = flags.DEFINE_integer("documents", None, "At most so many documents, the first ones.")
FSDP = flags.DEFINE_integer("fsdp", 1, "Devices that share rows and weights; -1: all others.")
CONTEXT = flags.DEFINE_integer("context", 1, "Devices that share a sequence.")
TENSOR = flags.DEFINE_integer("tensor", 1, "Devices that share heads and vocabulary.")


@dataclasses.dataclass(frozen=True)
class Model:
    """config: the network; weights: which weights, for people and keys of results; load: reads them
    onto a mesh in a dtype; tokenizer: where its vocabulary should be; sha256: which that is."""

    config: ModelConfig
    weights: dict[str, Any]
    load: Callable[[jax.sharding.Mesh | None, str], Params]
    tokenizer: pathlib.Path
    sha256: str | None = None


def open_model(path: str, step: int | None) -> Model:
    """Says what is in a checkpoint folder of any kind, without reading its arrays.

    Raises:
      UserError: neither kind of checkpoint is there.
    """
    folder = pathlib.Path(path)
    if (folder / "config.json").is_file():
        if step is not None:
            raise UserError(f"--step={step} goes with native checkpoints, not with {path}")
        return _open_hf(folder)
    inner = folder / "checkpoints"
    return _open_native(inner if inner.is_dir() else folder, folder, step)


def _open_hf(folder: pathlib.Path) -> Model:
    config = interop.read_config(folder)
    files = sorted(folder.glob("*.safetensors"))
    weights = {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in files}

    def load(mesh, dtype):
        return interop.load_params(folder, config, _in(dtype, abstract_params(config, mesh)))

    return Model(config, {"folder": str(folder.resolve()), "files": weights}, load, folder)


def _open_native(checkpoints: pathlib.Path, workdir: pathlib.Path, step: int | None) -> Model:
    if not checkpoints.is_dir():
        raise UserError(f"--checkpoint={workdir} does not exist; give a folder with a model")
    facts = read_identity(str(checkpoints), step)
    identity = facts["identity"]
    if "model" not in identity:
        raise UserError(f"{checkpoints} does not say which model it is of; give one of a training")
    config = from_config_dict(ModelConfig, identity["model"], "model")

    def load(mesh, dtype):
        stored = facts["info"].get("param_dtype", "float32")
        abstract = _in(stored, abstract_params(config, mesh))
        params = restore_params(str(checkpoints), abstract, step=facts["step"])
        return jax.jit(lambda p: jax.tree.map(lambda x: x.astype(dtype), p), donate_argnums=0)(
            params
        )

    weights = {"folder": str(checkpoints.resolve()), "step": facts["step"], "identity": identity}
    place = workdir / "tokenizer.tiktoken"
    return Model(config, weights, load, place, identity.get("tokenizer_sha256"))


def _in(dtype: str, abstract: Params) -> Params:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), abstract
    )


def find_tokenizer(model: Model, given: str | None) -> Tokenizer:
    """The vocabulary of the model.

    Raises:
      UserError: there is none, or it is another model's.
    """
    place = pathlib.Path(given) if given else model.tokenizer
    if not given and not place.exists():
        raise UserError(f"{place} does not exist; say where the vocabulary is with --tokenizer")
    tokenizer = load_tokenizer(place)
    if model.sha256 not in (None, tokenizer.sha256):
        raise UserError(f"{place} is not the vocabulary this model was trained with; give that one")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{place} has {tokenizer.vocab_size} ids but the model {model.config.vocab_size} rows; "
            "give the vocabulary of this model"
        )
    return tokenizer


def long_documents(
    paths: Sequence[str], tokenizer: Tokenizer, longest: int, most: int | None
) -> list[list[int]]:
    """Token ids of the first documents with more than `longest` tokens.

    Raises:
      UserError: as `read_texts`; no documents at all.
    """
    found, seen = [], 0
    for path in paths:
        for document in read_texts(path):
            seen += 1
            # A token is a byte or more; normalisation makes three bytes of one at most.
            if 3 * len(document.text.encode()) > longest:
                ids = tokenizer.encode(document.text)
                if len(ids) > longest:
                    found.append(ids)
            if most is not None and len(found) == most:
                return found
    if not found:
        raise UserError(
            f"none of the {seen} documents of --corpus has more than {longest} tokens; give longer "
            "ones, or smaller --lengths"
        )
    return found


def make_plan(config: ModelConfig) -> Plan:
    """The table that the flags ask for.

    Raises:
      UserError: a flag that says nothing possible.
    """
    if TRAINED.value is not None:
        config = dataclasses.replace(config, trained_length=TRAINED.value)
    try:
        lengths = tuple(int(text) for text in LENGTHS.value)
    except ValueError:
        raise UserError(
            f"--lengths={','.join(LENGTHS.value)} must be whole numbers joined by commas"
        ) from None
    trained = config.trained_length
    return Plan(
        config=config,
        options=ForwardOptions(dtype=DTYPE.value),
        lengths=lengths or tuple(trained * 2**k // 2 for k in range(5)),
        modes=tuple(TABLE_MODES.value),
        layers_per_window=PER_WINDOW.value,
        batch_tokens=BATCH.value,
        spread=CONTEXT.value,
    )


def find_mesh(plan: Plan) -> jax.sharding.Mesh | None:
    """The mesh of the flags; None for one device.

    Raises:
      UserError: too few devices, or sizes that do not divide the model.
    """
    sizes = MeshConfig(data=1, fsdp=FSDP.value, context=CONTEXT.value, tensor=TENSOR.value)
    if sizes == MeshConfig(1, 1, 1, 1) and jax.process_count() == 1:
        return None
    devices = jax.devices()
    if FSDP.value != -1 and jax.process_count() == 1:
        devices = devices[: FSDP.value * CONTEXT.value * TENSOR.value]
    mesh = make_mesh(sizes, devices)
    check_mesh(
        plan.config,
        mesh,
        global_batch=batch_devices(mesh),
        microbatches=1,
        seq_len=min(plan.lengths),
    )
    return mesh


def main() -> None:
    """Reads, scores, prints, writes."""
    if not CORPUS.value:
        raise UserError("--corpus is missing: give text files, .jsonl files or held-out folders")
    if DOCUMENTS.value is not None and DOCUMENTS.value < 1:
        raise UserError(f"--documents is {DOCUMENTS.value}; it must be at least 1")
    model = open_model(CHECKPOINT.value, STEP.value)
    plan = make_plan(model.config)
    tokenizer = find_tokenizer(model, TOKENIZER.value)
    mesh = find_mesh(plan)
    documents = long_documents(CORPUS.value, tokenizer, plan.longest, DOCUMENTS.value)
    out = pathlib.Path(OUT.value)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        table = measure(
            *(plan, lambda: model.load(mesh, plan.options.dtype), documents),
            *(tokenizer.token_lengths, out / "cells", model.weights),
        )
    if jax.process_index():
        return
    result = {"checkpoint": CHECKPOINT.value, "corpus": CORPUS.value, **as_json(table)}
    write_text(out / "perplexity.json", json.dumps(result, indent=1) + "\n")
    _write_bytes(out / "perplexity.png", picture(table))
    print(as_text(table))
    logging.info("wrote %s and perplexity.png", out / "perplexity.json")


def _write_bytes(path: pathlib.Path, data: bytes) -> None:
    """Whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    os.replace(partial, path)


if __name__ == "__main__":
    program.run(main)
