"""Group-quantised matmul on TPU: packed weights are streamed from HBM, each read once for all rows.

A grid step processes all inputs of a few hundred outputs: one copy of one to two megabytes, during
which the previous one is processed. Groups are processed one after the other: their words are
unpacked in registers, the matrix unit multiplies them, and the float32 result is scaled and added.

Unpacking on the vector unit, four bits at a time, would dominate, so nothing is converted. The
word's bits under mask 000F000F, combined with bits 4300 of bf16's 128, *are* two bf16 numbers 128 +
q, exact; a shift, an "and" and an "or" make 2,048 of them. Their offset is subtracted together with
the zeros, through Σ x_g. The numbers are in a permuted order (digits 0 and 4 of each word, then 1
and 5, …), and x, which is small, is permuted accordingly.

With the many rows of a prompt, results would have to be scaled once per group, and the matrix unit
would be used with 128 inputs at a time. Instead, a block of weights is dequantised in VMEM once,
and all rows are multiplied by it as by dense weights.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.kernels.quantised import GroupWeight
from qwen_jax.parallel import current_mesh

_LANES = 128
_CHUNK = 128
"""Inputs per product: the depth of a matrix unit, and a divisor of every group."""
_BLOCK_BYTES = 2 << 20
"""Bytes of packed weights per grid step: large enough to hide the latency of a copy."""
_MAX_FEW_ROWS = 64
"""Most rows whose product is taken with values as they are and scaled after, group by group."""
_X_BYTES = 6 << 20
"""Bytes of rows per grid step, in the kernel for many rows."""
_WIDE_BYTES = 12 << 20
"""Bytes of dequantised weights per block of outputs: with more, rows are read fewer times."""
_MOST_COLUMNS = 512
_UNROLL = 16
"""Chunks processed per iteration, to overlap products with unpacking."""
_WIDE_UNROLL = 2
"""Chunks dequantised per iteration."""
_VMEM_BYTES = 48 << 20
_BF16_OFFSET = 128
"""What bf16 values made of bits are too large by."""


def unsupported_reason(weight: GroupWeight, *, rows: int, dtype) -> str | None:
    """Returns why this kernel does not support a call; None if it does.

    Args:
      weight: the quantised matrix.
      rows: rows of x; any number is supported.
      dtype: dtype of x.
    """
    del rows  # of any number
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"x in {jnp.dtype(dtype)}; the TPU kernel takes bfloat16 or float32"
    if weight.group % _CHUNK:
        return f"groups of {weight.group}; the TPU kernel takes multiples of {_CHUNK}"
    return None


@dataclasses.dataclass(frozen=True)
class MatmulShape:
    """Static parameters of a call.

    Attributes:
      bits: bits per weight, 4 or 8.
      group: inputs per quantisation group.
      chunks: number of chunks of `_CHUNK` inputs.
      groups: number of groups.
      dtype: dtype of x, and of weights in the matrix unit.
      symmetric: whether all zeros are the midpoint.
    """

    bits: int
    group: int
    chunks: int
    groups: int
    dtype: jnp.dtype  # of x and of the values in the matrix unit
    symmetric: bool

    @property
    def words(self) -> int:
        """Returns the number of rows of packed words per chunk."""
        return _CHUNK * self.bits // 32

    @property
    def sums(self) -> int:
        """Returns the number of groups, padded to complete vectors of lanes."""
        return -(-self.groups // _LANES) * _LANES

    @property
    def paired(self) -> bool:
        """Returns whether weights are assembled from bits, two at a time."""
        return self.bits == 4 and self.dtype == jnp.bfloat16

    @property
    def midpoint(self) -> float:
        """Returns the midpoint of the weights, the zero if none is given."""
        return 2.0 ** (self.bits - 1)

    @property
    def offset(self) -> float | None:
        """Returns what to add to zeros to cancel the offset of `_unpack`; None: nothing."""
        if self.paired:
            return _BF16_OFFSET
        return None if self.symmetric else -self.midpoint

    def group_of(self, chunk):
        """Returns the group of a chunk."""
        chunks = self.group // _CHUNK
        if isinstance(chunk, int) or chunks == 1:
            return chunk // chunks
        return jax.lax.div(chunk, chunks)

    def input_index(self, position):
        """Returns the input of a chunk to which a row of `_unpack`'s result belongs, int32."""
        if self.paired:  # positions are [shift, word, half]; of a word, digit 4·half + shift
            pairs = 2 * self.words
            shift, inner = jax.lax.div(position, pairs), jax.lax.rem(position, pairs)
            return 8 * jax.lax.div(inner, 2) + 4 * jax.lax.rem(inner, 2) + shift
        shift, word = jax.lax.div(position, self.words), jax.lax.rem(position, self.words)
        return 32 // self.bits * word + shift


def quantised_matmul(x: jax.Array, weight: GroupWeight, *, columns: int | None = None) -> jax.Array:
    """Multiplies x by a quantised matrix.

    Args:
      x: [M, K], bfloat16 or float32.
      weight: the quantised matrix [K, O].
      columns: outputs per grid step, a multiple of 128; default: `choose_columns`.

    Returns:
      [M, O] in x's dtype.
    """
    rows, inputs = x.shape
    is_few = rows <= _MAX_FEW_ROWS
    static = MatmulShape(
        *(weight.bits, weight.group, inputs // _CHUNK, weight.scales.shape[-3]),
        *(x.dtype, weight.zeros is None),
    )
    columns = columns or choose_columns(weight, is_few)
    if not is_few:
        # Numbers become float32 to be scaled; rows are put into their order here.
        static = dataclasses.replace(static, dtype=jnp.dtype(jnp.float32))
        x = _reorder_inputs(static, x)
    height = -(-rows // 16) * 16
    if not is_few:
        height = min(height, max(128, _X_BYTES // (inputs * x.dtype.itemsize) // 128 * 128))
    return _launch(static, is_few, height, columns, x, weight)


def _launch(static: MatmulShape, is_few: bool, height: int, columns: int, x, weight: GroupWeight):
    """Runs the kernel over all blocks of rows and outputs.

    Args:
      static: static parameters.
      is_few: whether to use the kernel for few rows.
      height: rows per block.
      columns: outputs per block.
      x: [M, K].
      weight: the quantised matrix.
    """
    rows, inputs = x.shape
    stacked = [weight.codes, weight.scales]
    if weight.zeros is not None:
        stacked.append(weight.zeros)
    if weight.codes.ndim == 2:
        stacked = [a[None] for a in stacked]
    layer = jnp.zeros((), jnp.int32) if weight.layer is None else weight.layer
    blocks = pl.cdiv(weight.outputs, columns)
    cores = min(_cores(), blocks)
    blocks_per_core = pl.cdiv(blocks, cores)

    def column_block(c, n):
        """Returns the block of outputs of step n on core c; the last one may be repeated."""
        return jnp.minimum(c * blocks_per_core + n, blocks - 1)

    def weight_spec(a):
        """Returns the block spec of an array of the weight, for the layer given as a scalar."""
        inner = (0,) * (a.ndim - 2)
        shape = (1, *a.shape[1:-1], columns)
        return pl.BlockSpec(shape, lambda c, n, m, layer: (layer[0], *inner, column_block(c, n)))

    scratch = [
        pltpu.VMEM((height, inputs), x.dtype),
        pltpu.VMEM((height, static.sums), jnp.float32),
        pltpu.VMEM((height, columns), jnp.float32),
    ]
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(cores, blocks_per_core, pl.cdiv(rows, height)),
        in_specs=[
            pl.BlockSpec((height, inputs), lambda c, n, m, _: (m, 0)),
            *map(weight_spec, stacked),
        ],
        out_specs=pl.BlockSpec((height, columns), lambda c, n, m, _: (m, column_block(c, n))),
        scratch_shapes=scratch if is_few else [pltpu.VMEM((inputs, columns), x.dtype)],
    )
    moved = sum(a.size * a.dtype.itemsize // a.shape[0] for a in stacked)
    moved += x.dtype.itemsize * rows * (inputs * (1 if is_few else blocks) + weight.outputs)
    return pl.pallas_call(
        functools.partial(_few_rows_kernel if is_few else _many_rows_kernel, static),
        grid_spec=grid_spec,
        out_shape=jax.ShapeDtypeStruct((rows, weight.outputs), x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=_VMEM_BYTES,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * inputs * weight.outputs, transcendentals=0, bytes_accessed=moved
        ),
        name="group_matmul",
    )(jnp.reshape(layer, (1,)), x, *stacked)


def _reorder_inputs(static: MatmulShape, x: jax.Array) -> jax.Array:
    """Returns x [M, K] with the inputs of each chunk in the order of `_unpack`.

    Computed as a product with a permutation matrix: transposing axes of 4 and 8 would take a TPU
    many times as long.
    """
    positions = jnp.arange(_CHUNK, dtype=jnp.int32)
    permutation = (positions[:, None] == static.input_index(positions)).astype(x.dtype)
    chunks = x.reshape(x.shape[0], -1, _CHUNK)
    exact = None if x.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    return jnp.einsum("MCK,KJ->MCJ", chunks, permutation, precision=exact).reshape(x.shape)


def _cores() -> int:
    """Returns the number of cores per chip of the current mesh or host: 2 on v4 and v5p."""
    device = current_mesh().abstract_device or jax.devices()[0]
    return getattr(device, "num_cores", None) or 1


def choose_columns(weight: GroupWeight, is_few: bool) -> int:
    """Returns the number of outputs per grid step: a multiple of the lanes with the least padding.

    As many as a copy of `_BLOCK_BYTES` has, or, for many rows, as `_WIDE_BYTES` of bf16.
    """
    most = _BLOCK_BYTES // (weight.codes.shape[-2] * 4 * _LANES)
    if not is_few:
        most = min(_WIDE_BYTES // (weight.inputs * 2 * _LANES), _MOST_COLUMNS // _LANES)
    most = max(1, most)
    lanes = -(-weight.outputs // _LANES)
    steps = -(-lanes // most)
    return _LANES * -(-lanes // steps)


def _many_rows_kernel(static: MatmulShape, layer_ref, x_ref, codes_ref, scales_ref, *rest):
    """Computes a block of outputs for one of many blocks of rows; dequantises it for the first.

    Args:
      static: static parameters.
      layer_ref: index of the layer, used by the block specs.
      x_ref: rows.
      codes_ref: packed weights.
      scales_ref: scales.
      *rest: zeros (asymmetric only), output, dequantised weights.
    """
    del layer_ref  # the copies have used it
    *zeros_ref, out_ref, dense_ref = rest

    def dequantise_chunks(chunks):
        """Dequantises some chunks of inputs into `dense_ref`."""
        for i in chunks:
            words = codes_ref[0, pl.ds(_aligned(i * static.words, 8), static.words), :]
            values, group = _unpack(static, words), static.group_of(i)
            if zeros_ref:
                values = values - (zeros_ref[0][0, group] + static.offset)
            dense_ref[_chunk_slice(i), :] = (values * scales_ref[0, group]).astype(dense_ref.dtype)

    pl.when(pl.program_id(2) == 0)(
        lambda: _for_each_chunk(static.chunks, dequantise_chunks, _WIDE_UNROLL)
    )
    out_ref[...] = _dot(x_ref[...], dense_ref[...]).astype(out_ref.dtype)


def _few_rows_kernel(static: MatmulShape, layer_ref, x_ref, codes_ref, scales_ref, *rest):
    """Computes a block of outputs for all rows: weights are multiplied unscaled, results scaled.

    Args:
      static: static parameters.
      layer_ref: index of the layer, used by the block specs.
      x_ref: rows.
      codes_ref: packed weights.
      scales_ref: scales.
      *rest: zeros (asymmetric only), output, reordered rows, sums per group, accumulator.
    """
    del layer_ref  # the copies have used it
    *zeros_ref, out_ref, ordered_ref, sums_ref, total_ref = rest
    pl.when(pl.program_id(1) == 0)(lambda: _prepare_rows(static, x_ref, ordered_ref, sums_ref))
    if static.offset is None:
        total_ref[...] = jnp.zeros_like(total_ref)
    else:
        zeros = zeros_ref[0][0] if zeros_ref else static.midpoint
        offset = scales_ref[0] * (zeros + static.offset)
        total_ref[...] = -_dot(sums_ref[:, : static.groups], offset.reshape(static.groups, -1))

    def chunk(i):
        """Returns the scaled product of one chunk of inputs."""
        words = codes_ref[0, pl.ds(_aligned(i * static.words, 8), static.words), :]
        part = _dot(ordered_ref[:, _chunk_slice(i)], _unpack(static, words))
        return part * scales_ref[0, static.group_of(i)]

    _for_each_chunk(
        static.chunks, lambda chunks: _add_parts(total_ref, [chunk(i) for i in chunks]), _UNROLL
    )
    out_ref[...] = total_ref[...].astype(out_ref.dtype)


def _add_parts(ref, parts) -> None:
    """Adds several arrays to a reference."""
    ref[...] += functools.reduce(jnp.add, parts)


def _for_each_chunk(count: int, body, unroll: int) -> None:
    """Calls body([i, …]) for chunks 0 … count − 1, several at a time.

    Products of one chunk then overlap with the unpacking of another.
    """
    unroll = min(unroll, count)
    complete = count - count % unroll

    def step(j, carry):
        """Processes one group of chunks."""
        body([j * unroll + i for i in range(unroll)])
        return carry

    jax.lax.fori_loop(0, complete // unroll, step, 0)
    if complete < count:
        body(range(complete, count))


def _chunk_slice(i):
    """Returns the slice of the inputs of chunk i."""
    return pl.ds(_aligned(i * _CHUNK, _CHUNK), _CHUNK)


def _aligned(i, of: int):
    """Returns i with the hint that it is a multiple of `of`, if it is traced."""
    return i if isinstance(i, int) else pl.multiple_of(i, of)


def _dot(a, b) -> jax.Array:
    """Returns a·b in float32: exact products of bf16, full precision for float32."""
    precision = None if a.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _prepare_rows(static: MatmulShape, x_ref, ordered_ref, sums_ref) -> None:
    """Computes, once for all outputs, the reordered rows and their sums per group.

    Both are products with zeros and ones, since the matrix unit permutes lanes at no extra cost.
    """
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, (_CHUNK, _CHUNK), axis) for axis in (0, 1))
    permutation = (row == static.input_index(lane)).astype(static.dtype)
    group = jax.lax.broadcasted_iota(jnp.int32, (_CHUNK, static.sums), 1)
    sums_ref[...] = jnp.zeros_like(sums_ref)

    def add_chunks(chunks):
        """Reorders some chunks and adds their sums."""
        parts = []
        for i in chunks:
            x = x_ref[:, _chunk_slice(i)]
            ordered_ref[:, _chunk_slice(i)] = _dot(x, permutation).astype(static.dtype)
            parts.append(_dot(x, (group == static.group_of(i)).astype(static.dtype)))
        _add_parts(sums_ref, parts)

    _for_each_chunk(static.chunks, add_chunks, _UNROLL)


def _unpack(static: MatmulShape, words: jax.Array) -> jax.Array:
    """Unpacks words to weights in x's dtype; rows are in the order of `input_index`.

    Args:
      static: static parameters.
      words: int32 [words, columns].

    Returns:
      [_CHUNK, columns]: q + 128 if assembled in pairs, else q − midpoint.
    """
    if static.paired:
        mask, exponent = jnp.int32(0x000F000F), jnp.int32(0x43004300)
        digits = [((words >> shift) & mask) | exponent for shift in range(0, 16, 4)]
        return jnp.concatenate([pltpu.bitcast(d, jnp.bfloat16) for d in digits], axis=0)
    # With every digit's highest bit turned over, it is q − midpoint in two's complement.
    words = words ^ jnp.int32(-0x77777778 if static.bits == 4 else -0x7F7F7F80)
    top = 32 - static.bits
    digits = [(words << (top - shift)) >> top for shift in range(0, 32, static.bits)]
    # By way of float32, which every chip converts to.
    return jnp.concatenate([d.astype(jnp.float32).astype(static.dtype) for d in digits], axis=0)
