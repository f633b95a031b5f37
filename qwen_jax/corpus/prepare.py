"""Preparation of a corpus on disk: named sources, split into training and held-out documents.

FOLDER/<source>/train.jsonl, FOLDER/<source>/heldout.jsonl     the documents
FOLDER/<source>/train/,      FOLDER/<source>/heldout/          the packed windows
"""

from __future__ import annotations

import filecmp
import os
import pathlib
from collections.abc import Iterable

from qwen_jax.corpus import stdlib
from qwen_jax.corpus.documents import Document, JsonLines, Subset, write_jsonl
from qwen_jax.corpus.packing import PackConfig, PackTokenizer, pack
from qwen_jax.corpus.records import Manifest
from qwen_jax.errors import UserError

Sides = dict[str, Iterable[Document]]
"""{"train": documents, "heldout": documents}; no "heldout" if nothing is held out."""


def stdlib_sources(
    *, heldout: float, seed: int, max_bytes: int | None = None, tests: bool = False
) -> dict[str, Sides]:
    """Returns the standard library of this interpreter as sources `code` and `prose`.

    Args:
      heldout: expected share of modules held out.
      seed: seed of the split.
      max_bytes: approximate limit of the text in bytes; None: no limit.
      tests: whether to include the test suite where it is installed.

    Returns:
      Source name -> its training and held-out documents (see `stdlib.load`).
    """
    corpus = stdlib.load(heldout=heldout, seed=seed, max_bytes=max_bytes, tests=tests)
    return {
        component: _sides(
            [d for d in corpus.train if d.source == component],
            [d for d in corpus.heldout if d.source == component],
            heldout,
        )
        for component in stdlib.COMPONENTS
    }


def jsonl_source(path: str | os.PathLike, *, heldout: float, seed: int) -> dict[str, Sides]:
    """Returns a JSONL file as a single source named after the file.

    Args:
      path: a `.jsonl` or `.jsonl.gz` file.
      heldout: expected share of documents held out.
      seed: seed of the split.
    """
    lines = JsonLines(path)
    name = lines.path.name.removesuffix(".gz").removesuffix(".jsonl")
    train, held = (Subset(lines, heldout, seed, held=side) for side in (False, True))
    return {name: _sides(train, held, heldout)}


def _sides(train: Iterable[Document], held: Iterable[Document], heldout: float) -> Sides:
    """Returns the sides of a source, without the held-out side if `heldout` is 0."""
    return {"train": train, "heldout": held} if heldout else {"train": train}


def keep_documents(path: str | os.PathLike, documents: Iterable[Document]) -> int:
    """Writes documents to a JSONL file, unless it already contains them, and returns their number.

    Raises:
      UserError: the file contains other documents.
    """
    path = pathlib.Path(path)
    new = path.with_name(path.name + ".new")
    count = write_jsonl(new, documents)
    if path.exists() and not filecmp.cmp(new, path, shallow=False):
        new.unlink()
        raise UserError(
            f"{path} already contains other documents; delete it or choose another folder."
        )
    os.replace(new, path)
    return count


def write_source(folder: str | os.PathLike, sides: Sides) -> dict[str, int]:
    """Writes each side of a source as JSONL and returns side -> number of documents.

    Raises:
      UserError: a side has no documents, or its file contains other documents.
    """
    folder = pathlib.Path(folder)
    _check_not_empty(folder, sides)
    counts = {}
    for side, documents in sides.items():
        counts[side] = keep_documents(folder / f"{side}.jsonl", documents)
    return counts


def pack_source(
    folder: str | os.PathLike, sides: Sides, tokenizer: PackTokenizer, config: PackConfig
) -> dict[str, Manifest]:
    """Packs each side of a source, held-out windows into a single file; returns side -> manifest.

    The held-out documents are also written beside their windows, for evaluations that read text.

    Args:
      folder: folder of the source.
      sides: its documents.
      tokenizer: tokenizer of the windows.
      config: packing of the training side.

    Raises:
      UserError: a side has no documents, or its output contains other data.
    """
    folder = pathlib.Path(folder)
    _check_not_empty(folder, sides)
    manifests = {}
    for side, documents in sides.items():
        one_file = PackConfig(config.seq_len, config.seed, 1, config.run_bytes)
        how = config if side == "train" else one_file
        manifests[side] = pack(documents, folder / side, tokenizer, how)
        if side == "heldout":
            keep_documents(folder / "heldout.jsonl", documents)
    return manifests


def _check_not_empty(folder: pathlib.Path, sides: Sides) -> None:
    """Checks that each side has documents, before anything is written.

    Raises:
      UserError: a side has none.
    """
    for side, documents in sides.items():
        if next(iter(documents), None) is None:
            raise UserError(
                f"The {side} side of {folder.name} has no documents; hold out another share, split "
                "by another seed, or give more text."
            )
