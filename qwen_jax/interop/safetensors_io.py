"""Reading and writing safetensors: headers checked first, then only the bytes that are wanted.

Format: 8-byte little-endian header length, JSON header {name: {dtype, shape, data_offsets}}, data
without gaps (github.com/huggingface/safetensors). The public package's slices go through whole
torch or numpy tensors and do not know bfloat16 in numpy; here a tensor is a memory-mapped view, so
a strided slice of it touches only its own pages and costs no anonymous memory.
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

import ml_dtypes
import numpy as np

from qwen_jax.errors import UserError

# dtypes weights may have. Others (fp8) are read as headers only.
FLOAT_DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
DTYPES = FLOAT_DTYPES | {"I32": np.dtype(np.int32)}
"""dtypes that can be read and written: floats, and the words that weights are packed into."""
_ITEM_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I16": 16, "U16": 16,
              "I32": 32, "U32": 32, "I64": 64, "U64": 64} | {
    name: 8 * dtype.itemsize for name, dtype in FLOAT_DTYPES.items()
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ROWS = 256  # Few enough that the columns they are taken from stay in cache.
_MAX_HEADER = 100_000_000  # The public reader's own limit, in bytes.


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: file, safetensors dtype name, shape, and byte range in the file."""

    file: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_header(file: pathlib.Path) -> dict[str, TensorInfo]:
    """Reads and checks the header of one safetensors file; no tensor data is read.

    Returns:
      Tensor name → place, with byte ranges that lie in the file and fit shape and dtype.

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


def _no_duplicates(pairs):
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name appears twice")
    return out


def _parse_entry(file: pathlib.Path, entry: Mapping, data_start: int) -> TensorInfo:
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
    """The tensors of several safetensors files, as read-only memory-mapped arrays.

    Use as a context manager. `bytes_read` counts the bytes of the slices that were copied out.

    Args:
      infos: tensor name → place, as `read_header` gives them.
    """

    def __init__(self, infos: Mapping[str, TensorInfo]):
        self.infos = dict(infos)
        self.bytes_read = 0
        self._maps: dict[pathlib.Path, mmap.mmap] = {}

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *exc):
        # A view still referenced by a traceback must not turn the error into a BufferError.
        for mapped in self._maps.values():
            with contextlib.suppress(BufferError):
                mapped.close()
        self._maps.clear()

    def tensor(self, name: str) -> np.ndarray:
        """Read-only view [shape] of a tensor in its stored dtype; nothing is read until used."""
        info = self.infos[name]
        if info.file not in self._maps:
            with info.file.open("rb") as f:
                self._maps[info.file] = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        dtype = DTYPES[info.dtype]
        flat = np.frombuffer(self._maps[info.file], np.uint8, info.nbytes, info.start)
        return flat.view(dtype).reshape(info.shape)

    def release(self) -> None:
        """Lets the operating system drop the pages read so far from this process's memory."""
        for mapped in self._maps.values():
            mapped.madvise(mmap.MADV_DONTNEED)


def header_bytes(tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> bytes:
    """The header, length included, of a file that stores `tensors` in their order.

    Args:
      tensors: name → (shape, dtype, one of `DTYPES`' values).
    """
    header: dict = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, dtype) in tensors.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # Data starts at a multiple of 8 bytes.
    return struct.pack("<Q", len(text)) + text


def write_file(
    file: pathlib.Path,
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    blocks: Iterable[np.ndarray],
) -> Iterator[int]:
    """Writes one safetensors file from a stream of arrays; yields the bytes written by each.

    Args:
      file: where to write; the caller makes it visible atomically.
      tensors: name → (shape, dtype), in the order of the data.
      blocks: the data of all tensors in that order, cut anywhere inside a tensor.
    """
    dtypes = {dtype for _, dtype in tensors.values()}
    with file.open("wb") as f:
        f.write(header_bytes(tensors))
        for block in blocks:
            assert block.dtype in dtypes, (block.dtype, dtypes)
            nbytes = block.nbytes
            # A transposed block is straightened out a few rows at a time, never copied whole.
            rows = len(block) if block.flags.c_contiguous else _ROWS
            for start in range(0, len(block), rows):
                piece = np.ascontiguousarray(block[start : start + rows])
                f.write(piece.reshape(-1).view(np.uint8).data)
            del block, piece  # Before the next one is made.
            yield nbytes
        f.flush()
        os.fsync(f.fileno())
