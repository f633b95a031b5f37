"""Batches as a pure function of the step, and a background reader that prefetches them.

Global batch s consists of rows s·B to s·B + B - 1 of the mixture (B: global batch size), of which
each host reads the rows that its devices hold. So the global batch is the same for any number of
hosts, the data position is the step number, and a run resumes exactly on another number of hosts.

Keys of a batch of b rows and T = seq_len tokens:

    tokens       int32[b, T]    input token ids
    targets      int32[b, T]    the next token ids
    loss_mask    float32[b, T]  1 where the target carries loss, else 0
    segment_ids  int32[b, T]    tokens attend only to those with the same id; 0 is padding
    positions    int32[b, T]    RoPE positions
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

HostBatch = dict[str, np.ndarray]
"""Rows of a batch as numpy arrays on the host; the module docstring lists keys and shapes."""


def make_batch(records: Sequence[bytes], seq_len: int, packing: Packing) -> HostBatch:
    """Decodes records of packed windows to a batch.

    Args:
      records: one raw record per row.
      seq_len: tokens per row T.
      packing: "plain" gives segment id 1 everywhere (0 on padding) and positions 0 to T-1;
        "masked" gives segment ids 1, 2, … per document in the row, and positions that start from 0
        at each document's first token in the row.

    Returns:
      The batch; the module docstring lists its keys, shapes and dtypes.
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
    """Random access to the training batches of a config, by step.

    Attributes:
      config: the mixture, sequence length, batch size and packing.

    Raises:
      UserError: a source is missing, empty, incomplete, damaged, or does not fit the config; all of
        this is checked when the object is made.
    """

    def __init__(self, config: DataConfig, tokenizer_sha256: str | None = None):
        """Opens and checks all sources.

        Args:
          config: the mixture, sequence length, batch size and packing.
          tokenizer_sha256: hash of the tokenizer in use, which the sources must be made with; None
            skips this check.
        """
        self.config = config
        self._mixture = mix(open_sources(config, tokenizer_sha256), config)

    def rows(self, step: int, first: int = 0, count: int | None = None) -> HostBatch:
        """Reads rows [first, first + count) of a global batch; a pure function of its arguments.

        Args:
          step: 0-based step of the global batch.
          first: first row to read.
          count: number of rows; None reads to the end of the batch.

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
        """Returns an endless iterator over (step, batch), read ahead by a thread.

        Args:
          start_step: first 0-based step; on a resume, the number of steps done.
          first: first row of each batch that this host needs.
          count: number of rows that this host needs; None is all from `first` on.
          prefetch: number of batches read ahead, which bounds the memory.

        Returns:
          A context manager and iterator; `next()` raises the errors of `rows`.
        """
        return Prefetch(self, start_step, first, count, prefetch)


class Prefetch:
    """Iterator over (step, batch) whose batches are read ahead by a background thread.

    Use it as a context manager, or call `close()`, to end the thread.
    """

    def __init__(
        self,
        batches: Batches,
        start_step: int,
        first: int,
        count: int | None,
        depth: int,
    ):
        """Starts the reading thread; the arguments are those of `Batches.iterate`."""
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
        """Puts (step, batch), or an error after which it ends, into the queue; runs in a thread."""
        while not self._stop.is_set():
            item: tuple[int, HostBatch] | BaseException
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

    def __iter__(self) -> Iterator[tuple[int, HostBatch]]:
        return self

    def __next__(self) -> tuple[int, HostBatch]:
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
        """Ends the thread and discards what was read ahead; a second call does nothing."""
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
) -> Iterator[HostBatch]:
    """Returns an iterator over every window of one packed folder, once, in stream order.

    The last batch is filled with rows of padding (segment 0, loss_mask 0, n_bytes 0), so all
    batches have `batch_size` rows and every host gets the same number of batches. Sums of loss and
    n_bytes over all batches and hosts are exact.

    Args:
      path: packed folder.
      batch_size: rows per batch over all hosts.
      packing: as in `DataConfig`; should be the one the model is trained with.
      seq_len: tokens per row that the folder must have; None accepts any.
      tokenizer_sha256: hash of the tokenizer that the folder must be made with; None accepts any.
      first: first row of each batch to read.
      count: number of rows of each batch to read; None is all from `first` on.

    Raises:
      UserError: at the call, for the reasons of `WindowSource`; while iterating, if a record is
        damaged.
    """
    if batch_size < 1:
        raise UserError(f"The evaluation batch size is {batch_size}; it must be at least 1.")
    check_packing(packing)
    rows = batch_size - first if count is None else count
    source = WindowSource(path, seq_len=seq_len, tokenizer_sha256=tokenizer_sha256)
    length = source.manifest.seq_len
    padding = bytes(record_size(length))

    def read() -> Iterator[HostBatch]:
        for start in range(first, first + len(source), batch_size):
            indices = range(start, start + rows)
            records = [source[i] if i < len(source) else padding for i in indices]
            yield make_batch(records, length, packing)

    return read()
