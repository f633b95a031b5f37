"""Perplexity of a model on long windows of text, in total and by position in the window.

A window has T inputs and T targets, and its first input is the last target of the window before it.
Cut into windows of T or of 2·T tokens, a document is therefore scored on the same tokens; only the
context before each differs. That makes the columns of a table over lengths comparable.

Letters in shapes: B windows per batch, T tokens of a window, W distinct attention windows of the
model, D hidden size.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.errors import UserError
from qwen_jax.model import (
    ForwardOptions,
    ModelConfig,
    Params,
    hidden_states,
    ntk_alphas,
    output_kernel,
)
from qwen_jax.parallel import batch_devices, context_size, current_mesh, on_mesh, reshard, spec
from qwen_jax.train.losses import next_token_loss


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Summed losses of scored tokens, by part of the window.

    Attributes:
      nll_by_position: summed −log p (nats) in each equal part of the window, first part first, over
        all windows.
      tokens_by_position: number of scored tokens in each part.
    """

    nll_by_position: tuple[float, ...]
    tokens_by_position: tuple[int, ...]

    @property
    def nll(self) -> float:
        """Summed −log p over all scored tokens, in nats."""
        return math.fsum(self.nll_by_position)

    @property
    def tokens(self) -> int:
        """Number of scored tokens."""
        return sum(self.tokens_by_position)

    @property
    def loss(self) -> float:
        """Mean loss, nats per token."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """exp of the mean loss; infinity if that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def curve(self) -> tuple[float, ...]:
        """Mean loss (nats per token) of each part of the window."""
        parts = zip(self.nll_by_position, self.tokens_by_position, strict=True)
        return tuple(nll / max(tokens, 1) for nll, tokens in parts)

    def bits_per_byte(self, n_bytes: int) -> float:
        """Returns bits per byte, where the scored tokens encode `n_bytes` bytes of text."""
        return self.nll / math.log(2) / n_bytes


def split_windows(
    documents: Iterable[Sequence[int]], length: int, longest: int | None = None
) -> np.ndarray:
    """Cuts long documents into windows of `length` inputs and targets; int32 [n, length + 1].

    Every document is truncated to a multiple of `longest`; shorter documents are dropped. For any
    `length` that divides `longest`, the windows therefore score the same tokens.

    Args:
      documents: token ids of each document.
      length: inputs per window.
      longest: length of the longest window of a comparison; `length` by default.

    Raises:
      UserError: `length` does not divide `longest`, or no document is long enough.
    """
    longest = length if longest is None else longest
    if length < 1 or longest % length:
        raise UserError(
            f"a length of {length} does not divide the longest, {longest}; lengths must, so that "
            "all score the same tokens"
        )
    rows, most = [], 0
    for document in documents:
        ids = np.asarray(document, np.int32)
        most = max(most, len(ids))
        usable = (len(ids) - 1) // longest * longest
        rows += [ids[i : i + length + 1] for i in range(0, usable, length)]
    if not rows:
        raise UserError(
            f"no document has the {longest + 1} tokens that a window of {longest} needs (the "
            f"longest has {most}); give longer documents or shorter lengths"
        )
    return np.stack(rows)


def window_nll(
    params: Params,
    inputs: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    ntk_alpha: jax.Array | None,
    *,
    config: ModelConfig,
    options: ForwardOptions,
    parts: int = 1,
    chunk: int = 1024,
) -> tuple[jax.Array, jax.Array]:
    """Returns the summed loss of windows by part of the window; a pure function.

    Logits of only `chunk` tokens exist at a time. Jit it with the keyword arguments static. LogN
    applies
    if `config` enables it.

    Args:
      params: weights of `config`.
      inputs: int32 [B, T], token ids.
      targets: int32 [B, T], the next tokens.
      weights: float32 [B, T], 0 for a target that is not scored.
      ntk_alpha: float32 [B, W] as `model.ntk_alphas` returns for each row, or None.
      config: the model.
      options: dtype and attention implementation.
      parts: number of equal parts of the window; divides T, over a `context` axis on each device.
      chunk: tokens whose logits are computed at a time.

    Returns:
      (Σ weight·(−log p) float32 [parts], Σ weight float32 [parts]).
    """
    rows, length = inputs.shape
    hidden, _ = hidden_states(
        params, inputs, config, options, ntk_alpha=ntk_alpha, logn=config.logn
    )
    kernel = output_kernel(params, config)
    if context_size() > 1 and parts > 1:  # a part is cut out of the sequence, then spread again
        hidden = reshard(hidden, "batch", None, "channels")
        targets, weights = (reshard(x, "batch", None) for x in (targets, weights))

    def split(x):  # [B,T,...] -> [parts,B,T/parts,...]
        axes = ("batch", None, "channels")[: x.ndim]
        split = (rows, parts, length // parts, *x.shape[2:])
        x = x.reshape(split, out_sharding=spec(axes[0], None, *axes[1:]))
        return jnp.moveaxis(x, 1, 0)

    def one(piece):
        h, target, weight = piece
        h = reshard(h, "batch", "sequence", "channels")
        target, weight = (reshard(x, "batch", "sequence") for x in (target, weight))
        sums = next_token_loss(h, kernel, target, weight, 0.0, chunk)
        return sums.nll, sums.weight

    if parts == 1:
        nll, weight = one((hidden, targets, weights))
        return nll[None], weight[None]
    return jax.lax.map(one, (split(hidden), split(targets), split(weights)))


_jitted = jax.jit(window_nll, static_argnames=("config", "options", "parts", "chunk"))


def perplexity(
    params: Params,
    windows: np.ndarray,
    config: ModelConfig,
    options: ForwardOptions,
    *,
    batch: int = 1,
    parts: int = 1,
    chunk: int = 1024,
    on_batch: Callable[[int], None] | None = None,
) -> Perplexity:
    """Scores every target of every window, each window independently.

    What the release enables at inference applies if `config` enables it: dynamic NTK with the
    factors of
    T tokens (per layer, if `config.windows` differ), and LogN (report §2.5). Results do not depend
    on
    `batch` or on the mesh, beyond rounding.

    Args:
      params: the parameters of `config`, on the mesh in force or on one device.
      windows: int [n, T + 1], as `split_windows` makes them; every process of a job passes all of
        them.
      config: the model.
      options: dtype and attention implementation.
      batch: windows per batch, rounded up to a multiple of the mesh's batch shards.
      parts: number of equal parts of a window whose losses are reported separately, a divisor of T.
      chunk: tokens whose logits are computed at a time.
      on_batch: called after each batch with the number of tokens it scored.

    Raises:
      UserError: no windows, a window without targets, an id outside the vocabulary, an argument out
        of
        range, or a loss that is not a number.
    """
    count, length = _check(windows, config, batch, parts)
    devices = batch_devices(current_mesh()) if on_mesh() else 1
    rows = -(-min(batch, count) // devices) * devices
    alpha = None
    if config.dynamic_ntk:
        alpha = _global(np.tile(ntk_alphas(length, config), (rows, 1)), "batch", None)
    run = functools.partial(_jitted, config=config, options=options, parts=parts, chunk=chunk)
    total, scored = np.zeros(parts), np.zeros(parts)  # float64: over many batches
    for start in range(0, count, rows):
        here = windows[start : start + rows]
        padded = np.zeros((rows, length + 1), np.int32)
        padded[: len(here)] = here
        weights = np.zeros((rows, length), np.float32)
        weights[: len(here)] = 1
        arrays = (padded[:, :-1], padded[:, 1:], weights)
        placed = (_global(x, "batch", "sequence") for x in arrays)
        nll, weight = jax.device_get(run(params, *placed, alpha))
        if not np.isfinite(nll).all():
            raise UserError(
                f"the loss of windows {start} to {start + len(here) - 1} is not a number in "
                f"{options.dtype}; try another dtype, or check the weights"
            )
        total, scored = total + nll, scored + weight
        if on_batch is not None:
            on_batch(len(here) * length)
    return Perplexity(tuple(total.tolist()), tuple(int(n) for n in scored))


def _global(x: np.ndarray, *axes: str | None) -> jax.Array:
    """Returns x as a global array on the mesh in force, with the given logical axes.

    Each process copies the shards of its own devices. Without a mesh, a plain array.
    """
    if not on_mesh():
        return jnp.asarray(x)
    sharding = jax.NamedSharding(jax.sharding.get_mesh(), spec(*axes) or jax.P())
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def _check(windows: np.ndarray, config: ModelConfig, batch: int, parts: int) -> tuple[int, int]:
    """Checks windows and arguments; returns (number of windows, T).

    Raises:
      UserError: a wrong shape, a batch or number of parts that does not fit, an invalid id.
    """
    if windows.ndim != 2 or not len(windows) or windows.shape[1] < 2:
        raise UserError(
            f"windows have the shape {list(windows.shape)}; they must be [n,T+1], n and T at least "
            "1"
        )
    length = windows.shape[1] - 1
    spread = context_size()
    if batch < 1 or parts < 1 or length % (parts * spread):
        raise UserError(
            f"batch={batch} must be at least 1, and parts={parts} times mesh.context={spread} a "
            f"divisor of the length {length}"
        )
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or high >= config.vocab_size:
        raise UserError(
            f"windows hold the id {low if low < 0 else high}; ids of this model are 0 to "
            f"{config.vocab_size - 1}"
        )
    return len(windows), length
