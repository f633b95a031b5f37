"""Weighted mixture of packed sources with random access: the window at any position, directly.

Each source is an endless sequence of its windows, every epoch in another order
(`grain.MapDataset.shuffle`: a keyed permutation, nothing is held in memory); the mixture
interleaves the sources evenly by weight (`grain.MapDataset.mix`). All windows have the same number
of tokens, so weights are shares of *tokens* (padding of each source's last window aside).

Grain turns weights into integers, the smallest becoming 100. `proportions` does this first and
rounds to nearest (Grain would truncate), so each weight relative to the smallest is off by at most
0.5 %; in every run of sum(proportions) windows each source then has exactly its proportion.
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

_SMALLEST = 100  # What Grain scales the smallest weight to.


class WindowSource:
    """Random access to the raw records of one packed folder, in stream order.

    Thread-safe. Opening compares size and record count of every shard with the manifest.

    Args:
      path: packed folder.
      seq_len: the T wanted, None for whatever it holds.
      tokenizer_sha256: the tokenizer wanted, None for any.

    Raises:
      UserError: not a complete packed folder, or of another seq_len or tokenizer (at once); a
        damaged record (when it is read).
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        seq_len: int | None = None,
        tokenizer_sha256: str | None = None,
    ):
        self.path = os.fspath(path)
        self.manifest: Manifest = read_manifest(path)
        found = self.manifest.seq_len
        if seq_len is not None and found != seq_len:
            raise UserError(
                f"{path} is packed with seq_len {found}, the config wants {seq_len}; "
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
        return self.manifest.windows

    def __repr__(self) -> str:
        return f"WindowSource({self.path!r})"

    def __getitem__(self, index: int) -> bytes:
        try:
            record = self._records[index]
        except (RuntimeError, OSError) as error:
            raise self._damaged(index, str(error)) from None
        if len(record) != self._size:
            raise self._damaged(index, f"{len(record)} bytes instead of {self._size}")
        return record

    def _damaged(self, index: int, what: str) -> UserError:
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
    """Opens and checks every source of the config; raises UserError for the first that is wrong."""
    return tuple(
        WindowSource(source.path, seq_len=config.seq_len, tokenizer_sha256=tokenizer_sha256)
        for source in parse_sources(config.sources)
    )


def proportions(weights: tuple[float, ...]) -> tuple[int, ...]:
    """Integer shares of the mixture: weights scaled so that the smallest is 100, rounded."""
    smallest = min(weights)
    return tuple(round(_SMALLEST * (weight / smallest)) for weight in weights)


def _proportions_of(config: DataConfig) -> tuple[int, ...]:
    return proportions(tuple(source.weight for source in parse_sources(config.sources)))


def _source_seed(seed: int, index: int) -> int:
    """32 bits, hashed: Grain adds the epoch, and no source's epoch e shall be another's e+1."""
    digest = hashlib.sha256(f"source:{seed}:{index}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def mix(sources: tuple[WindowSource, ...], config: DataConfig) -> grain.MapDataset:
    """The endless mixture: raw record bytes of global row r (step · global_batch + row) at [r]."""
    return _mix([grain.MapDataset.source(source) for source in sources], config)


def _mix(datasets: list[grain.MapDataset], config: DataConfig) -> grain.MapDataset:
    endless = [
        dataset.shuffle(seed=_source_seed(config.seed, index)).repeat()
        for index, dataset in enumerate(datasets)
    ]
    if len(endless) == 1:
        return endless[0]
    return grain.MapDataset.mix(endless, _proportions_of(config))


def _order_probe(config: DataConfig, lengths: list[int]) -> str:
    """Hash of which window some rows hold, near the start and far into the run.

    The order is Grain's; should a version of it order differently, a resumed run must not silently
    go on in another order.
    """
    starts = [0, *itertools.accumulate(lengths)]
    ranges = [grain.MapDataset.range(*pair) for pair in itertools.pairwise(starts)]
    order = _mix(ranges, config)
    rows = [int(order[row]) for start in (0, 10**6, 10**9) for row in range(start, start + 16)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def epochs_at(config: DataConfig, step: int) -> dict[str, float]:
    """Passes over each source, by path, that training has made before `step` (1.0 = all once)."""
    weights = _proportions_of(config)
    rows = step * config.global_batch
    return {
        source.path: rows * weight / sum(weights) / read_manifest(source.path).windows
        for source, weight in zip(parse_sources(config.sources), weights, strict=True)
    }


def data_fingerprint(config: DataConfig) -> dict[str, Any]:
    """What determines the batch of every step, in JSON types, to be stored with a checkpoint.

    Two configs with equal fingerprints give equal batches. Folders are named by the hash of their
    manifests, not by path, so moved data is the same data.
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
    """Raises UserError, naming what differs, unless `found` is the fingerprint of `config`."""
    different = differences(found, data_fingerprint(config))
    if different:
        raise UserError(
            f"The run was started on other data: {different}; "
            "use the config it was started with, or start a new run."
        )
