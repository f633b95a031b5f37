"""Thresholds and draws over a vocabulary that may be divided among devices, without sorting it.

Every function works on one device's rows and its part of the vocabulary, [R,V]. `axis` is the mesh
axis that divides it, or None; what crosses devices are numbers per row, or per row and block of
tokens. All devices along the axis return the same.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen_jax.engine.request import MAX_LOGPROBS

BLOCK = 128
"""Tokens of a block, for the draw and for the best tokens: a TPU's lanes."""

_NO_ID = 2**31 - 1


def offset(part: int, axis: str | None):
    """Id of the first token here, of `part` tokens a device."""
    return 0 if axis is None else jax.lax.axis_index(axis) * part


def _across(reduce, local: jax.Array, axis: str | None) -> jax.Array:
    return local if axis is None else reduce(local, axis)


def highest(x: jax.Array, axis) -> jax.Array:
    """[R], the maximum of each row of x [R,V]."""
    return _across(jax.lax.pmax, x.max(axis=-1), axis)


def total(x: jax.Array, axis) -> jax.Array:
    """[R], the sum of each row of x [R,V]."""
    return _across(jax.lax.psum, x.sum(axis=-1), axis)


def _ids(x, axis):
    return offset(x.shape[-1], axis) + jnp.arange(x.shape[-1], dtype=jnp.int32)


def mask_padding(logits: jax.Array, vocab_size: int, axis) -> jax.Array:
    """Logits [R,V] with -inf for ids from `vocab_size` on."""
    return jnp.where(_ids(logits, axis) < vocab_size, logits, -jnp.inf)


def first_highest(x: jax.Array, axis) -> jax.Array:
    """int32 [R], the lowest id of each row's maximum in x [R,V].

    Two plain reductions: argmax is one that XLA doesn't vectorise on CPUs, 8 times slower.
    """
    ids = jnp.where(x == highest(x, axis)[:, None], _ids(x, axis), _NO_ID)
    first = _across(jax.lax.pmin, ids.min(axis=-1), axis)
    return jnp.where(first < _NO_ID, first, 0)  # a row of NaN has no maximum, but gets a token


def at(x: jax.Array, tokens: jax.Array, axis) -> jax.Array:
    """x [R,V] at one id a row, float32 [R]."""
    here = tokens - offset(x.shape[1], axis)
    inside = (here >= 0) & (here < x.shape[1])
    found = jnp.take_along_axis(x, jnp.where(inside, here, 0)[:, None], axis=1)[:, 0]
    return found if axis is None else total(jnp.where(inside, found, 0.0)[:, None], axis)


def mass(scaled, threshold, axis, probable: bool = True) -> jax.Array:
    """float32 [R], the sum of exp(scaled) from the threshold on, or how many there are."""
    kept = scaled >= threshold[:, None]
    # The choice is made before exp: after it, exp would be taken out of a loop and kept.
    weights = jnp.exp(jnp.where(kept, scaled, -jnp.inf)) if probable else kept.astype(jnp.float32)
    return total(weights, axis)


def reach(values: jax.Array, target: jax.Array, axis, *, probable: bool) -> jax.Array:
    """The highest value such that the weights of entries at or above it sum to `target` or more.

    Bisection between two bounds, one that reaches the target and one that doesn't, until a single
    entry between them is sure to make the difference: the highest one there is then the answer,
    exactly. Takes 10 to 20 steps on logits, at most 4 × 32 on any floats, because every fourth
    middle is taken among the floats between the bounds, the others between their values.

    Args:
      values: float32 [R,V], at most 0.
      target: float32 [R]; 0: no wish.
      probable: weights are exp(values); otherwise 1 each.

    Returns:
      float32 [R], -inf where there is no wish or nothing reaches it.
    """

    low = jnp.where(values > -jnp.inf, values, 0.0).min(axis=-1)
    low = _across(jax.lax.pmin, low, axis)
    wish = (target > 0) & (mass(values, low, axis, probable) >= target)
    target = jnp.where(wish, target, 0.0)

    def least_between(low):
        return jnp.exp(low) if probable else 1.0

    def open_(state):
        _, low, high, above = state
        return (target - above > least_between(low)) & (_order(high) - 1 > _order(low))

    def halve(state):
        step, low, high, above = state
        middle = low + (high - low) / 2
        by_value = (step % 4 != 3) & (middle > low) & (middle < high)
        middle = jnp.where(by_value, middle, _between(low, high))
        sums = mass(values, middle, axis, probable)
        go = open_(state)
        down, up = go & (sums < target), go & (sums >= target)
        return (
            step + 1,
            jnp.where(up, middle, low),
            jnp.where(down, middle, high),
            jnp.where(down, sums, above),
        )

    start = (jnp.int32(0), low, jnp.full_like(low, 1.0), jnp.zeros_like(target))
    _, _, high, _ = jax.lax.while_loop(lambda s: open_(s).any(), halve, start)
    found = highest(jnp.where(values < high[:, None], values, -jnp.inf), axis)
    return jnp.where(wish, found, -jnp.inf)


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


def uniform(seed: jax.Array, positions: jax.Array) -> jax.Array:
    """float32 [R,2] in [0, 1), 24 bits each, from seed uint32 [R,2] and positions int32 [R]."""

    def bits(seed, position):
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        return jax.random.bits(jax.random.fold_in(key, position), (2,), jnp.uint32)

    return (jax.vmap(bits)(seed, positions) >> 8).astype(jnp.float32) * 2.0**-24


def _pick(weights: jax.Array, share: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The entry of weights [R,n] in which a share in [0, 1) of their sum falls, never one of 0.

    Returns:
      (int32 [R], and float32 [R] how far into that entry the share reaches, in [0, 1]).
    """
    total = jnp.cumsum(weights, axis=-1)
    target = share * total[:, -1]
    some = weights > 0
    past = some & (total > target[:, None])
    places = jnp.arange(weights.shape[-1], dtype=jnp.int32)
    # Rounding may leave no place past the target: then it is the last one that can be drawn.
    first = jnp.where(past, places, weights.shape[-1]).min(axis=-1)
    place = jnp.minimum(first, jnp.where(some, places, 0).max(axis=-1))
    weight, reached = (
        jnp.take_along_axis(x, place[:, None], axis=1)[:, 0] for x in (weights, total)
    )
    inside = 1 - (reached - target) / jnp.where(weight > 0, weight, 1.0)
    return place, jnp.clip(inside, 0.0, 1.0)


def _blocks(x: jax.Array) -> jax.Array:
    """[R,V] -> [R, blocks, BLOCK], filled up with -inf."""
    short = -x.shape[1] % BLOCK
    if short:
        x = jnp.pad(x, ((0, 0), (0, short)), constant_values=-jnp.inf)
    return x.reshape(x.shape[0], -1, BLOCK)


def draw(scaled: jax.Array, threshold: jax.Array, uniform: jax.Array, axis) -> jax.Array:
    """int32 [R], an id a row in proportion to exp(scaled [R,V]) from the threshold [R] on.

    The id at which the sum of probabilities passes a uniform number: first the block of tokens,
    then the token in it. How the vocabulary is cut into blocks, and over devices, moves nothing but
    rounding. Uniform [R,2]: the second number gives the first its digits from the 25th on.
    """

    def weights(x):
        kept = x >= threshold.reshape(-1, *[1] * (x.ndim - 1))
        return jnp.where(kept, jnp.exp(x), 0.0)

    blocks = _blocks(scaled)
    sums = weights(blocks).sum(axis=-1)
    mine = blocks.shape[1]
    sums = sums if axis is None else jax.lax.all_gather(sums, axis, axis=1, tiled=True)
    block, share = _pick(sums, uniform[:, 0])
    finest = 2.0**-24 * sums.sum(axis=-1) / jnp.take_along_axis(sums, block[:, None], axis=1)[:, 0]
    share = jnp.minimum(share + uniform[:, 1] * finest, 1 - 2.0**-24)
    here = block - offset(mine, axis)
    inside = (here >= 0) & (here < mine)
    here = jnp.where(inside, here, 0)
    one = jnp.take_along_axis(blocks, here[:, None, None], axis=1)[:, 0]
    token = here * BLOCK + _pick(weights(one), share)[0]
    if axis is None:
        return token
    return jax.lax.psum(jnp.where(inside, token + offset(scaled.shape[1], axis), 0), axis)


def best(x: jax.Array, count: jax.Array, axis) -> tuple[jax.Array, jax.Array]:
    """Values and ids [R, MAX_LOGPROBS] of the `count` highest of x [R,V], of equals the lower id.

    One after the other: the block with the highest maximum has the next one, and then has another
    maximum. Only the first step looks at all of x. Places from `count` on are -inf and 0.
    """
    blocks = _blocks(x)
    requests, many, _ = blocks.shape
    numbers = jnp.arange(many, dtype=jnp.int32)
    places = jnp.arange(BLOCK, dtype=jnp.int32)
    none = jnp.int32(2**31 - 1)

    def first(where, ids):
        return jnp.where(where, ids, none).min(axis=-1)

    def next_(i, state):
        maxima, value, place, values, ids = state
        mine = maxima.max(axis=-1)
        block = jnp.minimum(first(maxima == mine[:, None], numbers), many - 1)
        in_block = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]  # [R, BLOCK]
        at = block[:, None] * BLOCK + places
        # What comes after the last one taken here, in the order of values, then ids.
        left = (in_block < value[:, None]) | ((in_block == value[:, None]) & (at > place[:, None]))
        local = jnp.minimum(first(left & (in_block == mine[:, None]), at), x.shape[1] - 1)
        best, token = mine, local + offset(x.shape[1], axis)
        taken = jnp.full(requests, True)
        if axis is not None:
            best = jax.lax.pmax(mine, axis)
            token = jax.lax.pmin(jnp.where(mine == best, token, none), axis)
            taken = token == local + offset(x.shape[1], axis)
        rest = jnp.where(left & (at != local[:, None]), in_block, -jnp.inf).max(axis=-1)
        here = (numbers == block[:, None]) & taken[:, None]
        return (
            jnp.where(here, rest[:, None], maxima),
            jnp.where(taken, mine, value),
            jnp.where(taken, local, place),
            values.at[:, i].set(best),
            ids.at[:, i].set(token),
        )

    shape = (requests, MAX_LOGPROBS)
    value, place = jnp.full(requests, jnp.inf), jnp.full(requests, -1, jnp.int32)
    out = jnp.full(shape, -jnp.inf), jnp.zeros(shape, jnp.int32)
    start = (blocks.max(axis=-1), value, place, *out)
    return jax.lax.fori_loop(0, count, next_, start)[-2:]
