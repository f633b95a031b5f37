"""Drawing the next token on device, each row by its own parameters.

One executable serves every mixture of requests. What no row asks for stands behind a `lax.cond`
that skips it, so a batch of greedy rows pays for one look at the logits; and no branch returns
anything of the size of the vocabulary but the logits after penalties, so none copies it.

The vocabulary is never sorted: what truncation leaves are the tokens whose logit is at least a
threshold. How that is found, and how a draw is made over a divided vocabulary, is `vocabulary`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.engine import vocabulary
from qwen_jax.engine.request import MAX_LOGPROBS, SamplingParams
from qwen_jax.parallel import RULES, current_mesh, on_mesh, reshard, spec

_TINY = 1e-37
"""Lowest temperature that divides: its reciprocal is a float32, and no logits are that close."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingRows:
    """Parameters of R rows, an array each; `SamplingParams` says what they mean.

    Attributes:
      temperature, top_p, min_p, repetition, presence, frequency: float32 [R].
      top_k: int32 [R].
      seed: uint32 [R,2], high and low half.
      n_logprobs: int32 [R], alternatives to report; -1: no log-probabilities at all.
      raw: bool [R], alternatives of the model's own distribution.
    """

    temperature: jax.Array | np.ndarray
    top_k: jax.Array | np.ndarray
    top_p: jax.Array | np.ndarray
    min_p: jax.Array | np.ndarray
    repetition: jax.Array | np.ndarray
    presence: jax.Array | np.ndarray
    frequency: jax.Array | np.ndarray
    seed: jax.Array | np.ndarray
    n_logprobs: jax.Array | np.ndarray
    raw: jax.Array | np.ndarray

    @property
    def penalised(self) -> jax.Array | np.ndarray:
        """bool [R], whether any penalty changes the logits."""
        return (self.repetition != 1) | (self.presence != 0) | (self.frequency != 0)


_IDLE = SamplingParams(temperature=0.0, seed=0)


def sampling_rows(params: Sequence[SamplingParams | None]) -> SamplingRows:
    """Rows in numpy, to be sent to the device at once; None is a slot that nobody uses.

    A request's seed must have been chosen by now: whoever holds the request holds its seed.
    """
    rows = [_IDLE if p is None else p for p in params]
    assert all(p.seed is not None for p in rows), "a request without a seed reached the sampler"

    def column(name: str, dtype) -> np.ndarray:
        return np.array([getattr(p, name) for p in rows], dtype)

    return SamplingRows(
        temperature=column("temperature", np.float32),
        top_k=np.minimum(column("top_k", np.int64), 2**31 - 1).astype(np.int32),
        top_p=column("top_p", np.float32),
        min_p=column("min_p", np.float32),
        repetition=column("repetition_penalty", np.float32),
        presence=column("presence_penalty", np.float32),
        frequency=column("frequency_penalty", np.float32),
        seed=np.array([divmod(p.seed, 2**32) for p in rows], np.uint32).reshape(-1, 2),
        n_logprobs=np.array([-1 if p.logprobs is None else p.logprobs for p in rows], np.int32),
        raw=np.array([p.logprobs_of == "raw" for p in rows], bool),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenCounts:
    """What each row's prompt and answer have, for the penalties.

    Rows without penalties are never read: they may hold anything.

    Attributes:
      counts: int16 [R,V], twice the times that the answer has the token, plus 1 where the prompt
        has it; more than 16,000 times are counted as 16,000.
    """

    counts: jax.Array


_MOST = 2 * 16_000


def init_counts(rows: int, vocab: int) -> TokenCounts:
    """Zeros for so many rows and logits (V, padding included); on a mesh divided as logits are."""
    out = {"out_sharding": spec("batch", "vocab")} if on_mesh() else {}
    return TokenCounts(jnp.zeros((rows, vocab), jnp.int16, **out))


def count_row(prompt: Sequence[int], answer: Sequence[int], vocab: int) -> np.ndarray:
    """int16 [V], a row of `TokenCounts` from ids in [0, vocab), in numpy; for `put_row`."""
    counts = np.bincount(np.asarray(answer, np.int64), minlength=vocab)
    row = np.minimum(2 * counts, _MOST).astype(np.int16)
    row[np.asarray(prompt, np.int64)] |= 1
    return row


def put_row(seen: TokenCounts, row: jax.Array, counts: jax.Array) -> TokenCounts:
    """Replaces row `row` (int32 scalar) by counts int16 [V]; donate `seen` to do it in place."""
    if on_mesh():
        counts = reshard(counts, "vocab")
        here = jnp.arange(seen.counts.shape[0])[:, None] == row
        return TokenCounts(jnp.where(reshard(here, "batch", None), counts, seen.counts))
    return TokenCounts(jax.lax.dynamic_update_slice(seen.counts, counts[None], (row, 0)))


def count_tokens(seen: TokenCounts, tokens: jax.Array, real: jax.Array) -> TokenCounts:
    """Counts one drawn token a row, tokens int32 [R], where real bool [R]; in place in a loop."""

    def local(counts, tokens, real, *, axis):
        tokens = tokens - vocabulary.offset(counts.shape[1], axis)
        real &= (tokens >= 0) & (tokens < counts.shape[1])
        rows = jnp.arange(counts.shape[0])
        tokens = jnp.where(real, tokens, 0)
        room = counts[rows, tokens] < _MOST
        # One update a row, so none is lost; an update of 0 stands for none.
        new = jnp.where(real & room, 2, 0).astype(jnp.int16)
        return counts.at[rows, tokens].add(new, unique_indices=True, indices_are_sorted=True)

    with jax.named_scope("count_tokens"):
        new = _sharded(local, (_LOGITS, _ROW, _ROW), _LOGITS)(seen.counts, tokens, real)
    return TokenCounts(new)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
    """One token a row and, for rows that asked, its log-probabilities.

    "Sampled" is the distribution drawn from: after penalties, temperature and truncation. For
    a greedy row, whose draw is certain, it is that after penalties at temperature 1.

    Attributes:
      tokens: int32 [R].
      logprob, raw_logprob: float32 [R], natural logarithms, sampled and the model's own (softmax of
        all logits, padding included, as the loss takes it).
      top_ids, top_logprobs: int32, float32 [R, MAX_LOGPROBS], the most probable tokens first (of
        equals the lower id) in the distribution that the row asked for; -inf: truncated away.
        All these are zeros when no row of the batch wants them.
    """

    tokens: jax.Array
    logprob: jax.Array
    raw_logprob: jax.Array
    top_ids: jax.Array
    top_logprobs: jax.Array


def sample_rows(
    logits: jax.Array,
    rows: SamplingRows,
    positions: jax.Array,
    seen: TokenCounts | None,
    vocab_size: int,
) -> Drawn:
    """Draws the next token of every row; it depends on the row's own numbers alone.

    Args:
      logits: float32 [R,V]; on a mesh R may be divided as the batch is, V along `tensor`.
      rows: parameters of R rows.
      positions: int32 [R], slot that the token will have in its sequence. With the seed it is the
        key of the draw, so a sequence resumed elsewhere goes on as it would have.
      seen: for the penalties; None: there are none.
      vocab_size: ids from here on are padding of the model's table and never drawn.
    """
    local = functools.partial(_local, vocab_size=vocab_size)
    axes = (_LOGITS, _ROW_AXES, _ROW, _LOGITS, ())
    out = Drawn(_ROW, _ROW, _ROW, ("batch", None), ("batch", None))
    counts = None if seen is None else seen.counts
    with jax.named_scope("sample"):
        wishes = _wishes(rows, seen)
        return _sharded(local, axes, out)(logits, rows, positions, counts, wishes)


def log_probabilities(
    logits: jax.Array, rows: SamplingRows, seen: TokenCounts | None, vocab_size: int
) -> jax.Array:
    """float32 [R,V], natural logarithms of what `sample_rows` draws from; -inf: never drawn.

    Arguments as there. Greedy rows: after penalties at temperature 1, where the highest is taken.
    """

    def local(logits, rows, counts, any_of, *, axis):
        scaled = _scaled(logits, rows, counts, any_of["penalised"], vocab_size, axis)
        threshold = _threshold(scaled, rows, any_of, axis)
        kept = scaled >= threshold[:, None]
        total = vocabulary.mass(scaled, threshold, axis)
        return jnp.where(kept, scaled - jnp.log(total)[:, None], -jnp.inf)

    axes = (_LOGITS, _ROW_AXES, _LOGITS, ())
    counts = None if seen is None else seen.counts
    return _sharded(local, axes, _LOGITS)(logits, rows, counts, _wishes(rows, seen))


_LOGITS, _ROW = ("batch", "vocab"), ("batch",)
_ROW_AXES = SamplingRows(*[_ROW] * 7, seed=("batch", None), n_logprobs=_ROW, raw=_ROW)


def _wishes(rows: SamplingRows, seen: TokenCounts | None) -> dict[str, jax.Array]:
    """What any row of the batch wants, bool scalars, and the most alternatives, int32.

    Over all devices, so that all take the same branches and meet in the same collectives.
    """
    drawn = jnp.asarray(rows.temperature) > 0
    penalised = rows.penalised
    wishes = {
        "drawn": drawn,
        "penalised": jnp.zeros_like(drawn) if seen is None else penalised,
        "top_k": drawn & (rows.top_k > 0),
        "top_p": drawn & (rows.top_p < 1),
        "logprobs": rows.n_logprobs >= 0,
    }
    wishes = {name: jnp.any(wish) for name, wish in wishes.items()}
    wishes["alternatives"] = jnp.max(rows.n_logprobs)
    wishes["more"] = wishes["drawn"] | wishes["penalised"] | wishes["logprobs"]
    return wishes


def _sharded(local, in_axes, out_axes):
    """`local(..., axis=)` in shard_map by logical axes of arrays; as it is without a mesh.

    A tuple of names stands for every array of its argument; None arguments pass.
    """

    def call(*operands):
        if not on_mesh():
            return local(*operands, axis=None)
        name = RULES["vocab"]
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


# From here on: the rows of one device and its part of the vocabulary. `axis` is the mesh axis that
# divides the vocabulary, or None.


def _local(logits, rows, positions, counts, any_of, *, vocab_size, axis) -> Drawn:
    def greedy():
        x = vocabulary.mask_padding(logits, vocab_size, axis)
        tokens = vocabulary.first_highest(x, axis)
        return Drawn(tokens, *_no_logprobs(tokens))

    def everything():
        scaled = _scaled(logits, rows, counts, any_of["penalised"], vocab_size, axis)
        threshold = _threshold(scaled, rows, any_of, axis)
        tokens = _draw(scaled, threshold, rows, positions, any_of["drawn"], axis)
        logprobs = jax.lax.cond(
            any_of["logprobs"],
            lambda: _logprobs(logits, scaled, threshold, tokens, rows, any_of, vocab_size, axis),
            lambda: _no_logprobs(tokens),
        )
        return Drawn(tokens, *logprobs)

    return jax.lax.cond(any_of["more"], everything, greedy)


def _scaled(x, rows, counts, penalised, vocab_size, axis) -> jax.Array:
    """float32 [R,V], logits after penalties and temperature, shifted so that a row's highest is 0.

    Shifted before the division, no temperature overflows. Greedy rows have temperature 1.
    """
    temperature = jnp.where(rows.temperature > 0, jnp.maximum(rows.temperature, _TINY), 1.0)

    def scale(x):
        x = vocabulary.mask_padding(x, vocab_size, axis)
        return (x - vocabulary.highest(x, axis)[:, None]) / temperature[:, None]

    def penalise():
        repetition = rows.repetition[:, None]
        worse = jnp.where(x > 0, x / repetition, x * repetition)
        times = (counts >> 1).astype(jnp.float32)
        new = jnp.where(counts > 0, worse, x)
        new -= rows.presence[:, None] * (times > 0) + rows.frequency[:, None] * times
        return scale(new)

    if counts is None:
        return scale(x)
    return jax.lax.cond(penalised, penalise, lambda: scale(x))


def _threshold(scaled, rows, any_of, axis) -> jax.Array:
    """float32 [R], the scaled logit from which on tokens are kept; -inf keeps all.

    Top-k, then top-p of what is left renormalised, then min-p. Tokens equal to the last one kept
    are kept as well.
    """
    drawn = rows.temperature > 0
    nothing = jnp.full(rows.temperature.shape, -jnp.inf)

    def top_k():
        wanted = jnp.where(drawn, rows.top_k, 0).astype(jnp.float32)
        return vocabulary.reach(scaled, wanted, axis, probable=False)

    def top_p(k_threshold):
        left = vocabulary.mass(scaled, k_threshold, axis)
        target = jnp.where(drawn & (rows.top_p < 1), rows.top_p * left, 0.0)
        return vocabulary.reach(scaled, target, axis, probable=True)

    with jax.named_scope("top_k"):
        threshold = jax.lax.cond(any_of["top_k"], top_k, lambda: nothing)
    with jax.named_scope("top_p"):
        least = jax.lax.cond(any_of["top_p"], top_p, lambda _: nothing, threshold)
    threshold = jnp.maximum(threshold, least)
    return jnp.maximum(threshold, jnp.where(drawn, jnp.log(rows.min_p), -jnp.inf))


def _draw(scaled, threshold, rows, positions, drawn, axis) -> jax.Array:
    """int32 [R], drawn tokens, or the highest of greedy rows."""

    def draw():
        token = vocabulary.draw(scaled, threshold, vocabulary.uniform(rows.seed, positions), axis)
        return jnp.where(rows.temperature > 0, token, greedy())

    def greedy():
        return vocabulary.first_highest(scaled, axis)

    with jax.named_scope("draw"):
        return jax.lax.cond(drawn, draw, greedy)


def _no_logprobs(tokens):
    """Zeros in the places of `_logprobs`."""
    zeros = jnp.zeros(tokens.shape, jnp.float32)
    many = (*tokens.shape, MAX_LOGPROBS)
    return zeros, zeros, jnp.zeros(many, jnp.int32), jnp.zeros(many, jnp.float32)


def _logprobs(logits, scaled, threshold, tokens, rows, any_of, vocab_size, axis):
    """(logprob, raw_logprob float32 [R], top ids, top logprobs [R, MAX_LOGPROBS])."""
    highest = vocabulary.highest(logits, axis)
    raw_total = highest + jnp.log(vocabulary.total(jnp.exp(logits - highest[:, None]), axis))
    total = jnp.log(vocabulary.mass(scaled, threshold, axis))
    logprob = vocabulary.at(scaled, tokens, axis) - total
    raw_logprob = vocabulary.at(logits, tokens, axis) - raw_total

    def top():
        kept = jnp.where(scaled >= threshold[:, None], scaled, -jnp.inf)
        real = vocabulary.mask_padding(logits, vocab_size, axis)
        of = jnp.where(rows.raw[:, None], real, kept)
        values, ids = vocabulary.best(of, any_of["alternatives"], axis)
        return ids, values - jnp.where(rows.raw, raw_total, total)[:, None]

    with jax.named_scope("top_logprobs"):
        none = _no_logprobs(tokens)[2:]
        ids, values = jax.lax.cond(any_of["alternatives"] > 0, top, lambda: none)
    return logprob, raw_logprob, ids, values
