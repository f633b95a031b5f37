"""Thresholds and samples over a vocabulary that may be divided over devices, without sorting it.

Every function works on one device's rows and its part of the vocabulary. `axis` is the mesh axis
that divides the vocabulary, or None; only numbers per row, or per row and block of tokens, cross
devices. All devices along the axis return the same result.

Letters in shapes: R rows of the device, V tokens of the device's part of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from qwen_jax.engine.request import MAX_LOGPROBS

BLOCK = 128
"""Tokens per block in `sample_token` and `top_tokens`: the lanes of a TPU register."""

_NO_ID = 2**31 - 1


def first_token_id(part: int, axis: str | None) -> jax.Array | int:
    """Returns the id of this device's first token, where each device has `part` tokens."""
    return 0 if axis is None else jax.lax.axis_index(axis) * part


def _reduce_over_devices(
    reduce: Callable[..., jax.Array], local: jax.Array, axis: str | None
) -> jax.Array:
    """Applies a collective such as `jax.lax.psum` along `axis`, if there is one."""
    return local if axis is None else reduce(local, axis)


def row_max(x: jax.Array, axis: str | None) -> jax.Array:
    """Returns the maximum of each row of x [R, V] over the whole vocabulary, [R]."""
    return _reduce_over_devices(jax.lax.pmax, x.max(axis=-1), axis)


def row_sum(x: jax.Array, axis: str | None) -> jax.Array:
    """Returns the sum of each row of x [R, V] over the whole vocabulary, [R]."""
    return _reduce_over_devices(jax.lax.psum, x.sum(axis=-1), axis)


def _token_ids(x: jax.Array, axis: str | None) -> jax.Array:
    """Returns the ids of the columns of x [R, V], int32 [V]."""
    return first_token_id(x.shape[-1], axis) + jnp.arange(x.shape[-1], dtype=jnp.int32)


def mask_padding(logits: jax.Array, vocab_size: int, axis: str | None) -> jax.Array:
    """Returns logits [R, V] with -inf for ids from `vocab_size` on."""
    return jnp.where(_token_ids(logits, axis) < vocab_size, logits, -jnp.inf)


def argmax_lowest_id(x: jax.Array, axis: str | None) -> jax.Array:
    """Returns the lowest id of each row's maximum in x [R, V], int32 [R].

    Two plain reductions: XLA does not vectorise argmax on CPUs, which is 8 times slower.
    """
    ids = jnp.where(x == row_max(x, axis)[:, None], _token_ids(x, axis), _NO_ID)
    first = _reduce_over_devices(jax.lax.pmin, ids.min(axis=-1), axis)
    return jnp.where(first < _NO_ID, first, 0)  # a row of NaN has no maximum, but gets a token


def value_at(x: jax.Array, tokens: jax.Array, axis: str | None) -> jax.Array:
    """Returns the entry of x float32 [R, V] at one id per row, tokens int32 [R]; float32 [R]."""
    local = tokens - first_token_id(x.shape[1], axis)
    inside = (local >= 0) & (local < x.shape[1])
    found = jnp.take_along_axis(x, jnp.where(inside, local, 0)[:, None], axis=1)[:, 0]
    return found if axis is None else row_sum(jnp.where(inside, found, 0.0)[:, None], axis)


def kept_mass(
    scaled: jax.Array, threshold: jax.Array, axis: str | None, weighted: bool = True
) -> jax.Array:
    """Returns the unnormalised probability mass at or above a threshold in each row, float32 [R].

    Args:
      scaled: float32 [R, V], log-weights of the tokens.
      threshold: float32 [R].
      axis: mesh axis of the vocabulary, or None.
      weighted: whether a token weighs exp(scaled); otherwise each weighs 1 (a count).
    """
    kept = scaled >= threshold[:, None]
    # Selected before exp: XLA would hoist an unconditional exp out of a loop and store it.
    weights = jnp.exp(jnp.where(kept, scaled, -jnp.inf)) if weighted else kept.astype(jnp.float32)
    return row_sum(weights, axis)


def threshold_for_mass(
    values: jax.Array, target: jax.Array, axis: str | None, *, weighted: bool
) -> jax.Array:
    """Returns the highest entry per row such that the entries at or above it reach a mass.

    Bisects between a bound that reaches the target and one that does not, until exactly one entry
    between them is undecided; the highest entry below the upper bound is then the exact result.
    Takes 10 to 20 passes over logits and at most 4 × 32 over any floats, because every fourth
    midpoint is taken in the ordering of float32 numbers and the others in their values.

    Args:
      values: float32 [R, V], at most 0.
      target: float32 [R], mass to reach; 0 disables truncation.
      axis: mesh axis of the vocabulary, or None.
      weighted: whether an entry weighs exp(value); otherwise each weighs 1.

    Returns:
      float32 [R]; -inf where truncation is disabled or the row's total is below the target.
    """
    low = jnp.where(values > -jnp.inf, values, 0.0).min(axis=-1)
    low = _reduce_over_devices(jax.lax.pmin, low, axis)
    enabled = (target > 0) & (kept_mass(values, low, axis, weighted) >= target)
    target = jnp.where(enabled, target, 0.0)

    def least_weight(low):
        return jnp.exp(low) if weighted else 1.0

    def undecided(state):
        _, low, high, above = state
        return (target - above > least_weight(low)) & (_float_order(high) - 1 > _float_order(low))

    def halve(state):
        step, low, high, above = state
        middle = low + (high - low) / 2
        by_value = (step % 4 != 3) & (middle > low) & (middle < high)
        middle = jnp.where(by_value, middle, _middle_in_float_order(low, high))
        sums = kept_mass(values, middle, axis, weighted)
        active = undecided(state)
        lower_high, raise_low = active & (sums < target), active & (sums >= target)
        return (
            step + 1,
            jnp.where(raise_low, middle, low),
            jnp.where(lower_high, middle, high),
            jnp.where(lower_high, sums, above),
        )

    start = (jnp.int32(0), low, jnp.full_like(low, 1.0), jnp.zeros_like(target))
    _, _, high, _ = jax.lax.while_loop(lambda state: undecided(state).any(), halve, start)
    found = row_max(jnp.where(values < high[:, None], values, -jnp.inf), axis)
    return jnp.where(enabled, found, -jnp.inf)


def _float_order(x: jax.Array) -> jax.Array:
    """Returns the rank of each float32 among all float32 numbers, int32; neighbours differ by 1."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _middle_in_float_order(low: jax.Array, high: jax.Array) -> jax.Array:
    """Returns the float32 half-way between low and high by rank: at least low, below high."""
    a, b = _float_order(low), _float_order(high)
    middle = (a & b) + ((a ^ b) >> 1)
    bits = jnp.where(middle < 0, middle ^ 0x7FFFFFFF, middle)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def uniform(seed: jax.Array, positions: jax.Array) -> jax.Array:
    """Returns two uniform numbers per row, float32 [R, 2] in [0, 1) with 24 bits each.

    Args:
      seed: uint32 [R, 2], the threefry key of each row.
      positions: int32 [R], folded into the key.
    """

    def bits(seed, position):
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        return jax.random.bits(jax.random.fold_in(key, position), (2,), jnp.uint32)

    return (jax.vmap(bits)(seed, positions) >> 8).astype(jnp.float32) * 2.0**-24


def _index_at_fraction(weights: jax.Array, fraction: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the index at which the cumulative weight passes a fraction of the row's total.

    Args:
      weights: float32 [R, n], non-negative. An entry of weight 0 is never chosen.
      fraction: float32 [R], in [0, 1).

    Returns:
      (index int32 [R], position of the fraction within that entry's weight, float32 [R] in [0, 1]).
    """
    cumulative = jnp.cumsum(weights, axis=-1)
    target = fraction * cumulative[:, -1]
    positive = weights > 0
    past = positive & (cumulative > target[:, None])
    places = jnp.arange(weights.shape[-1], dtype=jnp.int32)
    # Rounding may leave no entry past the target: then the last positive one is chosen.
    first = jnp.where(past, places, weights.shape[-1]).min(axis=-1)
    index = jnp.minimum(first, jnp.where(positive, places, 0).max(axis=-1))
    weight = jnp.take_along_axis(weights, index[:, None], axis=1)[:, 0]
    reached = jnp.take_along_axis(cumulative, index[:, None], axis=1)[:, 0]
    inside = 1 - (reached - target) / jnp.where(weight > 0, weight, 1.0)
    return index, jnp.clip(inside, 0.0, 1.0)


def _blocks(x: jax.Array) -> jax.Array:
    """Reshapes x [R, V] to [R, number of blocks, BLOCK], padded with -inf."""
    padding = -x.shape[1] % BLOCK
    if padding:
        x = jnp.pad(x, ((0, 0), (0, padding)), constant_values=-jnp.inf)
    return x.reshape(x.shape[0], -1, BLOCK)


def sample_token(
    scaled: jax.Array, threshold: jax.Array, uniform: jax.Array, axis: str | None
) -> jax.Array:
    """Samples one id per row in proportion to exp(scaled) among entries ≥ threshold, int32 [R].

    By inversion of the cumulative distribution: first the block of tokens in which it passes the
    uniform number, then the token within the block. How the vocabulary is divided into blocks and
    over devices changes rounding only.

    Args:
      scaled: float32 [R, V], log-weights.
      threshold: float32 [R], lowest log-weight to sample from.
      uniform: float32 [R, 2] in [0, 1); the second number provides the digits after the first 24.
      axis: mesh axis of the vocabulary, or None.
    """

    def weights(x):
        kept = x >= threshold.reshape(-1, *[1] * (x.ndim - 1))
        return jnp.where(kept, jnp.exp(x), 0.0)

    blocks = _blocks(scaled)
    sums = weights(blocks).sum(axis=-1)
    num_local = blocks.shape[1]
    sums = sums if axis is None else jax.lax.all_gather(sums, axis, axis=1, tiled=True)
    block, fraction = _index_at_fraction(sums, uniform[:, 0])
    block_sum = jnp.take_along_axis(sums, block[:, None], axis=1)[:, 0]
    resolution = 2.0**-24 * sums.sum(axis=-1) / block_sum
    fraction = jnp.minimum(fraction + uniform[:, 1] * resolution, 1 - 2.0**-24)
    local = block - first_token_id(num_local, axis)
    inside = (local >= 0) & (local < num_local)
    local = jnp.where(inside, local, 0)
    chosen = jnp.take_along_axis(blocks, local[:, None, None], axis=1)[:, 0]
    token = local * BLOCK + _index_at_fraction(weights(chosen), fraction)[0]
    if axis is None:
        return token
    first = first_token_id(scaled.shape[1], axis)
    return jax.lax.psum(jnp.where(inside, token + first, 0), axis)


def top_tokens(x: jax.Array, count: jax.Array, axis: str | None) -> tuple[jax.Array, jax.Array]:
    """Returns the `count` highest entries of each row, best first, the lower id of equals first.

    Takes them one by one: the block with the highest maximum contains the next one, and then has a
    new maximum. Only the first step reads all of x.

    Args:
      x: float32 [R, V].
      count: int32 scalar, at most MAX_LOGPROBS.
      axis: mesh axis of the vocabulary, or None.

    Returns:
      (values float32 [R, MAX_LOGPROBS], ids int32 [R, MAX_LOGPROBS]); -inf and 0 from `count` on.
    """
    blocks = _blocks(x)
    num_rows, num_blocks, _ = blocks.shape
    block_numbers = jnp.arange(num_blocks, dtype=jnp.int32)
    places = jnp.arange(BLOCK, dtype=jnp.int32)
    none = jnp.int32(_NO_ID)

    def first(where, ids):
        return jnp.where(where, ids, none).min(axis=-1)

    def take_next(i, state):
        maxima, value, place, values, ids = state
        local_best = maxima.max(axis=-1)
        block = jnp.minimum(first(maxima == local_best[:, None], block_numbers), num_blocks - 1)
        in_block = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]  # [R, BLOCK]
        at = block[:, None] * BLOCK + places
        # Entries after the last one taken on this device, ordered by value, then id.
        left = (in_block < value[:, None]) | ((in_block == value[:, None]) & (at > place[:, None]))
        found = first(left & (in_block == local_best[:, None]), at)
        local = jnp.minimum(found, x.shape[1] - 1)
        best, token = local_best, local + first_token_id(x.shape[1], axis)
        taken = jnp.full(num_rows, True)
        if axis is not None:
            best = jax.lax.pmax(local_best, axis)
            token = jax.lax.pmin(jnp.where(local_best == best, token, none), axis)
            taken = token == local + first_token_id(x.shape[1], axis)
        rest = jnp.where(left & (at != local[:, None]), in_block, -jnp.inf).max(axis=-1)
        changed = (block_numbers == block[:, None]) & taken[:, None]
        return (
            jnp.where(changed, rest[:, None], maxima),
            jnp.where(taken, local_best, value),
            jnp.where(taken, local, place),
            values.at[:, i].set(best),
            ids.at[:, i].set(token),
        )

    shape = (num_rows, MAX_LOGPROBS)
    value, place = jnp.full(num_rows, jnp.inf), jnp.full(num_rows, -1, jnp.int32)
    out = jnp.full(shape, -jnp.inf), jnp.zeros(shape, jnp.int32)
    start = (blocks.max(axis=-1), value, place, *out)
    return jax.lax.fori_loop(0, count, take_next, start)[-2:]
