"""Hopper attention kernels interpreted on a CPU against float64, and their race detection.

Interpreted means that the kernel runs unchanged, its three warpgroups as threads, with barriers,
bulk copies and shared memory simulated; wgmma products, which a CPU lacks, are plain ones.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams, force_gpu_interpret_mode

from qwen_jax.kernels.gpu import mosaic
from qwen_jax.kernels.gpu.flash import KERNEL
from qwen_jax.kernels.gpu.flash_pipeline import TILE_ROWS
from qwen_jax.kernels.mask import MASKED, make_mask, visible
from tests.kernels import gpu_plain_ops


@pytest.fixture
def reproducible(monkeypatch):
    """Sets the flag that selects reproducible kernels; XLA itself has read its flags already."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=true")


@pytest.fixture
def on_cpu(monkeypatch):
    """Returns a context manager in which the kernels are interpreted, on two CTAs.

    jax 0.11 interprets wgmma of two operands in shared memory, transposed or cut in any way; such
    products are left in place there, except under race detection, which does not see their reads.
    """
    wgmma_of_smem = mosaic.matmul_transposed, mosaic.scores_and_dp
    gpu_plain_ops.replace(
        monkeypatch,
        *gpu_plain_ops.REGISTER_OPS,
        *gpu_plain_ops.MATMULS,
        gpu_plain_ops.add_to_gmem,
    )
    monkeypatch.setattr(mosaic, "num_ctas", lambda: 2)

    @contextlib.contextmanager
    def interpret(**options):
        if jax.__version_info__ >= (0, 11) and not options:
            gpu_plain_ops.replace(monkeypatch, *wgmma_of_smem)
        try:
            with force_gpu_interpret_mode(InterpretGPUParams(**options)):
                yield
        finally:
            interpreter.reset_gpu_interpret_mode_state()

    return interpret


def attention_in_float64(q, k, v, d_out, seen, scale):
    """Computes (out, lse, delta, dq, dk, dv) in float64.

    seen: bool [B, T, S], whether query t of row b sees key s.
    """
    groups = q.shape[2] // k.shape[2]
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    k_, v_ = (np.repeat(x, groups, axis=2) for x in (k, v))
    seen = seen[:, None]
    scores = np.where(seen, np.einsum("btnh,bsnh->bnts", q, k_) * scale, -np.inf)
    highest = np.maximum(scores.max(-1), -1e300)
    weight = np.exp(scores - highest[..., None])
    total = weight.sum(-1)
    p = weight / np.maximum(total, 1e-300)[..., None]
    out = np.einsum("bnts,bsnh->btnh", p, v_)
    lse = np.where(total > 0, highest + np.log(np.maximum(total, 1e-300)), MASKED)
    delta = np.einsum("btnh,btnh->bnt", out, d_out)
    ds = p * (np.einsum("btnh,bsnh->bnts", d_out, v_) - delta[..., None])
    dq = np.einsum("bnts,bsnh->btnh", ds, k_) * scale
    dk = np.einsum("bnts,btnh->bsnh", ds, q) * scale
    dv = np.einsum("bnts,btnh->bsnh", p, d_out)
    dk, dv = (x.reshape(*k.shape[:3], groups, -1).sum(3) for x in (dk, dv))
    return out, lse, delta, dq, dk, dv


CASES = {
    "multi-head, odd length": {"length": 200, "kv_heads": 2},
    "grouped, wide heads": {"width": 128, "heads": 4, "kv_heads": 2},
    "window": {"window": 70, "length": 300, "dtype": jnp.bfloat16},
    "packed, with padding": {"ids": "ascending", "batch": 2},
    "ids in any order": {"ids": "any"},
    "a tile of padding": {"ids": "padding after 100"},
    "past, packed, window": {"ids": "ascending", "start": 150, "length": 100, "window": 130},
}


def build(case, length=256, batch=1, heads=2, kv_heads=1, width=64, **more):
    """Returns ((q, k, v, d_out), mask, visibility bool [B, T, S]) of a case of `CASES`."""
    rng = np.random.default_rng(len(case))
    start, dtype = more.get("start", 0), more.get("dtype", jnp.float16)
    keys = length + start
    sizes = ((length, heads), (keys, kv_heads), (keys, kv_heads), (length, heads))
    arrays = [jnp.asarray(rng.normal(size=(batch, *n, width)), dtype) for n in sizes]
    q_ids = k_ids = None
    if "ids" in more:
        ids = rng.integers(0, 5, (batch, keys)).astype(np.int32)
        if more["ids"] == "ascending":
            ids.sort(axis=1)
        if more["ids"] == "padding after 100":
            ids[:] = np.arange(keys) < 100
        q_ids, k_ids = jnp.asarray(ids[:, start:]), jnp.asarray(ids)
    starts = jnp.full((batch,), start, jnp.int32) if start else None
    mask = make_mask(starts, q_ids, k_ids, more.get("window"))
    seen = visible(
        start + jnp.arange(length)[None], jnp.arange(keys)[None], q_ids, k_ids, more.get("window")
    )
    return arrays, mask, np.broadcast_to(np.asarray(seen), (batch, length, keys))


def assert_close(got, expected, dtype):
    """Checks that two arrays differ by a few roundings of the weights to `dtype` at most."""
    error = np.abs(np.asarray(got, np.float64) - expected).max()
    unit = float(jnp.finfo(dtype).eps) * np.abs(expected).max()
    assert error < 3 * unit, (error, unit)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_kernels_compute_attention_and_its_gradients(case, on_cpu, monkeypatch):
    (q, k, v, d_out), mask, seen = build(case, **CASES[case])
    scale = q.shape[-1] ** -0.5
    out, lse, delta, *gradients = attention_in_float64(q, k, v, d_out, seen, scale)
    with on_cpu():
        got, got_lse = jax.jit(lambda *x: KERNEL.forward(*x, mask, scale))(q, k, v)
        statistics = (jnp.asarray(lse, jnp.float32), d_out, jnp.asarray(delta, jnp.float32))
        # Interpreted, an addition to memory is not atomic: one CTA.
        monkeypatch.setattr(mosaic, "num_ctas", lambda: 1)
        got_gradients = jax.jit(
            lambda q, k, v, *x: KERNEL.backward(q, k, v, mask, scale, *x, jnp.float32)
        )(q, k, v, *statistics)
        jax.block_until_ready((got, got_lse, got_gradients))
    assert_close(got, out, q.dtype)
    # Products and sums in float32: the weights' rounding never enters the log-sum-exp.
    np.testing.assert_allclose(got_lse, lse, rtol=2e-6, atol=2e-6)
    nothing = ~seen.any(-1)
    assert (np.asarray(got)[nothing] == 0).all()
    assert (np.asarray(got_lse).swapaxes(1, 2)[nothing] == np.float32(MASKED)).all()
    for mine, expected in zip(got_gradients, gradients, strict=True):
        assert mine.dtype == jnp.float32
        assert_close(mine, expected, q.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["multi-head, odd length", "packed, with padding"])
def test_reproducible_kernels_compute_the_same_gradients(case, on_cpu, reproducible):
    (q, k, v, d_out), mask, seen = build(case, **CASES[case])
    scale = q.shape[-1] ** -0.5
    _, lse, delta, *gradients = attention_in_float64(q, k, v, d_out, seen, scale)
    statistics = (jnp.asarray(lse, jnp.float32), d_out, jnp.asarray(delta, jnp.float32))
    with on_cpu():
        run = jax.jit(lambda q, k, v, *x: KERNEL.backward(q, k, v, mask, scale, *x, jnp.float32))
        got = jax.block_until_ready(run(q, k, v, *statistics))
    for mine, expected in zip(got, gradients, strict=True):
        assert_close(mine, expected, q.dtype)


def backward_races(case, on_cpu) -> bool:
    """Returns whether the detector finds a race between the backward kernels' warpgroups."""
    (q, k, v, d_out), mask, _ = case
    statistics = jnp.zeros((1, 2, q.shape[1]))
    with on_cpu(detect_races=True):
        run = jax.jit(lambda *x: KERNEL.backward(*x[:3], mask, 1.0, *x[3:], None))
        jax.block_until_ready(run(q, k, v, statistics, d_out, statistics))
        return interpreter.get_races().races_found


@pytest.mark.slow
def test_kernels_are_free_of_races(on_cpu, monkeypatch):
    """Both kernels, with several work items per CTA."""
    case = build("races", ids="ascending", heads=2, kv_heads=2)
    (q, k, v, _), mask, _ = case
    with on_cpu(detect_races=True):
        jax.block_until_ready(jax.jit(lambda *x: KERNEL.forward(*x, mask, 1.0))(q, k, v))
        assert not interpreter.get_races().races_found
    # CTAs add to the same memory, atomically on a GPU but not in the interpreter: one CTA.
    monkeypatch.setattr(mosaic, "num_ctas", lambda: 1)
    assert not backward_races(case, on_cpu)


@pytest.mark.slow
def test_reproducible_kernels_are_free_of_races(on_cpu, reproducible):
    assert not backward_races(build("races", ids="ascending", heads=2, kv_heads=2), on_cpu)


@pytest.mark.slow
def test_race_detector_finds_a_missing_warpgroup_barrier(on_cpu, monkeypatch):
    """Without the barrier at which both warpgroups have stored their ds."""
    monkeypatch.setattr(mosaic, "num_ctas", lambda: 1)
    monkeypatch.setattr("qwen_jax.kernels.gpu.flash_backward.sync_warpgroups", lambda barrier: None)
    assert backward_races(build("races", length=TILE_ROWS, heads=2, kv_heads=2), on_cpu)


@pytest.mark.slow
def test_race_detector_finds_a_missing_wait_for_a_copy(on_cpu, monkeypatch):
    wait = "qwen_jax.kernels.gpu.flash_pipeline.CopyRing.wait_filled"
    monkeypatch.setattr(wait, lambda self, step: None)
    (q, k, v, _), mask, _ = build("races", length=TILE_ROWS, kv_heads=2)
    with on_cpu(detect_races=True):
        jax.block_until_ready(jax.jit(lambda *x: KERNEL.forward(*x, mask, 1.0))(q, k, v))
        assert interpreter.get_races().races_found
