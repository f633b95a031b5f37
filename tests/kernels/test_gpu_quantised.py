"""Hopper group matmul on a CPU: lowered for CUDA, and interpreted with plain products for wgmma."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import params as gpu_interpret

from qwen_jax.kernels import quantised
from qwen_jax.kernels.gpu import mosaic
from qwen_jax.kernels.gpu import quantised_matmul as gpu_quantised
from tests.kernels import gpu_plain_ops
from tests.kernels.test_quantised import error, make_case

CASES = {
    "4 bits, two splits": ((5, 512, 256), {}, {"splits": 2}),
    "8 bits, a stack, zeros": ((3, 256, 128), {"bits": 8, "layers": 2, "zeros": True}, {}),
    "groups of 256, splits of unequal length, two blocks of rows": (
        (70, 768, 128),
        {"group": 256},
        {"splits": 4},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_lowers_for_hopper(name):
    """Down to Mosaic GPU's own code, with its check of shared memory; ptxas needs CUDA's wheels."""
    sizes, case_options, options = CASES[name]
    case = make_case(*sizes, **case_options)
    checks = [
        jax.export.DisabledSafetyCheck.custom_call(x) for x in ("mosaic_gpu", "mosaic_gpu_v2")
    ]
    exported = jax.export.export(
        jax.jit(lambda x, weight: gpu_quantised.quantised_matmul(x, weight, **options)),
        platforms=["cuda"],
        disabled_checks=checks,
    )(case.x, case.weight)
    assert exported.mlir_module().count("@mosaic_gpu") == 1


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernel_matches_float64(name, monkeypatch):
    """All but register layouts and wgmma, which a CPU cannot run: plain products replace those."""
    gpu_plain_ops.replace(monkeypatch, *gpu_plain_ops.REGISTER_OPS, gpu_plain_ops.smem_union)
    monkeypatch.setattr(
        gpu_quantised,
        "_wgmma_product",
        lambda a, b: jnp.dot(a[...], b[...], preferred_element_type=jnp.float32),
    )
    sizes, case_options, options = CASES[name]
    case = make_case(*sizes, **case_options)
    with gpu_interpret.force_gpu_interpret_mode(gpu_interpret.InterpretGPUParams()):
        got = gpu_quantised.quantised_matmul(case.x, case.weight, **options)
    assert error(got, case) < 2e-3


def test_many_rows_are_multiplied_by_dequantised_weights():
    case = make_case(300, 256, 128, layers=2)
    # Here weights are rounded to bf16: by 2⁻⁹ each, which averages out over the sum.
    assert error(gpu_quantised.quantised_matmul(case.x, case.weight), case) < 5e-3


def test_splits_occupy_the_gpu():
    """CTAs come in mostly whole waves of 264, as many as run at once, at Qwen-7B's widths."""
    for inputs, outputs in ((4096, 4096), (4096, 11008), (11008, 4096)):
        blocks, chunks = outputs // 128, inputs // 128
        splits = gpu_quantised.choose_splits(blocks, chunks)
        assert 1 <= splits <= 32
        waves = -(-blocks * splits // 264)
        assert blocks * splits / (264 * waves) > 0.6, (inputs, outputs, splits)


def test_auto_selects_the_kernel_on_hopper_and_refusals_name_the_reason(monkeypatch):
    monkeypatch.setattr(quantised, "platform", lambda: ("gpu", "H200"))
    case = make_case(2, 256, 128)
    weight = case.weight
    choose = quantised.choose_group_matmul
    # The device of this test is a CPU, which the kernel does not support.
    assert choose("auto", weight, 2, jnp.bfloat16) == "reference"
    monkeypatch.setattr(mosaic, "is_hopper", lambda kind: True)
    assert choose("auto", weight, 2, jnp.bfloat16) == "pallas_gpu"
    small_groups = make_case(2, 256, 128, group=32).weight
    odd_outputs = make_case(2, 256, 200).weight
    reason = gpu_quantised.unsupported_reason
    assert "float32" in reason(weight, rows=2, dtype=jnp.float32)
    assert "groups of 32" in reason(small_groups, rows=2, dtype=jnp.bfloat16)
    assert "200 outputs" in reason(odd_outputs, rows=2, dtype=jnp.bfloat16)
    assert np.isfinite(np.asarray(case.x, np.float32)).all()
