"""Mosaic GPU building blocks of the Hopper kernels: memory types, register loads, wgmma products.

Differences between jax 0.10 and 0.11 are handled here. Everything that a CPU cannot interpret
(wgmma, register layouts, additions in global memory) is in this module too, so a test can replace
it with plain products and interpret the rest of a kernel unchanged.

Terms: a CTA is a thread block; a warpgroup is 128 threads of it that issue one wgmma (the tensor
core instruction of Hopper) together; shared memory belongs to one CTA, global memory to the GPU.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from qwen_jax.kernels.refs import Ref

RegisterLayout: TypeAlias = Any
"""How an array is spread over the registers of a warpgroup: a `plgpu.Layout`."""
MemoryType: TypeAlias = Any
"""Type of a scratch allocation: `plgpu.SMEM(…)`, `plgpu.Barrier(…)` or a union of them."""

MATRIX: RegisterLayout = plgpu.Layout.WGMMA
"""Layout of a [rows, columns] operand or result of wgmma."""
PER_ROW: RegisterLayout = plgpu.Layout.WGMMA.reduce(1)
"""Layout of one value per row of a `MATRIX`."""
PER_COLUMN: RegisterLayout = plgpu.Layout.WGMMA.reduce(0)
"""Layout of one value per column of a `MATRIX`."""

COMPILER_PARAMS = plgpu.CompilerParams(
    approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
)

NUM_MULTIPROCESSORS = 132
"""Of an H100 (SXM) or H200."""

_LOAD_TAKES_INDEX = (
    inspect.signature(plgpu.load).parameters["idx"].default is inspect.Parameter.empty
)


def smem_tile(shape: tuple[int, ...], dtype: DTypeLike) -> MemoryType:
    """Returns the type of a shared-memory array whose last two axes are an operand of wgmma.

    Rows are swizzled over 128 bytes, or over their whole length where that is less.
    """
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = min(128, shape[-1] * itemsize)
    tiling = plgpu.TilingTransform((8, swizzle // itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


def smem_union(*types: MemoryType) -> MemoryType:
    """Returns the type of one shared-memory region that is used as each of `types` in turn."""
    return plgpu.RefUnion(*types)


def load(ref: Ref, layout: RegisterLayout) -> jax.Array:
    """Returns the contents of a global- or shared-memory reference, in registers as `layout`."""
    if _LOAD_TAKES_INDEX:
        return plgpu.load(ref, (), layout=layout, optimized=False)
    # The installed stubs are jax 0.10's; jax 0.11 has no index argument.
    return plgpu.load(ref, layout=layout, optimized=False)  # type: ignore[call-arg]


def full(shape: tuple[int, ...], value: float, layout: RegisterLayout) -> jax.Array:
    """Returns a float32 array of `shape` filled with `value`, in registers as `layout`."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def iota(shape: tuple[int, int], axis: int) -> jax.Array:
    """Returns the index of each element along `axis`, int32 [rows, columns] in layout `MATRIX`."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=MATRIX)


def broadcast_rows(x: jax.Array, num_columns: int) -> jax.Array:
    """Broadcasts one value per row [M] to a matrix [M, num_columns] with constant rows."""
    return lax.broadcast_in_dim(x, (x.shape[0], num_columns), [0])


def broadcast_columns(x: jax.Array, num_rows: int) -> jax.Array:
    """Broadcasts one value per column [N] to a matrix [num_rows, N] with constant columns."""
    return lax.broadcast_in_dim(x, (num_rows, x.shape[0]), [1])


def matmul_transposed(a_ref: Ref, b_ref: Ref) -> jax.Array:
    """Computes a·bᵀ in float32.

    Args:
      a_ref: [M, K] in shared memory.
      b_ref: [N, K] in shared memory.

    Returns:
      [M, N] float32, in registers.
    """

    def compute(acc_ref):
        plgpu.wgmma(acc_ref, a_ref, b_ref.transpose((1, 0)))
        return acc_ref[...]

    shape = (a_ref.shape[0], b_ref.shape[0])
    return pl.run_scoped(compute, plgpu.ACC(shape, jnp.float32))


def matmul_accumulate(acc: jax.Array, a: jax.Array, b_ref: Ref) -> jax.Array:
    """Computes acc + a·b in float32.

    Args:
      acc: [M, N] float32, in registers.
      a: [M, K], in registers.
      b_ref: [K, N] in shared memory.

    Returns:
      [M, N] float32, in registers.
    """

    def compute(acc_ref):
        plgpu.wgmma(acc_ref, a, b_ref)

    return pl.run_state(compute)(plgpu.ACC.init(acc))


def scores_and_dp(
    q_ref: Ref,
    k_ref: Ref,
    d_out_ref: Ref,
    v_ref: Ref,
    softmax: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Computes softmax(q·kᵀ) and d_out·vᵀ; `softmax` runs while the second product is computed.

    Args:
      q_ref: queries [queries, head_dim] in shared memory.
      k_ref: keys [keys, head_dim] in shared memory.
      d_out_ref: gradient of the output, [queries, head_dim] in shared memory.
      v_ref: values [keys, head_dim] in shared memory.
      softmax: takes the scores q·kᵀ and returns the attention weights p of the same shape.

    Returns:
      (p, dp), float32 [queries, keys] each, in registers.
    """

    def compute(scores_ref, dp_ref):
        plgpu.wgmma(scores_ref, q_ref, k_ref.transpose((1, 0)))
        plgpu.wgmma(dp_ref, d_out_ref, v_ref.transpose((1, 0)))
        p = softmax(plgpu.wgmma_accumulator_load(scores_ref, wait_n=1))
        # Without the barrier the compiler moves the softmax behind the second wait.
        p = lax.optimization_barrier(p)
        return p, plgpu.wgmma_accumulator_load(dp_ref, wait_n=0)

    shapes = ((x.shape[0], y.shape[0]) for x, y in ((q_ref, k_ref), (d_out_ref, v_ref)))
    return pl.run_scoped(compute, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def output_matmul_with_softmax(
    acc: jax.Array,
    p: jax.Array,
    v_ref: Ref,
    q_ref: Ref,
    k_ref: Ref,
    *,
    on_issued: Callable[[], None],
    softmax: Callable[[jax.Array], Sequence[jax.Array]],
    after_softmax: Callable[[], None],
    softmax_templates: Sequence[jax.Array],
) -> list[jax.Array]:
    """Computes acc + p·v of one block while `softmax` runs on the scores q·kᵀ of the next block.

    Args:
      acc: output so far, float32 [queries, head_dim], in registers.
      p: attention weights of the earlier block [queries, keys], in registers.
      v_ref: values of the earlier block [keys, head_dim] in shared memory.
      q_ref: queries [queries, head_dim] in shared memory.
      k_ref: keys of the next block [keys, head_dim] in shared memory.
      on_issued: called once both products have been issued to the tensor cores.
      softmax: takes float32 scores [queries, keys] and returns a tuple of arrays.
      after_softmax: must wait for a barrier; without one the assembler moves the work of `softmax`
        behind the wait for p·v.
      softmax_templates: arrays of the shapes, dtypes and layouts that `softmax` returns.

    Returns:
      [acc + p·v, *softmax(q·kᵀ)].
    """

    def compute(refs):
        acc_ref, *result_refs = refs

        def with_scores(scores_ref):
            plgpu.wgmma(scores_ref, q_ref, k_ref.transpose((1, 0)))
            plgpu.wgmma(acc_ref, p, v_ref)
            on_issued()
            scores = plgpu.wgmma_accumulator_load(scores_ref, wait_n=1)
            results = lax.optimization_barrier(softmax(scores))
            after_softmax()
            for ref, x in zip(result_refs, results, strict=True):
                ref[...] = x

        shape = (q_ref.shape[0], k_ref.shape[0])
        pl.run_scoped(with_scores, plgpu.ACC(shape, jnp.float32))

    # p·v reads its registers until it is done, so whatever uses the results has to wait for it.
    return lax.optimization_barrier(
        pl.run_state(compute)((plgpu.ACC.init(acc), *softmax_templates))
    )


def accumulate_dk_dv(
    dk: jax.Array,
    dv: jax.Array,
    k_ref: Ref,
    v_ref: Ref,
    q_ref: Ref,
    d_out_ref: Ref,
    softmax: Callable[[jax.Array], jax.Array],
    score_gradient: Callable[[jax.Array, jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Computes (dk + ds·q, dv + p·d_out) for one block of keys and one of queries.

    With p = softmax(k·qᵀ) and ds = score_gradient(p, v·d_outᵀ), both [keys, queries]. `softmax`
    runs while the tensor cores compute v·d_outᵀ, `score_gradient` while they compute p·d_out.

    Args:
      dk: gradient of the keys so far, float32 [keys, head_dim], in registers.
      dv: gradient of the values so far, float32 [keys, head_dim], in registers.
      k_ref: keys [keys, head_dim] in shared memory.
      v_ref: values [keys, head_dim] in shared memory.
      q_ref: queries [queries, head_dim] in shared memory.
      d_out_ref: gradient of the output, [queries, head_dim] in shared memory.
      softmax: takes float32 scores and returns float32 weights of the same shape.
      score_gradient: takes (p, dp) and returns ds in the operands' dtype.

    Returns:
      (dk, dv) with this block added, float32 [keys, head_dim] each.
    """

    def add_dk(dk_ref, ds):
        plgpu.wgmma(dk_ref, ds, q_ref)

    return _accumulate_gradients(
        dk, dv, k_ref, v_ref, q_ref, d_out_ref, softmax, score_gradient, add_dk
    )


def accumulate_dk_dv_dq(
    dk: jax.Array,
    dv: jax.Array,
    k_ref: Ref,
    v_ref: Ref,
    q_ref: Ref,
    d_out_ref: Ref,
    softmax: Callable[[jax.Array], jax.Array],
    score_gradient: Callable[[jax.Array, jax.Array], jax.Array],
    *,
    store_ds: Callable[[jax.Array], None],
    dq_operands: Sequence[tuple[Ref, Ref]],
    store_dq: Callable[[jax.Array], None],
) -> tuple[jax.Array, jax.Array]:
    """Computes (dk + ds·q, dv + p·d_out) for one block, and passes its part of dq to `store_dq`.

    With p = softmax(k·qᵀ) and ds = score_gradient(p, v·d_outᵀ), both [keys, queries].

    Args:
      dk: gradient of the keys so far, float32 [keys, head_dim], in registers.
      dv: gradient of the values so far, float32 [keys, head_dim], in registers.
      k_ref: keys [keys, head_dim] in shared memory.
      v_ref: values [keys, head_dim] in shared memory.
      q_ref: queries [queries, head_dim] in shared memory.
      d_out_ref: gradient of the output, [queries, head_dim] in shared memory.
      softmax: takes float32 scores and returns float32 weights of the same shape.
      score_gradient: takes (p, dp) and returns ds in the operands' dtype.
      store_ds: takes ds [keys, queries] and writes it to the shared memory that `dq_operands` read.
      dq_operands: pairs (a, b) in shared memory, a [keys, queries] and b [keys, columns];
        dq = Σ aᵀ·b over the pairs.
      store_dq: takes dq, float32 [queries, columns]; runs while the tensor cores compute dk.

    Returns:
      (dk, dv) with this block added, float32 [keys, head_dim] each.
    """

    def add_dk_and_store_dq(dk_ref, ds):
        store_ds(ds)

        def compute(dq_ref):
            for a_ref, b_ref in dq_operands:
                plgpu.wgmma(dq_ref, a_ref.transpose((1, 0)), b_ref)
            plgpu.wgmma(dk_ref, ds, q_ref)
            store_dq(plgpu.wgmma_accumulator_load(dq_ref, wait_n=1))

        (a_ref, b_ref), *_ = dq_operands
        pl.run_scoped(compute, plgpu.ACC((a_ref.shape[1], b_ref.shape[1]), jnp.float32))

    return _accumulate_gradients(
        dk, dv, k_ref, v_ref, q_ref, d_out_ref, softmax, score_gradient, add_dk_and_store_dq
    )


def _accumulate_gradients(
    dk: jax.Array,
    dv: jax.Array,
    k_ref: Ref,
    v_ref: Ref,
    q_ref: Ref,
    d_out_ref: Ref,
    softmax: Callable[[jax.Array], jax.Array],
    score_gradient: Callable[[jax.Array, jax.Array], jax.Array],
    add_dk: Callable[[Ref, jax.Array], None],
) -> tuple[jax.Array, jax.Array]:
    """Computes `accumulate_dk_dv`, with the product ds·q left to a callback.

    add_dk: takes the accumulator reference of dk and the array ds [keys, queries], and issues
      dk += ds·q. The other arguments and the result are those of `accumulate_dk_dv`.
    """

    def compute(refs):
        dk_ref, dv_ref = refs

        def with_scores(scores_ref, dp_ref):
            plgpu.wgmma(scores_ref, k_ref, q_ref.transpose((1, 0)))
            plgpu.wgmma(dp_ref, v_ref, d_out_ref.transpose((1, 0)))
            p = softmax(plgpu.wgmma_accumulator_load(scores_ref, wait_n=1))
            plgpu.wgmma(dv_ref, p.astype(jnp.dtype(q_ref.dtype)), d_out_ref)
            add_dk(dk_ref, score_gradient(p, plgpu.wgmma_accumulator_load(dp_ref, wait_n=1)))

        shape = (k_ref.shape[0], q_ref.shape[0])
        pl.run_scoped(with_scores, plgpu.ACC(shape, jnp.float32), plgpu.ACC(shape, jnp.float32))

    return pl.run_state(compute)((plgpu.ACC.init(dk), plgpu.ACC.init(dv)))


def add_to_gmem(source_ref: Ref, target_ref: Ref) -> None:
    """Adds a float32 array in shared memory to one in global memory, by the copy engine (TMA)."""
    plgpu.copy_smem_to_gmem(source_ref, target_ref, reduction_op="add")


def is_hopper(device_kind: str) -> bool:
    """Returns whether a device kind, as jax spells it, is a Hopper GPU, which has wgmma and TMA."""
    return any(name in device_kind.upper() for name in ("H100", "H200", "H800", "H20"))


def splits_for_fewest_waves(num_units: int, steps_per_unit: int, max_splits: int) -> int:
    """Returns into how many CTAs to split each of several equal units of work.

    Minimises waves of CTAs × steps of the longest split, where starting a split and merging its
    result count as four steps. CTAs have one warpgroup, so a multiprocessor runs two at a time.

    Args:
      num_units: units of work.
      steps_per_unit: loop steps that one unit takes unsplit.
      max_splits: upper bound of the result; it is also at most half of `steps_per_unit`.
    """

    def cost(splits):
        waves = -(-num_units * splits // (2 * NUM_MULTIPROCESSORS))
        return waves * (-(-steps_per_unit // splits) + 4)

    return min(range(1, max(1, min(steps_per_unit // 2, max_splits)) + 1), key=cost)


def num_ctas() -> int:
    """Returns the number of multiprocessors of the device that code is traced for.

    A persistent kernel runs one CTA on each. It is 132 where neither the abstract mesh nor the
    local device is a GPU.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None and device.num_cores:
        return device.num_cores
    device = jax.local_devices()[0]
    return device.core_count if device.platform == "gpu" else NUM_MULTIPROCESSORS
