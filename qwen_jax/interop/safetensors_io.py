"""Reads and writes safetensors files: validated headers, memory-mapped tensors, streamed writes.

Format: 8-byte little-endian header length, JSON header {name: {dtype, shape, data_offsets}}, data
without gaps (github.com/huggingface/safetensors). The public package slices through whole torch or
numpy tensors and has no bfloat16 in numpy; here a tensor is a memory-mapped view, so a strided
slice of it reads only its own pages of the file and uses no anonymous memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import mmap
import os
import pathlib
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from qwen_jax.errors import UserError

FLOAT_DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
"""Safetensors name → numpy dtype of the dtypes that weights may have."""
DTYPES = FLOAT_DTYPES | {"I32": np.dtype(np.int32)}
"""The dtypes that can be read and written: floats, and the int32 words of packed weights."""
# Bits per item, for checking headers; data of dtypes outside DTYPES (such as fp8) is never read.
_ITEM_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 8),
    **dict.fromkeys(("I16", "U16"), 16),
    **dict.fromkeys(("I32", "U32"), 32),
    **dict.fromkeys(("I64", "U64"), 64),
    **{name: 8 * dtype.itemsize for name, dtype in FLOAT_DTYPES.items()},
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ROWS = 256  # Rows of a transposed array copied at a time; few enough to stay in cache.
_MAX_HEADER = 100_000_000  # Bytes; the limit of the public package.

TensorSpecs = Mapping[str, tuple[tuple[int, ...], np.dtype]]
"""Tensor name → (shape, dtype); where order matters, it is that of the data in the file."""


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Location and type of one tensor in a safetensors file.

    Attributes:
      file: the safetensors file.
      dtype: the format's name of the dtype, such as "BF16".
      shape: shape of the tensor.
      start: position of its first byte in the file.
      nbytes: length of its data in bytes.
    """

    file: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_header(file: pathlib.Path) -> dict[str, TensorInfo]:
    """Parses and validates the header of one safetensors file; reads no tensor data.

    Returns:
      Tensor name → `TensorInfo`, with byte ranges that are inside the file, without gaps, and
      match shape and dtype.

    Raises:
      UserError: the file is missing, truncated, or its header is corrupt.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as f:
            length = struct.unpack("<Q", f.read(8))[0] if size >= 8 else None
            if length is None or length > min(size - 8, _MAX_HEADER):
                found = "shorter than its own header" if length is not None else "too short"
                raise UserError(
                    f"{file} is {found} ({size} bytes): it is truncated or not a safetensors "
                    "file; download it again"
                )
            text = f.read(length)
    except OSError as e:
        raise UserError(f"{file} cannot be read ({e.strerror}); download it again") from e
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
        header.pop("__metadata__", None)
        infos = {n: _parse_entry(file, e, 8 + length) for n, e in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise UserError(f"{file} has a corrupt header ({e}); download it again") from e
    end = 8 + length
    for name, info in sorted(infos.items(), key=lambda item: item[1].start):
        if info.start != end:
            raise UserError(
                f"{file} has a corrupt header (data of {name} starts at byte {info.start}, not at "
                f"{end}); download it again"
            )
        end += info.nbytes
    if end != size:
        state = "truncated" if size < end else "longer than it should be"
        raise UserError(
            f"{file} is {state}: its header describes {end} bytes, the file has {size}; "
            "download it again"
        )
    return infos


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the (key, value) pairs of a JSON object as a dict (an `object_pairs_hook`).

    Raises:
      ValueError: a key appears twice.
    """
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name appears twice")
    return out


def _parse_entry(file: pathlib.Path, entry: Mapping[str, Any], data_start: int) -> TensorInfo:
    """Converts one entry of a header into a `TensorInfo`.

    Args:
      file: the safetensors file.
      entry: the JSON object {dtype, shape, data_offsets} of one tensor.
      data_start: position in the file that `data_offsets` are relative to.

    Raises:
      ValueError, TypeError, KeyError: the entry is malformed.
    """
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    numbers = (begin, end, *shape)
    if not all(type(n) is int and n >= 0 for n in numbers) or end < begin:
        raise ValueError(f"shape {list(shape)}, data_offsets {[begin, end]}")
    bits = _ITEM_BITS.get(entry["dtype"])
    if bits is not None and math.prod(shape) * bits != 8 * (end - begin):
        raise ValueError(f"{end - begin} bytes for {entry['dtype']} {list(shape)}")
    return TensorInfo(file, entry["dtype"], shape, data_start + begin, end - begin)


class TensorFiles:
    """Read-only memory-mapped access to the tensors of several safetensors files.

    A context manager; leaving it unmaps the files.

    Attributes:
      infos: tensor name → location, as returned by `read_header`.
      bytes_read: bytes copied out of the tensors; the code that copies adds to it.
    """

    def __init__(self, infos: Mapping[str, TensorInfo]):
        """Prepares access to the tensors in `infos`; files are mapped on first use."""
        self.infos = dict(infos)
        self.bytes_read = 0
        self._maps: dict[pathlib.Path, mmap.mmap] = {}

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *exc):
        # Views may still be referenced by a traceback; the original error must not be replaced by
        # a BufferError.
        for mapped in self._maps.values():
            with contextlib.suppress(BufferError):
                mapped.close()
        self._maps.clear()

    def tensor(self, name: str) -> np.ndarray:
        """Returns a tensor as a read-only view in its stored shape and dtype.

        The file is read only where the view is accessed, as long as the context is open.
        """
        info = self.infos[name]
        if info.file not in self._maps:
            with info.file.open("rb") as f:
                self._maps[info.file] = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        dtype = DTYPES[info.dtype]
        flat = np.frombuffer(self._maps[info.file], np.uint8, info.nbytes, info.start)
        return flat.view(dtype).reshape(info.shape)

    def release(self) -> None:
        """Drops the pages of the files read so far from this process's resident memory."""
        for mapped in self._maps.values():
            mapped.madvise(mmap.MADV_DONTNEED)


def encode_header(tensors: TensorSpecs) -> bytes:
    """Returns the header of a safetensors file, preceded by its length as 8 bytes, little endian.

    Args:
      tensors: specs of the file's tensors in the order of their data, with dtypes of `DTYPES`.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, dtype) in tensors.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # Data starts at a multiple of 8 bytes.
    return struct.pack("<Q", len(text)) + text


def write_file(
    file: pathlib.Path, tensors: TensorSpecs, blocks: Iterable[np.ndarray]
) -> Iterator[int]:
    """Writes one safetensors file from a stream of arrays and yields the bytes written by each.

    Args:
      file: path to write, overwritten in place; atomic replacement is up to the caller.
      tensors: specs of the file's tensors, in the order of their data.
      blocks: arrays whose bytes, one after the other, are the data of all tensors in that order.
        A tensor may be divided into several of them.

    Yields:
      The number of bytes of each array, once it is written.
    """
    dtypes = {dtype for _, dtype in tensors.values()}
    with file.open("wb") as f:
        f.write(encode_header(tensors))
        for block in blocks:
            assert block.dtype in dtypes, (block.dtype, dtypes)
            nbytes = block.nbytes
            # A transposed block is made contiguous a few rows at a time, to bound the copy.
            rows = len(block) if block.flags.c_contiguous else _ROWS
            for start in range(0, len(block), rows):
                piece = np.ascontiguousarray(block[start : start + rows])
                f.write(piece.reshape(-1).view(np.uint8).data)
            del block, piece  # Free them before the iterator makes the next one.
            yield nbytes
        f.flush()
        os.fsync(f.fileno())
