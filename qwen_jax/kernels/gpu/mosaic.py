"""The few Mosaic GPU operations the kernels are made of; what differs between jax 0.10 and 0.11.

Everything a CPU cannot interpret is here as well, so that a test can put plain products in its
place and run the rest of a kernel as it stands.
"""

from __future__ import annotations

import inspect

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

MATRIX = plgpu.Layout.WGMMA
PER_ROW = plgpu.Layout.WGMMA.reduce(1)
PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)

PARAMS = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)

_LOAD_TAKES_INDEX = (
    inspect.signature(plgpu.load).parameters["idx"].default is inspect.Parameter.empty
)


def tile_memory(shape: tuple[int, ...], dtype) -> plgpu.GPUMemoryRef:
    """Shared memory for matrix operands: rows swizzled over 128 bytes, or over all they have."""
    itemsize = jnp.dtype(dtype).itemsize
    size = min(128, shape[-1] * itemsize)
    tiling = plgpu.TilingTransform((8, size // itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(size)))


def share(*memory):
    """Shared memory used for one thing, then for another."""
    return plgpu.RefUnion(*memory)


def load(ref, layout) -> jax.Array:
    """Reads a reference into registers."""
    if _LOAD_TAKES_INDEX:
        return plgpu.load(ref, (), layout=layout, optimized=False)
    return plgpu.load(ref, layout=layout, optimized=False)


def full(shape: tuple[int, ...], value: float, layout) -> jax.Array:
    """A constant, float32."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def iota(shape: tuple[int, int], axis: int) -> jax.Array:
    """int32 positions along one axis of a matrix."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=MATRIX)


def rows(x: jax.Array, columns: int) -> jax.Array:
    """[M] -> [M, columns]."""
    return lax.broadcast_in_dim(x, (x.shape[0], columns), [0])


def columns(x: jax.Array, rows: int) -> jax.Array:
    """[N] -> [rows, N]."""
    return lax.broadcast_in_dim(x, (rows, x.shape[0]), [1])


def two_products(a_ref, b_ref, c_ref, d_ref, between) -> tuple[jax.Array, jax.Array]:
    """(between(a·bᵀ), c·dᵀ), float32; `between` runs while c·dᵀ is computed."""

    def compute(first_ref, second_ref):
        plgpu.wgmma(first_ref, a_ref, b_ref.transpose((1, 0)))
        plgpu.wgmma(second_ref, c_ref, d_ref.transpose((1, 0)))
        first = between(plgpu.wgmma_accumulator_load(first_ref, wait_n=1))
        first = lax.optimization_barrier(first)  # or it is computed after the second wait
        return first, plgpu.wgmma_accumulator_load(second_ref, wait_n=0)

    shapes = ((x.shape[0], y.shape[0]) for x, y in ((a_ref, b_ref), (c_ref, d_ref)))
    return pl.run_scoped(compute, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def product(a_ref, b_ref) -> jax.Array:
    """a·bᵀ in float32, both in shared memory."""

    def compute(acc_ref):
        plgpu.wgmma(acc_ref, a_ref, b_ref.transpose((1, 0)))
        return acc_ref[...]

    shape = (a_ref.shape[0], b_ref.shape[0])
    return pl.run_scoped(compute, plgpu.ACC(shape, jnp.float32))


def accumulate(total: jax.Array, a: jax.Array, b_ref) -> jax.Array:
    """total + a·b: a in registers, b in shared memory."""

    def compute(acc_ref):
        plgpu.wgmma(acc_ref, a, b_ref)

    return pl.run_state(compute)(plgpu.ACC.init(total))


def product_beside(total, a, b_ref, q_ref, k_ref, issued, consume, after, results):
    """(total + a·b, *consume(q·kᵀ)): `consume` runs while the tensor cores compute a·b.

    a is in registers, b, q and k in shared memory. `issued` is called when both products have been
    given to the tensor cores. `after` has to wait for a barrier: without that border the assembler
    moves what `consume` does behind the wait for a·b. results: arrays like those `consume` returns.
    """

    def compute(refs):
        total_ref, *result_refs = refs

        def scores(s_ref):
            plgpu.wgmma(s_ref, q_ref, k_ref.transpose((1, 0)))
            plgpu.wgmma(total_ref, a, b_ref)
            issued()
            made = lax.optimization_barrier(consume(plgpu.wgmma_accumulator_load(s_ref, wait_n=1)))
            after()
            for ref, x in zip(result_refs, made, strict=True):
                ref[...] = x

        shape = (q_ref.shape[0], k_ref.shape[0])
        pl.run_scoped(scores, plgpu.ACC(shape, jnp.float32))

    # What is made of the results is to wait for a·b, which reads registers all the while.
    return lax.optimization_barrier(pl.run_state(compute)((plgpu.ACC.init(total), *results)))


def key_gradients(dk, dv, k_ref, v_ref, q_ref, o_ref, weights, gradient):
    """(dk + ds·q, dv + p·d_out), p = weights(k·qᵀ), ds = gradient(p, v·d_outᵀ), sums in float32.

    k_ref, v_ref: [keys, H], q_ref, o_ref: [queries, H] in shared memory; dk, dv: [keys, H] in
    registers; ds in the operands' dtype. While the tensor cores compute v·d_outᵀ, `weights` runs;
    while p·d_out, `gradient`.
    """

    def finish(dk_ref, ds):
        plgpu.wgmma(dk_ref, ds, q_ref)

    return _gradients(dk, dv, k_ref, v_ref, q_ref, o_ref, weights, gradient, finish)


def all_gradients(dk, dv, k_ref, v_ref, q_ref, o_ref, weights, gradient, share, factors, deliver):
    """`key_gradients`, and deliver(Σ aᵀ·b over factors) for a part of dq, all in shared memory.

    share(ds) lays ds down where factors take it from. While dk is computed, `deliver` runs.
    """

    def finish(dk_ref, ds):
        share(ds)

        def compute(dq_ref):
            for a_ref, b_ref in factors:
                plgpu.wgmma(dq_ref, a_ref.transpose((1, 0)), b_ref)
            plgpu.wgmma(dk_ref, ds, q_ref)
            deliver(plgpu.wgmma_accumulator_load(dq_ref, wait_n=1))

        (a_ref, b_ref), *_ = factors
        pl.run_scoped(compute, plgpu.ACC((a_ref.shape[1], b_ref.shape[1]), jnp.float32))

    return _gradients(dk, dv, k_ref, v_ref, q_ref, o_ref, weights, gradient, finish)


def _gradients(dk, dv, k_ref, v_ref, q_ref, o_ref, weights, gradient, finish):
    def compute(refs):
        dk_ref, dv_ref = refs

        def scores(s_ref, dp_ref):
            plgpu.wgmma(s_ref, k_ref, q_ref.transpose((1, 0)))
            plgpu.wgmma(dp_ref, v_ref, o_ref.transpose((1, 0)))
            p = weights(plgpu.wgmma_accumulator_load(s_ref, wait_n=1))
            plgpu.wgmma(dv_ref, p.astype(jnp.dtype(q_ref.dtype)), o_ref)
            finish(dk_ref, gradient(p, plgpu.wgmma_accumulator_load(dp_ref, wait_n=1)))

        shape = (k_ref.shape[0], q_ref.shape[0])
        pl.run_scoped(scores, plgpu.ACC(shape, jnp.float32), plgpu.ACC(shape, jnp.float32))

    return pl.run_state(compute)((plgpu.ACC.init(dk), plgpu.ACC.init(dv)))


def add_to_memory(source_ref, target_ref) -> None:
    """target += source, from shared to global memory by the copy engine, float32."""
    plgpu.copy_smem_to_gmem(source_ref, target_ref, reduction_op="add")


def is_hopper(device_kind: str) -> bool:
    """Whether a device of this kind has wgmma and the copy engine the kernels are written for."""
    return any(name in device_kind.upper() for name in ("H100", "H200", "H800", "H20"))


def fewest_waves(units: int, steps: int, most: int) -> int:
    """Parts, `most` at most, to cut each of `units` pieces of work of `steps` steps into.

    The fewest waves of thread blocks by steps of the longest part; starting a part and merging it
    counts as four steps. Of thread blocks of one warpgroup, two share a multiprocessor.
    """

    def cost(parts):
        return -(-units * parts // (2 * 132)) * (-(-steps // parts) + 4)

    return min(range(1, max(1, min(steps // 2, most)) + 1), key=cost)


def ctas() -> int:
    """How many thread blocks run at once: one for each multiprocessor (132 on an H100 or H200)."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None and device.num_cores:
        return device.num_cores
    device = jax.local_devices()[0]
    return device.core_count if device.platform == "gpu" else 132
