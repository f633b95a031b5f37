"""Measures perplexity beyond the trained length, as in the report's Table 3.

    python -m launch.perplexity --checkpoint=runs/demo --out=runs/demo/perplexity \
        --corpus=runs/demo/data/code/heldout,runs/demo/data/prose/heldout \
        --lengths=128,256,512,1024,2048,4096 --layers_per_window=1

`--checkpoint` is a Hugging Face folder, a folder of native checkpoints, or a working folder of
launch.demo or launch.pretrain. `--corpus` is a list of text files, JSON lines and held-out folders
of launch.prepare; documents of more than the longest length are cut into windows that do not
overlap. Prints the table, and writes OUT/perplexity.json and OUT/perplexity.png. Finished cells are
kept in OUT/cells: rerunning the same command resumes an interrupted run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags, logging

from launch import program
from qwen_jax.artifact import write_text
from qwen_jax.corpus.texts import read_texts
from qwen_jax.errors import UserError
from qwen_jax.evaluate.long_context import MODES, TablePlan, measure
from qwen_jax.evaluate.long_context_report import as_json, as_text, plot_png
from qwen_jax.generate.source import ModelSource, find_model, load_weights
from qwen_jax.model import ForwardOptions, ModelConfig
from qwen_jax.parallel import MeshConfig, batch_devices, make_mesh
from qwen_jax.tokenizer import Tokenizer
from qwen_jax.train.config import check_mesh

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of the model.", required=True)
STEP = flags.DEFINE_integer("step", None, "Native checkpoint to read; the newest by default.")
TOKENIZER = flags.DEFINE_string("tokenizer", None, "Vocabulary; by default the checkpoint's.")
CORPUS = flags.DEFINE_list("corpus", [], "Text files, .jsonl files and held-out folders.")
OUT = flags.DEFINE_string("out", None, "Folder to write.", required=True)
LENGTHS = flags.DEFINE_list(
    "lengths", [], "Lengths in tokens; default 1/2 to 8 times the trained length."
)
TABLE_MODES = flags.DEFINE_list("modes", list(MODES), "none, or ntk, logn, window joined by +.")
TRAINED = flags.DEFINE_integer("trained_length", None, "Trained length; default the checkpoint's.")
PER_WINDOW = flags.DEFINE_integer("layers_per_window", 4, "Layers after which the window doubles.")
DTYPE = flags.DEFINE_string("dtype", "bfloat16", "Dtype of weights and computation.")
BATCH = flags.DEFINE_integer(
    "batch_tokens", 0, "Tokens per batch; 0: the longest length, at least 8192."
)
DOCUMENTS = flags.DEFINE_integer(
    "documents", None, "Maximum number of documents, first ones first."
)
FSDP = flags.DEFINE_integer("fsdp", 1, "Size of the fsdp mesh axis; -1: all remaining devices.")
CONTEXT = flags.DEFINE_integer("context", 1, "Size of the context mesh axis (sequence).")
TENSOR = flags.DEFINE_integer("tensor", 1, "Size of the tensor mesh axis (heads, FFN, vocabulary).")


def identify_weights(source: ModelSource) -> dict[str, Any]:
    """Returns facts that identify the weights without reading them: file names, sizes and times."""
    if source.step is None:
        files = source.folder.glob("*.safetensors")
    else:
        files = (source.folder / f"step_{source.step:08d}").rglob("*")
    facts = [(str(f.relative_to(source.folder)), f.stat()) for f in files if f.is_file()]
    return {
        "folder": str(source.folder.resolve()),
        "files": sorted([name, fact.st_size, fact.st_mtime_ns] for name, fact in facts),
    }


def long_documents(
    paths: Sequence[str], tokenizer: Tokenizer, longest: int, max_documents: int | None
) -> list[list[int]]:
    """Returns the token ids of the first documents with more than `longest` tokens.

    Args:
      paths: text files, JSON lines, held-out folders.
      tokenizer: encodes the documents.
      longest: documents with this many tokens or fewer are skipped.
      max_documents: maximum number of documents; None for all.

    Raises:
      UserError: as `read_texts`, or no document is long enough.
    """
    found: list[list[int]] = []
    num_read = 0
    for path in paths:
        for document in read_texts(path):
            num_read += 1
            # A token is a byte or more; normalisation makes three bytes of one at most.
            if 3 * len(document.text.encode()) > longest:
                ids = tokenizer.encode(document.text)
                if len(ids) > longest:
                    found.append(ids)
            if max_documents is not None and len(found) == max_documents:
                return found
    if not found:
        raise UserError(
            f"none of the {num_read} documents of --corpus has more than {longest} tokens; give "
            "longer ones, or smaller --lengths"
        )
    return found


def make_plan(config: ModelConfig) -> TablePlan:
    """Returns the table that the flags define, for a network.

    Raises:
      UserError: an invalid flag value.
    """
    if TRAINED.value is not None:
        config = dataclasses.replace(config, trained_length=TRAINED.value)
    try:
        lengths = tuple(int(text) for text in LENGTHS.value)
    except ValueError:
        raise UserError(
            f"--lengths={','.join(LENGTHS.value)} must be integers joined by commas"
        ) from None
    trained = config.trained_length
    return TablePlan(
        config=config,
        options=ForwardOptions(dtype=DTYPE.value),
        lengths=lengths or tuple(trained * 2**k // 2 for k in range(5)),
        modes=tuple(TABLE_MODES.value),
        layers_per_window=PER_WINDOW.value,
        batch_tokens=BATCH.value,
        context=CONTEXT.value,
    )


def find_mesh(plan: TablePlan) -> jax.sharding.Mesh | None:
    """Returns the mesh that the flags define; None for one device.

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
    """Reads the model and documents, computes the table, prints and writes it."""
    if not CORPUS.value:
        raise UserError("--corpus is missing: give text files, .jsonl files or held-out folders")
    if DOCUMENTS.value is not None and DOCUMENTS.value < 1:
        raise UserError(f"--documents is {DOCUMENTS.value}; it must be at least 1")
    source = find_model(CHECKPOINT.value, tokenizer=TOKENIZER.value, step=STEP.value)
    plan = make_plan(source.config)
    mesh = find_mesh(plan)
    documents = long_documents(CORPUS.value, source.tokenizer, plan.longest, DOCUMENTS.value)
    out = pathlib.Path(OUT.value)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        table = measure(
            plan,
            lambda: load_weights(source, plan.options.dtype),
            documents,
            source.tokenizer.token_lengths,
            out / "cells",
            identify_weights(source),
        )
    if jax.process_index():
        return
    result = {"checkpoint": CHECKPOINT.value, "corpus": CORPUS.value, **as_json(table)}
    write_text(out / "perplexity.json", json.dumps(result, indent=1) + "\n")
    _write_bytes(out / "perplexity.png", plot_png(table))
    print(as_text(table))
    logging.info("wrote %s and perplexity.png", out / "perplexity.json")


def _write_bytes(path: pathlib.Path, data: bytes) -> None:
    """Writes `data` to a file, which appears complete or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    os.replace(partial, path)


if __name__ == "__main__":
    program.run(main)
