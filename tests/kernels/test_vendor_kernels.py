"""JAX's own kernels, called by our contract: the same masks, windows and scales."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.kernels import attention, vendor_kernels
from qwen_jax.kernels.mask import make_mask
from tests.toy import close

SCALE = 0.2


def inputs(length=256, heads=4, kv_heads=2, width=128):
    rng = np.random.default_rng(7)
    q = rng.normal(size=(2, length, heads, width))
    k, v = rng.normal(size=(2, 2, length, kv_heads, width))
    return [jnp.asarray(x, jnp.float32) for x in (q, k, v)]


def with_gradients(f, q, k, v):
    out, transpose = jax.vjp(f, q, k, v)
    return out, *transpose(jnp.cos(out))


def expected(q, k, v, ids, window):
    f = functools.partial(
        attention,
        q_segments=ids,
        k_segments=ids,
        window=window,
        scale=SCALE,
        implementation="reference",
    )
    return with_gradients(f, q, k, v)


@pytest.mark.slow
@pytest.mark.parametrize(("window", "packed"), [(None, False), (100, True)])
def test_splash_equals_the_reference(window, packed):
    q, k, v = inputs()
    ids = None
    if packed:  # padding included: its rows are 0 in our contract
        ids = jnp.asarray(np.repeat([[1, 2, 3, 0]], 64, axis=1).reshape(1, -1), jnp.int32)
        ids = jnp.concatenate([ids, jnp.ones_like(ids)])
    mask = make_mask(None, ids, ids, window)
    with jax.default_matmul_precision("highest"):
        f = functools.partial(vendor_kernels.splash, mask=mask, scale=SCALE, interpret=True)
        results = with_gradients(f, q, k, v)
        for actual, wanted in zip(results, expected(q, k, v, ids, window), strict=True):
            close(actual, wanted, rtol=1e-4)


@pytest.mark.parametrize("window", [None, 1, 50])
def test_cudnn_is_asked_for_the_same_thing(window, monkeypatch):
    """cuDNN needs its GPU; the same public function by XLA stands in for it."""
    by_xla = jax.nn.dot_product_attention
    asked = {}

    def stand_in(*args, implementation, **kwargs):
        asked["implementation"] = implementation
        return by_xla(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    q, k, v = inputs(length=96, width=32)
    mask = make_mask(None, None, None, window)
    with jax.default_matmul_precision("highest"):
        results = with_gradients(
            lambda q, k, v: vendor_kernels.cudnn(q, k, v, mask, SCALE), q, k, v
        )
        for actual, wanted in zip(results, expected(q, k, v, None, window), strict=True):
            np.testing.assert_allclose(actual, wanted, atol=2e-5)
    assert asked == {"implementation": "cudnn"}
