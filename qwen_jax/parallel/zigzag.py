"""The order in which a sequence lies on the `context` axis.

Cut in the natural order, the devices with the last tokens would do most of causal attention's work.
In zigzag order the sequence is cut into 2C chunks and device i holds chunks i and 2C−1−i: each then
has the same work at every step of a ring (Llama 3's context parallelism cuts sequences in the same
way, arXiv:2407.21783 §3.3.2). The forward pass enters and leaves this order by itself
(`model.hidden_states`); outside it sequences are in natural order.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen_jax.errors import UserError
from qwen_jax.parallel.rules import RULES, current_mesh, on_mesh

AXIS = RULES["sequence"]


def context_size() -> int:
    """Devices a sequence is spread over; 1 without a mesh."""
    return current_mesh().shape.get(AXIS, 1) if on_mesh() else 1


def to_zigzag(x: jax.Array) -> jax.Array:
    """From natural to zigzag order along axis 1 of [B,T,…]; other axes stay sharded as they are.

    The identity unless a sequence is spread over devices. Costs two point-to-point exchanges.

    Raises:
      UserError: T is not a multiple of twice the context axis.
    """
    return _exchange(x, _to_zigzag)


def from_zigzag(x: jax.Array) -> jax.Array:
    """The way back."""
    return _exchange(x, _from_zigzag)


def zigzag_slots(length: int, device: jax.Array | int, size: int) -> jax.Array:
    """Natural slots of the `length` tokens that this device holds: int32 [length]."""
    half = length // 2
    steps = jnp.arange(half, dtype=jnp.int32)
    return jnp.concatenate([device * half + steps, (2 * size - 1 - device) * half + steps])


def _exchange(x: jax.Array, local) -> jax.Array:
    size = context_size()
    if size == 1:
        return x
    if x.shape[1] % (2 * size):
        raise UserError(
            f"a sequence of {x.shape[1]} does not divide into 2 × mesh.context = {2 * size} "
            "chunks; choose another length or mesh.context"
        )
    axes = (*jax.typeof(x).sharding.spec, *(None,) * x.ndim)[: x.ndim]
    at = jax.P(axes[0], AXIS, *axes[2:])
    exchange = jax.shard_map(lambda x: local(x, size), in_specs=at, out_specs=at, check_vma=False)
    return exchange(jax.reshard(x, at))


# Even-numbered chunks go to as many different devices as there are, and so do odd-numbered ones:
# each of the two exchanges is a permutation of devices.


def _destinations(parity: int, size: int) -> list[tuple[int, int]]:
    """(device holding chunk m in natural order, device holding it in zigzag), m of this parity."""
    chunks = range(parity, 2 * size, 2)
    return [(m // 2, m if m < size else 2 * size - 1 - m) for m in chunks]


def _to_zigzag(x, size):
    parts = jnp.split(x, 2, axis=1)
    even, odd = (
        jax.lax.ppermute(part, AXIS, _destinations(parity, size))
        for parity, part in enumerate(parts)
    )
    # Chunk i has i's parity; chunk 2C−1−i has the other.
    return _in_order(even, odd, jax.lax.axis_index(AXIS) % 2)


def _from_zigzag(x, size):
    first, second = jnp.split(x, 2, axis=1)
    parity = jax.lax.axis_index(AXIS) % 2
    even = jnp.where(parity == 0, first, second)
    odd = jnp.where(parity == 0, second, first)
    parts = (
        jax.lax.ppermute(part, AXIS, [(to, back) for back, to in _destinations(parity, size)])
        for parity, part in enumerate((even, odd))
    )
    return jnp.concatenate(tuple(parts), axis=1)


def _in_order(even, odd, parity):
    first, second = jnp.where(parity == 0, even, odd), jnp.where(parity == 0, odd, even)
    return jnp.concatenate([first, second], axis=1)
