"""Matmuls in bfloat16 on CPUs, in the one form that XLA's CPU backend has a native kernel for.

On CPUs XLA multiplies bfloat16 by bfloat16 natively (YNNPACK; AVX-512 BF16 and AMX where available)
only if the result is float32 and the operands are stored as [rows, inner] and [inner, columns]. It
converts the operands of any other product to float32 first, which halves the speed. `jnp.einsum` of
bfloat16 requests a bfloat16 result, and the gradient of a weight contracts over the leading axis,
so neither has that form. The functions here accumulate in float32, round once, and transpose
operands in memory where necessary, which costs little beside the product. The result is produced
directly in the requested axis order: XLA (jax 0.10.2) would fold a transposition of the result into
the product, which then has a form that no kernel accepts, and fail at run time.

Other platforms use `jnp.einsum` unchanged: their matrix units read operands in any order.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from qwen_jax.parallel import on_mesh, platform


def einsum(
    equation: str, a: jax.Array, b: jax.Array, *, out_sharding: jax.P | None = None
) -> jax.Array:
    """Computes `jnp.einsum` of two operands; on CPUs, bfloat16 is accumulated in float32.

    Differentiable; on CPUs the gradients of bfloat16 operands are accumulated in float32 as well.

    Args:
      equation: such as "AB,BC->AC"; each letter occurs in two of the three terms or in all of them.
      a: left operand.
      b: right operand.
      out_sharding: sharding of the result, as in `jnp.einsum`.

    Returns:
      the product in the operands' dtype.
    """
    if _on_cpu() and a.dtype == b.dtype == jnp.bfloat16:
        return _einsum_rounded_once(equation, out_sharding, a, b)
    return jnp.einsum(equation, a, b, out_sharding=out_sharding)


_einsum_f32 = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _einsum_rounded_once(
    equation: str, out_sharding: jax.P | None, a: jax.Array, b: jax.Array
) -> jax.Array:
    """Computes `einsum` on a CPU: accumulates in float32 and rounds once to the operands' dtype."""
    return matmul_f32(equation, a, b, out_sharding=out_sharding).astype(a.dtype)


def _einsum_forward(
    equation: str, out_sharding: jax.P | None, a: jax.Array, b: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Returns (product, operands): the forward rule of `_einsum_rounded_once`."""
    return _einsum_rounded_once(equation, out_sharding, a, b), (a, b)


def _einsum_backward(
    equation: str,
    out_sharding: jax.P | None,
    operands: tuple[jax.Array, jax.Array],
    d_out: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of both operands from that of the product, with the operands' sharding.

    The backward rule of `_einsum_rounded_once`.
    """
    del out_sharding
    (left, right, out), (a, b) = _split_equation(equation), operands
    d_a = matmul_f32(f"{out},{right}->{left}", d_out, b, out_sharding=_sharding(a))
    d_b = matmul_f32(f"{left},{out}->{right}", a, d_out, out_sharding=_sharding(b))
    return d_a.astype(a.dtype), d_b.astype(b.dtype)


_einsum_rounded_once.defvjp(_einsum_forward, _einsum_backward)


def matmul_f32(
    equation: str, a: jax.Array, b: jax.Array, *, out_sharding: jax.P | None = None
) -> jax.Array:
    """Computes an einsum of two operands in float32.

    On CPUs the operands are first transposed in memory to the order that the native kernel reads.

    Args:
      equation: as in `einsum`. On CPUs the axes of its result must be in the order batch, rows,
        columns, or batch, columns, rows, where batch axes occur in both operands, rows in `a` only
        and columns in `b` only.
      a: left operand.
      b: right operand, in a's dtype.
      out_sharding: sharding of the result, as in `jnp.einsum`.

    Returns:
      the product, float32.

    Raises:
      ValueError: on a CPU, if the result's axes are in another order.
    """
    if not _on_cpu():
        return _einsum_f32(equation, a, b, out_sharding=out_sharding)
    left, right, out = _split_equation(equation)
    batch = "".join(c for c in out if c in left and c in right)
    rows = "".join(c for c in out if c in left and c not in right)
    columns = "".join(c for c in out if c not in left)
    if rows and columns and out.endswith(columns + rows):
        return matmul_f32(f"{right},{left}->{out}", b, a, out_sharding=out_sharding)
    if out != batch + rows + columns:
        raise ValueError(f"{equation}: the result's axes must be {batch}, {rows}, {columns}")
    inner = "".join(c for c in right if c in left and c not in out)
    a_order, b_order = batch + rows + inner, batch + inner + columns
    # The kernel reads [columns, inner] too, if each of the two is a single axis.
    if right == batch + columns + inner and len(columns) == len(inner) == 1:
        b_order = right
    a, b = transpose_in_memory(a, left, a_order), transpose_in_memory(b, right, b_order)
    return _einsum_f32(f"{a_order},{b_order}->{out}", a, b, out_sharding=out_sharding)


def transpose_in_memory(x: jax.Array, axes: str, order: str) -> jax.Array:
    """Transposes an array and forces XLA to store it in the new order.

    XLA would fold a plain transposition into the product that reads the result. The barrier
    prevents that, and the extra axis of size one inside it makes the compiler forget the operand's
    original layout.

    Args:
      x: array to transpose.
      axes: one letter for each axis of `x`.
      order: the same letters in the order wanted.
    """
    if order == axes:
        return x
    x = jnp.transpose(x, [axes.index(c) for c in order])
    return jnp.squeeze(jax.lax.optimization_barrier(x[None]), 0)


def _on_cpu() -> bool:
    """Returns whether code is traced for a CPU."""
    return platform()[0] == "cpu"


def _split_equation(equation: str) -> tuple[str, str, str]:
    """Splits "AB,BC->AC" into ("AB", "BC", "AC")."""
    operands, out = equation.split("->")
    left, right = operands.split(",")
    return left, right, out


def _sharding(x: jax.Array) -> jax.P | None:
    """Returns the partition spec of an array on a mesh, or None without a mesh."""
    return jax.typeof(x).sharding.spec if on_mesh() else None
