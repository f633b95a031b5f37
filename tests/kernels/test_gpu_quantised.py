"""Hopper's group matmul: lowered on a CPU, and interpreted with plain products for wgmma."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import params as gpu_interpret

from qwen_jax.kernels import quantised
from qwen_jax.kernels.gpu import mosaic
from qwen_jax.kernels.gpu import quantised_matmul as gpu_quantised
from tests.kernels.test_quantised import error, make_case

CASES = {
    "4 bits, two shares": ((5, 512, 256), {}, {"splits": 2}),
    "8 bits, a stack, zeros": ((3, 256, 128), {"bits": 8, "layers": 2, "zeros": True}, {}),
    "groups of 256, shares of unequal length, two blocks of rows": (
        (70, 768, 128),
        {"group": 256},
        {"splits": 4},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_lowers_for_hopper(name):
    """To Mosaic GPU's own code, with the check of shared memory; ptxas needs CUDA's wheels."""
    sizes, how, options = CASES[name]
    case = make_case(*sizes, **how)
    checks = [
        jax.export.DisabledSafetyCheck.custom_call(x) for x in ("mosaic_gpu", "mosaic_gpu_v2")
    ]
    exported = jax.export.export(
        jax.jit(lambda x, weight: gpu_quantised.matmul(x, weight, **options)),
        platforms=["cuda"],
        disabled_checks=checks,
    )(case.x, case.weight)
    assert exported.mlir_module().count("@mosaic_gpu") == 1


@pytest.mark.parametrize("name", CASES)
def test_interpreted_is_the_product(name, monkeypatch):
    """Everything but layouts and wgmma, which a CPU can't run: plain products stand for those."""
    plain = {
        "share": lambda *memory: memory,
        "load": lambda ref, layout: ref[...],
        "full": lambda shape, value, layout: jnp.full(shape, value, jnp.float32),
    }
    for attribute, function in plain.items():
        monkeypatch.setattr(mosaic, attribute, function)
    monkeypatch.setattr(
        gpu_quantised,
        "_product",
        lambda a, b: jnp.dot(a[...], b[...], preferred_element_type=jnp.float32),
    )
    sizes, how, options = CASES[name]
    case = make_case(*sizes, **how)
    with gpu_interpret.force_gpu_interpret_mode(gpu_interpret.InterpretGPUParams()):
        got = gpu_quantised.matmul(case.x, case.weight, **options)
    assert error(got, case) < 2e-3


def test_a_prompt_is_dequantised_and_multiplied():
    case = make_case(300, 256, 128, layers=2)
    # Weights are rounded to bf16 here: 2⁻⁹ each, averaged over the sum.
    assert error(gpu_quantised.matmul(case.x, case.weight), case) < 5e-3


def test_shares_fill_the_chip():
    """Whole waves of the 264 blocks that run at once, at Qwen-7B's widths and one row."""
    for inputs, outputs in ((4096, 4096), (4096, 11008), (11008, 4096)):
        blocks, chunks = outputs // 128, inputs // 128
        splits = gpu_quantised.choose_splits(blocks, chunks)
        assert 1 <= splits <= 32
        waves = -(-blocks * splits // 264)
        assert blocks * splits / (264 * waves) > 0.6, (inputs, outputs, splits)


def test_the_gpu_takes_what_its_kernel_can_and_names_the_rest(monkeypatch):
    monkeypatch.setattr(quantised, "platform", lambda: ("gpu", "H200"))
    case = make_case(2, 256, 128)
    weight = case.weight
    choose = quantised.choose_group_matmul
    # This machine's device is a CPU, which the kernel is not made for.
    assert choose("auto", weight, 2, jnp.bfloat16) == "reference"
    monkeypatch.setattr(mosaic, "is_hopper", lambda kind: True)
    assert choose("auto", weight, 2, jnp.bfloat16) == "pallas_gpu"
    refused = gpu_quantised.refusal
    assert "float32" in refused(weight, rows=2, dtype=jnp.float32)
    assert "groups of 32" in refused(make_case(2, 256, 128, group=32).weight, rows=2,
                                     dtype=jnp.bfloat16)  # fmt: skip
    assert "200 outputs" in refused(make_case(2, 256, 200).weight, rows=2, dtype=jnp.bfloat16)
    assert np.isfinite(np.asarray(case.x, np.float32)).all()
