"""Hopper decode kernel on a CPU: lowered for CUDA, interpreted with plain products, split plans."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import params as gpu_interpret

from qwen_jax.kernels.gpu import paged_decode as gpu_decode
from qwen_jax.kernels.gpu import paged_decode_kernel
from tests.kernels import gpu_plain_ops
from tests.kernels.paged_cases import NO_WINDOW, check, make_case


def operands(case, window=None):
    """Returns the positional arguments of `paged_decode` for a case whose queries end the cache."""
    start = jnp.asarray(case.lengths - case.q.shape[1])
    window = jnp.int32(NO_WINDOW if window is None else window)
    return (jnp.asarray(case.q), *case.flat(), start, window)


SHAPES = {
    "grouped": {},
    "8 bits": {"dtype": jnp.uint8},
    "heads of 64, groups of 7": {"width": 64, "groups": 7},
    "8 bits, heads of 64, a draft": {"width": 64, "dtype": jnp.uint8, "q_len": 3},
    "a draft of eight": {"groups": 8, "q_len": 8},
    "multi-head": {"groups": 1, "kv_heads": 4},
}


@pytest.mark.parametrize("name", SHAPES)
def test_lowers_for_hopper(name):
    """Down to Mosaic GPU's own code, with its check of shared memory; ptxas needs CUDA's wheels."""
    case = make_case((100, 200), page=64, **SHAPES[name])
    checks = [
        jax.export.DisabledSafetyCheck.custom_call(x) for x in ("mosaic_gpu", "mosaic_gpu_v2")
    ]
    exported = jax.export.export(
        jax.jit(lambda *x: gpu_decode.paged_decode(*x, scale=0.1)),
        platforms=["cuda"],
        disabled_checks=checks,
    )(*operands(case))
    assert exported.mlir_module().count("@mosaic_gpu") == 1


CASES = {
    "block borders, three splits": ({"splits": 3}, {"lengths": (0, 1, 63, 64, 65, 256)}),
    "8 bits": ({"splits": 2}, {"lengths": (1, 130), "dtype": jnp.uint8}),
    "window, heads of 64": ({"splits": 2, "window": 70}, {"lengths": (64, 200), "width": 64}),
    "8 bits, a draft, window": (
        {"splits": 1, "window": 66},
        {"lengths": (2, 67, 193), "dtype": jnp.uint8, "q_len": 4, "groups": 2},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernel_matches_float64(name, monkeypatch):
    """All but register layouts and wgmma, which a CPU cannot run: plain products replace those."""

    def widen_codes(codes_ref, widened_ref):
        widened_ref[...] = (codes_ref[...].astype(jnp.float32) - 128).astype(widened_ref.dtype)

    gpu_plain_ops.replace(
        monkeypatch,
        *gpu_plain_ops.REGISTER_OPS,
        gpu_plain_ops.smem_union,
        gpu_plain_ops.matmul_transposed,
        gpu_plain_ops.matmul_accumulate,
    )
    monkeypatch.setattr(paged_decode_kernel, "_widen_codes", widen_codes)
    options, sizes = (dict(x) for x in CASES[name])
    kv_heads = 1 if "q_len" in sizes else 2
    case = make_case(sizes.pop("lengths"), page=64, kv_heads=kv_heads, **sizes)
    window = options.pop("window", None)
    with gpu_interpret.force_gpu_interpret_mode(gpu_interpret.InterpretGPUParams()):
        got = gpu_decode.paged_decode(
            *operands(case, window), scale=case.q.shape[-1] ** -0.5, **options
        )
    check(got, case.expected(window=window), 1e-2)


def test_splits_occupy_the_gpu():
    """CTAs come in nearly whole waves of the 264 that run at once, from one request on."""
    for pairs in (1, 2, 8, 64, 512):
        for blocks in (32, 128, 512):
            splits = gpu_decode.choose_splits(pairs, blocks)
            ctas = pairs * splits
            assert 1 <= splits <= 128
            if pairs * min(blocks // 2, 128) >= 264:
                waves = -(-ctas // 264)
                assert ctas / (264 * waves) > 0.9, (pairs, blocks, splits)
    assert gpu_decode.choose_splits(8, 512) == 32
    assert gpu_decode.choose_splits(1, 1) == 1


def test_split_plan_covers_every_needed_block_once():
    """The splits of a request cover the blocks it needs, and use the mask where it is needed."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 1000, 40).astype(np.int32)
    for q_len, window, splits in ((1, NO_WINDOW, 5), (4, 100, 3), (8, 64, 16), (2, 1, 1)):
        start = lengths - q_len
        shape = paged_decode_kernel.DecodeShape(
            kv_heads=1,
            groups=1,
            q_len=q_len,
            rows=8,
            head_dim=64,
            page_size=64,
            pages_per_request=16,
            splits=splits,
            scale=1.0,
            quantised=False,
        )
        plan = gpu_decode._split_plan(jnp.asarray(lengths), jnp.asarray(start), window, shape)
        plan = np.asarray(plan).reshape(40, splits, -1)
        for r in range(40):
            seen = np.zeros((q_len, 1024), bool)
            for t in range(q_len):
                slot = start[r] + t
                if slot >= 0:
                    seen[t, max(0, slot - window + 1) : min(slot, lengths[r] - 1) + 1] = True
            blocks = seen.reshape(q_len, 16, 64)
            taken = []
            for first, count, tail, masked, *_ in plan[r]:
                for step in range(count):
                    block = first + (count - 1 - step if step < tail else step - tail)
                    taken.append(block)
                    assert step < masked or blocks[:, block].all(), (r, block)
            assert len(set(taken)) == len(taken)
            assert set(np.flatnonzero(blocks.any(axis=(0, 2)))) <= set(taken)
            # At most one block more than needed at either end.
            assert len(taken) <= blocks.any(axis=(0, 2)).sum() + 1
