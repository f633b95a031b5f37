"""Drawing the next token on device, each row by its own parameters.

One executable serves every mixture of requests. What no row asks for stands behind a `lax.cond`
that skips it, so a batch of greedy rows pays for one look at the logits; and no branch returns
anything of the size of the vocabulary but the logits after penalties, so none copies it.

The vocabulary is never sorted. The tokens that top-k, top-p and min-p leave are those whose logit
is at least a threshold, found by bisection: count, or sum the probabilities of, what lies above the
middle of an interval. The draw is an inverse distribution function in two levels, a block of
tokens and a token in it, from two uniform numbers that depend on (seed, position) alone.

Over a mesh the vocabulary may be divided along `tensor`: each device works on its part, and numbers
per row, or per row and block of tokens, are all that crosses devices.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.generate.request import MAX_LOGPROBS, SamplingParams
from qwen_jax.parallel import RULES, current_mesh, on_mesh, reshard, spec

_BLOCK = 128
"""Tokens of a block, for the draw and for the best tokens: a TPU's lanes."""

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
        tokens = tokens - _offset(counts.shape[1], axis)
        real &= (tokens >= 0) & (tokens < counts.shape[1])
        rows = jnp.arange(counts.shape[0])
        tokens = jnp.where(real, tokens, 0)
        room = counts[rows, tokens] < _MOST
        # One update a row, so none is lost; an update of 0 stands for none.
        new = jnp.where(real & room, 2, 0).astype(jnp.int16)
        return counts.at[rows, tokens].add(new, unique_indices=True, indices_are_sorted=True)

    with jax.named_scope("count_tokens"):
        vocab, rows = ("batch", "vocab"), ("batch",)
        new = _sharded(local, (vocab, rows, rows), vocab)(seen.counts, tokens, real)
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
    rows = jax.tree.map(jnp.asarray, rows)
    penalised = (rows.repetition != 1) | (rows.presence != 0) | (rows.frequency != 0)
    any_of = {
        "drawn": (rows.temperature > 0).any(),
        "penalised": jnp.bool_(False) if seen is None else penalised.any(),
        "top_k": ((rows.top_k > 0) & (rows.temperature > 0)).any(),
        "top_p": ((rows.top_p < 1) & (rows.temperature > 0)).any(),
        "logprobs": (rows.n_logprobs >= 0).any(),
        "top": (rows.n_logprobs > 0).any(),
    }
    plain = ~(any_of["drawn"] | any_of["penalised"] | any_of["logprobs"])
    vocab, row = ("batch", "vocab"), ("batch",)
    row_axes = dataclasses.replace(
        jax.tree.map(lambda _: row, rows, is_leaf=lambda x: x is None), seed=("batch", None)
    )
    local = functools.partial(_local, vocab_size=vocab_size)
    axes = (vocab, row_axes, row, vocab, (), ())
    out = Drawn(row, row, row, ("batch", None), ("batch", None))
    counts = None if seen is None else seen.counts
    with jax.named_scope("sample"):
        return _sharded(local, axes, out)(logits, rows, positions, counts, any_of, plain)


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


# From here on: one device's rows and part of the vocabulary. `axis` is the mesh axis that divides
# the vocabulary, or None.


def _offset(part: int, axis: str | None):
    """Id of the first token here, of `part` tokens a device."""
    return 0 if axis is None else jax.lax.axis_index(axis) * part


def _all(reduce, local: jax.Array, axis: str | None) -> jax.Array:
    return local if axis is None else reduce(local, axis)


def _max(x, axis):
    return _all(jax.lax.pmax, x.max(axis=-1), axis)


def _sum(x, axis):
    return _all(jax.lax.psum, x.sum(axis=-1), axis)


def _ids(x, axis):
    return _offset(x.shape[-1], axis) + jnp.arange(x.shape[-1], dtype=jnp.int32)


def _first_max(x: jax.Array, highest: jax.Array, vocab_size: int, axis) -> jax.Array:
    """int32 [R], lowest id whose x is the highest. Two plain reductions: argmax is 8× one of them
    on CPUs, where it isn't vectorised."""
    ids = jnp.where(x == highest[:, None], _ids(x, axis), vocab_size - 1)
    return _all(jax.lax.pmin, ids.min(axis=-1), axis)


def _at(x: jax.Array, tokens: jax.Array, axis) -> jax.Array:
    """x [R,V] at one id a row, float32 [R]."""
    here = tokens - _offset(x.shape[1], axis)
    inside = (here >= 0) & (here < x.shape[1])
    found = jnp.take_along_axis(x, jnp.where(inside, here, 0)[:, None], axis=1)[:, 0]
    return found if axis is None else _sum(jnp.where(inside, found, 0.0)[:, None], axis)


def _local(logits, rows, positions, counts, any_of, plain, *, vocab_size, axis) -> Drawn:
    def real(x):
        return jnp.where(_ids(x, axis) < vocab_size, x, -jnp.inf)

    def greedy():
        x = real(logits)
        tokens = _first_max(x, _max(x, axis), vocab_size, axis)
        return Drawn(tokens, *_no_logprobs(tokens))

    def everything():
        scaled = _scaled(real(logits), rows, counts, any_of["penalised"], axis)
        threshold = _threshold(scaled, rows, any_of, axis)
        tokens = _draw(scaled, threshold, rows, positions, any_of["drawn"], vocab_size, axis)
        logprobs = jax.lax.cond(
            any_of["logprobs"],
            lambda: _logprobs(logits, real, scaled, threshold, tokens, rows, any_of["top"], axis),
            lambda: _no_logprobs(tokens),
        )
        return Drawn(tokens, *logprobs)

    return jax.lax.cond(plain, greedy, everything)


def _scaled(x, rows, counts, penalised, axis) -> jax.Array:
    """float32 [R,V], logits after penalties and temperature, shifted so that a row's highest is 0.

    Shifted before the division, no temperature overflows. Greedy rows have temperature 1.
    """
    temperature = jnp.where(rows.temperature > 0, jnp.maximum(rows.temperature, _TINY), 1.0)

    def scale(x):
        return (x - _max(x, axis)[:, None]) / temperature[:, None]

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

    def low():
        finite = jnp.where(scaled > -jnp.inf, scaled, 0.0).min(axis=-1)
        return _all(jax.lax.pmin, finite, axis)

    def top_k():
        target = jnp.minimum(rows.top_k, _sum((scaled > -jnp.inf).astype(jnp.float32), axis))
        wanted = drawn & (rows.top_k > 0)
        return _reach(scaled, None, jnp.where(wanted, target, 0.0), low(), axis)

    def top_p(k_threshold):
        weights = jnp.exp(scaled)
        left = _sum(jnp.where(scaled >= k_threshold[:, None], weights, 0.0), axis)
        wanted = drawn & (rows.top_p < 1)
        return _reach(scaled, weights, jnp.where(wanted, rows.top_p * left, 0.0), low(), axis)

    with jax.named_scope("top_k"):
        threshold = jax.lax.cond(any_of["top_k"], top_k, lambda: nothing)
    with jax.named_scope("top_p"):
        least = jax.lax.cond(any_of["top_p"], top_p, lambda _: nothing, threshold)
    threshold = jnp.maximum(threshold, least)
    return jnp.maximum(threshold, jnp.where(drawn, jnp.log(rows.min_p), -jnp.inf))


def _reach(values, weights, target, low, axis) -> jax.Array:
    """The highest value such that the weights of entries at or above it sum to `target` or more.

    Bisection between two bounds, one that reaches the target and one that doesn't, until a single
    entry between them is sure to make the difference: the highest one there is then the answer,
    exactly. Takes 10 to 20 steps on logits, at most 4 × 32 on any floats, because every fourth
    middle is taken among the floats between the bounds, the others between their values.

    Args:
      values: float32 [R,V], at most 0.
      weights: float32 [R,V], exp(values); None: 1 each.
      target: float32 [R], at most the sum of all weights of finite values; 0: no wish.
      low: float32 [R], lowest finite value.

    Returns:
      float32 [R], -inf where there is no wish.
    """

    def least_between(low):
        return 1.0 if weights is None else jnp.exp(low)

    def open_(state):
        _, low, high, above = state
        return (target - above > least_between(low)) & (_order(high) - 1 > _order(low))

    def halve(state):
        step, low, high, above = state
        middle = low + (high - low) / 2
        by_value = (step % 4 != 3) & (middle > low) & (middle < high)
        middle = jnp.where(by_value, middle, _between(low, high))
        counted = jnp.where(values >= middle[:, None], 1.0 if weights is None else weights, 0.0)
        mass = _sum(counted, axis)
        go = open_(state)
        down, up = go & (mass < target), go & (mass >= target)
        return (
            step + 1,
            jnp.where(up, middle, low),
            jnp.where(down, middle, high),
            jnp.where(down, mass, above),
        )

    zeros = jnp.zeros_like(target)
    start = (jnp.int32(0), low, jnp.full_like(low, 1.0), zeros)
    _, _, high, _ = jax.lax.while_loop(lambda s: open_(s).any(), halve, start)
    found = _max(jnp.where(values < high[:, None], values, -jnp.inf), axis)
    return jnp.where(target > 0, found, -jnp.inf)


def _order(x: jax.Array) -> jax.Array:
    """int32 in the order of float32 x: neighbours differ by 1."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _between(low: jax.Array, high: jax.Array) -> jax.Array:
    """The float32 half-way in the order of floats, at least low, below high."""
    a, b = _order(low), _order(high)
    middle = (a & b) + ((a ^ b) >> 1)
    bits = jnp.where(middle < 0, middle ^ 0x7FFFFFFF, middle)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _uniform(seed: jax.Array, positions: jax.Array) -> jax.Array:
    """float32 [R,2] in [0, 1), 24 bits each, from seed uint32 [R,2] and positions int32 [R]."""

    def bits(seed, position):
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        return jax.random.bits(jax.random.fold_in(key, position), (2,), jnp.uint32)

    return (jax.vmap(bits)(seed, positions) >> 8).astype(jnp.float32) * 2.0**-24


def _pick(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """int32 [R], an index of weights [R,n] drawn in proportion to them; never one of weight 0."""
    total = jnp.cumsum(weights, axis=-1)
    some = weights > 0
    past = some & (total > uniform[:, None] * total[:, -1:])
    places = jnp.arange(weights.shape[-1], dtype=jnp.int32)
    # Rounding may leave no place past the target: then it is the last one that can be drawn.
    first = jnp.where(past, places, weights.shape[-1]).min(axis=-1)
    return jnp.minimum(first, jnp.where(some, places, 0).max(axis=-1))


def _blocks(x: jax.Array) -> jax.Array:
    """[R,V] -> [R, blocks, _BLOCK], filled up with -inf."""
    short = -x.shape[1] % _BLOCK
    if short:
        x = jnp.pad(x, ((0, 0), (0, short)), constant_values=-jnp.inf)
    return x.reshape(x.shape[0], -1, _BLOCK)


def _draw(scaled, threshold, rows, positions, drawn, vocab_size, axis) -> jax.Array:
    """int32 [R], drawn tokens, or the highest of greedy rows."""

    def weights(x):
        kept = x >= threshold.reshape(-1, *[1] * (x.ndim - 1))
        return jnp.where(kept, jnp.exp(x), 0.0)

    def draw():
        blocks = _blocks(scaled)
        uniform = _uniform(rows.seed, positions)
        sums = weights(blocks).sum(axis=-1)
        mine = blocks.shape[1]
        sums = sums if axis is None else jax.lax.all_gather(sums, axis, axis=1, tiled=True)
        block = _pick(sums, uniform[:, 0])
        here = block - _offset(mine, axis)
        inside = (here >= 0) & (here < mine)
        one = jnp.take_along_axis(blocks, jnp.where(inside, here, 0)[:, None, None], axis=1)[:, 0]
        token = jnp.where(inside, here, 0) * _BLOCK + _pick(weights(one), uniform[:, 1])
        if axis is not None:
            token = jnp.where(inside, token + _offset(scaled.shape[1], axis), 0)
            token = jax.lax.psum(token, axis)
        return jnp.where(rows.temperature > 0, token, greedy())

    def greedy():
        return _first_max(scaled, _max(scaled, axis), vocab_size, axis)

    with jax.named_scope("draw"):
        return jax.lax.cond(drawn, draw, greedy)


def _no_logprobs(tokens):
    """Zeros in the places of `_logprobs`."""
    zeros = jnp.zeros(tokens.shape, jnp.float32)
    many = (*tokens.shape, MAX_LOGPROBS)
    return zeros, zeros, jnp.zeros(many, jnp.int32), jnp.zeros(many, jnp.float32)


def _logprobs(logits, real, scaled, threshold, tokens, rows, any_top, axis):
    """(logprob, raw_logprob float32 [R], top ids, top logprobs [R, MAX_LOGPROBS])."""
    highest = _max(logits, axis)
    raw_total = highest + jnp.log(_sum(jnp.exp(logits - highest[:, None]), axis))

    def kept(scaled):
        return jnp.where(scaled >= threshold[:, None], scaled, -jnp.inf)

    total = jnp.log(_sum(jnp.exp(kept(scaled)), axis))
    logprob = _at(scaled, tokens, axis) - total
    raw_logprob = _at(logits, tokens, axis) - raw_total

    def top():
        values, ids = _top(jnp.where(rows.raw[:, None], real(logits), kept(scaled)), axis)
        return ids, values - jnp.where(rows.raw, raw_total, total)[:, None]

    with jax.named_scope("top_logprobs"):
        ids, values = jax.lax.cond(any_top, top, lambda: _no_logprobs(tokens)[2:])
    return logprob, raw_logprob, ids, values


def _top(x: jax.Array, axis) -> tuple[jax.Array, jax.Array]:
    """Values and ids of the MAX_LOGPROBS highest of x [R,V], highest first, of equals the lower id.

    They lie in the blocks with the highest maxima, so only those few are looked through.
    """
    blocks = _blocks(x)
    some = min(MAX_LOGPROBS, blocks.shape[1])
    # In the order of the vocabulary, so that the first of equals has the lowest id.
    best = jnp.sort(jax.lax.top_k(blocks.max(axis=-1), some)[1], axis=-1)
    few = jnp.take_along_axis(blocks, best[:, :, None], axis=1).reshape(x.shape[0], -1)
    values, at = jax.lax.top_k(few, min(MAX_LOGPROBS, few.shape[1]))
    ids = jnp.take_along_axis(best, at // _BLOCK, axis=1) * _BLOCK + at % _BLOCK
    ids = jnp.minimum(ids, x.shape[1] - 1)  # filling, all -inf, has no id
    if axis is not None:
        ids = ids + _offset(x.shape[1], axis)
        values, ids = (jax.lax.all_gather(a, axis, axis=1, tiled=True) for a in (values, ids))
        values, at = jax.lax.top_k(values, MAX_LOGPROBS)
        ids = jnp.take_along_axis(ids, at, axis=1)
    return values, ids
