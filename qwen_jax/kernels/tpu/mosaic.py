"""Building blocks of the TPU kernels: lanes, float32 products, number of cores."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from qwen_jax.parallel import current_mesh

LANES = 128
"""Lanes of a vector register, and length of the last axis of a memory tile."""

LOG2E = math.log2(math.e)
"""Factor that turns exponents of e into exponents of 2."""


def num_cores() -> int:
    """Returns the cores per chip of the current mesh, or of this host's devices.

    2 on v4 and v5p, 1 on the other chips and where jax does not say.
    """
    device = current_mesh().abstract_device or jax.devices()[0]
    return getattr(device, "num_cores", None) or 1


def round_up(x: int, multiple: int) -> int:
    """Returns the smallest multiple of `multiple` that is at least `x`."""
    return -(-x // multiple) * multiple


def broadcast_lanes(x: jax.Array, width: int) -> jax.Array:
    """Returns [R, width] from [R, LANES] whose rows hold the same number in every lane.

    `width` is at most LANES, or a multiple of it.
    """
    if width <= LANES:
        return x[:, :width]
    return jnp.concatenate([x] * (width // LANES), axis=1)


def dot_f32(a: jax.Array, b: jax.Array, axes: tuple[int, int] = (1, 0)) -> jax.Array:
    """Multiplies two matrices and accumulates in float32.

    Float32 operands are multiplied as float32, not as one bfloat16 product.

    Args:
      a: a matrix, bfloat16 or float32.
      b: a matrix of a's dtype.
      axes: contracted axis of a and of b.

    Returns:
      float32, the other axis of a by the other axis of b.
    """
    dims = (((axes[0],), (axes[1],)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
