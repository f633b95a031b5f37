"""Reads, validates and writes BPE vocabularies: lists of byte strings, the index being the rank.

The native format is tiktoken's: one line per token with base64 of its bytes, a space, and its rank.
The Hugging Face files of Qwen1.5 and later contain the same list and are read by `huggingface.py`.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import os
import pathlib
import re
import tempfile
from collections.abc import Iterable, Mapping

from qwen_jax.errors import UserError
from qwen_jax.tokenizer import huggingface
from qwen_jax.tokenizer.huggingface import AddedToken

QWEN_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
"""SHA-256 of the released qwen.tiktoken, the same file in Qwen-1.8B to 72B, base and chat."""
QWEN_RANKS = 151_643
"""Number of BPE tokens in it."""

# What the first line of a tiktoken file looks like.
_FIRST_LINE = re.compile(rb"\s*[A-Za-z0-9+/]+={0,2} [0-9]+\s*(\n|$)")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Content of a vocabulary file.

    Attributes:
      ranks: bytes of each BPE token; the index is its rank and its id.
      added_tokens: control tokens defined by Hugging Face files; empty for the tiktoken format,
        which cannot store them.
    """

    ranks: tuple[bytes, ...]
    added_tokens: tuple[AddedToken, ...] = ()


def tiktoken_text(ranks: Iterable[bytes]) -> bytes:
    """Returns the content of a tiktoken file in canonical form.

    That is: lines sorted by rank, one space between base64 and rank, "\\n" after every line.

    Args:
      ranks: bytes of each token, in order of rank.
    """
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks))


def canonical_sha256(ranks: Iterable[bytes]) -> str:
    """Returns the SHA-256 (hex) of a vocabulary in canonical tiktoken form.

    Equal vocabularies have equal hashes, independent of the format of their files.
    """
    return hashlib.sha256(tiktoken_text(ranks)).hexdigest()


def write_tiktoken(ranks: Iterable[bytes], path: str | os.PathLike) -> None:
    """Writes a vocabulary to a tiktoken file, atomically.

    Args:
      ranks: bytes of each token, in order of rank.
      path: file to write or replace.

    Raises:
      UserError: the ranks are not a valid vocabulary, or the folder does not exist.
    """
    path = pathlib.Path(path)
    ranks = check_ranks(dict(enumerate(ranks)), f"the vocabulary to be written to {path}")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is not a folder: create it before writing {path.name}.")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(tiktoken_text(ranks))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_vocabulary(path: str | os.PathLike) -> Vocabulary:
    """Reads the vocabulary in a file or a folder.

    A folder (checkpoint or Hugging Face) is searched for `qwen.tiktoken`, a single `*.tiktoken`,
    `tokenizer.json`, and `vocab.json` with `merges.txt`, in this order. A file with the suffix
    `.json` is read as one of the last two, any other file as tiktoken.

    Raises:
      UserError: there is no vocabulary, or it is invalid; the message gives the file and, if it
        can, the line.
    """
    path = _find_file(pathlib.Path(path))
    try:
        if path.suffix == ".json":
            by_id, added = huggingface.read_ranks(path)
            return Vocabulary(check_ranks(by_id, str(path)), added)
        with open(path, "rb") as file:
            head = file.read(512)
            _check_start(head, path)
            data = head + file.read()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from None
    return Vocabulary(check_ranks(_parse_tiktoken(data, path), str(path)))


def _find_file(path: pathlib.Path) -> pathlib.Path:
    """Returns the vocabulary file at `path`, a file or a folder; see `read_vocabulary`.

    Raises:
      UserError: there is none, or a folder has several `*.tiktoken` files.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(
            f"{path} does not exist: give a tiktoken file, or a folder with qwen.tiktoken, "
            "tokenizer.json, or vocab.json and merges.txt."
        )
    if (path / "qwen.tiktoken").is_file():
        return path / "qwen.tiktoken"
    found = sorted(path.glob("*.tiktoken"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise UserError(f"{path} contains {len(found)} vocabularies ({names}): give one of them.")
    if found:
        return found[0]
    if (path / "tokenizer.json").is_file():
        return path / "tokenizer.json"
    if (path / "vocab.json").is_file():
        return path / "vocab.json"
    raise UserError(
        f"{path} contains no vocabulary: looked for qwen.tiktoken, *.tiktoken, tokenizer.json, and "
        "vocab.json with merges.txt."
    )


def _check_start(head: bytes, path: pathlib.Path) -> None:
    """Checks that the first bytes of a file are those of a tiktoken file.

    Args:
      head: the first bytes, enough for a line.
      path: the file, for messages.

    Raises:
      UserError: it is another file; the usual ones (Git LFS pointer, web page, JSON) are named.
    """
    wanted = "a tiktoken vocabulary (lines of base64, a space, a rank) was expected"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not start:
        raise UserError(f"{path} is empty: {wanted}; fetch the file again.")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in that "
            "folder, or fetch the file again."
        )
    if start.startswith(b"<"):
        raise UserError(
            f"{path} is a web page, not a vocabulary: {wanted}; fetch the raw file instead of "
            "the page that shows it."
        )
    if start.startswith((b"{", b"[")):
        raise UserError(
            f"{path} is JSON: {wanted}; a Hugging Face tokenizer is read from a file named "
            "tokenizer.json or vocab.json."
        )
    if not _FIRST_LINE.match(head):
        shown = head.split(b"\n", 1)[0][:40].decode("utf-8", "backslashreplace")
        raise UserError(f"{path}, line 1, is {shown!r}: {wanted}.")


def _parse_tiktoken(data: bytes, path: pathlib.Path) -> dict[int, bytes]:
    """Parses the content of a tiktoken file, whose lines may be in any order.

    Args:
      data: the content.
      path: the file, for messages.

    Returns:
      Rank → token bytes.

    Raises:
      UserError: a line is malformed, or a rank occurs twice.
    """
    by_rank: dict[int, bytes] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        fields = line.split()
        if not fields:
            continue
        try:
            encoded, digits = fields
            token = binascii.a2b_base64(encoded, strict_mode=True)
            rank = int(digits)
        except ValueError:
            shown = line[:40].decode("utf-8", "backslashreplace")
            raise UserError(
                f"{path}, line {number}, is {shown!r}: base64, a space and a rank were expected; "
                "the file is damaged or truncated, so fetch it again."
            ) from None
        if rank in by_rank:
            raise UserError(
                f"{path}, line {number}, gives rank {rank} a second time: every rank must appear "
                "once; fetch the file again."
            )
        by_rank[rank] = token
    return by_rank


def check_ranks(by_rank: Mapping[int, bytes], name: str) -> tuple[bytes, ...]:
    """Checks that tokens form a byte-level BPE vocabulary and returns them in order of rank.

    Args:
      by_rank: rank → token bytes.
      name: name of the vocabulary in error messages.

    Raises:
      UserError: the ranks are not 0 … n−1, a token is empty or repeated, or one of the 256 single
        bytes is missing.
    """
    missing = next((rank for rank in range(len(by_rank)) if rank not in by_rank), None)
    if missing is not None:
        raise UserError(
            f"{name} has {len(by_rank):,} tokens but none of rank {missing}: ranks must be 0 to "
            f"{len(by_rank) - 1:,} without a gap; lines are missing, so fetch the file again."
        )
    seen: dict[bytes, int] = {}
    for rank in range(len(by_rank)):
        token = by_rank[rank]
        if not token or token in seen:
            what = f"repeats rank {seen[token]}" if token else "is empty"
            raise UserError(
                f"{name}: the token of rank {rank}, {token!r}, {what}; every token must be a "
                "different, non-empty byte string."
            )
        seen[token] = rank
    absent = [byte for byte in range(256) if bytes([byte]) not in seen]
    if absent:
        raise UserError(
            f"{name} lacks {len(absent)} of the 256 single bytes (the first is "
            f"0x{absent[0]:02X}): byte-level BPE needs them all to encode any text."
        )
    return tuple(seen)
