"""Group-quantised matmul on Hopper GPUs: packed weights are widened in shared memory for wgmma.

For few rows of activations. A CTA (thread block) is one warpgroup and computes 128 outputs over one
split of the inputs, so that a matrix of 4,096 outputs occupies all 132 multiprocessors; the float32
results of the splits are summed afterwards. A step takes 128 inputs: packed words, the activations
and a row of scales arrive through a ring of buffers filled by the copy engine. Words become bf16
numbers q - 2^(bits - 1) in registers and are written to shared memory as one operand of wgmma, the
activations are the other, and the result is scaled and summed in registers.

Digit i of all words of a step makes 16 or 32 adjacent rows of the operand, so the numbers are in a
different order from the inputs, and activations are permuted to match beforehand. Rows are always
64, with zeros for missing ones: the product of 64 bf16 rows takes less time than loading the words.

For more rows than `_MAX_ROWS` the matrix is dequantised in memory and multiplied by XLA: the
product then outweighs a copy of the weights.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from qwen_jax.kernels.gpu import mosaic
from qwen_jax.kernels.quantised import GroupWeight, dequantise
from qwen_jax.kernels.refs import Ref, bind_by_name
from qwen_jax.parallel import current_mesh

_CHUNK = 128
"""Inputs per step."""
_COLUMNS = 128
"""Outputs per CTA."""
_ROWS = 64
"""Rows of a wgmma instruction (its M)."""
_MAX_ROWS = 256
"""Most rows for the kernel: it then reads the weights four times, still less than copying them."""
_MAX_SPLITS = 32


def unsupported_reason(weight: GroupWeight, *, rows: int, dtype: DTypeLike) -> str | None:
    """Returns one clause saying why this kernel cannot multiply by a weight, or None if it can.

    Args:
      weight: the quantised matrix.
      rows: rows of activations; any number is accepted.
      dtype: of the activations.
    """
    del rows
    device = current_mesh().abstract_device or jax.devices()[0]
    if not mosaic.is_hopper(device.device_kind):
        return f"a {device.device_kind}; the GPU kernel is made for Hopper (H100, H200)"
    if dtype != jnp.bfloat16:
        return f"x in {jnp.dtype(dtype)}; the GPU kernel takes bfloat16"
    if weight.group % _CHUNK:
        return f"groups of {weight.group}; the GPU kernel takes multiples of {_CHUNK}"
    if weight.outputs % _COLUMNS:
        return f"{weight.outputs} outputs; the GPU kernel takes multiples of {_COLUMNS}"
    return None


@dataclasses.dataclass(frozen=True)
class _GpuMatmulShape:
    """Sizes of a quantised matmul that are known at compile time.

    Attributes:
      bits: 4 or 8.
      chunks: steps of 128 inputs, over all inputs.
      chunks_per_group: steps in a quantisation group.
      splits: parts that the inputs are split into, one CTA each.
    """

    bits: int
    chunks: int
    chunks_per_group: int
    splits: int

    @property
    def words(self) -> int:
        """Returns the number of rows of packed int32 words per step of 128 inputs."""
        return _CHUNK * self.bits // 32

    @property
    def groups(self) -> int:
        """Returns the number of quantisation groups of a matrix."""
        return self.chunks // self.chunks_per_group

    @property
    def stages(self) -> int:
        """Returns the number of ring buffers: as many as let two CTAs share a multiprocessor."""
        return 3 if self.bits == 4 else 2


def quantised_matmul(x: jax.Array, weight: GroupWeight, *, splits: int | None = None) -> jax.Array:
    """Computes x · w for a weight quantised in groups of inputs.

    Args:
      x: [M, K] (rows, inputs), bfloat16.
      weight: a matrix of K inputs and O outputs.
      splits: into how many parts the inputs are split; None: `choose_splits`.

    Returns:
      [M, O] in x's dtype.
    """
    rows, inputs = x.shape
    if rows > _MAX_ROWS:
        return x @ dequantise(weight, x.dtype)
    chunks = inputs // _CHUNK
    blocks = weight.outputs // _COLUMNS * -(-rows // _ROWS)
    shape = _GpuMatmulShape(
        bits=weight.bits,
        chunks=chunks,
        chunks_per_group=weight.group // _CHUNK,
        splits=splits or choose_splits(blocks, chunks),
    )
    padded = jnp.pad(x, ((0, -rows % _ROWS), (0, 0)))
    per_word = 32 // shape.bits
    ordered = padded.reshape(-1, chunks, shape.words, per_word).swapaxes(2, 3)
    out = _launch(shape, ordered.reshape(padded.shape), weight)
    out = out.sum(axis=0)[:rows]
    if weight.zeros is not None:
        single = weight.select_layer()
        assert single.zeros is not None
        offset = (single.scales * (single.zeros - 2.0 ** (shape.bits - 1)))[:, 0]
        sums = x.astype(jnp.float32).reshape(rows, shape.groups, -1).sum(axis=-1)
        out = out - jnp.dot(sums, offset, precision=lax.Precision.HIGHEST)
    return out.astype(x.dtype)


def choose_splits(blocks: int, chunks: int) -> int:
    """Returns into how many parts to split the inputs so that the GPU is well occupied.

    Args:
      blocks: tiles of 64 rows by 128 outputs, one CTA each without splitting.
      chunks: steps of 128 inputs that each takes.
    """
    return mosaic.splits_for_fewest_waves(blocks, chunks, _MAX_SPLITS)


def _launch(shape: _GpuMatmulShape, x: jax.Array, weight: GroupWeight) -> jax.Array:
    """Runs the kernel and returns the product over each split of the inputs.

    Args:
      shape: sizes of the call.
      x: activations [M, K] (rows, inputs), M a multiple of 64, inputs in the order in which packed
        words are widened.
      weight: the quantised matrix of K inputs and O outputs; zeros are taken as 2^(bits - 1).

    Returns:
      float32 [splits, M, O], to be summed over the splits.
    """
    rows, outputs = x.shape[0], weight.outputs
    layer = jnp.zeros((), jnp.int32) if weight.layer is None else weight.layer
    inputs = {
        "layer_ref": jnp.reshape(layer, (1,)),
        "x_ref": x,
        "codes_ref": weight.codes.reshape(-1, outputs),
        "scales_ref": weight.scales.reshape(-1, outputs),
    }
    ring = [
        plgpu.SMEM((shape.stages, shape.words, _COLUMNS), jnp.int32),
        mosaic.smem_tile((shape.stages, _ROWS, _CHUNK), x.dtype),
        plgpu.SMEM((shape.stages, 1, _COLUMNS), jnp.float32),
    ]
    scratch = {
        # The result leaves through the memory that operands arrived in.
        "ring_or_out": mosaic.smem_union(ring, plgpu.SMEM((_ROWS, _COLUMNS), jnp.float32)),
        "widened": mosaic.smem_tile((_CHUNK, _COLUMNS), x.dtype),
        "ring_filled": plgpu.Barrier(num_arrivals=len(ring), num_barriers=shape.stages),
    }
    body = functools.partial(_matmul_kernel, shape)
    out = plgpu.kernel(
        bind_by_name(body, [*inputs, "out_ref", *scratch]),
        out_type=jax.ShapeDtypeStruct((shape.splits * rows, outputs), jnp.float32),
        scratch_types=list(scratch.values()),
        grid=(outputs // _COLUMNS, shape.splits, rows // _ROWS),
        grid_names=("column", "split", "row"),
        compiler_params=mosaic.COMPILER_PARAMS,
        kernel_name="group_matmul",
    )(*inputs.values())
    return out.reshape(shape.splits, rows, outputs)


def _matmul_kernel(
    shape: _GpuMatmulShape,
    *,
    layer_ref: Ref,
    x_ref: Ref,
    codes_ref: Ref,
    scales_ref: Ref,
    out_ref: Ref,
    ring_or_out: tuple[Sequence[Ref], Ref],
    widened: Ref,
    ring_filled: Ref,
) -> None:
    """Kernel body: 64 rows by 128 outputs, over one split of the inputs.

    Args:
      shape: sizes of the call.
      layer_ref: int32 [1], which matrix of the stack to use.
      x_ref: activations in global memory, [M, K] (rows, inputs).
      codes_ref: packed words of all layers, int32 [layers · K · bits / 32, O] (O outputs).
      scales_ref: scales of all layers, float32 [layers · groups, O].
      out_ref: result in global memory, float32 [splits · M, O].
      ring_or_out: ((words, activations, scales) of the steps in flight, result [64, 128]) in the
        same shared memory.
      widened: numbers q - 2^(bits - 1) of a step as bf16, [128, 128] in shared memory.
      ring_filled: barriers [stages], completed when a step's copies have arrived.
    """
    ring, out_smem = ring_or_out
    column, split, row = (lax.axis_index(name) for name in ("column", "split", "row"))
    layer = layer_ref[0]
    per_split = -(-shape.chunks // shape.splits)
    first = split * per_split
    count = jnp.minimum(shape.chunks - first, per_split)
    columns, rows = pl.ds(column * _COLUMNS, _COLUMNS), pl.ds(row * _ROWS, _ROWS)

    def start_copies(step):
        def copy():
            chunk, slot = first + step, lax.rem(step, jnp.int32(shape.stages))
            group = layer * shape.groups + lax.div(chunk, jnp.int32(shape.chunks_per_group))
            words = pl.ds((layer * shape.chunks + chunk) * shape.words, shape.words)
            sources = (
                codes_ref.at[words, columns],
                x_ref.at[rows, pl.ds(chunk * _CHUNK, _CHUNK)],
                scales_ref.at[pl.ds(group, 1), columns],
            )
            for source, buffers in zip(sources, ring, strict=True):
                plgpu.copy_gmem_to_smem(source, buffers.at[slot], ring_filled.at[slot])

        pl.when(step < count)(copy)

    for step in range(shape.stages):
        start_copies(jnp.int32(step))

    def compute_step(step, acc):
        slot = lax.rem(step, jnp.int32(shape.stages))
        plgpu.barrier_wait(ring_filled.at[slot])
        codes, x, scales = (buffers.at[slot] for buffers in ring)
        _widen_words(shape, codes, widened)
        plgpu.commit_smem()
        scale = mosaic.load(scales.at[0], mosaic.PER_COLUMN)
        scale = mosaic.broadcast_columns(scale, _ROWS)
        acc = acc + _wgmma_product(x, widened) * scale
        # All of this step's buffers have been read: the copy waits for all warps.
        start_copies(step + shape.stages)
        return acc

    zero = mosaic.full((_ROWS, _COLUMNS), 0.0, mosaic.MATRIX)
    out_smem[...] = lax.fori_loop(0, count, compute_step, zero)
    plgpu.commit_smem()
    out_rows = pl.ds(split * x_ref.shape[0] + row * _ROWS, _ROWS)
    plgpu.copy_smem_to_gmem(out_smem, out_ref.at[out_rows, columns])
    plgpu.wait_smem_to_gmem(0)


def _widen_words(shape: _GpuMatmulShape, codes_ref: Ref, widened_ref: Ref) -> None:
    """Writes the numbers q - 2^(bits - 1) of packed words as bf16, one digit after the other.

    Args:
      shape: sizes of the call.
      codes_ref: int32 [words, 128] in shared memory.
      widened_ref: bf16 [128, 128] in shared memory; digit i of all words fills rows i·words to
        (i + 1)·words - 1.
    """
    words = mosaic.load(codes_ref, _WORDS_LAYOUT)
    for digit in range(32 // shape.bits):
        codes = (words >> (digit * shape.bits)) & (2**shape.bits - 1)
        numbers = codes.astype(jnp.float32) - 2.0 ** (shape.bits - 1)
        rows = pl.ds(digit * shape.words, shape.words)
        widened_ref[rows, :] = numbers.astype(widened_ref.dtype)


# A thread holds 8 adjacent words, a warp two rows: reads of 32 bytes and writes of 16.
_WORDS_LAYOUT = plgpu.Layout.TILED(
    plgpu.Tiling(((8, _COLUMNS), (2, _COLUMNS), (8,))),
    warp_dims=(-5,),
    lane_dims=(-3, -2),
    vector_dim=-1,
)


def _wgmma_product(a_ref: Ref, b_ref: Ref) -> jax.Array:
    """Computes a·b, float32 [64, 128], for a [64, 128] and b [128, 128] in shared memory."""

    def compute(acc_ref):
        plgpu.wgmma(acc_ref, a_ref, b_ref)
        return acc_ref[...]

    return pl.run_scoped(compute, plgpu.ACC((_ROWS, _COLUMNS), jnp.float32))
