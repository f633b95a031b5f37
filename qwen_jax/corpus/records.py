"""The fixed binary record that one training window is, and the manifest of a folder of them.

A *window* is `seq_len + 1` consecutive tokens of a source's stream: the first `seq_len` are inputs,
the last `seq_len` targets. With T = seq_len, one ArrayRecord record (group_size 1, little endian,
no header, no padding) is::

    offset        type           meaning
    0             uint32         UTF-8 bytes of the targets that carry loss
    4             uint32[T + 1]  tokens
    8 + 4T        uint32[T + 1]  segment ids: 1, 2, ... per document within the record, 0 = padding
    12 + 8T       uint8[T]       loss mask of targets tokens[1:], 1 = trained
    12 + 9T                      end

A folder holds `windows-00000-of-0000N.array_record` files and `manifest.json` (`Manifest`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_module

from qwen_jax.errors import UserError

FORMAT = "qwen_jax.windows.1"
MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Windows:
    """A batch of b decoded records.

    Attributes:
      tokens: uint32[b, T+1].
      segment_ids: uint32[b, T+1], 1-based per record, 0 for padding.
      loss_mask: uint8[b, T], for the targets tokens[:, 1:].
      n_bytes: uint32[b], UTF-8 bytes of the targets that carry loss.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    loss_mask: np.ndarray
    n_bytes: np.ndarray


def record_size(seq_len: int) -> int:
    """Bytes of a record with `seq_len` targets."""
    return 12 + 9 * seq_len


def encode_window(
    tokens: np.ndarray, segment_ids: np.ndarray, loss_mask: np.ndarray, n_bytes: int
) -> bytes:
    """One record from integer arrays [T+1], [T+1] and [T]; see the module's layout."""
    return b"".join(
        (
            np.uint32(n_bytes).astype("<u4").tobytes(),
            tokens.astype("<u4").tobytes(),
            segment_ids.astype("<u4").tobytes(),
            loss_mask.astype("u1").tobytes(),
        )
    )


def decode_windows(records: Sequence[bytes], seq_len: int) -> Windows:
    """Decodes b records of `record_size(seq_len)` bytes each at once."""
    size, width = record_size(seq_len), 4 * (seq_len + 1)
    rows = np.frombuffer(b"".join(records), np.uint8).reshape(len(records), size)

    def words(start: int, stop: int) -> np.ndarray:
        return np.ascontiguousarray(rows[:, start:stop]).view("<u4").astype(np.uint32)

    return Windows(
        tokens=words(4, 4 + width),
        segment_ids=words(4 + width, 4 + 2 * width),
        loss_mask=rows[:, 4 + 2 * width :],
        n_bytes=words(0, 4)[:, 0],
    )


def cut_windows(
    documents: Iterable[np.ndarray], seq_len: int, eod_id: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Documents in order to windows: append `eod_id` to each, join, cut with a stride of seq_len.

    Args:
      documents: uint32 tokens of each document, none empty, without `eod_id`.
      seq_len: targets per window T. eod_id: end-of-document token, also the padding.

    Yields:
      tokens uint32[T+1], segment ids uint32[T+1] (1-based per window, 0 = padding), loss mask
      uint8[T]. The first token of a window is the last of the one before.
    """
    size = seq_len + 1
    tokens = np.full(size, eod_id, np.uint32)
    segments = np.zeros(size, np.uint32)
    filled = segment = 0
    fresh = False  # Does the window hold a token that no earlier window had as target?

    def finished() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        # A target is trained when its input is of the same document; padding never is.
        mask = (segments[1:] == segments[:-1]) & (segments[1:] != 0)
        return tokens.copy(), segments.copy(), mask.astype(np.uint8)

    for document in documents:
        segment += 1
        pieces = np.append(document, np.uint32(eod_id)).astype(np.uint32)
        while pieces.size:
            take = min(size - filled, pieces.size)
            tokens[filled : filled + take] = pieces[:take]
            segments[filled : filled + take] = segment
            filled, pieces, fresh = filled + take, pieces[take:], True
            if filled == size:
                yield finished()
                tokens[0] = tokens[-1]
                tokens[1:], segments[1:] = eod_id, 0
                segments[0] = segment = 1
                filled, fresh = 1, False
    if fresh:
        yield finished()


@dataclasses.dataclass(frozen=True)
class Shard:
    """One ArrayRecord file: name within the folder, records, size in bytes, SHA-256 of the file."""

    file: str
    windows: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a folder of windows holds and what it was made from.

    Attributes:
      format: `FORMAT`.
      seq_len: targets per window T.
      seed: of the document order.
      tokenizer_sha256, vocab_size: the tokenizer's identity.
      documents: documents packed. empty_documents: those without a token, left out.
      text_bytes: UTF-8 bytes of all documents.
      documents_digest: hash of the set of (id, text), independent of their order.
      tokens: length of the token stream, one end-of-document token per document included.
      target_tokens: targets that carry loss. target_bytes: their UTF-8 bytes.
      windows: records in all shards.
      shards: the files, in stream order.
    """

    format: str
    seq_len: int
    seed: int
    tokenizer_sha256: str
    vocab_size: int
    documents: int
    empty_documents: int
    text_bytes: int
    documents_digest: str
    tokens: int
    target_tokens: int
    target_bytes: int
    windows: int
    shards: tuple[Shard, ...]

    def content(self) -> dict[str, Any]:
        """The fields that determine every window, in JSON types; the same for any sharding."""
        fields = dataclasses.asdict(self)
        del fields["shards"]
        return fields


def write_manifest(folder: pathlib.Path, manifest: Manifest) -> None:
    """Writes `manifest.json` through a temporary file."""
    temporary = folder / (MANIFEST + ".tmp")
    with open(temporary, "w", encoding="utf-8", newline="\n") as file:
        json.dump(dataclasses.asdict(manifest), file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / MANIFEST)


def read_manifest(folder: str | os.PathLike) -> Manifest:
    """Reads the manifest of a packed folder.

    Raises:
      UserError: the folder or its manifest is missing, unreadable, or of another format.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"The data folder {folder} does not exist; pack it first (python -m launch.prepare)."
        )
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder} has no {MANIFEST}, so it is not a complete packed data folder.")
    try:
        fields = json.loads(path.read_text("utf-8"))
        found = fields["format"]
        if found == FORMAT:
            shards = tuple(Shard(**shard) for shard in fields.pop("shards"))
            return Manifest(**fields, shards=shards)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}); pack the data again.") from None
    raise UserError(f"{path} is of format {found!r}, this code reads {FORMAT!r}; pack it again.")


def check_shards(folder: str | os.PathLike, manifest: Manifest, *, deep: bool = False) -> list[str]:
    """Compares size and record count of every shard with the manifest; returns their paths.

    Cheap enough for every start (no record is read): it finds missing, truncated and half-copied
    files. A flipped bit is found when its record is read, or here with `deep`, which reads
    everything and compares SHA-256.

    Raises:
      UserError: naming the first file that differs.
    """
    if manifest.windows == 0 or not manifest.shards:
        raise UserError(f"{folder} holds no windows; give it documents or leave it out.")
    paths = []
    for shard in manifest.shards:
        path = pathlib.Path(folder) / shard.file
        found = _shard_problem(path, shard, deep)
        if found:
            raise UserError(f"The shard {path} {found}; copy or pack the data again.")
        paths.append(str(path))
    return paths


def _shard_problem(path: pathlib.Path, shard: Shard, deep: bool) -> str:
    """What is wrong with a shard, or ""."""
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != shard.bytes:
        return f"has {size} bytes, its manifest says {shard.bytes}"
    try:
        reader = array_record_module.ArrayRecordReader(str(path))
        records = reader.num_records()
        reader.close()
    except RuntimeError as error:
        return f"is damaged ({error})"
    if records != shard.windows:
        return f"has {records} records, its manifest says {shard.windows}"
    if deep:
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                return "has not the SHA-256 its manifest says"
    return ""


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """ "key is X, not Y; ..." for every key of `wanted` whose value in `found` differs, or ""."""
    return "; ".join(
        f"{key} is {found.get(key)!r}, not {value!r}"
        for key, value in wanted.items()
        if found.get(key) != value
    )
