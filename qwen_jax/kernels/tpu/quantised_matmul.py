"""Group-quantised matmul on TPU: packed weights streamed from HBM, each read once for all rows.

A grid step takes all inputs of a few hundred outputs: one copy of one to two megabytes, the next
one under way meanwhile. Groups are worked off one after the other: their words become numbers in
registers, the matrix unit multiplies them, and the float32 result is scaled and summed.

Unpacking is what could cost: on the vector unit, four bits at a time. So nothing is converted. The
word's bits under mask 000F000F, beside the bits 4300 of bf16's 128, *are* two bf16 numbers 128 + q,
exact; shift, and, or make 2,048 of them. Their offset leaves with the zeros, through Σ x_g. The
numbers come in an order of their own (of each word, digits 0 and 4, then 1 and 5, …), and x, which
is small, is put into that order instead of them.

A prompt's many rows would have to be scaled once per group, and the matrix unit be used 128 inputs
at a time. For them a block of weights is dequantised in VMEM, once, and all rows are multiplied by
it as by dense weights.
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
"""Inputs a product: the depth of a matrix unit, and a divisor of every group."""
_BLOCK_BYTES = 2 << 20
"""Of packed weights a grid step: long enough a copy to hide its latency and the step's own cost."""
_FEW = 64
"""Most rows whose product is taken with numbers as they are and scaled after, group by group."""
_X_BYTES = 6 << 20
"""Of rows a grid step, where there are many."""
_WIDE_BYTES = 12 << 20
"""Of a block of outputs' dequantised weights: the wider, the fewer times rows are read."""
_MOST_COLUMNS = 512
_AT_ONCE = 16
"""Chunks worked on at once."""
_WIDE_AT_ONCE = 2
"""Chunks dequantised at once."""
_VMEM_BYTES = 48 << 20
_MAGIC = 128
"""What bf16 numbers made of bits are too large by."""


def unsupported_reason(weight: GroupWeight, *, rows: int, dtype) -> str | None:
    """Why this kernel can't multiply by a weight; None if it can."""
    del rows  # of any number
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"x in {jnp.dtype(dtype)}; the TPU kernel takes bfloat16 or float32"
    if weight.group % _CHUNK:
        return f"groups of {weight.group}; the TPU kernel takes multiples of {_CHUNK}"
    return None


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Everything known when compiling."""

    bits: int
    group: int
    chunks: int
    groups: int
    dtype: jnp.dtype  # of x and of the numbers in the matrix unit
    symmetric: bool

    @property
    def words(self) -> int:
        """Rows of packed words a chunk."""
        return _CHUNK * self.bits // 32

    @property
    def sums(self) -> int:
        """Groups, filled up to whole lanes."""
        return -(-self.groups // _LANES) * _LANES

    @property
    def paired(self) -> bool:
        """Whether numbers are made of bits, two at a time."""
        return self.bits == 4 and self.dtype == jnp.bfloat16

    @property
    def half(self) -> float:
        """The middle of the numbers, the zero where none is given."""
        return 2.0 ** (self.bits - 1)

    @property
    def offset(self) -> float | None:
        """What zeros are to be increased by, since `_numbers` are; None where they end up 0."""
        if self.paired:
            return _MAGIC
        return None if self.symmetric else -self.half

    def group_of(self, chunk):
        """Group that a chunk lies in."""
        chunks = self.group // _CHUNK
        if isinstance(chunk, int) or chunks == 1:
            return chunk // chunks
        return jax.lax.div(chunk, chunks)

    def input_of(self, place):
        """Which input of a chunk the number at a place of `_numbers` belongs to, int32."""
        if self.paired:  # places are [shift, word, half]; of a word, digit 4·half + shift
            pairs = 2 * self.words
            shift, inner = jax.lax.div(place, pairs), jax.lax.rem(place, pairs)
            return 8 * jax.lax.div(inner, 2) + 4 * jax.lax.rem(inner, 2) + shift
        shift, word = jax.lax.div(place, self.words), jax.lax.rem(place, self.words)
        return 32 // self.bits * word + shift


def quantised_matmul(x: jax.Array, weight: GroupWeight, *, columns: int | None = None) -> jax.Array:
    """x [M,K] · w [K,O] -> [M,O] in x's dtype.

    columns: outputs a grid step, a multiple of 128; by default what `choose_columns` says.
    """
    rows, inputs = x.shape
    few = rows <= _FEW
    sizes = _Sizes(
        *(weight.bits, weight.group, inputs // _CHUNK, weight.scales.shape[-3]),
        *(x.dtype, weight.zeros is None),
    )
    columns = columns or choose_columns(weight, few)
    if not few:
        # Numbers become float32 to be scaled; rows are put into their order here.
        sizes = dataclasses.replace(sizes, dtype=jnp.dtype(jnp.float32))
        x = _ordered(sizes, x)
    height = -(-rows // 16) * 16
    if not few:
        height = min(height, max(128, _X_BYTES // (inputs * x.dtype.itemsize) // 128 * 128))
    return _call(sizes, few, height, columns, x, weight)


def _call(sizes: _Sizes, few: bool, height: int, columns: int, x, weight: GroupWeight):
    """The kernel over all blocks of `height` rows and `columns` outputs."""
    rows, inputs = x.shape
    stacked = [weight.codes, weight.scales] + [weight.zeros] * (not sizes.symmetric)
    if weight.codes.ndim == 2:
        stacked = [a[None] for a in stacked]
    layer = jnp.zeros((), jnp.int32) if weight.layer is None else weight.layer
    blocks = pl.cdiv(weight.outputs, columns)
    cores = min(_cores(), blocks)
    each = pl.cdiv(blocks, cores)

    def block(c, n):  # the last core may do its last block twice
        return jnp.minimum(c * each + n, blocks - 1)

    def of_layer(a):
        inner = (0,) * (a.ndim - 2)
        shape = (1, *a.shape[1:-1], columns)
        return pl.BlockSpec(shape, lambda c, n, m, layer: (layer[0], *inner, block(c, n)))

    scratch = [
        pltpu.VMEM((height, inputs), x.dtype),
        pltpu.VMEM((height, sizes.sums), jnp.float32),
        pltpu.VMEM((height, columns), jnp.float32),
    ]
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(cores, each, pl.cdiv(rows, height)),
        in_specs=[
            pl.BlockSpec((height, inputs), lambda c, n, m, _: (m, 0)),
            *map(of_layer, stacked),
        ],
        out_specs=pl.BlockSpec((height, columns), lambda c, n, m, _: (m, block(c, n))),
        scratch_shapes=scratch if few else [pltpu.VMEM((inputs, columns), x.dtype)],
    )
    moved = sum(a.size * a.dtype.itemsize // a.shape[0] for a in stacked)
    moved += x.dtype.itemsize * rows * (inputs * (1 if few else blocks) + weight.outputs)
    return pl.pallas_call(
        functools.partial(_few if few else _many, sizes),
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


def _ordered(sizes: _Sizes, x: jax.Array) -> jax.Array:
    """x [M,K] with the inputs of each chunk in the order of `_numbers`.

    A product with zeros and ones: transposing axes of 4 and 8 would take a TPU many times as long.
    """
    places = jnp.arange(_CHUNK, dtype=jnp.int32)
    permutation = (places[:, None] == sizes.input_of(places)).astype(x.dtype)
    chunks = x.reshape(x.shape[0], -1, _CHUNK)
    exact = None if x.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    return jnp.einsum("MCK,KJ->MCJ", chunks, permutation, precision=exact).reshape(x.shape)


def _cores() -> int:
    """Cores of a chip of the mesh in force, or of this host's: 2 on v4 and v5p."""
    device = current_mesh().abstract_device or jax.devices()[0]
    return getattr(device, "num_cores", None) or 1


def choose_columns(weight: GroupWeight, few: bool) -> int:
    """Outputs a grid step: whole lanes, the least left over.

    As many as a copy of `_BLOCK_BYTES` holds, or, for many rows, as `_WIDE_BYTES` of bf16.
    """
    most = _BLOCK_BYTES // (weight.codes.shape[-2] * 4 * _LANES)
    if not few:
        most = min(_WIDE_BYTES // (weight.inputs * 2 * _LANES), _MOST_COLUMNS // _LANES)
    most = max(1, most)
    lanes = -(-weight.outputs // _LANES)
    steps = -(-lanes // most)
    return _LANES * -(-lanes // steps)


def _many(sizes: _Sizes, layer_ref, x_ref, codes_ref, scales_ref, *rest):
    """A block of outputs for one of many blocks of rows: dequantised for the first of them."""
    del layer_ref  # the copies have used it
    *zeros_ref, out_ref, wide_ref = rest

    def widen(chunks):
        for i in chunks:
            words = codes_ref[0, pl.ds(_multiple(i * sizes.words, 8), sizes.words), :]
            numbers, group = _numbers(sizes, words), sizes.group_of(i)
            if zeros_ref:
                numbers = numbers - (zeros_ref[0][0, group] + sizes.offset)
            wide_ref[_of_chunk(i), :] = (numbers * scales_ref[0, group]).astype(wide_ref.dtype)

    pl.when(pl.program_id(2) == 0)(lambda: _each(sizes.chunks, widen, _WIDE_AT_ONCE))
    out_ref[...] = _dot(x_ref[...], wide_ref[...]).astype(out_ref.dtype)


def _few(sizes: _Sizes, layer_ref, x_ref, codes_ref, scales_ref, *rest):
    """A block of outputs for all rows: the numbers are multiplied as they are, then scaled."""
    del layer_ref  # the copies have used it
    *zeros_ref, out_ref, ordered_ref, sums_ref, total_ref = rest
    pl.when(pl.program_id(1) == 0)(lambda: _prepare(sizes, x_ref, ordered_ref, sums_ref))
    if sizes.offset is None:
        total_ref[...] = jnp.zeros_like(total_ref)
    else:
        zeros = zeros_ref[0][0] if zeros_ref else sizes.half
        offset = scales_ref[0] * (zeros + sizes.offset)
        total_ref[...] = -_dot(sums_ref[:, : sizes.groups], offset.reshape(sizes.groups, -1))

    def chunk(i):
        words = codes_ref[0, pl.ds(_multiple(i * sizes.words, 8), sizes.words), :]
        part = _dot(ordered_ref[:, _of_chunk(i)], _numbers(sizes, words))
        return part * scales_ref[0, sizes.group_of(i)]

    _each(sizes.chunks, lambda chunks: _add(total_ref, [chunk(i) for i in chunks]), _AT_ONCE)
    out_ref[...] = total_ref[...].astype(out_ref.dtype)


def _add(ref, parts) -> None:
    ref[...] += functools.reduce(jnp.add, parts)


def _each(count: int, body, at_once: int) -> None:
    """body([i, …]) over 0 … count − 1, several at once: one's products hide another's unpacking."""
    at_once = min(at_once, count)
    whole = count - count % at_once

    def step(j, carry):
        body([j * at_once + i for i in range(at_once)])
        return carry

    jax.lax.fori_loop(0, whole // at_once, step, 0)
    if whole < count:
        body(range(whole, count))


def _of_chunk(i):
    return pl.ds(_multiple(i * _CHUNK, _CHUNK), _CHUNK)


def _multiple(i, of: int):
    return i if isinstance(i, int) else pl.multiple_of(i, of)


def _dot(a, b) -> jax.Array:
    """a·b in float32; exact products of bf16, and no less than float32 of float32."""
    precision = None if a.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _prepare(sizes: _Sizes, x_ref, ordered_ref, sums_ref) -> None:
    """x in the order of the numbers, and its sums over groups, once for all outputs.

    Both are products with zeros and ones: the matrix unit moves lanes about at no other's cost.
    """
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, (_CHUNK, _CHUNK), axis) for axis in (0, 1))
    permutation = (row == sizes.input_of(lane)).astype(sizes.dtype)
    group = jax.lax.broadcasted_iota(jnp.int32, (_CHUNK, sizes.sums), 1)
    sums_ref[...] = jnp.zeros_like(sums_ref)

    def some(chunks):
        parts = []
        for i in chunks:
            x = x_ref[:, _of_chunk(i)]
            ordered_ref[:, _of_chunk(i)] = _dot(x, permutation).astype(sizes.dtype)
            parts.append(_dot(x, (group == sizes.group_of(i)).astype(sizes.dtype)))
        _add(sums_ref, parts)

    _each(sizes.chunks, some, _AT_ONCE)


def _numbers(sizes: _Sizes, words: jax.Array) -> jax.Array:
    """int32 [words, columns] -> its numbers [_CHUNK, columns] in x's dtype; see `input_of`.

    Numbers are q + 128 in pairs, else q − half.
    """
    if sizes.paired:
        mask, exponent = jnp.int32(0x000F000F), jnp.int32(0x43004300)
        digits = [((words >> shift) & mask) | exponent for shift in range(0, 16, 4)]
        return jnp.concatenate([pltpu.bitcast(d, jnp.bfloat16) for d in digits], axis=0)
    # With every digit's highest bit turned over, it is q − half in two's complement.
    words = words ^ jnp.int32(-0x77777778 if sizes.bits == 4 else -0x7F7F7F80)
    top = 32 - sizes.bits
    digits = [(words << (top - shift)) >> top for shift in range(0, 32, sizes.bits)]
    # By way of float32, which every chip converts to.
    return jnp.concatenate([d.astype(jnp.float32).astype(sizes.dtype) for d in digits], axis=0)
