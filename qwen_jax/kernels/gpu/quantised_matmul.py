"""Group-quantised matmul on Hopper: packed weights widened in shared memory, then tensor cores.

For few rows. A thread block, one warpgroup, takes 128 outputs and a share of the inputs (so that a
matrix of 4,096 outputs fills a chip of 132 multiprocessors); the shares' float32 results are summed
afterwards. Steps are of 128 inputs: packed words, the rows' activations and a row of scales come
through a ring of buffers filled by the copy engine, words become bf16 numbers q − half in registers
and go to shared memory as one operand of wgmma, the activations are the other, and the result is
scaled and summed in registers.

Digit i of all words of a step makes 16 or 32 neighbouring rows of the operand, so the numbers are
in another order than the inputs; activations are put into that order before. Rows always are 64,
those that are not there zero: the product of 64 bf16 rows takes less time than the words take to
arrive.

For more rows than `_FEW` the matrix is dequantised in memory and multiplied by XLA: the product
then outweighs a copy of the weights.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.gpu import mosaic
from qwen_jax.kernels.quantised import GroupWeight, dequantise
from qwen_jax.parallel import current_mesh

_CHUNK = 128
"""Inputs a step."""
_COLUMNS = 128
"""Outputs a thread block."""
_ROWS = 64
"""M of a wgmma instruction."""
_FEW = 256
"""Most rows that the kernel takes: four times through the weights, still less than copying them."""


def refusal(weight: GroupWeight, *, rows: int, dtype) -> str | None:
    """Why this kernel can't multiply by a weight; None if it can."""
    del rows  # of any number
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
class _Sizes:
    """Everything known when compiling."""

    bits: int
    chunks: int
    chunks_per_group: int
    splits: int

    @property
    def words(self) -> int:
        """Rows of packed words a chunk."""
        return _CHUNK * self.bits // 32

    @property
    def groups(self) -> int:
        """Groups of a matrix."""
        return self.chunks // self.chunks_per_group

    @property
    def stages(self) -> int:
        """Buffers of the ring: as many as leave room for two thread blocks a multiprocessor."""
        return 3 if self.bits == 4 else 2


def matmul(x: jax.Array, weight: GroupWeight, *, splits: int | None = None) -> jax.Array:
    """x [M,K] · w [K,O] -> [M,O] in x's dtype.

    splits: shares of the inputs; by default what `choose_splits` says.
    """
    rows, inputs = x.shape
    if rows > _FEW:
        return x @ dequantise(weight, x.dtype)
    chunks = inputs // _CHUNK
    blocks = weight.outputs // _COLUMNS * -(-rows // _ROWS)
    splits = splits or choose_splits(blocks, chunks)
    sizes = _Sizes(weight.bits, chunks, weight.group // _CHUNK, splits)
    padded = jnp.pad(x, ((0, -rows % _ROWS), (0, 0)))
    per_word = 32 // sizes.bits
    ordered = padded.reshape(-1, chunks, sizes.words, per_word).swapaxes(2, 3)
    out = _call(sizes, ordered.reshape(padded.shape), weight)
    out = out.sum(axis=0)[:rows]
    if weight.zeros is not None:
        alone = weight.alone()
        offset = (alone.scales * (alone.zeros - 2.0 ** (sizes.bits - 1)))[:, 0]
        sums = x.astype(jnp.float32).reshape(rows, sizes.groups, -1).sum(axis=-1)
        out = out - jnp.dot(sums, offset, precision=lax.Precision.HIGHEST)
    return out.astype(x.dtype)


def choose_splits(blocks: int, chunks: int) -> int:
    """Shares of `chunks` steps for each of `blocks` thread blocks.

    The fewest waves by steps of the longest share; starting one and summing it counts as four.
    """

    return mosaic.fewest_waves(blocks, chunks, 32)


def _call(sizes: _Sizes, x, weight: GroupWeight):
    """float32 [splits, M, O]; M a multiple of 64."""
    rows, outputs = x.shape[0], weight.outputs
    layer = jnp.zeros((), jnp.int32) if weight.layer is None else weight.layer
    ring = [
        plgpu.SMEM((sizes.stages, sizes.words, _COLUMNS), jnp.int32),
        mosaic.tile_memory((sizes.stages, _ROWS, _CHUNK), x.dtype),
        plgpu.SMEM((sizes.stages, 1, _COLUMNS), jnp.float32),
    ]
    out = plgpu.kernel(
        functools.partial(_kernel, sizes),
        out_type=jax.ShapeDtypeStruct((sizes.splits * rows, outputs), jnp.float32),
        scratch_types=[
            # The result leaves through the memory that operands came in by.
            mosaic.share(ring, plgpu.SMEM((_ROWS, _COLUMNS), jnp.float32)),
            mosaic.tile_memory((_CHUNK, _COLUMNS), x.dtype),
            plgpu.Barrier(num_arrivals=len(ring), num_barriers=sizes.stages),
        ],
        grid=(outputs // _COLUMNS, sizes.splits, rows // _ROWS),
        grid_names=("column", "split", "row"),
        compiler_params=mosaic.PARAMS,
        kernel_name="group_matmul",
    )(
        jnp.reshape(layer, (1,)),
        x,
        weight.codes.reshape(-1, outputs),
        weight.scales.reshape(-1, outputs),
    )
    return out.reshape(sizes.splits, rows, outputs)


def _kernel(sizes: _Sizes, layer_ref, x_ref, codes_ref, scales_ref, out_ref, shared, wide, ready):
    """A share of the inputs, for 128 outputs and 64 rows."""
    ring, out_memory = shared
    column, split, row = (lax.axis_index(name) for name in ("column", "split", "row"))
    layer = layer_ref[0]
    each = -(-sizes.chunks // sizes.splits)
    first = split * each
    count = jnp.minimum(sizes.chunks - first, each)
    columns, rows = pl.ds(column * _COLUMNS, _COLUMNS), pl.ds(row * _ROWS, _ROWS)

    def start(step):
        def copy():
            chunk, slot = first + step, lax.rem(step, jnp.int32(sizes.stages))
            group = layer * sizes.groups + lax.div(chunk, jnp.int32(sizes.chunks_per_group))
            words = pl.ds((layer * sizes.chunks + chunk) * sizes.words, sizes.words)
            sources = (
                codes_ref.at[words, columns],
                x_ref.at[rows, pl.ds(chunk * _CHUNK, _CHUNK)],
                scales_ref.at[pl.ds(group, 1), columns],
            )
            for source, memory in zip(sources, ring, strict=True):
                plgpu.copy_gmem_to_smem(source, memory.at[slot], ready.at[slot])

        pl.when(step < count)(copy)

    for step in range(sizes.stages):
        start(jnp.int32(step))

    def body(step, total):
        slot = lax.rem(step, jnp.int32(sizes.stages))
        plgpu.barrier_wait(ready.at[slot])
        codes, x, scales = (memory.at[slot] for memory in ring)
        _widen(sizes, codes, wide)
        plgpu.commit_smem()
        scale = mosaic.columns(mosaic.load(scales.at[0], mosaic.PER_COLUMN), _ROWS)
        total = total + _product(x, wide) * scale
        # Everything here has been read: the copy waits for all warps.
        start(step + sizes.stages)
        return total

    total = lax.fori_loop(0, count, body, mosaic.full((_ROWS, _COLUMNS), 0.0, mosaic.MATRIX))
    out_memory[...] = total
    plgpu.commit_smem()
    at = pl.ds(split * x_ref.shape[0] + row * _ROWS, _ROWS)
    plgpu.copy_smem_to_gmem(out_memory, out_ref.at[at, columns])
    plgpu.wait_smem_to_gmem(0)


def _widen(sizes: _Sizes, codes_ref, wide_ref) -> None:
    """Words int32 [words, 128] to numbers q − half, bf16 [128, 128], a digit after the other."""
    words = mosaic.load(codes_ref, _WORDS)
    for digit in range(32 // sizes.bits):
        codes = (words >> (digit * sizes.bits)) & (2**sizes.bits - 1)
        numbers = codes.astype(jnp.float32) - 2.0 ** (sizes.bits - 1)
        into = pl.ds(digit * sizes.words, sizes.words)
        wide_ref[into, :] = numbers.astype(wide_ref.dtype)


_WORDS = plgpu.Layout.TILED(
    # A thread holds 8 words side by side, a warp two rows: reads of 32 bytes and writes of 16.
    plgpu.Tiling(((8, _COLUMNS), (2, _COLUMNS), (8,))),
    warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1,
)  # fmt: skip


def _product(a_ref, b_ref):
    """a·b in float32, both in shared memory."""

    def compute(acc_ref):
        plgpu.wgmma(acc_ref, a_ref, b_ref)
        return acc_ref[...]

    return pl.run_scoped(compute, plgpu.ACC((_ROWS, _COLUMNS), jnp.float32))
