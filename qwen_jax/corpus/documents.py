"""Documents stored as JSON lines, one `{"id", "text", "source"}` object per line, UTF-8 or gzip.

Lines end at "\\n" only: U+0085 and U+2028, at which `str.splitlines` also splits, are ordinary
characters inside a text.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import json
import os
import pathlib
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, cast

from qwen_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Document:
    """A text with an id.

    Attributes:
      id: unique name within its corpus, from which shuffles and splits are derived.
      text: the complete text of one document.
      source: name of the mixture component it belongs to ("" if there is only one).
    """

    id: str
    text: str
    source: str = ""


def unit_hash(seed: int, key: str) -> float:
    """Returns a uniform number in [0, 1) computed from `seed` and `key` (SHA-256, first 53 bits).

    All splits and subsamples are based on it: its value is the same on every machine and in every
    run, and does not depend on the order or number of other keys.
    """
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def _parse(line: bytes, where: str) -> Document:
    """Parses one line as a document.

    Args:
      line: a line of the file, UTF-8.
      where: "file:line", with which every error begins.

    Raises:
      UserError: the line is not UTF-8, not JSON, or not a document.
    """
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 (byte {error.start} of the line); re-encode the file as UTF-8."
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where} is not JSON ({error.msg}, column {error.colno}); "
            'each line must be one object {"id": ..., "text": ...}.'
        ) from None
    if not isinstance(row, dict):
        raise UserError(
            f"{where} is a JSON {type(row).__name__}, not an object with the keys id and text."
        )
    for key in ("id", "text"):
        if not isinstance(row.get(key), str):
            found = type(row[key]).__name__ if key in row else "nothing"
            raise UserError(f"{where} has {found} under {key!r} where a string is needed.")
    source = row.get("source", "")
    if not isinstance(source, str):
        raise UserError(f"{where} has {type(source).__name__} under 'source', not a string.")
    for key, value in (("id", row["id"]), ("text", row["text"])):
        if "\\u" in line.decode("utf-8") and not _encodable(value):
            raise UserError(
                f"{where} has a lone surrogate in {key!r}, which UTF-8 cannot represent; "
                "remove it or join the pair."
            )
    return Document(row["id"], row["text"], source)


def _encodable(text: str) -> bool:
    """Returns whether a text can be encoded as UTF-8, that is, has no lone surrogate."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


class JsonLines:
    """Iterable of the documents of a JSONL file, in file order; each `iter()` starts a new pass.

    Keys other than id, text and source are ignored. Blank lines are skipped.

    Args:
      path: a `.jsonl` file, or gzip of one if the name ends in `.gz`.

    Raises:
      UserError: no such file (at construction); or, while iterating, a line that is not a document,
        or a truncated gzip stream; the message names file and line.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise UserError(f"The corpus {self.path} is not a file; give a .jsonl or .jsonl.gz.")

    def __iter__(self) -> Iterator[Document]:
        number = 0
        opener = gzip.open if self.path.suffix == ".gz" else open
        try:
            with opener(self.path, "rb") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield _parse(line, f"{self.path}:{number}")
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(
                f"{self.path} is a damaged gzip file after line {number} ({error}); "
                "copy or compress it again."
            ) from None


@dataclasses.dataclass(frozen=True)
class Subset:
    """Iterable of one side of a split by document id; each `iter()` starts a new pass.

    Attributes:
      documents: documents to split, iterable several times.
      heldout: expected share of documents held out, in [0, 1].
      seed: seed of the split; a document is held out if `unit_hash(seed, id) < heldout`.
      held: True for the held-out documents, False for the others.
    """

    documents: Iterable[Document]
    heldout: float
    seed: int
    held: bool

    def __iter__(self) -> Iterator[Document]:
        for document in self.documents:
            if (unit_hash(self.seed, document.id) < self.heldout) == self.held:
                yield document


def write_jsonl(path: str | os.PathLike, documents: Iterable[Document]) -> int:
    """Writes documents to a JSONL file atomically and returns their number.

    The bytes depend on the documents only (there is no time stamp in the gzip header).

    Args:
      path: the file; gzip-compressed if its name ends in `.gz`.
      documents: the documents, written in order.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    count = 0
    with contextlib.ExitStack() as stack:
        raw = stack.enter_context(open(temporary, "wb"))
        file: IO[bytes] = raw
        if path.suffix == ".gz":
            file = cast(
                "IO[bytes]", stack.enter_context(gzip.GzipFile("", "wb", fileobj=raw, mtime=0))
            )
        for document in documents:
            row = dataclasses.asdict(document)
            file.write(json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n")
            count += 1
    os.replace(temporary, path)
    return count
