"""Products in bfloat16, in the form that XLA's CPU backend has a kernel for.

On CPUs XLA multiplies bfloat16 by bfloat16 natively (YNNPACK; AVX-512 BF16 and AMX where there are
any) only where the result is float32 and the operands lie as [rows, inner] and [inner, columns];
any other product is converted to float32 first, whole operands at a time, and runs at half the
speed. `jnp.einsum` of bfloat16 asks for a bfloat16 result, and the gradient of a weight contracts
over the leading axis: neither has the form. Here products accumulate in float32, are rounded once,
and operands that lie otherwise are transposed first, which costs little beside the product. The
result lies as it is asked for: were it transposed afterwards, XLA (jax 0.10.2) would fold that into
the product, which then has a form that no kernel takes, and fail when it runs.

Other platforms get `jnp.einsum` as it is: their matrix units read any order.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from qwen_jax.parallel import on_mesh, platform


def einsum(equation: str, a: jax.Array, b: jax.Array, *, out_sharding=None) -> jax.Array:
    """`jnp.einsum` of two operands, in their dtype; on CPUs bfloat16 is accumulated in float32.

    Args:
      equation: "AB,BC->AC", each letter in two of the three terms or in all of them.
      a, b: operands. out_sharding: as in `jnp.einsum`.
    """
    if _on_cpu() and a.dtype == b.dtype == jnp.bfloat16:
        return _rounded(equation, out_sharding, a, b)
    return jnp.einsum(equation, a, b, out_sharding=out_sharding)


_float32 = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rounded(equation, out_sharding, a, b):
    return matmul_f32(equation, a, b, out_sharding=out_sharding).astype(a.dtype)


def _forward(equation, out_sharding, a, b):
    return _rounded(equation, out_sharding, a, b), (a, b)


def _backward(equation, out_sharding, operands, d):
    del out_sharding  # the gradient of an operand lies as the operand does
    (left, right, out), (a, b) = _terms(equation), operands
    d_a = matmul_f32(f"{out},{right}->{left}", d, b, out_sharding=_sharding(a))
    d_b = matmul_f32(f"{left},{out}->{right}", a, d, out_sharding=_sharding(b))
    return d_a.astype(a.dtype), d_b.astype(b.dtype)


_rounded.defvjp(_forward, _backward)


def matmul_f32(equation: str, a: jax.Array, b: jax.Array, *, out_sharding=None) -> jax.Array:
    """The product in float32; on CPUs operands are brought into the order the kernel reads.

    Args:
      equation: as in `einsum`, its result in the order batch, rows, columns, or batch, columns,
        rows. a, b: of one dtype. out_sharding: as in `jnp.einsum`.

    Raises:
      ValueError: on a CPU, the result in another order.
    """
    if not _on_cpu():
        return _float32(equation, a, b, out_sharding=out_sharding)
    left, right, out = _terms(equation)
    batch = "".join(c for c in out if c in left and c in right)
    rows = "".join(c for c in out if c in left and c not in right)
    columns = "".join(c for c in out if c not in left)
    if rows and columns and out.endswith(columns + rows):
        return matmul_f32(f"{right},{left}->{out}", b, a, out_sharding=out_sharding)
    if out != batch + rows + columns:
        raise ValueError(f"{equation}: the result's axes must be {batch}, {rows}, {columns}")
    inner = "".join(c for c in right if c in left and c not in out)
    a_order, b_order = batch + rows + inner, batch + inner + columns
    # [columns, inner] is read as well, where each is one axis.
    if right == batch + columns + inner and len(columns) == len(inner) == 1:
        b_order = right
    a, b = transpose_in_memory(a, left, a_order), transpose_in_memory(b, right, b_order)
    return _float32(f"{a_order},{b_order}->{out}", a, b, out_sharding=out_sharding)


def transpose_in_memory(x: jax.Array, axes: str, order: str) -> jax.Array:
    """`x` with its `axes` in this `order`, in memory too.

    A bare transposition would be folded into the product that reads it. The barrier keeps it apart,
    and the axis of one inside makes the compiler forget the order that the operand had.
    """
    if order == axes:
        return x
    x = jnp.transpose(x, [axes.index(c) for c in order])
    return jnp.squeeze(jax.lax.optimization_barrier(x[None]), 0)


def _on_cpu() -> bool:
    return platform()[0] == "cpu"


def _terms(equation: str) -> tuple[str, str, str]:
    operands, out = equation.split("->")
    return (*operands.split(","), out)


def _sharding(x: jax.Array) -> jax.P | None:
    return jax.typeof(x).sharding.spec if on_mesh() else None
