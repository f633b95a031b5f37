"""Weighted mixture of packed sources with random access to the window at any position.

Each source is an endless sequence of its windows, every epoch in another order
(`grain.MapDataset.shuffle`: a keyed permutation that is not held in memory); the mixture
interleaves the sources evenly by weight (`grain.MapDataset.mix`). All windows have the same number
of tokens, so weights are shares of *tokens* (except for the padding of each source's last window).

Grain converts weights to integers, the smallest becoming 100. `proportions` does this beforehand
and rounds to nearest (Grain truncates), so each weight relative to the smallest is off by at most
0.5 %; every sequence of sum(proportions) windows has exactly each source's proportion.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Mapping
from typing import Any

import grain

from qwen_jax.corpus.records import (
    Manifest,
    check_shards,
    differences,
    read_manifest,
    record_size,
)
from qwen_jax.data.config import DataConfig, parse_sources
from qwen_jax.errors import UserError

_SMALLEST = 100  # integer to which Grain scales the smallest weight


class WindowSource:
    """Sequence of the raw records (bytes) of one packed folder, in stream order; thread-safe.

    Attributes:
      path: the folder.
      manifest: what the folder records about its shards.

    Raises:
      UserError: when opened, if the folder is not complete or has another seq_len or tokenizer;
        when a record is read, if it is damaged.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        seq_len: int | None = None,
        tokenizer_sha256: str | None = None,
    ):
        """Opens the folder and compares size and record count of every shard with the manifest.

        Args:
          path: packed folder.
          seq_len: tokens per window that the folder must have; None accepts any.
          tokenizer_sha256: hash of the tokenizer it must be made with; None accepts any.
        """
        self.path = os.fspath(path)
        self.manifest: Manifest = read_manifest(path)
        packed_len = self.manifest.seq_len
        if seq_len is not None and packed_len != seq_len:
            raise UserError(
                f"{path} is packed with seq_len {packed_len}, the config has {seq_len}; "
                "pack it again or change the config."
            )
        found = self.manifest.tokenizer_sha256
        if tokenizer_sha256 is not None and found != tokenizer_sha256:
            raise UserError(
                f"{path} is packed with the tokenizer {found[:16]}..., the one in use is "
                f"{tokenizer_sha256[:16]}...; use the same tokenizer or pack it again."
            )
        self._records = grain.sources.ArrayRecordDataSource(check_shards(path, self.manifest))
        self._size = record_size(self.manifest.seq_len)

    def __len__(self) -> int:
        """Returns the number of windows."""
        return self.manifest.windows

    def __repr__(self) -> str:
        return f"WindowSource({self.path!r})"

    def __getitem__(self, index: int) -> bytes:
        """Reads the raw record of a window; raises UserError if it is damaged."""
        try:
            record = self._records[index]
        except (RuntimeError, OSError) as error:
            raise self._damaged(index, str(error)) from None
        if len(record) != self._size:
            raise self._damaged(index, f"{len(record)} bytes instead of {self._size}")
        return record

    def _damaged(self, index: int, what: str) -> UserError:
        """Returns the error of a damaged record, naming its shard and its index there.

        Args:
          index: window of the folder.
          what: what is wrong with its record.
        """
        local = int(index)
        for shard in self.manifest.shards:
            if local < shard.windows:
                return UserError(
                    f"Record {local} of {os.path.join(self.path, shard.file)} is damaged ({what}); "
                    "copy or pack the data again."
                )
            local -= shard.windows
        raise AssertionError(f"index {index} is beyond {self.manifest.windows} windows")


def open_sources(
    config: DataConfig, tokenizer_sha256: str | None = None
) -> tuple[WindowSource, ...]:
    """Opens and checks every source of a config, in its order.

    Args:
      config: its `sources` and `seq_len`.
      tokenizer_sha256: hash of the tokenizer they must be made with; None accepts any.

    Raises:
      UserError: a source cannot be opened or does not fit; names the first.
    """
    return tuple(
        WindowSource(source.path, seq_len=config.seq_len, tokenizer_sha256=tokenizer_sha256)
        for source in parse_sources(config.sources)
    )


def proportions(weights: tuple[float, ...]) -> tuple[int, ...]:
    """Returns integer shares of a mixture: weights scaled so that the smallest is 100, rounded."""
    smallest = min(weights)
    return tuple(round(_SMALLEST * (weight / smallest)) for weight in weights)


def _proportions_of(config: DataConfig) -> tuple[int, ...]:
    """Returns the integer shares of the sources of a config, in their order."""
    return proportions(tuple(source.weight for source in parse_sources(config.sources)))


def _source_seed(seed: int, index: int) -> int:
    """Returns the 32-bit shuffle seed of the source at `index`.

    Hashed, because Grain adds the epoch number to it: with consecutive seeds, epoch e+1 of a source
    would have the order of epoch e of the next one.
    """
    digest = hashlib.sha256(f"source:{seed}:{index}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def mix(sources: tuple[WindowSource, ...], config: DataConfig) -> grain.MapDataset:
    """Returns the endless mixture of opened sources, shuffled and interleaved by weight.

    Item [r] is the raw record (bytes) of global row r = step · global_batch + row in the batch.
    """
    return _mix([grain.MapDataset.source(source) for source in sources], config)


def _mix(datasets: list[grain.MapDataset], config: DataConfig) -> grain.MapDataset:
    """Returns the endless mixture of any datasets in place of the config's sources."""
    endless = [
        dataset.shuffle(seed=_source_seed(config.seed, index)).repeat()
        for index, dataset in enumerate(datasets)
    ]
    if len(endless) == 1:
        return endless[0]
    return grain.MapDataset.mix(endless, _proportions_of(config))


def _order_probe(config: DataConfig, lengths: list[int]) -> str:
    """Returns a hash of the windows in some rows, near the start and far into a run.

    The order is computed by Grain. If another version of it ordered differently, this hash would
    differ, so that a run does not silently resume in another order.

    Args:
      config: weights and seed of the mixture.
      lengths: number of windows of each source.
    """
    starts = [0, *itertools.accumulate(lengths)]
    ranges = [grain.MapDataset.range(*pair) for pair in itertools.pairwise(starts)]
    order = _mix(ranges, config)
    rows = [int(order[row]) for start in (0, 10**6, 10**9) for row in range(start, start + 16)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def epochs_at(config: DataConfig, step: int) -> dict[str, float]:
    """Returns the number of epochs over each source, by path, in the first `step` steps."""
    weights = _proportions_of(config)
    rows = step * config.global_batch
    return {
        source.path: rows * weight / sum(weights) / read_manifest(source.path).windows
        for source, weight in zip(parse_sources(config.sources), weights, strict=True)
    }


def data_fingerprint(config: DataConfig) -> dict[str, Any]:
    """Returns everything that determines the batches, in JSON types, to store with a checkpoint.

    Two configs with equal fingerprints give equal batches. Folders are identified by the hash of
    their manifests, not by path, so data may be moved.
    """
    weights = _proportions_of(config)
    manifests = [read_manifest(source.path) for source in parse_sources(config.sources)]
    return {
        "sources": [
            hashlib.sha256(json.dumps(manifest.content(), sort_keys=True).encode()).hexdigest()
            for manifest in manifests
        ],
        "proportions": list(weights),
        "seq_len": config.seq_len,
        "global_batch": config.global_batch,
        "packing": config.packing,
        "seed": config.seed,
        "order": _order_probe(config, [manifest.windows for manifest in manifests]),
    }


def check_fingerprint(found: Mapping[str, Any], config: DataConfig) -> None:
    """Checks that a stored fingerprint is that of `config`.

    Raises:
      UserError: it is not; names what differs.
    """
    different = differences(found, data_fingerprint(config))
    if different:
        raise UserError(
            f"The run was started on other data: {different}; "
            "use the config it was started with, or start a new run."
        )
