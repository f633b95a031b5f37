"""Attention implementations against a float64 reference written with loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from qwen_jax.errors import UserError
from qwen_jax.kernels import attention
from qwen_jax.kernels.dispatch import AttentionCall, choose_attention


def by_loops(q, k, v, q_segments, k_segments, start, window):
    """Float64, one query at a time."""
    batch, q_len, heads, dim = q.shape
    out = np.zeros(q.shape)
    for b in range(batch):
        for t in range(q_len):
            slot = t + start[b]
            seen = [
                s
                for s in range(k.shape[1])
                if s <= slot
                and (window is None or slot - s < window)
                and q_segments[b, t] == k_segments[b, s] > 0
            ]
            for n in range(heads if seen else 0):
                kv = n // (heads // k.shape[2])
                scores = np.array([q[b, t, n] @ k[b, s, kv] for s in seen]) / np.sqrt(dim)
                weights = np.exp(scores - scores.max())
                out[b, t, n] = weights / weights.sum() @ v[b, seen, kv]
    return out


CASES = {
    "multi-head": {},
    "grouped": {"kv_heads": 2},
    "one kv head": {"kv_heads": 1},
    "window 1": {"window": 1},
    "window 5": {"window": 5, "kv_heads": 2},
    "packed": {"segments": True},
    "packed, window": {"segments": True, "window": 4},
    "one token": {"length": 1},
    "past": {"start": 7, "segments": True},
}


def make(case, length=37, kv_heads=4, window=None, segments=False, start=0):
    rng = np.random.default_rng(len(case))
    batch, heads, dim = 3, 4, 8
    keys = length + start
    q = rng.normal(size=(batch, length, heads, dim))
    k, v = rng.normal(size=(2, batch, keys, kv_heads, dim))
    starts = np.full(batch, start, np.int32)
    k_segments = np.ones((batch, keys), np.int32)
    if segments:
        k_segments = np.sort(rng.integers(0, 4, (batch, keys)), axis=1).astype(np.int32)
        k_segments[0] = 0  # a row of nothing but padding
    q_segments = k_segments[:, start:]
    return q, k, v, q_segments, k_segments, starts, window


def call(arrays, implementation):
    q, k, v, q_segments, k_segments, starts, window = arrays
    return attention(
        *(jnp.asarray(x, jnp.float32) for x in (q, k, v)),
        q_segments=jnp.asarray(q_segments),
        k_segments=jnp.asarray(k_segments),
        q_start=jnp.asarray(starts),
        window=window,
        implementation=implementation,
    )


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_loops(case, implementation, monkeypatch):
    monkeypatch.setattr("qwen_jax.kernels.chunked.CHUNK", 8)  # 37 = 4·8 + 5
    arrays = make(case, **CASES[case])
    with jax.default_matmul_precision("highest"):
        out = np.asarray(call(arrays, implementation))
    expected = by_loops(*arrays)
    np.testing.assert_allclose(out, expected, atol=2e-6)


def test_rows_without_any_key_are_zero_with_zero_gradients():
    arrays = make("packed", **CASES["packed"])
    q, k, v = (jnp.asarray(x, jnp.float32) for x in arrays[:3])
    for implementation in ("reference", "chunked"):

        def total(q, k, v, implementation=implementation):
            return jnp.sum(call((q, k, v, *arrays[3:]), implementation) ** 2)

        assert not np.any(call((q, k, v, *arrays[3:]), implementation)[0])
        for grad in jax.grad(total, (0, 1, 2))(q, k, v):
            assert np.all(np.isfinite(grad)) and not np.any(grad[0])


def test_gradients_agree(monkeypatch):
    monkeypatch.setattr("qwen_jax.kernels.chunked.CHUNK", 8)
    arrays = make("packed, window", segments=True, window=6, kv_heads=2)
    q, k, v = (jnp.asarray(x, jnp.float32) for x in arrays[:3])

    def grads(implementation):
        def f(q, k, v):
            return jnp.sum(jnp.sin(call((q, k, v, *arrays[3:]), implementation)))

        with jax.default_matmul_precision("highest"):
            check_grads(f, (q, k, v), 1, modes=("rev",), eps=1e-2, atol=0.02, rtol=0.02)
            return jax.grad(f, (0, 1, 2))(q, k, v)

    for a, b in zip(grads("reference"), grads("chunked"), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_chunked_memory_grows_with_length_not_its_square():
    def temp(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)

        def f(q, k, v):
            return attention(q, k, v, implementation="chunked").sum()

        return jax.jit(jax.grad(f, (0, 1, 2))).lower(x, x, x).compile().memory_analysis()

    short, long = temp(1024).temp_size_in_bytes, temp(8192).temp_size_in_bytes
    assert long < 16 * short  # 8 times the length; the square would be 64
    assert long < 2 * 8192 * 8192 * 4 / 4  # a quarter of one set of scores


def attention_call(length, **kwargs):
    return AttentionCall(q_len=length, k_len=length, head_dim=128, **kwargs)


def test_dispatch_refuses_with_the_reason():
    with pytest.raises(UserError, match=r"'chuncked' is unknown \(did you mean 'chunked'\?\)"):
        choose_attention("chuncked", attention_call(1))
    with pytest.raises(UserError, match="no dropout on attention weights"):
        choose_attention("chunked", attention_call(1, dropout=True))
    with pytest.raises(UserError, match="runs on TPUs and this is cpu"):
        choose_attention("splash", attention_call(1024))
    with pytest.raises(UserError, match=r"cudnn.*no support for segment ids"):
        choose_attention("cudnn", attention_call(1024, segments=True, platform="gpu"))
    with pytest.raises(UserError, match=r"splash.*no support for a context axis"):
        choose_attention("splash", attention_call(1024, context=2, platform="tpu"))
    with pytest.raises(UserError, match="bfloat16 or float16 and this is float32"):
        choose_attention("cudnn", attention_call(1024, dtype="float32", platform="gpu"))
    q = jnp.zeros((1, 8, 2, 16))
    with pytest.raises(UserError, match=r"'pallas_tpu' can't serve .* runs on TPUs"):
        attention(q, q, q, implementation="pallas_tpu")


def test_auto_chooses_by_size_and_place():
    assert choose_attention("auto", attention_call(127)) == "reference"
    assert choose_attention("auto", attention_call(128)) == "chunked"
    assert choose_attention("auto", attention_call(4096)) == "chunked"
    assert (
        choose_attention("auto", attention_call(256, context=2)) == "chunked"
    )  # a ring needs blocks
    assert choose_attention("auto", attention_call(4096, dropout=True)) == "reference"
    v5e = {"platform": "tpu", "device": "TPU v5 lite"}
    assert choose_attention("auto", attention_call(2048, **v5e)) == "pallas_tpu"
    assert choose_attention("auto", attention_call(2048, dtype="float16", **v5e)) == "chunked"
    assert (
        choose_attention("auto", attention_call(2048, platform="tpu", device="TPU v4")) == "chunked"
    )
    h200 = {"platform": "gpu", "device": "NVIDIA H200"}
    assert choose_attention("auto", attention_call(2048, segments=True, **h200)) == "pallas_gpu"
    a100 = {"platform": "gpu", "device": "NVIDIA A100"}
    assert choose_attention("auto", attention_call(2048, **a100)) == "cudnn"
    assert choose_attention("auto", attention_call(2048, segments=True, **a100)) == "chunked"
    decoding = AttentionCall(q_len=1, k_len=2048, head_dim=128, q_start=True, **v5e)
    assert choose_attention("auto", decoding) == "reference"
