"""The form of the report's Table 3: perplexity by length, with each means of going beyond training.

A cell is a mode and a length. Modes are sums of `ntk`, `logn` and `window`, or `none`; all run the
same weights over the same tokens. Finished cells are kept in files, so that a table which was
stopped, or is to have another row or a shorter length, computes only what is missing.
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
from qwen_jax.evaluate.perplexity import Perplexity, cut, perplexity
from qwen_jax.model import ForwardOptions, ModelConfig, Params, layer_windows
from qwen_jax.parallel.distributed import on_first_process
from qwen_jax.progress import Progress

MEANS = ("ntk", "logn", "window")
MODES = ("none", "ntk", "ntk+logn", "ntk+logn+window")
"""The rows of Table 3."""

_PARTS = 32  # parts of a window whose losses are kept apart, at most


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a table is of.

    Attributes:
      config: the network; its own switches are those of no mode, but for windows in `none`.
      options: how it runs.
      lengths: inputs of a window, each a divisor of the longest.
      modes: rows of the table, "none" or a sum such as "ntk+logn".
      layers_per_window: as in `model.layer_windows`.
      batch_tokens: tokens at a time; 0 is the longest length, and at least 8,192, so that matrix
        products are large.
      spread: devices a sequence is spread over (`mesh.context`).
    """

    config: ModelConfig
    options: ForwardOptions
    lengths: tuple[int, ...]
    modes: tuple[str, ...] = MODES
    layers_per_window: int = 4
    batch_tokens: int = 0
    spread: int = 1

    def __post_init__(self):
        if not self.lengths or not self.modes:
            raise UserError("lengths and modes are empty; give at least one of each")
        for length in self.lengths:
            if length < 1 or max(self.lengths) % length:
                raise UserError(
                    f"lengths has {length}, which does not divide the longest, "
                    f"{max(self.lengths)}; it must, so that all lengths score the same tokens"
                )
            if length % (2 * self.spread if self.spread > 1 else 1):
                raise UserError(
                    f"lengths has {length}, which is no multiple of twice context={self.spread}; "
                    "choose another length or fewer devices"
                )
        for name, values in (("lengths", self.lengths), ("modes", self.modes)):
            if len(set(values)) < len(values):
                raise UserError(f"{name} has an entry twice: {', '.join(map(str, values))}")
        for mode in self.modes:
            means_of(mode)
        if self.batch_tokens < 0 or self.layers_per_window < 1:
            raise UserError(
                f"batch_tokens={self.batch_tokens} must be at least 0 and layers_per_window="
                f"{self.layers_per_window} at least 1"
            )

    @property
    def longest(self) -> int:
        """The longest of `lengths`."""
        return max(self.lengths)


@dataclasses.dataclass(frozen=True)
class Table:
    """A finished table.

    Attributes:
      plan: what it is of.
      cells: (mode, length) -> what scoring gave.
      documents: how many were long enough. n_bytes: UTF-8 bytes of the tokens scored.
    """

    plan: Plan
    cells: Mapping[tuple[str, int], Perplexity]
    documents: int
    n_bytes: int

    @property
    def tokens(self) -> int:
        """Tokens scored in every cell."""
        return next(iter(self.cells.values())).tokens


def means_of(mode: str) -> frozenset[str]:
    """The means a mode turns on; "none" turns on none.

    Raises:
      UserError: a mode that is no sum of `MEANS`.
    """
    if mode == "none":
        return frozenset()
    found = mode.split("+")
    for means in found:
        if means not in MEANS:
            raise UserError(
                f"mode {mode!r} has {means!r}{nearest(means, MEANS)}; a mode is none, or "
                "ntk, logn and window joined by +"
            )
    return frozenset(found)


def switched(config: ModelConfig, mode: str, length: int, layers_per_window: int) -> ModelConfig:
    """The network as `mode` runs windows of `length`.

    Switches that change nothing at this length (any up to the trained length, windows as wide as
    the text) are off, so that equal computations are equal configurations. Without `window` the
    network keeps the windows it has.
    """
    means, beyond = means_of(mode), length > config.trained_length
    windows = config.windows
    if "window" in means:
        windows = layer_windows(
            config.n_layers,
            config.trained_length,
            layers_per_window=layers_per_window,
            longest=length,
        )
    windows = tuple(None if w is None or w >= length else w for w in windows)
    return dataclasses.replace(
        config,
        dynamic_ntk=beyond and "ntk" in means,
        logn=beyond and "logn" in means,
        windows=windows if any(windows) else (),
    )


def measure(
    plan: Plan,
    params: Callable[[], Params],
    documents: Sequence[Sequence[int]],
    token_lengths: np.ndarray,
    folder: str | pathlib.Path,
    weights: Mapping[str, Any],
) -> Table:
    """Fills the table, keeping every finished cell in `folder`; run it under the mesh, if any.

    Of several processes, the first keeps the cells and says which there are.

    Args:
      params: loads the parameters of `plan.config`; called once, when a cell has to be computed.
      documents: token ids; those with fewer than the longest length + 1 are left out.
      token_lengths: UTF-8 bytes of each id (`Tokenizer.token_lengths`).
      folder: where cells are kept.
      weights: what says which weights these are, in JSON types: part of each cell's key.

    Raises:
      UserError: no document is long enough, or a loss that is not a number.
    """
    kept = [d for d in documents if len(d) > plan.longest]
    longest = cut(documents, plan.longest)
    jobs = {}  # equal computations stand once
    for length in sorted(plan.lengths):
        for mode in plan.modes:
            config = switched(plan.config, mode, length, plan.layers_per_window)
            jobs.setdefault((config, length), None)
    scored = longest[:, 1:].size
    progress = Progress("perplexity", len(jobs) * scored, "tokens")
    loaded: list[Params] = []

    def lazily() -> Params:
        if not loaded:
            loaded.append(params())
        return loaded[0]

    text = hashlib.sha256(longest.tobytes()).hexdigest()
    for config, length in jobs:
        key = _key(plan, config, length, text, weights)
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
        keep = functools.partial(once, pathlib.Path(folder) / f"{length}-{name}.json", key)
        found = on_first_process(functools.partial(_kept, keep))
        if found is not None:
            progress.skip(scored)
        else:
            windows = cut(kept, length, plan.longest)
            cell = dataclasses.asdict(_cell(plan, lazily(), config, windows, progress.add))
            found = on_first_process(functools.partial(keep, lambda cell=cell: cell))
        jobs[config, length] = Perplexity(**{k: tuple(v) for k, v in found.items()})
    cells = {
        (mode, length): jobs[switched(plan.config, mode, length, plan.layers_per_window), length]
        for mode in plan.modes
        for length in plan.lengths
    }
    return Table(plan, cells, len(kept), int(token_lengths[longest[:, 1:]].sum()))


class _Missing(Exception):
    """A cell that is not kept."""


def _kept(keep: Callable[[Callable], Any]) -> Any:
    """What is kept of a cell, or None."""

    def missing():
        raise _Missing

    try:
        return keep(missing)
    except _Missing:
        return None


def _key(plan: Plan, config: ModelConfig, length: int, text: str, weights) -> dict[str, Any]:
    """What a cell's numbers depend on; the batch and the mesh only change rounding."""
    return {
        "model": dataclasses.asdict(config),
        "weights": dict(weights),
        "options": {"dtype": plan.options.dtype, "attention": plan.options.attention},
        "length": length,
        "text": text,
    }


def _cell(plan: Plan, params, config, windows: np.ndarray, on_batch) -> Perplexity:
    length = windows.shape[1] - 1
    each = length // plan.spread
    parts = max(p for p in range(1, min(_PARTS, each) + 1) if each % p == 0)
    return perplexity(
        *(params, windows, config, plan.options),
        batch=max((plan.batch_tokens or max(plan.longest, 8192)) // length, 1),
        parts=parts,
        on_batch=on_batch,
    )
