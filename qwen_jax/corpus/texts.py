"""Reading of complete documents for evaluation, from any supported format."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator

from qwen_jax.corpus.documents import Document, JsonLines
from qwen_jax.corpus.records import MANIFEST
from qwen_jax.errors import UserError


def read_texts(path: str | os.PathLike) -> Iterator[Document]:
    """Yields the documents of a file or folder, in its order.

    Args:
      path: JSON lines (`.jsonl`, `.jsonl.gz`); a held-out folder written by launch.prepare, or the
        folder of its source, whose documents are in `heldout.jsonl`; or any other file, which is
        one document of UTF-8 text.

    Raises:
      UserError: the path does not exist, is a folder without documents, or has other contents than
        its name says.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        beside = path.with_name(path.name + ".jsonl")
        inside = path / "heldout.jsonl"
        if not (path / MANIFEST).is_file():
            beside = inside
        if not beside.is_file():
            raise UserError(
                f"the corpus {path} is a folder without {beside.name}; give a "
                "held-out folder of launch.prepare, a .jsonl or a text file"
            )
        path = beside
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        yield from JsonLines(path)
        return
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"the corpus {path} does not exist; give a text or .jsonl file") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"the corpus {path} is not UTF-8 (byte {error.start}); give a text or .jsonl file"
        ) from None
    except OSError as error:
        raise UserError(f"the corpus {path} cannot be read ({error.strerror})") from None
    yield Document(path.name, text)
