"""Plain jnp replacements of the `kernels.gpu.mosaic` functions that a CPU cannot interpret.

Each has the name, parameters and result of the function it replaces.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from qwen_jax.kernels.gpu import mosaic


def smem_union(*types):
    return types


def load(ref, layout):
    return ref[...]


def full(shape, value, layout):
    return jnp.full(shape, value, jnp.float32)


def iota(shape, axis):
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def dot(a, b):
    """Computes a·b in float32."""
    # Plain reads need a fence before the copy engine writes again; wgmma's own reads do not.
    plgpu.commit_smem()
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def matmul_transposed(a_ref, b_ref):
    return dot(a_ref[...], b_ref[...].T)


def matmul_accumulate(acc, a, b_ref):
    return acc + dot(a, b_ref[...])


def scores_and_dp(q_ref, k_ref, d_out_ref, v_ref, softmax):
    return softmax(matmul_transposed(q_ref, k_ref)), matmul_transposed(d_out_ref, v_ref)


def output_matmul_with_softmax(
    acc, p, v_ref, q_ref, k_ref, *, on_issued, softmax, after_softmax, softmax_templates
):
    scores, added = mosaic.matmul_transposed(q_ref, k_ref), dot(p, v_ref[...])
    on_issued()
    results = softmax(scores)
    after_softmax()
    assert [x.shape for x in results] == [x.shape for x in softmax_templates]
    return acc + added, *results


def accumulate_dk_dv(dk, dv, k_ref, v_ref, q_ref, d_out_ref, softmax, score_gradient):
    p = softmax(mosaic.matmul_transposed(k_ref, q_ref))
    ds = score_gradient(p, mosaic.matmul_transposed(v_ref, d_out_ref))
    dk = matmul_accumulate(dk, ds, q_ref)
    return dk, matmul_accumulate(dv, p.astype(ds.dtype), d_out_ref)


def accumulate_dk_dv_dq(
    dk,
    dv,
    k_ref,
    v_ref,
    q_ref,
    d_out_ref,
    softmax,
    score_gradient,
    *,
    store_ds,
    dq_operands,
    store_dq,
):
    computed = []

    def keep_score_gradient(p, dp):
        computed.append(score_gradient(p, dp))
        return computed[0]

    dk, dv = accumulate_dk_dv(dk, dv, k_ref, v_ref, q_ref, d_out_ref, softmax, keep_score_gradient)
    store_ds(computed[0])
    store_dq(_sum_of_products(dq_operands))
    return dk, dv


def _sum_of_products(pairs):
    """Computes Σ aᵀ·b over pairs of references, by wgmma where that is interpreted."""
    if mosaic.matmul_transposed is matmul_transposed:
        return sum(dot(a_ref[...].T, b_ref[...]) for a_ref, b_ref in pairs)

    def compute(acc_ref):
        for a_ref, b_ref in pairs:
            plgpu.wgmma(acc_ref, a_ref.transpose((1, 0)), b_ref)
        return acc_ref[...]

    (a_ref, b_ref), *_ = pairs
    return pl.run_scoped(compute, plgpu.ACC((a_ref.shape[1], b_ref.shape[1]), jnp.float32))


def add_to_gmem(source_ref, target_ref):
    target_ref[...] = target_ref[...] + source_ref[...]


REGISTER_OPS = (load, full, iota)
MATMULS = (
    matmul_transposed,
    matmul_accumulate,
    scores_and_dp,
    output_matmul_with_softmax,
    accumulate_dk_dv,
    accumulate_dk_dv_dq,
)


def replace(monkeypatch, *functions):
    """Puts functions of this module in the place of those of `mosaic` with the same names."""
    for function in functions:
        monkeypatch.setattr(mosaic, function.__name__, function)
