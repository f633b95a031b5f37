"""A corpus as named sources, each split into a training and a held-out side, written to disk.

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
"""{"train": documents, "heldout": documents}; without the second where nothing is held out."""


def stdlib_sources(
    *, heldout: float, seed: int, max_bytes: int | None = None, tests: bool = False
) -> dict[str, Sides]:
    """The standard library of this interpreter: sources `code` and `prose` (see `stdlib.load`)."""
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
    """A JSONL file as one source, named after it."""
    lines = JsonLines(path)
    name = lines.path.name.removesuffix(".gz").removesuffix(".jsonl")
    train, held = (Subset(lines, heldout, seed, held=side) for side in (False, True))
    return {name: _sides(train, held, heldout)}


def _sides(train: Iterable[Document], held: Iterable[Document], heldout: float) -> Sides:
    return {"train": train, "heldout": held} if heldout else {"train": train}


def keep_documents(path: str | os.PathLike, documents: Iterable[Document]) -> int:
    """Writes documents to a JSONL file unless they are there; returns their number.

    Raises:
      UserError: the file holds other documents.
    """
    path = pathlib.Path(path)
    new = path.with_name(path.name + ".new")
    count = write_jsonl(new, documents)
    if path.exists() and not filecmp.cmp(new, path, shallow=False):
        new.unlink()
        raise UserError(
            f"{path} already holds other documents; delete it or choose another folder."
        )
    os.replace(new, path)
    return count


def write_source(folder: str | os.PathLike, sides: Sides) -> dict[str, int]:
    """Writes every side of a source as JSONL; returns the number of documents of each.

    Raises:
      UserError: a side without documents, or other documents in its place.
    """
    folder = pathlib.Path(folder)
    _check_some(folder, sides)
    counts = {}
    for side, documents in sides.items():
        counts[side] = keep_documents(folder / f"{side}.jsonl", documents)
    return counts


def pack_source(
    folder: str | os.PathLike, sides: Sides, tokenizer: PackTokenizer, config: PackConfig
) -> dict[str, Manifest]:
    """Packs every side of a source (held-out windows in one file); returns the manifests.

    The held-out documents are kept beside their windows, for measures that read text.

    Raises:
      UserError: a side without documents, or other data in its place.
    """
    folder = pathlib.Path(folder)
    _check_some(folder, sides)
    manifests = {}
    for side, documents in sides.items():
        one_file = PackConfig(config.seq_len, config.seed, 1, config.run_bytes)
        how = config if side == "train" else one_file
        manifests[side] = pack(documents, folder / side, tokenizer, how)
        if side == "heldout":
            keep_documents(folder / "heldout.jsonl", documents)
    return manifests


def _check_some(folder: pathlib.Path, sides: Sides) -> None:
    """Before anything is written."""
    for side, documents in sides.items():
        if next(iter(documents), None) is None:
            raise UserError(
                f"The {side} side of {folder.name} has no documents; hold out another share, split "
                "by another seed, or give more text."
            )
