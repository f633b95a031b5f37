"""Group-quantised matmul on TPU: packed weights are streamed from HBM, each read once for all rows.

A grid step processes all inputs of a few hundred outputs: one copy of one to two megabytes, during
which the previous one is processed. Groups are processed one after the other: their words are
unpacked in registers, the matrix unit multiplies them, and the float32 result is scaled and added.

Converting the integers q on the vector unit, four bits at a time, would take longer than the
products, so they are not converted. The bits of a word under the mask 000F000F, combined with 4300,
the upper bits of 128 in bf16, *are* two bf16 numbers 128 + q, exactly; a shift, an "and" and an
"or" give 2,048 of them. The offset 128 is subtracted together with the zeros, by way of Σ x_g, the
sum of x over a group. The numbers are in a permuted order (digits 0 and 4 of each word, then 1 and
5, …), and x, which is small, is permuted to match.

With the many rows of a prompt, results would have to be scaled once per group, and the matrix unit
would be used with 128 inputs at a time. Instead, a block of weights is dequantised in VMEM once,
and all rows are multiplied by it as by dense weights.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from qwen_jax.kernels.quantised import GroupWeight
from qwen_jax.kernels.refs import Ref, bind_by_name
from qwen_jax.kernels.tpu import mosaic
from qwen_jax.kernels.tpu.mosaic import LANES, dot_f32

_CHUNK = 128
"""Inputs per product: the depth of a matrix unit, and a divisor of every group."""
_BLOCK_BYTES = 2 << 20
"""Bytes of packed weights per grid step: large enough to hide the latency of a copy."""
_MAX_FEW_ROWS = 64
"""Most rows for the kernel that multiplies unscaled integers and scales the result of each group.
"""
_X_BYTES = 6 << 20
"""Bytes of activations per grid step, in the kernel for many rows."""
_DENSE_BYTES = 12 << 20
"""Bytes of dequantised weights per block of outputs, in the kernel for many rows. The larger, the
fewer times the activations are read."""
_MAX_COLUMNS = 512
"""Most outputs per grid step, in the kernel for many rows."""
_UNROLL = 16
"""Chunks processed per iteration, so that products overlap with unpacking."""
_DEQUANTISE_UNROLL = 2
"""Chunks dequantised per iteration."""
_VMEM_BYTES = 48 << 20
"""Vector memory that the kernels request."""
_BF16_OFFSET = 128
"""What is added to an integer when it is placed into the bits of a bf16 number."""


def unsupported_reason(weight: GroupWeight, *, rows: int, dtype: DTypeLike) -> str | None:
    """Returns one clause saying why this kernel cannot multiply by a weight, or None if it can.

    Args:
      weight: the quantised matrix.
      rows: rows of activations; any number is accepted.
      dtype: of the activations.
    """
    del rows
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"x in {jnp.dtype(dtype)}; the TPU kernel takes bfloat16 or float32"
    if weight.group % _CHUNK:
        return f"groups of {weight.group}; the TPU kernel takes multiples of {_CHUNK}"
    return None


@dataclasses.dataclass(frozen=True)
class MatmulShape:
    """Sizes of a quantised matmul that are known at compile time.

    Attributes:
      bits: bits per weight, 4 or 8.
      group: inputs per quantisation group.
      chunks: number of chunks of 128 inputs.
      groups: number of quantisation groups.
      dtype: dtype that `_unpack` returns.
      symmetric: whether the weight has no zeros, that is, all are 2^(bits - 1).
    """

    bits: int
    group: int
    chunks: int
    groups: int
    dtype: jnp.dtype
    symmetric: bool

    @property
    def words(self) -> int:
        """Returns the number of rows of packed int32 words per chunk."""
        return _CHUNK * self.bits // 32

    @property
    def padded_groups(self) -> int:
        """Returns the number of groups rounded up to a multiple of 128."""
        return mosaic.round_up(self.groups, LANES)

    @property
    def paired(self) -> bool:
        """Returns whether `_unpack` places integers into bits of bf16 numbers, two at a time."""
        return self.bits == 4 and self.dtype == jnp.bfloat16

    @property
    def midpoint(self) -> float:
        """Returns 2^(bits - 1), the zero of a weight that has none."""
        return 2.0 ** (self.bits - 1)

    @property
    def offset(self) -> float | None:
        """Returns what to add to a zero because `_unpack` adds it to q.

        None if the result of `_unpack` needs no correction: q - zero, for a symmetric weight.
        """
        if self.paired:
            return _BF16_OFFSET
        return None if self.symmetric else -self.midpoint

    def group_of(self, chunk: Any) -> Any:
        """Returns the index of the group of a chunk, both int or int32 scalar."""
        chunks = self.group // _CHUNK
        if isinstance(chunk, int) or chunks == 1:
            return chunk // chunks
        return jax.lax.div(chunk, chunks)

    def input_index(self, row: jax.Array) -> jax.Array:
        """Returns to which input of a chunk a row of `_unpack`'s result belongs, int32."""
        if self.paired:  # rows are [shift, word, half]; they hold digit 4·half + shift of a word
            pairs = 2 * self.words
            shift, inner = jax.lax.div(row, pairs), jax.lax.rem(row, pairs)
            return 8 * jax.lax.div(inner, 2) + 4 * jax.lax.rem(inner, 2) + shift
        shift, word = jax.lax.div(row, self.words), jax.lax.rem(row, self.words)
        return 32 // self.bits * word + shift


def quantised_matmul(x: jax.Array, weight: GroupWeight, *, columns: int | None = None) -> jax.Array:
    """Computes x · w for a weight quantised in groups of inputs.

    Args:
      x: [M, K] (rows, inputs), bfloat16 or float32.
      weight: a matrix of K inputs and O outputs.
      columns: outputs per grid step, a multiple of 128; None: `choose_columns`.

    Returns:
      [M, O] in x's dtype.
    """
    rows, inputs = x.shape
    is_few = rows <= _MAX_FEW_ROWS
    static = MatmulShape(
        bits=weight.bits,
        group=weight.group,
        chunks=inputs // _CHUNK,
        groups=weight.scales.shape[-3],
        dtype=x.dtype,
        symmetric=weight.zeros is None,
    )
    columns = columns or choose_columns(weight, is_few)
    height = mosaic.round_up(rows, 16)
    if not is_few:
        # Integers become float32 to be scaled, and the inputs of x are permuted here.
        static = dataclasses.replace(static, dtype=jnp.dtype(jnp.float32))
        x = _permute_inputs(static, x)
        height = min(height, max(128, _X_BYTES // (inputs * x.dtype.itemsize) // 128 * 128))
    return _launch(static, is_few, height, columns, x, weight)


def _launch(
    static: MatmulShape, is_few: bool, height: int, columns: int, x: jax.Array, weight: GroupWeight
) -> jax.Array:
    """Runs the kernel over all blocks of rows and outputs.

    Args:
      static: sizes of the call.
      is_few: use `_few_rows_kernel`, else `_many_rows_kernel`.
      height: rows per block.
      columns: outputs per block.
      x: activations [M, K] (rows, inputs); permuted by `_permute_inputs` unless `is_few`.
      weight: the quantised matrix of K inputs and O outputs.

    Returns:
      [M, O] in x's dtype.
    """
    rows, inputs = x.shape
    arrays = {"codes_ref": weight.codes, "scales_ref": weight.scales}
    if weight.zeros is not None:
        arrays["zeros_ref"] = weight.zeros
    if weight.codes.ndim == 2:
        arrays = {name: a[None] for name, a in arrays.items()}
    layer = jnp.zeros((), jnp.int32) if weight.layer is None else weight.layer
    blocks = pl.cdiv(weight.outputs, columns)
    cores = min(mosaic.num_cores(), blocks)
    blocks_per_core = pl.cdiv(blocks, cores)

    def column_block(core, n):
        """Returns the block of outputs of a core's step n; the last core may repeat its last."""
        return jnp.minimum(core * blocks_per_core + n, blocks - 1)

    def weight_spec(a: jax.Array) -> pl.BlockSpec:
        """Returns the block of an array of the weight: one layer, all inputs, some outputs."""
        inner = (0,) * (a.ndim - 2)
        shape = (1, *a.shape[1:-1], columns)
        return pl.BlockSpec(shape, lambda c, n, m, layer: (layer[0], *inner, column_block(c, n)))

    scratch: dict[str, Any]
    if is_few:
        scratch = {
            "permuted_ref": pltpu.VMEM((height, inputs), x.dtype),
            "sums_ref": pltpu.VMEM((height, static.padded_groups), jnp.float32),
            "total_ref": pltpu.VMEM((height, columns), jnp.float32),
        }
    else:
        scratch = {"dense_ref": pltpu.VMEM((inputs, columns), x.dtype)}
    moved = sum(a.size * a.dtype.itemsize // a.shape[0] for a in arrays.values())
    moved += x.dtype.itemsize * rows * (inputs * (1 if is_few else blocks) + weight.outputs)
    body = functools.partial(_few_rows_kernel if is_few else _many_rows_kernel, static)
    return pl.pallas_call(
        bind_by_name(body, ["layer_ref", "x_ref", *arrays, "out_ref", *scratch]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(cores, blocks_per_core, pl.cdiv(rows, height)),
            in_specs=[
                pl.BlockSpec((height, inputs), lambda c, n, m, _: (m, 0)),
                *map(weight_spec, arrays.values()),
            ],
            out_specs=pl.BlockSpec((height, columns), lambda c, n, m, _: (m, column_block(c, n))),
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=jax.ShapeDtypeStruct((rows, weight.outputs), x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=_VMEM_BYTES,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * inputs * weight.outputs, transcendentals=0, bytes_accessed=moved
        ),
        name="group_matmul",
    )(jnp.reshape(layer, (1,)), x, *arrays.values())


def _permute_inputs(static: MatmulShape, x: jax.Array) -> jax.Array:
    """Returns x [rows, inputs] with the inputs of each chunk in the order of `_unpack`'s rows.

    Computed as a product with a permutation matrix: transposing axes of 4 and 8 would take a TPU
    many times as long.
    """
    positions = jnp.arange(_CHUNK, dtype=jnp.int32)
    permutation = (positions[:, None] == static.input_index(positions)).astype(x.dtype)
    chunks = x.reshape(x.shape[0], -1, _CHUNK)
    exact = None if x.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    return jnp.einsum("MCK,KJ->MCJ", chunks, permutation, precision=exact).reshape(x.shape)


def choose_columns(weight: GroupWeight, is_few: bool) -> int:
    """Returns the number of outputs per grid step, the multiple of 128 with the least padding.

    It is at most what `_BLOCK_BYTES` of packed weights hold or, for many rows, `_DENSE_BYTES` of
    bf16 weights.

    Args:
      weight: the quantised matrix.
      is_few: whether the kernel for few rows is used.
    """
    most = _BLOCK_BYTES // (weight.codes.shape[-2] * 4 * LANES)
    if not is_few:
        most = min(_DENSE_BYTES // (weight.inputs * 2 * LANES), _MAX_COLUMNS // LANES)
    most = max(1, most)
    lanes = -(-weight.outputs // LANES)
    steps = -(-lanes // most)
    return LANES * -(-lanes // steps)


def _many_rows_kernel(
    static: MatmulShape,
    *,
    layer_ref: Ref,
    x_ref: Ref,
    codes_ref: Ref,
    scales_ref: Ref,
    zeros_ref: Ref | None = None,
    out_ref: Ref,
    dense_ref: Ref,
) -> None:
    """Kernel body: one block of outputs for one of many blocks of rows.

    The weights of the block are dequantised at the first block of rows and reused for the others.

    Args:
      static: sizes of the call.
      layer_ref: index of the layer; only the block specs use it.
      x_ref: activations [height, inputs], permuted by `_permute_inputs`.
      codes_ref: packed words, int32 [1, inputs · bits / 32, columns].
      scales_ref: scales, float32 [1, groups, 1, columns].
      zeros_ref: zeros, float32 [1, groups, 1, columns], or None.
      out_ref: result [height, columns].
      dense_ref: scratch [inputs, columns], dequantised weights.
    """
    del layer_ref

    def dequantise_chunks(chunks: Sequence[Any]) -> None:
        """Writes the weights of some chunks of inputs to `dense_ref`."""
        for i in chunks:
            words = codes_ref[0, pl.ds(_aligned(i * static.words, 8), static.words), :]
            values, group = _unpack(static, words), static.group_of(i)
            if zeros_ref is not None:
                values = values - (zeros_ref[0, group] + static.offset)
            dense_ref[_chunk_slice(i), :] = (values * scales_ref[0, group]).astype(dense_ref.dtype)

    pl.when(pl.program_id(2) == 0)(
        lambda: _for_each_chunk(static.chunks, dequantise_chunks, _DEQUANTISE_UNROLL)
    )
    out_ref[...] = dot_f32(x_ref[...], dense_ref[...]).astype(out_ref.dtype)


def _few_rows_kernel(
    static: MatmulShape,
    *,
    layer_ref: Ref,
    x_ref: Ref,
    codes_ref: Ref,
    scales_ref: Ref,
    zeros_ref: Ref | None = None,
    out_ref: Ref,
    permuted_ref: Ref,
    sums_ref: Ref,
    total_ref: Ref,
) -> None:
    """Kernel body: one block of outputs for all rows, from products with unscaled integers.

    Args:
      static: sizes of the call.
      layer_ref: index of the layer; only the block specs use it.
      x_ref: activations [height, inputs].
      codes_ref: packed words, int32 [1, inputs · bits / 32, columns].
      scales_ref: scales, float32 [1, groups, 1, columns].
      zeros_ref: zeros, float32 [1, groups, 1, columns], or None.
      out_ref: result [height, columns].
      permuted_ref: scratch [height, inputs], activations in the order of `_unpack`'s rows.
      sums_ref: scratch float32 [height, padded_groups], sums of the activations of each group.
      total_ref: scratch float32 [height, columns], result so far.
    """
    del layer_ref
    pl.when(pl.program_id(1) == 0)(
        lambda: _prepare_activations(static, x_ref, permuted_ref, sums_ref)
    )
    if static.offset is None:
        total_ref[...] = jnp.zeros_like(total_ref)
    else:
        zeros = static.midpoint if zeros_ref is None else zeros_ref[0]
        offset = scales_ref[0] * (zeros + static.offset)
        total_ref[...] = -dot_f32(sums_ref[:, : static.groups], offset.reshape(static.groups, -1))

    def scaled_product(i: Any) -> jax.Array:
        """Returns the product of one chunk of inputs, times its scales."""
        words = codes_ref[0, pl.ds(_aligned(i * static.words, 8), static.words), :]
        product = dot_f32(permuted_ref[:, _chunk_slice(i)], _unpack(static, words))
        return product * scales_ref[0, static.group_of(i)]

    def add_chunks(chunks: Sequence[Any]) -> None:
        """Adds the products of some chunks of inputs to the result."""
        _add_all(total_ref, [scaled_product(i) for i in chunks])

    _for_each_chunk(static.chunks, add_chunks, _UNROLL)
    out_ref[...] = total_ref[...].astype(out_ref.dtype)


def _add_all(ref: Ref, terms: Sequence[jax.Array]) -> None:
    """Adds the sum of several arrays to the contents of a reference."""
    ref[...] += functools.reduce(jnp.add, terms)


def _for_each_chunk(count: int, body: Callable[[Sequence[Any]], None], unroll: int) -> None:
    """Calls body([i, i + 1, …]) on `unroll` chunks at a time, until all are processed.

    The products of one chunk then overlap with the unpacking of another.

    Args:
      count: number of chunks.
      body: takes the indices of some chunks, ints or int32 scalars.
      unroll: chunks per call; the last call may get fewer.
    """
    unroll = min(unroll, count)
    in_loop = count - count % unroll

    def step(j, carry):
        """Processes `unroll` chunks."""
        body([j * unroll + i for i in range(unroll)])
        return carry

    jax.lax.fori_loop(0, in_loop // unroll, step, 0)
    if in_loop < count:
        body(range(in_loop, count))


def _chunk_slice(i: Any) -> pl.Slice | slice:
    """Returns the slice of the inputs of chunk i, an int or int32 scalar."""
    return pl.ds(_aligned(i * _CHUNK, _CHUNK), _CHUNK)


def _aligned(i: Any, multiple: int) -> Any:
    """Returns i; if it is traced, with the hint that it is a multiple of `multiple`."""
    return i if isinstance(i, int) else pl.multiple_of(i, multiple)


def _prepare_activations(static: MatmulShape, x_ref: Ref, permuted_ref: Ref, sums_ref: Ref) -> None:
    """Writes permuted activations and their sums over groups to scratch, once for all outputs.

    Both are products with matrices of zeros and ones, since the matrix unit permutes lanes at no
    extra cost.

    Args:
      static: sizes of the call.
      x_ref: activations [height, inputs].
      permuted_ref: written: activations in the order of `_unpack`'s rows, [height, inputs].
      sums_ref: written: sums of each group, float32 [height, padded_groups].
    """
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, (_CHUNK, _CHUNK), axis) for axis in (0, 1))
    permutation = (row == static.input_index(lane)).astype(static.dtype)
    group = jax.lax.broadcasted_iota(jnp.int32, (_CHUNK, static.padded_groups), 1)
    sums_ref[...] = jnp.zeros_like(sums_ref)

    def prepare_chunks(chunks: Sequence[Any]) -> None:
        """Permutes some chunks and adds their sums."""
        sums = []
        for i in chunks:
            x = x_ref[:, _chunk_slice(i)]
            permuted_ref[:, _chunk_slice(i)] = dot_f32(x, permutation).astype(static.dtype)
            sums.append(dot_f32(x, (group == static.group_of(i)).astype(static.dtype)))
        _add_all(sums_ref, sums)

    _for_each_chunk(static.chunks, prepare_chunks, _UNROLL)


def _unpack(static: MatmulShape, words: jax.Array) -> jax.Array:
    """Unpacks the words of a chunk to numbers in `static.dtype`.

    Args:
      static: sizes of the call.
      words: int32 [words of a chunk, columns].

    Returns:
      [128, columns], rows in the order of `MatmulShape.input_index`: q + 128 if `static.paired`,
      else q - 2^(bits - 1), for a packed integer q.
    """
    if static.paired:
        mask, exponent = jnp.int32(0x000F000F), jnp.int32(0x43004300)
        digits = [((words >> shift) & mask) | exponent for shift in range(0, 16, 4)]
        return jnp.concatenate([pltpu.bitcast(d, jnp.bfloat16) for d in digits], axis=0)
    # With its highest bit inverted, a digit is q - 2^(bits - 1) in two's complement.
    words = words ^ jnp.int32(-0x77777778 if static.bits == 4 else -0x7F7F7F80)
    top = 32 - static.bits
    digits = [(words << (top - shift)) >> top for shift in range(0, 32, static.bits)]
    # By way of float32, which every chip converts integers to.
    return jnp.concatenate([d.astype(jnp.float32).astype(static.dtype) for d in digits], axis=0)
