"""Perplexity by context length for each context-extension method: the report's Table 3.

A cell of the table is a mode and a length. A mode is a sum of `ntk`, `logn` and `window`, or
`none`;
all modes use the same weights and score the same tokens. Finished cells are stored in files, so an
interrupted or extended table computes only what is missing.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qwen_jax.artifact import once
from qwen_jax.errors import UserError, nearest
from qwen_jax.evaluate.perplexity import Perplexity, perplexity, split_windows
from qwen_jax.model import ForwardOptions, ModelConfig, Params, layer_windows
from qwen_jax.parallel.distributed import on_first_process
from qwen_jax.progress import Progress

METHODS = ("ntk", "logn", "window")
MODES = ("none", "ntk", "ntk+logn", "ntk+logn+window")
"""The rows of PerplexityTable 3."""

_PARTS = 32  # most parts of a window whose losses are reported separately


@dataclasses.dataclass(frozen=True)
class TablePlan:
    """Definition of a table of perplexities.

    Attributes:
      config: the network. Its switches for NTK and LogN are ignored; its windows apply in modes
        without `window`.
      options: dtype and attention implementation.
      lengths: inputs per window, one per column, each a divisor of the longest.
      modes: rows of the table, "none" or a sum such as "ntk+logn".
      layers_per_window: as in `model.layer_windows`.
      batch_tokens: tokens per batch; 0 means the longest length, and at least 8,192, so that
        matmuls
        are large.
      context: size of the mesh's context axis, over which a sequence is sharded.
    """

    config: ModelConfig
    options: ForwardOptions
    lengths: tuple[int, ...]
    modes: tuple[str, ...] = MODES
    layers_per_window: int = 4
    batch_tokens: int = 0
    context: int = 1

    def __post_init__(self) -> None:
        if not self.lengths or not self.modes:
            raise UserError("lengths and modes are empty; give at least one of each")
        for length in self.lengths:
            if length < 1 or max(self.lengths) % length:
                raise UserError(
                    f"lengths has {length}, which does not divide the longest, "
                    f"{max(self.lengths)}; it must, so that all lengths score the same tokens"
                )
            if length % (2 * self.context if self.context > 1 else 1):
                raise UserError(
                    f"lengths has {length}, which is no multiple of twice context={self.context}; "
                    "choose another length or fewer devices"
                )
        for name, values in (("lengths", self.lengths), ("modes", self.modes)):
            if len(set(values)) < len(values):
                raise UserError(f"{name} has an entry twice: {', '.join(map(str, values))}")
        for mode in self.modes:
            methods_of(mode)
        if self.batch_tokens < 0 or self.layers_per_window < 1:
            raise UserError(
                f"batch_tokens={self.batch_tokens} must be at least 0 and layers_per_window="
                f"{self.layers_per_window} at least 1"
            )

    @property
    def longest(self) -> int:
        """The longest of `lengths`, in tokens."""
        return max(self.lengths)


@dataclasses.dataclass(frozen=True)
class PerplexityTable:
    """A finished table of perplexities.

    Attributes:
      plan: the definition of the table.
      cells: result of each (mode, length).
      documents: number of documents that were long enough.
      n_bytes: UTF-8 bytes of the scored tokens.
    """

    plan: TablePlan
    cells: Mapping[tuple[str, int], Perplexity]
    documents: int
    n_bytes: int

    @property
    def tokens(self) -> int:
        """Number of tokens scored in every cell."""
        return next(iter(self.cells.values())).tokens


def methods_of(mode: str) -> frozenset[str]:
    """Returns the context-extension methods that a mode enables; none for "none".

    Raises:
      UserError: the mode is not a sum of `METHODS`.
    """
    if mode == "none":
        return frozenset()
    found = mode.split("+")
    for method in found:
        if method not in METHODS:
            raise UserError(
                f"mode {mode!r} has {method!r}{nearest(method, METHODS)}; a mode is none, or "
                "ntk, logn and window joined by +"
            )
    return frozenset(found)


def mode_config(config: ModelConfig, mode: str, length: int, layers_per_window: int) -> ModelConfig:
    """Returns the network's configuration for windows of `length` tokens in a mode.

    Switches without effect at this length (any up to the trained length, windows as wide as the
    text)
    are off, so that equal computations have equal configurations. Without `window` in the mode, the
    network keeps its own windows.
    """
    methods, beyond = methods_of(mode), length > config.trained_length
    windows = config.windows
    if "window" in methods:
        windows = layer_windows(
            config.n_layers,
            config.trained_length,
            layers_per_window=layers_per_window,
            longest=length,
        )
    windows = tuple(None if w is None or w >= length else w for w in windows)
    return dataclasses.replace(
        config,
        dynamic_ntk=beyond and "ntk" in methods,
        logn=beyond and "logn" in methods,
        windows=windows if any(windows) else (),
    )


def measure(
    plan: TablePlan,
    params: Callable[[], Params],
    documents: Sequence[Sequence[int]],
    token_lengths: np.ndarray,
    folder: str | pathlib.Path,
    weights: Mapping[str, Any],
) -> PerplexityTable:
    """Computes the table and stores every finished cell in `folder`.

    Call it under the mesh, if any. With several processes, the first reads and writes the cells.

    Args:
      plan: the definition of the table.
      params: loads the parameters of `plan.config`; called once, if any cell has to be computed.
      documents: token ids; documents of fewer than the longest length + 1 are dropped.
      token_lengths: UTF-8 bytes of each id (`Tokenizer.token_lengths`).
      folder: folder of stored cells.
      weights: JSON values that identify the weights, part of each cell's key.

    Raises:
      UserError: no document is long enough, or a loss that is not a number.
    """
    kept = [d for d in documents if len(d) > plan.longest]
    longest = split_windows(documents, plan.longest)
    jobs: dict[Any, Any] = {}  # equal computations are run once
    for length in sorted(plan.lengths):
        for mode in plan.modes:
            config = mode_config(plan.config, mode, length, plan.layers_per_window)
            jobs.setdefault((config, length), None)
    scored = longest[:, 1:].size
    progress = Progress("perplexity", len(jobs) * scored, "tokens")
    loaded: list[Params] = []

    def load_once() -> Params:
        if not loaded:
            loaded.append(params())
        return loaded[0]

    text = hashlib.sha256(longest.tobytes()).hexdigest()
    for config, length in jobs:
        key = _key(plan, config, length, text, weights)
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
        keep = functools.partial(once, pathlib.Path(folder) / f"{length}-{name}.json", key)
        found = on_first_process(functools.partial(_read_cached, keep))
        if found is not None:
            progress.skip(scored)
        else:
            windows = split_windows(kept, length, plan.longest)
            cell = dataclasses.asdict(
                _compute_cell(plan, load_once(), config, windows, progress.add)
            )
            found = on_first_process(functools.partial(keep, lambda cell=cell: cell))
        jobs[config, length] = Perplexity(**{k: tuple(v) for k, v in found.items()})
    cells = {
        (mode, length): jobs[mode_config(plan.config, mode, length, plan.layers_per_window), length]
        for mode in plan.modes
        for length in plan.lengths
    }
    return PerplexityTable(plan, cells, len(kept), int(token_lengths[longest[:, 1:]].sum()))


class _NotCached(Exception):
    """Raised inside `_read_cached` when a cell is not stored."""


def _read_cached(keep: Callable[[Callable], Any]) -> Any:
    """Returns the stored result of a cell, or None.

    Args:
      keep: `artifact.once` of the cell, which calls its argument if nothing is stored.
    """

    def missing() -> Any:
        raise _NotCached

    try:
        return keep(missing)
    except _NotCached:
        return None


def _key(
    plan: TablePlan, config: ModelConfig, length: int, text: str, weights: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns everything a cell's numbers depend on, as JSON values.

    Batch size and mesh are left out: they change rounding only.

    Args:
      plan: the definition of the table.
      config: the network as the cell runs it.
      length: inputs per window.
      text: SHA-256 of the scored tokens.
      weights: JSON values that identify the weights.
    """
    return {
        "model": dataclasses.asdict(config),
        "weights": dict(weights),
        "options": {"dtype": plan.options.dtype, "attention": plan.options.attention},
        "length": length,
        "text": text,
    }


def _compute_cell(
    plan: TablePlan,
    params: Params,
    config: ModelConfig,
    windows: np.ndarray,
    on_batch: Callable[[int], None],
) -> Perplexity:
    """Scores the windows of one cell, int [n, T + 1], and reports progress to `on_batch`."""
    length = windows.shape[1] - 1
    each = length // plan.context
    parts = max(p for p in range(1, min(_PARTS, each) + 1) if each % p == 0)
    return perplexity(
        params,
        windows,
        config,
        plan.options,
        batch=max((plan.batch_tokens or max(plan.longest, 8192)) // length, 1),
        parts=parts,
        on_batch=on_batch,
    )
