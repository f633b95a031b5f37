"""Weights of 4 or 8 bits in groups of inputs, and `group_matmul(...)` that multiplies by them.

Layout, GPTQ's own (AutoGPTQ's `qweight`): whole numbers q of `bits` bits, packed along the input
into int32, lowest bits first. A weight is (q − zero) · scale, scale and zero shared by a group of
consecutive inputs. Outputs stand last, flat, so they fill the lanes of a TPU.

A kernel takes the product group by group, (x_g · q_g) · scale_g, minus Σ_g (Σ x_g) · zero_g ·
scale_g: the numbers q go into the matrix unit as they are, exact in bf16, so nothing is rounded
before the sum. Weights never exist in memory in any other form than the packed one.
"""

from __future__ import annotations

import dataclasses
import importlib
import math

import jax
import jax.numpy as jnp

from qwen_jax.errors import UserError
from qwen_jax.kernels.selection import choose_implementation
from qwen_jax.parallel import platform

_MODULES = {
    "pallas_tpu": "qwen_jax.kernels.tpu.quantised_matmul",
    "pallas_gpu": "qwen_jax.kernels.gpu.quantised_matmul",
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GroupWeight:
    """A matrix of K inputs and O outputs, or L of them, quantised in groups of inputs.

    Attributes:
      codes: int32 [(L,) K·bits/32, O].
      scales: float32 [(L,) G, 1, O]; input k belongs to group k // (K/G). The axis of one makes a
        row of outputs a TPU's tile; with G there, the compiler would pad it, or move it and copy.
      zeros: float32 [(L,) G, 1, O], or None where every zero is the middle, 2^(bits−1).
      layer: int32 scalar, which of L matrices is meant; None for a single one. A kernel takes its
        blocks out of the whole stack: handed one layer's slice, the compiler would copy it.
      bits: 4 or 8.
    """

    codes: jax.Array
    scales: jax.Array
    zeros: jax.Array | None = None
    layer: jax.Array | None = None
    bits: int = dataclasses.field(default=4, metadata={"static": True})

    @property
    def inputs(self) -> int:
        """K."""
        return self.codes.shape[-2] * 32 // self.bits

    @property
    def outputs(self) -> int:
        """O."""
        return self.codes.shape[-1]

    @property
    def group(self) -> int:
        """Inputs a group."""
        return self.inputs // self.scales.shape[-3]

    def alone(self) -> GroupWeight:
        """The one matrix that `layer` means, cut out of the stack."""
        if self.layer is None:
            return self
        arrays = {"codes": self.codes, "scales": self.scales, "zeros": self.zeros}
        arrays = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, self.layer, keepdims=False), arrays
        )
        return GroupWeight(**arrays, bits=self.bits)


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """Whole numbers 0 … 2^bits − 1, [..., K, O] -> int32 [..., K·bits/32, O], lowest bits first."""
    per_word = 32 // bits
    *lead, inputs, outputs = codes.shape
    words = codes.astype(jnp.uint32).reshape(*lead, inputs // per_word, per_word, outputs)
    shifts = bits * jnp.arange(per_word, dtype=jnp.uint32)[:, None]
    words = (words << shifts).sum(axis=-2, dtype=jnp.uint32)
    return jax.lax.bitcast_convert_type(words, jnp.int32)


def unpack(words: jax.Array, bits: int) -> jax.Array:
    """int32 [..., W, O] -> uint8 [..., W·32/bits, O]; the inverse of `pack`."""
    *lead, count, outputs = words.shape
    shifts = bits * jnp.arange(32 // bits, dtype=jnp.int32)[:, None]
    codes = (words[..., None, :] >> shifts) & (2**bits - 1)
    return codes.astype(jnp.uint8).reshape(*lead, count * 32 // bits, outputs)


def dequantise(weight: GroupWeight, dtype=jnp.float32) -> jax.Array:
    """The matrix [(L,) K, O]: (q − zero) · scale, taken in float32."""
    weight = weight.alone()
    codes = unpack(weight.codes, weight.bits).astype(jnp.float32)
    grouped = (*codes.shape[:-2], weight.scales.shape[-3], weight.group, weight.outputs)
    zeros = 2.0 ** (weight.bits - 1) if weight.zeros is None else weight.zeros
    out = (codes.reshape(grouped) - zeros) * weight.scales
    return out.reshape(codes.shape).astype(dtype)


def choose_group_matmul(requested: str, weight: GroupWeight, rows: int, dtype) -> str:
    """Resolves `auto` and refuses what can't run; logs each choice once.

    rows: of x on a device; dtype: of x.

    Raises:
      UserError: unknown name, a kernel on another platform than its own, or a weight that the
        kernel can't multiply by, with the reason.
    """

    def refusal(module):
        return module.unsupported_reason(weight, rows=rows, dtype=dtype)

    return choose_implementation("group matmul", requested, platform()[0], _MODULES, refusal)


def group_matmul(x: jax.Array, weight: GroupWeight, *, implementation: str = "auto") -> jax.Array:
    """x · w for a weight quantised in groups, on one device's arrays.

    Args:
      x: [..., K], a float dtype.
      weight: K inputs, O outputs; of a stack, `layer` says which.
      implementation: one of `selection.IMPLEMENTATIONS`. The reference dequantises the matrix
        a block of inputs at a time and multiplies.

    Returns:
      [..., O] in x's dtype, accumulated in float32.

    Raises:
      UserError: x of another width, or as `choose_group_matmul`.
    """
    if x.shape[-1] != weight.inputs:
        raise UserError(
            f"x has {x.shape[-1]} columns and the weight {weight.inputs} inputs; they must agree"
        )
    rows = math.prod(x.shape[:-1])
    chosen = choose_group_matmul(implementation, weight, rows, x.dtype)
    run = _reference
    if chosen != "reference":
        run = importlib.import_module(_MODULES[chosen]).quantised_matmul
    with jax.named_scope("group_matmul"):
        out = run(x.reshape(rows, weight.inputs), weight)
    return out.reshape(*x.shape[:-1], weight.outputs)


_REFERENCE_BYTES = 4 << 20
"""Of float32 weights that the reference holds at once: they stay in a CPU's cache."""


def _blocks(units: int, inputs: int, outputs: int) -> int:
    """How many blocks of inputs to convert one at a time, a divisor of `units`."""
    blocks = max(1, min(units, inputs * outputs * 4 // _REFERENCE_BYTES))
    return next(n for n in range(blocks, units + 1) if units % n == 0)


def integer_matmul(x: jax.Array, codes: jax.Array) -> jax.Array:
    """x [M,K] · whole numbers [K,O] (int8 or int4) -> float32 [M,O], for CPUs.

    Converted a block of inputs at a time: XLA's CPU compiler would write the whole matrix in float
    to fresh memory first, whose pages cost many times what the product does.
    """
    inputs, outputs = codes.shape
    blocks = _blocks(inputs, inputs, outputs)

    def block(total, operands):
        columns, codes = operands
        return total + columns @ codes.astype(jnp.float32), None

    columns = x.reshape(x.shape[0], blocks, -1).swapaxes(0, 1).astype(jnp.float32)
    total = jnp.zeros((x.shape[0], outputs), jnp.float32)
    return jax.lax.scan(block, total, (columns, codes.reshape(blocks, -1, outputs)))[0]


def _reference(x: jax.Array, weight: GroupWeight) -> jax.Array:
    """What every kernel is judged by, in plain jnp: x [M,K] -> [M,O] in x's dtype."""
    weight = weight.alone()
    groups, _, outputs = weight.scales.shape
    blocks = _blocks(groups, weight.inputs, outputs)

    def cut(a):  # the blocks in front
        return a.reshape(blocks, -1, *a.shape[1:])

    columns = x.reshape(x.shape[0], blocks, -1).swapaxes(0, 1).astype(jnp.float32)
    zeros = None if weight.zeros is None else cut(weight.zeros)

    def block(total, operands):
        columns, codes, scales, zeros = operands
        w = dequantise(GroupWeight(codes, scales, zeros, bits=weight.bits))
        return total + columns @ w, None

    total = jnp.zeros((x.shape[0], outputs), jnp.float32)
    operands = (columns, cut(weight.codes), cut(weight.scales), zeros)
    return jax.lax.scan(block, total, operands)[0].astype(x.dtype)
