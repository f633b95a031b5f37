"""Batches as a pure function of the step, and a background reader that keeps ahead of the device.

Global batch s is rows s·B .. s·B + B - 1 of the mixture, and each host reads the rows its devices
hold. So the global batch is the same for any number of hosts, the data position is the step number,
and a run resumes exactly on another number of hosts.

Keys of a batch of b rows and T = seq_len tokens:

    tokens       int32[b, T]    inputs
    targets      int32[b, T]    the next tokens
    loss_mask    float32[b, T]  1 where the target is trained, else 0
    segment_ids  int32[b, T]    which tokens attend to each other; 0 = padding
    positions    int32[b, T]    for RoPE
    n_bytes      float32[b]     UTF-8 bytes of the targets with loss_mask 1 (for bits per byte)
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator, Sequence

import numpy as np

from qwen_jax.corpus.records import decode_windows, record_size
from qwen_jax.data.config import DataConfig, Packing, check_packing
from qwen_jax.data.mixture import WindowSource, mix, open_sources
from qwen_jax.errors import UserError

Batch = dict[str, np.ndarray]


def make_batch(records: Sequence[bytes], seq_len: int, packing: Packing) -> Batch:
    """Records to a batch; see the module for keys, shapes and dtypes.

    "plain": segment id 1 everywhere (0 on padding), positions 0..T-1. "masked": segment ids
    1, 2, ... per document in the row, positions from 0 at each document's first token in the row.
    """
    windows = decode_windows(records, seq_len)
    segments = windows.segment_ids[:, :-1].astype(np.int32)  # [b, T]
    index = np.broadcast_to(np.arange(seq_len, dtype=np.int32), segments.shape)
    if packing == "masked":
        starts = np.zeros(segments.shape, np.int32)
        changed = segments[:, 1:] != segments[:, :-1]
        starts[:, 1:] = np.where(changed, index[:, 1:], 0)
        positions = index - np.maximum.accumulate(starts, axis=1)
    else:
        segments = (segments > 0).astype(np.int32)
        positions = index.copy()
    return {
        "tokens": windows.tokens[:, :-1].astype(np.int32),
        "targets": windows.tokens[:, 1:].astype(np.int32),
        "loss_mask": windows.loss_mask.astype(np.float32),
        "segment_ids": segments,
        "positions": positions,
        "n_bytes": windows.n_bytes.astype(np.float32),
    }


class Batches:
    """The training batches of a config. All checks of the sources happen here, before training.

    Args:
      config: see `DataConfig`.
      tokenizer_sha256: the hash of the tokenizer in use, compared with the sources'; None to skip.

    Raises:
      UserError: a source is missing, empty, incomplete, damaged, or does not fit the config.
    """

    def __init__(self, config: DataConfig, tokenizer_sha256: str | None = None):
        self.config = config
        self._mixture = mix(open_sources(config, tokenizer_sha256), config)

    def rows(self, step: int, first: int = 0, count: int | None = None) -> Batch:
        """Rows [first, first + count) of global batch `step` (all by default); a pure function.

        Raises:
          UserError: a record is damaged.
        """
        count = self.config.global_batch - first if count is None else count
        start = step * self.config.global_batch + first
        records = [self._mixture[row] for row in range(start, start + count)]
        return make_batch(records, self.config.seq_len, self.config.packing)

    def iterate(
        self, start_step: int, first: int = 0, count: int | None = None, prefetch: int = 2
    ) -> Prefetch:
        """Endless (step, rows [first, first + count) of its batch), read ahead by a thread.

        Args:
          start_step: first step, the checkpoint's step on resume.
          first, count: the rows this host needs, see `rows`.
          prefetch: batches read ahead; bounds the memory.

        Raises:
          UserError: as `rows`; errors while reading ahead come out of `next()`.
        """
        return Prefetch(self, start_step, first, count, prefetch)


class Prefetch:
    """Iterator over (step, batch), fed by a thread that `close()` or the `with` block ends."""

    def __init__(
        self,
        batches: Batches,
        start_step: int,
        first: int,
        count: int | None,
        depth: int,
    ):
        self._queue: queue.Queue = queue.Queue(max(1, depth))
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(
            target=self._read,
            args=(batches, start_step, first, count),
            name="batches",
            daemon=True,
        )
        self._thread.start()

    def _read(self, batches: Batches, step: int, first: int, count: int | None) -> None:
        while not self._stop.is_set():
            try:
                item = (step, batches.rows(step, first, count))
            except BaseException as error:
                item = error
            while not self._stop.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return
            step += 1

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        return self

    def __next__(self) -> tuple[int, Batch]:
        if self._failure is not None:
            raise self._failure
        if self._stop.is_set():
            raise StopIteration
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._failure = item
            raise item
        return item

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *unused) -> None:
        self.close()

    def close(self) -> None:
        """Ends the thread and drops what was read ahead; a second call does nothing."""
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(timeout=0.1)


def eval_batches(
    path: str | os.PathLike,
    batch_size: int,
    *,
    packing: Packing = "plain",
    seq_len: int | None = None,
    tokenizer_sha256: str | None = None,
    first: int = 0,
    count: int | None = None,
) -> Iterator[Batch]:
    """Every window of one packed folder once, in stream order.

    The last batch is filled with rows of padding (segment 0, loss_mask 0, n_bytes 0), so all
    batches have `batch_size` rows and every host gets the same number of batches. Sums of loss and
    n_bytes over all batches and hosts are exact.

    Args:
      path: packed folder.
      batch_size: rows per batch over all hosts.
      packing: as in `DataConfig`; the one the model is trained with.
      seq_len, tokenizer_sha256: when given, must be the folder's.
      first, count: the rows of each batch to read; all by default.

    Raises:
      UserError: as `WindowSource`, at the call; a damaged record, while iterating.
    """
    if batch_size < 1:
        raise UserError(f"The evaluation batch size is {batch_size}; it must be at least 1.")
    check_packing(packing)
    rows = batch_size - first if count is None else count
    source = WindowSource(path, seq_len=seq_len, tokenizer_sha256=tokenizer_sha256)
    length = source.manifest.seq_len
    padding = bytes(record_size(length))

    def read() -> Iterator[Batch]:
        for start in range(first, first + len(source), batch_size):
            indices = range(start, start + rows)
            records = [source[i] if i < len(source) else padding for i in indices]
            yield make_batch(records, length, packing)

    return read()
