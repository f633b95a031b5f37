"""Zigzag order of a sequence that is sharded over the `context` axis.

With contiguous shards, the devices with the last tokens would do most of the work of causal
attention. In zigzag order the sequence is cut into 2C chunks for C devices and device i holds
chunks i and 2C−1−i, so that all devices have the same work in every step of ring attention (Llama
3's context parallelism cuts sequences in the same way, arXiv:2407.21783 §3.3.2). The forward pass
converts to this order and back (`model.hidden_states`); outside it, sequences are in natural order.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from qwen_jax.errors import UserError
from qwen_jax.parallel.rules import current_mesh, mesh_axis, on_mesh

AXIS = mesh_axis("sequence")
"""Name of the mesh axis that sequences are sharded over, "context"."""


def context_size() -> int:
    """Returns the number of devices that a sequence is sharded over; 1 without a mesh."""
    return current_mesh().shape.get(AXIS, 1) if on_mesh() else 1


def to_zigzag(x: jax.Array) -> jax.Array:
    """Reorders axis 1 of [B, T, …] from natural to zigzag order; other axes keep their sharding.

    The identity unless the sequence is sharded. Costs two point-to-point exchanges.

    Args:
      x: array of B rows of T tokens.

    Raises:
      UserError: T is not a multiple of twice the size of the context axis.
    """
    return _exchange(x, _local_to_zigzag)


def from_zigzag(x: jax.Array) -> jax.Array:
    """Reorders axis 1 of [B, T, …] from zigzag to natural order; the inverse of `to_zigzag`."""
    return _exchange(x, _local_from_zigzag)


def zigzag_slots(length: int, device: jax.Array | int, size: int) -> jax.Array:
    """Returns the positions in natural order of the tokens that a device holds, int32 [length].

    Args:
      length: tokens per device.
      device: index of the device on the context axis.
      size: number of devices on the context axis.
    """
    half = length // 2
    steps = jnp.arange(half, dtype=jnp.int32)
    return jnp.concatenate([device * half + steps, (2 * size - 1 - device) * half + steps])


def _exchange(x: jax.Array, local_exchange: Callable[[jax.Array, int], jax.Array]) -> jax.Array:
    """Applies `local_exchange` to every device's shard of axis 1 of `x`; the identity if C = 1.

    Args:
      x: array of B rows of T tokens, [B, T, …].
      local_exchange: (shard [B, T/C, …], C) -> shard, run under `shard_map` on the C devices of the
        context axis.

    Raises:
      UserError: T is not a multiple of 2C.
    """
    size = context_size()
    if size == 1:
        return x
    if x.shape[1] % (2 * size):
        raise UserError(
            f"a sequence of {x.shape[1]} does not divide into 2 × mesh.context = {2 * size} "
            "chunks; choose another length or mesh.context"
        )
    axes = (*jax.typeof(x).sharding.spec, *(None,) * x.ndim)[: x.ndim]
    sharded = jax.P(axes[0], AXIS, *axes[2:])
    exchange = jax.shard_map(
        lambda x: local_exchange(x, size), in_specs=sharded, out_specs=sharded, check_vma=False
    )
    return exchange(jax.reshard(x, sharded))


# Even-numbered chunks go to as many different devices as there are, and so do odd ones:
# each of the two exchanges is a permutation of devices.


def _destinations(parity: int, size: int) -> list[tuple[int, int]]:
    """Returns the device moves of the even or the odd chunks from natural to zigzag order.

    Args:
      parity: 0 for the even-numbered chunks of the sequence, 1 for the odd-numbered ones.
      size: number of devices C on the context axis; the sequence has 2C chunks.

    Returns:
      (device in natural order, device in zigzag order) of each chunk, as `jax.lax.ppermute` takes.
    """
    chunks = range(parity, 2 * size, 2)
    return [(m // 2, m if m < size else 2 * size - 1 - m) for m in chunks]


def _local_to_zigzag(x: jax.Array, size: int) -> jax.Array:
    """Returns this device's shard in zigzag order, given its shard in natural order.

    Args:
      x: two consecutive chunks along axis 1, [B, T/C, …].
      size: number of devices C on the context axis.
    """
    parts = jnp.split(x, 2, axis=1)
    even, odd = (
        jax.lax.ppermute(part, AXIS, _destinations(parity, size))
        for parity, part in enumerate(parts)
    )
    # Device i holds chunk i, of i's parity, before chunk 2C−1−i, of the other.
    return _concatenate_by_parity(even, odd, jax.lax.axis_index(AXIS) % 2)


def _local_from_zigzag(x: jax.Array, size: int) -> jax.Array:
    """Returns this device's shard in natural order, given its shard in zigzag order.

    Args:
      x: chunks i and 2C−1−i of the sequence on device i, along axis 1, [B, T/C, …].
      size: number of devices C on the context axis.
    """
    first, second = jnp.split(x, 2, axis=1)
    parity = jax.lax.axis_index(AXIS) % 2
    even = jnp.where(parity == 0, first, second)
    odd = jnp.where(parity == 0, second, first)
    parts = (
        jax.lax.ppermute(
            part, AXIS, [(target, source) for source, target in _destinations(parity, size)]
        )
        for parity, part in enumerate((even, odd))
    )
    return jnp.concatenate(tuple(parts), axis=1)


def _concatenate_by_parity(even: jax.Array, odd: jax.Array, parity: jax.Array) -> jax.Array:
    """Concatenates two chunks along axis 1, `even` first if `parity` is 0, else `odd` first."""
    first, second = jnp.where(parity == 0, even, odd), jnp.where(parity == 0, odd, even)
    return jnp.concatenate([first, second], axis=1)
