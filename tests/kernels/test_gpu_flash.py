"""Hopper attention kernels without a GPU: every mask and shape lowers, what cannot run is refused.

Lowering stops at Mosaic GPU's own code, with its check of shared memory; ptxas needs CUDA's wheels.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest

from qwen_jax.errors import UserError
from qwen_jax.kernels.flash import flash_attention
from qwen_jax.kernels.gpu import flash_forward
from qwen_jax.kernels.gpu.flash import KERNEL, unsupported_reason
from qwen_jax.kernels.gpu.flash_pipeline import PipelineConfig
from qwen_jax.kernels.mask import make_mask

CHECKS = [
    jax.export.DisabledSafetyCheck.custom_call(name) for name in ("mosaic_gpu_v2", "mosaic_gpu")
]


def lower(function, *arrays):
    """Returns the exported program for CUDA; runs on any machine."""
    return jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=CHECKS)(*arrays)


def shapes(batch, q_len, k_len, heads, kv_heads, head_dim, dtype):
    """Returns abstract (q, k, v, lse, d_out, delta, query ids, key ids, start)."""
    q = jax.ShapeDtypeStruct((batch, q_len, heads, head_dim), dtype)
    k = jax.ShapeDtypeStruct((batch, k_len, kv_heads, head_dim), dtype)
    statistics = jax.ShapeDtypeStruct((batch, heads, q_len), jnp.float32)
    q_ids, k_ids = (jax.ShapeDtypeStruct((batch, n), jnp.int32) for n in (q_len, k_len))
    start = jax.ShapeDtypeStruct((batch,), jnp.int32)
    return q, k, k, statistics, q, statistics, q_ids, k_ids, start


MASKS = [
    {"segments": segments, "window": window, "start": start}
    for segments, window, start in itertools.product(
        (False, True), (None, 100, "traced"), (False, True)
    )
]


def forward_and_backward(mask_options, grad_dtype=None):
    """Returns a function of the arrays of `shapes` that computes (out, lse, dq, dk, dv)."""

    def run(q, k, v, lse, d_out, delta, q_ids, k_ids, start):
        segments, window = mask_options["segments"], mask_options["window"]
        mask = make_mask(
            start if mask_options["start"] else None,
            q_ids if segments else None,
            k_ids if segments else None,
            start[0] if window == "traced" else window,
        )
        results = KERNEL.forward(q, k, v, mask, 0.1)
        gradients = KERNEL.backward(q, k, v, mask, 0.1, lse, d_out, delta, grad_dtype)
        return *results, *gradients

    return run


@pytest.fixture
def reproducible(monkeypatch):
    """Sets the flag that selects reproducible kernels; XLA itself has read its flags already."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=true")


@pytest.mark.parametrize(
    ("mask_options", "head_dim"),
    [(m, 64 + 64 * ((i + i // 2) % 2)) for i, m in enumerate(MASKS)],
    ids=str,
)
def test_every_mask_lowers_for_cuda(mask_options, head_dim):
    arrays = shapes(2, 512, 512, 4, 2, head_dim, jnp.bfloat16)
    exported = lower(forward_and_backward(mask_options), *arrays)
    module = exported.mlir_module()
    assert module.count("@mosaic_gpu") == 2
    assert "output_operand_alias" in module  # dq, which is added to in place
    q, k = arrays[:2]
    dims = [q.shape, (2, 4, 512), q.shape, k.shape, k.shape]
    assert [x.shape for x in exported.out_avals] == dims


@pytest.mark.parametrize("head_dim", [64, 128])
def test_reproducible_gradients_add_nothing_in_memory(head_dim, reproducible):
    arrays = shapes(2, 512, 512, 4, 2, head_dim, jnp.bfloat16)
    module = lower(forward_and_backward(MASKS[-1]), *arrays).mlir_module()
    assert module.count("@mosaic_gpu") == 3
    assert "output_operand_alias" not in module


@pytest.mark.parametrize(
    ("sizes", "dtype", "grad_dtype"),
    [
        ((1, 500, 300, 8, 8), jnp.bfloat16, None),  # odd lengths, multi-head
        ((1, 7, 1000, 8, 1), jnp.float16, jnp.float32),  # few queries, one kv head
        ((3, 4096, 4096, 64, 8), jnp.bfloat16, jnp.float32),  # several sections of the work queue
    ],
)
def test_every_shape_lowers_for_cuda(sizes, dtype, grad_dtype):
    arrays = shapes(*sizes, 128, dtype)
    exported = lower(forward_and_backward(MASKS[-1], grad_dtype), *arrays)
    assert [x.shape for x in exported.out_avals[2:]] == [x.shape for x in arrays[:3]]
    assert {x.dtype for x in exported.out_avals[2:]} == {jnp.dtype(grad_dtype or dtype)}


def test_gradients_lower_inside_a_rematerialised_scan_on_a_mesh():
    """As a model takes them: a scan over layers, recomputed, on a mesh of two axes."""
    mesh, spec = jax.make_mesh((2, 2), ("data", "tensor")), jax.P("data", None, "tensor")

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False
    )
    def attend(q, k, v):
        mask = make_mask(None, None, None, None)
        return flash_attention(q, k, v, mask, 0.1, KERNEL)[0]

    def loss(q, k, v):
        def layer(q, _):
            return jax.checkpoint(attend)(q, k, v), None

        return jax.lax.scan(layer, q, length=2)[0].astype(jnp.float32).sum()

    sharding = jax.NamedSharding(mesh, spec)
    q, k = (jax.ShapeDtypeStruct((2, 512, n, 128), jnp.bfloat16, sharding=sharding) for n in (4, 2))
    module = lower(jax.grad(loss, (0, 1, 2)), q, k, k).mlir_module()
    assert module.count("@mosaic_gpu") >= 2 and "output_operand_alias" in module


def test_exceeding_shared_memory_is_an_error(monkeypatch):
    monkeypatch.setattr(flash_forward, "forward_config", lambda head_dim: PipelineConfig(128, 4))
    with pytest.raises(ValueError, match="exceeds available shared memory"):
        lower(forward_and_backward(MASKS[0]), *shapes(1, 512, 512, 2, 2, 128, jnp.bfloat16))


def test_why_not_names_the_unsupported_property():
    good = {"head_dim": 128, "dtype": jnp.bfloat16, "device_kind": "NVIDIA H200"}
    assert unsupported_reason(**good) is None
    assert (
        unsupported_reason(**good | {"dtype": "float16", "device_kind": "NVIDIA H100 80GB HBM3"})
        is None
    )
    assert "not 80" in unsupported_reason(**good | {"head_dim": 80})
    assert "not float32" in unsupported_reason(**good | {"dtype": jnp.float32})
    assert "'cpu'" in unsupported_reason(**good | {"device_kind": "cpu"})
    assert "A100" in unsupported_reason(**good | {"device_kind": "NVIDIA A100-SXM4-80GB"})


def test_unsupported_operands_are_refused():
    q = jnp.zeros((1, 128, 2, 64), jnp.bfloat16)
    mask = make_mask(None, None, None, None)
    refused = ((q.astype(jnp.float32),) * 3, (q, q.astype(jnp.float16), q), (q[..., :32],) * 3)
    for operands in refused:
        with pytest.raises(UserError, match="pallas_gpu"):
            KERNEL.forward(*operands, mask, 1.0)
    with pytest.raises(UserError, match="scale"):
        KERNEL.forward(q, q, q, mask, -1.0)
    with pytest.raises(ValueError, match="CPU"):  # never interpreted unless a test requests it
        KERNEL.forward(q, q, q, mask, 1.0)
