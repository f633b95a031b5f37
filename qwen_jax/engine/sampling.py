"""Samples the next token of each row on the device, every row with its own parameters.

One executable serves every mixture of requests. Processing that no row of the batch needs is
skipped by a `lax.cond`, so a batch of greedy rows costs one pass over the logits; and no branch
returns anything of the size of the vocabulary but the logits after penalties, so none copies it.

The vocabulary is never sorted: truncation keeps the tokens whose logit is at least a threshold.
`vocabulary` finds the threshold, and samples, over a vocabulary that may be divided over devices.

Letters in shapes: R rows, V vocabulary (padding included).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.engine import vocabulary
from qwen_jax.engine.request import MAX_LOGPROBS, SamplingParams
from qwen_jax.parallel import current_mesh, mesh_axis, on_mesh, reshard, spec

_MIN_TEMPERATURE = 1e-37
"""Lowest temperature used as a divisor: its reciprocal is a finite float32."""

BatchFlags = dict[str, jax.Array]
"""What any row of a batch needs, by name; see `_batch_flags`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingRows:
    """Sampling parameters of R rows, one array per field of `SamplingParams`.

    Attributes:
      temperature: float32 [R]; 0 is greedy.
      top_k: int32 [R]; 0 disables it.
      top_p: float32 [R]; 1 disables it.
      min_p: float32 [R]; 0 disables it.
      repetition: float32 [R], repetition penalty; 1 disables it.
      presence: float32 [R], presence penalty; 0 disables it.
      frequency: float32 [R], frequency penalty; 0 disables it.
      seed: uint32 [R, 2], high and low half.
      n_logprobs: int32 [R], number of alternatives to report; -1: no log-probabilities at all.
      raw: bool [R], whether alternatives are those of the model's own distribution.
    """

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    repetition: Any
    presence: Any
    frequency: Any
    seed: Any
    n_logprobs: Any
    raw: Any

    @property
    def penalised(self) -> Any:
        """Whether any penalty changes the logits of a row, bool [R]."""
        return (self.repetition != 1) | (self.presence != 0) | (self.frequency != 0)


_UNUSED_ROW = SamplingParams(temperature=0.0, seed=0)


def stack_sampling_params(params: Sequence[SamplingParams | None]) -> SamplingRows:
    """Stacks per-request sampling parameters into numpy arrays, ready for one transfer.

    Args:
      params: parameters of each row; None marks an unused row, which samples greedily.

    Raises:
      AssertionError: a request has no seed; the engine assigns seeds when a request is submitted.
    """
    rows = [_UNUSED_ROW if p is None else p for p in params]
    seeds = [p.seed for p in rows if p.seed is not None]
    assert len(seeds) == len(rows), "a request without a seed reached the sampler"

    def column(name: str, dtype: Any) -> np.ndarray:
        return np.array([getattr(p, name) for p in rows], dtype)

    return SamplingRows(
        temperature=column("temperature", np.float32),
        top_k=np.minimum(column("top_k", np.int64), 2**31 - 1).astype(np.int32),
        top_p=column("top_p", np.float32),
        min_p=column("min_p", np.float32),
        repetition=column("repetition_penalty", np.float32),
        presence=column("presence_penalty", np.float32),
        frequency=column("frequency_penalty", np.float32),
        seed=np.array([divmod(seed, 2**32) for seed in seeds], np.uint32).reshape(-1, 2),
        n_logprobs=np.array([-1 if p.logprobs is None else p.logprobs for p in rows], np.int32),
        raw=np.array([p.logprobs_of == "raw" for p in rows], bool),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenCounts:
    """Occurrences of each token in each row's prompt and output, for the penalties.

    Rows without penalties are never read and may contain anything.

    Attributes:
      counts: int16 [R, V], twice the number of occurrences in the output, plus 1 if the prompt
        contains the token; more than 16,000 occurrences count as 16,000.
    """

    counts: jax.Array


_MAX_COUNT = 2 * 16_000


def init_counts(rows: int, vocab: int) -> TokenCounts:
    """Returns zero counts for `rows` rows and `vocab` logits; on a mesh sharded as logits are."""
    out = {"out_sharding": spec("batch", "vocab")} if on_mesh() else {}
    return TokenCounts(jnp.zeros((rows, vocab), jnp.int16, **out))


def count_row(prompt: Sequence[int], output: Sequence[int], vocab: int) -> np.ndarray:
    """Returns one row of `TokenCounts`, int16 [vocab] in numpy, from ids in [0, vocab)."""
    counts = np.bincount(np.asarray(output, np.int64), minlength=vocab)
    row = np.minimum(2 * counts, _MAX_COUNT).astype(np.int16)
    row[np.asarray(prompt, np.int64)] |= 1
    return row


def put_row(token_counts: TokenCounts, row: jax.Array, counts: jax.Array) -> TokenCounts:
    """Replaces the counts of row `row` (int32 scalar) by counts int16 [V].

    In place if `token_counts` is donated.
    """
    old = token_counts.counts
    if on_mesh():
        counts = reshard(counts, "vocab")
        is_row = jnp.arange(old.shape[0])[:, None] == row
        return TokenCounts(jnp.where(reshard(is_row, "batch", None), counts, old))
    return TokenCounts(jax.lax.dynamic_update_slice(old, counts[None], (row, 0)))


def count_tokens(token_counts: TokenCounts, tokens: jax.Array, counted: jax.Array) -> TokenCounts:
    """Counts one sampled token per row, tokens int32 [R], in rows where `counted` bool [R] is set.

    In place inside a compiled loop.
    """

    def local(counts, tokens, counted, *, axis):
        tokens = tokens - vocabulary.first_token_id(counts.shape[1], axis)
        counted &= (tokens >= 0) & (tokens < counts.shape[1])
        rows = jnp.arange(counts.shape[0])
        tokens = jnp.where(counted, tokens, 0)
        below_limit = counts[rows, tokens] < _MAX_COUNT
        # Exactly one update per row, of 0 for rows that are not counted: indices stay unique.
        new = jnp.where(counted & below_limit, 2, 0).astype(jnp.int16)
        return counts.at[rows, tokens].add(new, unique_indices=True, indices_are_sorted=True)

    with jax.named_scope("count_tokens"):
        count = _sharded(local, (_LOGITS, _ROW, _ROW), _LOGITS)
        return TokenCounts(count(token_counts.counts, tokens, counted))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Samples:
    """One sampled token per row, and log-probabilities for rows that request them.

    The sampling distribution is that after penalties, temperature and truncation; for a greedy row,
    whose sample is certain, that after penalties at temperature 1. Log-probabilities are natural,
    and zeros if no row of the batch requests any.

    Attributes:
      tokens: int32 [R], sampled ids.
      logprob: float32 [R], log-probability of the token under the sampling distribution.
      raw_logprob: float32 [R], the same under the softmax of all logits, padding included, as in
        the training loss.
      top_ids: int32 [R, MAX_LOGPROBS], most probable tokens first (the lower id of equals), in the
        distribution that the row requests.
      top_logprobs: float32 [R, MAX_LOGPROBS], their log-probabilities; -inf if truncated.
    """

    tokens: Any
    logprob: Any
    raw_logprob: Any
    top_ids: Any
    top_logprobs: Any


def sample_rows(
    logits: jax.Array,
    rows: SamplingRows,
    positions: jax.Array,
    token_counts: TokenCounts | None,
    vocab_size: int,
) -> Samples:
    """Samples the next token of every row; a row's sample depends on its own arguments only.

    Args:
      logits: float32 [R, V]; on a mesh, R may be sharded as the batch is and V along `tensor`.
      rows: sampling parameters of the R rows.
      positions: int32 [R], position that the token will have in its sequence. With the seed it is
        the PRNG key, so a sequence that is resumed elsewhere samples the same tokens.
      token_counts: occurrences for the penalties; None applies none.
      vocab_size: ids from here on are padding of the embedding table and never sampled.
    """
    local = functools.partial(_sample_local, vocab_size=vocab_size)
    axes = (_LOGITS, _ROW_AXES, _ROW, _LOGITS, ())
    out = Samples(
        tokens=_ROW,
        logprob=_ROW,
        raw_logprob=_ROW,
        top_ids=("batch", None),
        top_logprobs=("batch", None),
    )
    counts = None if token_counts is None else token_counts.counts
    with jax.named_scope("sample"):
        flags = _batch_flags(rows, token_counts)
        return _sharded(local, axes, out)(logits, rows, positions, counts, flags)


def log_probabilities(
    logits: jax.Array, rows: SamplingRows, token_counts: TokenCounts | None, vocab_size: int
) -> jax.Array:
    """Returns the log-probabilities that `sample_rows` samples from, float32 [R, V].

    -inf marks tokens that are never sampled. Greedy rows get the distribution after penalties at
    temperature 1. Arguments are those of `sample_rows`.
    """

    def local(logits, rows, counts, flags, *, axis):
        scaled = _scaled_logits(logits, rows, counts, flags["penalised"], vocab_size, axis)
        threshold = _truncation_threshold(scaled, rows, flags, axis)
        kept = scaled >= threshold[:, None]
        total = vocabulary.kept_mass(scaled, threshold, axis)
        return jnp.where(kept, scaled - jnp.log(total)[:, None], -jnp.inf)

    axes = (_LOGITS, _ROW_AXES, _LOGITS, ())
    counts = None if token_counts is None else token_counts.counts
    flags = _batch_flags(rows, token_counts)
    return _sharded(local, axes, _LOGITS)(logits, rows, counts, flags)


# Logical axes of arguments in shard_map.
_LOGITS, _ROW = ("batch", "vocab"), ("batch",)
_ROW_AXES = SamplingRows(
    temperature=_ROW,
    top_k=_ROW,
    top_p=_ROW,
    min_p=_ROW,
    repetition=_ROW,
    presence=_ROW,
    frequency=_ROW,
    seed=("batch", None),
    n_logprobs=_ROW,
    raw=_ROW,
)


def _batch_flags(rows: SamplingRows, token_counts: TokenCounts | None) -> BatchFlags:
    """Returns which kinds of processing any row of the batch needs, over all devices.

    Every device takes the same branches and therefore joins the same collectives.

    Returns:
      bool scalars "sampled" (any row is not greedy), "penalised", "top_k", "top_p", "logprobs" and
      "not_greedy_only" (any of sampled, penalised, logprobs), and the int32 scalar "alternatives",
      the largest number of alternatives requested.
    """
    sampled = jnp.asarray(rows.temperature) > 0
    per_row = {
        "sampled": sampled,
        "penalised": jnp.zeros_like(sampled) if token_counts is None else rows.penalised,
        "top_k": sampled & (rows.top_k > 0),
        "top_p": sampled & (rows.top_p < 1),
        "logprobs": rows.n_logprobs >= 0,
    }
    flags = {name: jnp.any(value) for name, value in per_row.items()}
    flags["alternatives"] = jnp.max(rows.n_logprobs)
    flags["not_greedy_only"] = flags["sampled"] | flags["penalised"] | flags["logprobs"]
    return flags


def _sharded(local: Callable[..., Any], in_axes: Any, out_axes: Any) -> Callable[..., Any]:
    """Wraps a per-device function in shard_map; without a mesh it is called directly.

    Args:
      local: function of device-local arrays with a keyword `axis`, the mesh axis that divides the
        vocabulary, or None.
      in_axes: logical axes of each argument: a tuple of names for all arrays of the argument, or a
        tree of such tuples. None arguments pass through.
      out_axes: logical axes of the result, alike.
    """

    def call(*operands):
        if not on_mesh():
            return local(*operands, axis=None)
        name = mesh_axis("vocab")
        axis = name if current_mesh().shape.get(name, 1) > 1 else None

        def is_axes(x):
            return isinstance(x, tuple) and all(isinstance(n, str | None) for n in x)

        def place(axes, operand):
            return jax.tree.map(lambda x: jax.reshard(x, spec(*axes)), operand)

        placed = tuple(
            jax.tree.map(place, axes, operand, is_leaf=is_axes)
            for axes, operand in zip(in_axes, operands, strict=True)
        )
        specs = jax.tree.map(lambda axes: spec(*axes), (in_axes, out_axes), is_leaf=is_axes)
        run = functools.partial(local, axis=axis)
        return jax.shard_map(run, in_specs=specs[0], out_specs=specs[1], check_vma=False)(*placed)

    return call


# The functions below work on the rows of one device and its part of the vocabulary. `axis` is the
# mesh axis that divides the vocabulary, or None.


def _sample_local(
    logits: jax.Array,
    rows: SamplingRows,
    positions: jax.Array,
    counts: jax.Array | None,
    flags: BatchFlags,
    *,
    vocab_size: int,
    axis: str | None,
) -> Samples:
    """Computes `sample_rows` on one device; greedy-only batches skip everything but a maximum."""

    def greedy() -> Samples:
        x = vocabulary.mask_padding(logits, vocab_size, axis)
        tokens = vocabulary.argmax_lowest_id(x, axis)
        return Samples(tokens, *_no_logprobs(tokens))

    def full() -> Samples:
        scaled = _scaled_logits(logits, rows, counts, flags["penalised"], vocab_size, axis)
        threshold = _truncation_threshold(scaled, rows, flags, axis)
        tokens = _sample(scaled, threshold, rows, positions, flags["sampled"], axis)
        logprobs = jax.lax.cond(
            flags["logprobs"],
            lambda: _logprobs(logits, scaled, threshold, tokens, rows, flags, vocab_size, axis),
            lambda: _no_logprobs(tokens),
        )
        return Samples(tokens, *logprobs)

    return jax.lax.cond(flags["not_greedy_only"], full, greedy)


def _scaled_logits(
    x: jax.Array,
    rows: SamplingRows,
    counts: jax.Array | None,
    penalised: jax.Array,
    vocab_size: int,
    axis: str | None,
) -> jax.Array:
    """Returns logits after penalties and temperature, shifted so that each row's maximum is 0.

    Shifting before the division keeps every temperature from overflowing. Greedy rows use
    temperature 1.

    Args:
      x: float32 [R, V], logits.
      rows: sampling parameters.
      counts: int16 [R, V] of `TokenCounts`, or None.
      penalised: bool scalar, whether any row has penalties.
      vocab_size: ids from here on get -inf.
      axis: mesh axis of the vocabulary, or None.

    Returns:
      float32 [R, V], at most 0.
    """
    temperature = jnp.where(
        rows.temperature > 0, jnp.maximum(rows.temperature, _MIN_TEMPERATURE), 1.0
    )

    def scale(x):
        x = vocabulary.mask_padding(x, vocab_size, axis)
        return (x - vocabulary.row_max(x, axis)[:, None]) / temperature[:, None]

    if counts is None:
        return scale(x)

    def penalise():
        repetition = rows.repetition[:, None]
        repeated = jnp.where(x > 0, x / repetition, x * repetition)
        times = (counts >> 1).astype(jnp.float32)
        new = jnp.where(counts > 0, repeated, x)
        new -= rows.presence[:, None] * (times > 0) + rows.frequency[:, None] * times
        return scale(new)

    return jax.lax.cond(penalised, penalise, lambda: scale(x))


def _truncation_threshold(
    scaled: jax.Array, rows: SamplingRows, flags: BatchFlags, axis: str | None
) -> jax.Array:
    """Returns the lowest scaled logit that truncation keeps in each row, float32 [R].

    Top-k, then top-p of what is left, renormalised, then min-p. Tokens equal to the last kept one
    are kept as well. -inf keeps all tokens.

    Args:
      scaled: float32 [R, V], the result of `_scaled_logits`.
      rows: sampling parameters.
      flags: the result of `_batch_flags`.
      axis: mesh axis of the vocabulary, or None.
    """
    sampled = rows.temperature > 0
    keep_all = jnp.full(rows.temperature.shape, -jnp.inf)

    def top_k():
        count = jnp.where(sampled, rows.top_k, 0).astype(jnp.float32)
        return vocabulary.threshold_for_mass(scaled, count, axis, weighted=False)

    def top_p(k_threshold):
        left = vocabulary.kept_mass(scaled, k_threshold, axis)
        target = jnp.where(sampled & (rows.top_p < 1), rows.top_p * left, 0.0)
        return vocabulary.threshold_for_mass(scaled, target, axis, weighted=True)

    with jax.named_scope("top_k"):
        threshold = jax.lax.cond(flags["top_k"], top_k, lambda: keep_all)
    with jax.named_scope("top_p"):
        p_threshold = jax.lax.cond(flags["top_p"], top_p, lambda _: keep_all, threshold)
    threshold = jnp.maximum(threshold, p_threshold)
    return jnp.maximum(threshold, jnp.where(sampled, jnp.log(rows.min_p), -jnp.inf))


def _sample(
    scaled: jax.Array,
    threshold: jax.Array,
    rows: SamplingRows,
    positions: jax.Array,
    any_sampled: jax.Array,
    axis: str | None,
) -> jax.Array:
    """Returns one token per row, int32 [R]: sampled, or the most probable for greedy rows.

    Args:
      scaled: float32 [R, V], the result of `_scaled_logits`.
      threshold: float32 [R], lowest scaled logit to sample from.
      rows: sampling parameters.
      positions: int32 [R], positions of the tokens, part of the PRNG key.
      any_sampled: bool scalar, whether any row is not greedy.
      axis: mesh axis of the vocabulary, or None.
    """

    def greedy():
        return vocabulary.argmax_lowest_id(scaled, axis)

    def sample():
        uniform = vocabulary.uniform(rows.seed, positions)
        token = vocabulary.sample_token(scaled, threshold, uniform, axis)
        return jnp.where(rows.temperature > 0, token, greedy())

    with jax.named_scope("draw"):
        return jax.lax.cond(any_sampled, sample, greedy)


def _no_logprobs(tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns zeros with the shapes that `_logprobs` returns for tokens int32 [R]."""
    zeros = jnp.zeros(tokens.shape, jnp.float32)
    many = (*tokens.shape, MAX_LOGPROBS)
    return zeros, zeros, jnp.zeros(many, jnp.int32), jnp.zeros(many, jnp.float32)


def _logprobs(
    logits: jax.Array,
    scaled: jax.Array,
    threshold: jax.Array,
    tokens: jax.Array,
    rows: SamplingRows,
    flags: BatchFlags,
    vocab_size: int,
    axis: str | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the fields of `Samples` after `tokens`, in order, for tokens int32 [R]."""
    highest = vocabulary.row_max(logits, axis)
    exp = jnp.exp(logits - highest[:, None])
    raw_total = highest + jnp.log(vocabulary.row_sum(exp, axis))
    total = jnp.log(vocabulary.kept_mass(scaled, threshold, axis))
    logprob = vocabulary.value_at(scaled, tokens, axis) - total
    raw_logprob = vocabulary.value_at(logits, tokens, axis) - raw_total

    def top():
        kept = jnp.where(scaled >= threshold[:, None], scaled, -jnp.inf)
        real = vocabulary.mask_padding(logits, vocab_size, axis)
        source = jnp.where(rows.raw[:, None], real, kept)
        values, ids = vocabulary.top_tokens(source, flags["alternatives"], axis)
        return ids, values - jnp.where(rows.raw, raw_total, total)[:, None]

    with jax.named_scope("top_logprobs"):
        none = _no_logprobs(tokens)[2:]
        ids, values = jax.lax.cond(flags["alternatives"] > 0, top, lambda: none)
    return logprob, raw_logprob, ids, values
