"""Binary format of packed training windows, and the manifest of a folder of them.

A *window* is `seq_len + 1` consecutive tokens of a source's stream: the first `seq_len` are inputs,
the last `seq_len` targets. With T = seq_len, each ArrayRecord record (group_size 1, little endian,
no header, no padding) is one window::

    offset        type           meaning
    0             uint32         UTF-8 bytes of the targets that carry loss
    4             uint32[T + 1]  tokens
    8 + 4T        uint32[T + 1]  segment ids: 1, 2, ... per document within the record, 0 = padding
    12 + 8T       uint8[T]       loss mask of targets tokens[1:], 1 = carries loss
    12 + 9T                      end

A folder contains `windows-00000-of-0000N.array_record` files and `manifest.json` (`Manifest`).
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
    """A batch of b decoded windows of T targets each.

    Attributes:
      tokens: token ids, uint32 [b, T+1].
      segment_ids: document number within the window, from 1; 0 for padding; uint32 [b, T+1].
      loss_mask: 1 where the target tokens[:, 1:] carries loss, uint8 [b, T].
      n_bytes: UTF-8 bytes of the targets that carry loss, uint32 [b].
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    loss_mask: np.ndarray
    n_bytes: np.ndarray


def record_size(seq_len: int) -> int:
    """Returns the size in bytes of a record with `seq_len` targets."""
    return 12 + 9 * seq_len


def encode_window(
    tokens: np.ndarray, segment_ids: np.ndarray, loss_mask: np.ndarray, n_bytes: int
) -> bytes:
    """Encodes one window as a record; the module docstring gives the layout.

    Args:
      tokens: token ids, integers [T+1].
      segment_ids: document number of each token, integers [T+1].
      loss_mask: 1 where a target carries loss, integers [T].
      n_bytes: UTF-8 bytes of the targets that carry loss.
    """
    return b"".join(
        (
            np.uint32(n_bytes).astype("<u4").tobytes(),
            tokens.astype("<u4").tobytes(),
            segment_ids.astype("<u4").tobytes(),
            loss_mask.astype("u1").tobytes(),
        )
    )


def decode_windows(records: Sequence[bytes], seq_len: int) -> Windows:
    """Decodes b records of `record_size(seq_len)` bytes each."""
    size, width = record_size(seq_len), 4 * (seq_len + 1)
    rows = np.frombuffer(b"".join(records), np.uint8).reshape(len(records), size)

    def uint32_columns(start: int, stop: int) -> np.ndarray:
        """Returns bytes [start, stop) of every record as uint32 [b, (stop - start) / 4]."""
        return np.ascontiguousarray(rows[:, start:stop]).view("<u4").astype(np.uint32)

    return Windows(
        tokens=uint32_columns(4, 4 + width),
        segment_ids=uint32_columns(4 + width, 4 + 2 * width),
        loss_mask=rows[:, 4 + 2 * width :],
        n_bytes=uint32_columns(0, 4)[:, 0],
    )


def cut_windows(
    documents: Iterable[np.ndarray], seq_len: int, eod_id: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Appends `eod_id` to each document, joins them and cuts windows with a stride of seq_len.

    Args:
      documents: tokens of each document, uint32; none empty, none containing `eod_id`.
      seq_len: targets per window T.
      eod_id: end-of-document token, also used as padding.

    Yields:
      Token ids uint32 [T+1], segment ids uint32 [T+1] (from 1 in each window, 0 = padding) and loss
      mask uint8 [T]. The first token of a window is the last of the previous one.
    """
    size = seq_len + 1
    tokens = np.full(size, eod_id, np.uint32)
    segments = np.zeros(size, np.uint32)
    filled = segment = 0
    has_new_target = False  # whether the window has a target that no earlier one had

    def window() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns copies of the arrays of the current window."""
        # A target carries loss if its input is in the same document; padding never does.
        mask = (segments[1:] == segments[:-1]) & (segments[1:] != 0)
        return tokens.copy(), segments.copy(), mask.astype(np.uint8)

    for document in documents:
        segment += 1
        pieces = np.append(document, np.uint32(eod_id)).astype(np.uint32)
        while pieces.size:
            take = min(size - filled, pieces.size)
            tokens[filled : filled + take] = pieces[:take]
            segments[filled : filled + take] = segment
            filled, pieces, has_new_target = filled + take, pieces[take:], True
            if filled == size:
                yield window()
                tokens[0] = tokens[-1]
                tokens[1:], segments[1:] = eod_id, 0
                segments[0] = segment = 1
                filled, has_new_target = 1, False
    if has_new_target:
        yield window()


@dataclasses.dataclass(frozen=True)
class Shard:
    """One ArrayRecord file of windows.

    Attributes:
      file: file name within the folder.
      windows: number of records.
      bytes: size of the file in bytes.
      sha256: SHA-256 of the file, hexadecimal.
    """

    file: str
    windows: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Contents of a folder of windows and the inputs it was made from.

    Attributes:
      format: version of the format, `FORMAT`.
      seq_len: targets per window T.
      seed: seed of the document order.
      tokenizer_sha256: hash of the tokenizer's vocabulary.
      vocab_size: number of token ids of the tokenizer.
      documents: number of packed documents.
      empty_documents: number of documents without a token, which are left out.
      text_bytes: UTF-8 bytes of all documents.
      documents_digest: hash of the set of (id, text), independent of their order.
      tokens: length of the token stream, one end-of-document token per document included.
      target_tokens: number of targets that carry loss.
      target_bytes: UTF-8 bytes of the targets that carry loss.
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
        """Returns the fields that determine the windows, in JSON types; all except the shards."""
        fields = dataclasses.asdict(self)
        del fields["shards"]
        return fields


def write_manifest(folder: pathlib.Path, manifest: Manifest) -> None:
    """Writes `manifest.json` atomically."""
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
    raise UserError(
        f"{path} has format {found!r}, but this version reads {FORMAT!r}; pack the data again."
    )


def check_shards(folder: str | os.PathLike, manifest: Manifest, *, deep: bool = False) -> list[str]:
    """Compares size and record count of every shard with the manifest and returns their paths.

    Cheap enough for every start (no record is read): it finds missing, truncated and half-copied
    files. A flipped bit is found when its record is read.

    Args:
      folder: the packed folder.
      manifest: its manifest.
      deep: whether to read all files and compare their SHA-256 too.

    Raises:
      UserError: a shard differs from the manifest; the message names the first one.
    """
    if manifest.windows == 0 or not manifest.shards:
        raise UserError(
            f"{folder} has no windows; pack some documents into it, or remove it from the sources."
        )
    paths = []
    for shard in manifest.shards:
        path = pathlib.Path(folder) / shard.file
        found = _shard_problem(path, shard, deep)
        if found:
            raise UserError(f"The shard {path} {found}; copy or pack the data again.")
        paths.append(str(path))
    return paths


def _shard_problem(path: pathlib.Path, shard: Shard, deep: bool) -> str:
    """Returns what is wrong with a shard as a phrase such as "is missing", or "".

    Args:
      path: the file.
      shard: its entry in the manifest.
      deep: whether to compare its SHA-256.
    """
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != shard.bytes:
        return f"has {size} bytes, but its manifest says {shard.bytes}"
    try:
        reader = array_record_module.ArrayRecordReader(str(path))
        records = reader.num_records()
        reader.close()
    except RuntimeError as error:
        return f"is damaged ({error})"
    if records != shard.windows:
        return f"has {records} records, but its manifest says {shard.windows}"
    if deep:
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                return "differs from the SHA-256 in its manifest"
    return ""


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Compares two mappings on the keys of `wanted`.

    Returns:
      "key is X, not Y; …" for every key with another value in `found`; "" if there is none.
    """
    return "; ".join(
        f"{key} is {found.get(key)!r}, not {value!r}"
        for key, value in wanted.items()
        if found.get(key) != value
    )
