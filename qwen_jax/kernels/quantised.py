"""Weights of 4 or 8 bits, quantised in groups of inputs, and `group_matmul`, their product.

Layout, that of GPTQ (AutoGPTQ's `qweight`): integers q of `bits` bits, packed along the input axis
into int32, lowest bits first. A weight is (q − zero) · scale, with scale and zero shared by a group
of consecutive inputs. Outputs are the last axis, so they fill the lanes of a TPU.

Kernels compute the product group by group, (x_g · q_g) · scale_g, minus Σ_g (Σ x_g) · zero_g ·
scale_g: the integers q enter the matrix unit unchanged, exact in bf16, so nothing is rounded before
the sum. Weights are never stored in memory in another form than the packed one.
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
    """A matrix of K inputs and O outputs, or a stack of L of them, quantised in G groups of inputs.

    Attributes:
      codes: packed integers, int32 [(L,) K·bits/32, O].
      scales: float32 [(L,) G, 1, O]; input k is in group k // (K/G). With the axis of size 1, a row
        of outputs is a TPU tile; without it, the compiler would pad G, or transpose and copy.
      zeros: float32 [(L,) G, 1, O], or None if every zero is the midpoint 2^(bits−1).
      layer: index of the matrix in the stack, int32 scalar; None for a single one. A kernel reads
        its blocks from the complete stack: a slice of one layer would be copied by the compiler.
      bits: 4 or 8.
    """

    codes: jax.Array
    scales: jax.Array
    zeros: jax.Array | None = None
    layer: jax.Array | None = None
    bits: int = dataclasses.field(default=4, metadata={"static": True})

    @property
    def inputs(self) -> int:
        """Returns K, the number of inputs."""
        return self.codes.shape[-2] * 32 // self.bits

    @property
    def outputs(self) -> int:
        """Returns O, the number of outputs."""
        return self.codes.shape[-1]

    @property
    def group(self) -> int:
        """Returns the number of inputs per group."""
        return self.inputs // self.scales.shape[-3]

    def select_layer(self) -> GroupWeight:
        """Returns the single matrix at index `layer` of the stack, or itself if it is single."""
        if self.layer is None:
            return self
        arrays = {"codes": self.codes, "scales": self.scales, "zeros": self.zeros}
        arrays = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, self.layer, keepdims=False), arrays
        )
        return GroupWeight(**arrays, bits=self.bits)


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """Packs integers into int32 words along the input axis, lowest bits first.

    Args:
      codes: integers 0 … 2^bits − 1, [..., K, O] for K inputs and O outputs.
      bits: 4 or 8.

    Returns:
      int32 [..., K·bits/32, O].
    """
    per_word = 32 // bits
    *lead, inputs, outputs = codes.shape
    words = codes.astype(jnp.uint32).reshape(*lead, inputs // per_word, per_word, outputs)
    shifts = bits * jnp.arange(per_word, dtype=jnp.uint32)[:, None]
    words = (words << shifts).sum(axis=-2, dtype=jnp.uint32)
    return jax.lax.bitcast_convert_type(words, jnp.int32)


def unpack(words: jax.Array, bits: int) -> jax.Array:
    """Unpacks int32 words; the inverse of `pack`.

    Args:
      words: int32 [..., W, O] (W words for each of O outputs).
      bits: 4 or 8.

    Returns:
      uint8 [..., W·32/bits, O].
    """
    *lead, count, outputs = words.shape
    shifts = bits * jnp.arange(32 // bits, dtype=jnp.int32)[:, None]
    codes = (words[..., None, :] >> shifts) & (2**bits - 1)
    return codes.astype(jnp.uint8).reshape(*lead, count * 32 // bits, outputs)


def dequantise(weight: GroupWeight, dtype=jnp.float32) -> jax.Array:
    """Returns the matrix (q − zero) · scale, [K, O], computed in float32."""
    weight = weight.select_layer()
    codes = unpack(weight.codes, weight.bits).astype(jnp.float32)
    grouped = (*codes.shape[:-2], weight.scales.shape[-3], weight.group, weight.outputs)
    zeros = 2.0 ** (weight.bits - 1) if weight.zeros is None else weight.zeros
    out = (codes.reshape(grouped) - zeros) * weight.scales
    return out.reshape(codes.shape).astype(dtype)


def choose_group_matmul(requested: str, weight: GroupWeight, rows: int, dtype) -> str:
    """Returns the implementation to use, resolving "auto"; logs each choice once.

    Args:
      requested: one of `selection.IMPLEMENTATIONS`.
      weight: the quantised matrix.
      rows: rows of x on a device.
      dtype: dtype of x.

    Raises:
      UserError: the name is unknown, the kernel is for another platform, or it does not support
        this weight; the message has the reason.
    """

    def unsupported_reason(module):
        """Returns why a kernel's module does not support this call, or None."""
        return module.unsupported_reason(weight, rows=rows, dtype=dtype)

    return choose_implementation(
        "group matmul", requested, platform()[0], _MODULES, unsupported_reason
    )


def group_matmul(x: jax.Array, weight: GroupWeight, *, implementation: str = "auto") -> jax.Array:
    """Multiplies x by a quantised matrix, on one device's arrays.

    Args:
      x: [..., K], a float dtype.
      weight: the quantised matrix [K, O]; of a stack, the one at index `layer`.
      implementation: one of `selection.IMPLEMENTATIONS`. The reference dequantises the matrix one
        block of inputs at a time and multiplies.

    Returns:
      [..., O] in x's dtype, accumulated in float32.

    Raises:
      UserError: x has another width, or as `choose_group_matmul`.
    """
    if x.shape[-1] != weight.inputs:
        raise UserError(
            f"x has {x.shape[-1]} columns and the weight {weight.inputs} inputs; they must be equal"
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
"""Bytes of float32 weights that the reference converts at a time: they fit into a CPU's cache."""


def _blocks(units: int, inputs: int, outputs: int) -> int:
    """Returns the number of blocks of inputs to convert one at a time, a divisor of `units`.

    Args:
      units: number of indivisible units of inputs.
      inputs: number of inputs K.
      outputs: number of outputs O.
    """
    blocks = max(1, min(units, inputs * outputs * 4 // _REFERENCE_BYTES))
    return next(n for n in range(blocks, units + 1) if units % n == 0)


def integer_matmul(x: jax.Array, codes: jax.Array) -> jax.Array:
    """Multiplies x by a matrix of integers on CPUs, converting one block of inputs at a time.

    XLA's CPU compiler would first write the converted matrix to newly allocated memory, whose page
    faults cost many times as much as the product.

    Args:
      x: [M, K], a float dtype.
      codes: int8 or int4 [K, O].

    Returns:
      float32 [M, O].
    """
    inputs, outputs = codes.shape
    blocks = _blocks(inputs, inputs, outputs)

    def add_block(total, operands):
        """Adds the product of one block of inputs; a step of the scan."""
        columns, codes = operands
        return total + columns @ codes.astype(jnp.float32), None

    columns = x.reshape(x.shape[0], blocks, -1).swapaxes(0, 1).astype(jnp.float32)
    total = jnp.zeros((x.shape[0], outputs), jnp.float32)
    return jax.lax.scan(add_block, total, (columns, codes.reshape(blocks, -1, outputs)))[0]


def _reference(x: jax.Array, weight: GroupWeight) -> jax.Array:
    """Multiplies x [M, K] by a quantised matrix in plain jnp; the reference of all kernels.

    Returns:
      [M, O] in x's dtype.
    """
    weight = weight.select_layer()
    groups, _, outputs = weight.scales.shape
    blocks = _blocks(groups, weight.inputs, outputs)

    def split_blocks(a):  # the blocks in front
        """Reshapes axis 0 of an array to [blocks, …]."""
        return a.reshape(blocks, -1, *a.shape[1:])

    columns = x.reshape(x.shape[0], blocks, -1).swapaxes(0, 1).astype(jnp.float32)
    zeros = None if weight.zeros is None else split_blocks(weight.zeros)

    def add_block(total, operands):
        """Adds the product of one block of inputs; a step of the scan."""
        columns, codes, scales, zeros = operands
        w = dequantise(GroupWeight(codes, scales, zeros, bits=weight.bits))
        return total + columns @ w, None

    total = jnp.zeros((x.shape[0], outputs), jnp.float32)
    operands = (columns, split_blocks(weight.codes), split_blocks(weight.scales), zeros)
    return jax.lax.scan(add_block, total, operands)[0].astype(x.dtype)
