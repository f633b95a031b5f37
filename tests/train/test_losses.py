"""The chunked, vocabulary-parallel loss equals the plain one, and never holds all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.parallel import named_sharding
from qwen_jax.train.losses import next_token_loss
from tests import toy

B, T, D, V = 8, 20, 32, 64


def inputs():
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (B, T, D))
    kernel = jax.random.normal(keys[1], (D, V))
    targets = jax.random.randint(keys[2], (B, T), 0, V)
    weights = jnp.where(jax.random.uniform(keys[3], (B, T)) > 0.3, 1.5, 0.0)
    return hidden, kernel, targets, weights


def plain(hidden, kernel, targets, weights, z_loss):
    logits = jnp.einsum("BTD,DV->BTV", hidden, kernel)
    lse = jax.nn.logsumexp(logits, axis=-1)
    nll = lse - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return jnp.sum(weights * (nll + z_loss * lse**2)), jnp.sum(weights * nll)


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("chunk", [1, 7, 1000])  # 7 does not divide the tokens
@pytest.mark.parametrize("name", ["none", "2 × 2 × 2 fsdp, context, tensor", "8 tensor"])
def test_equals_the_plain_loss(name, chunk, z_loss):
    with jax.default_matmul_precision("highest"), toy.use(name) as mesh:
        args = inputs()
        (expected, nll), expected_grads = jax.value_and_grad(plain, (0, 1), has_aux=True)(
            *args, z_loss
        )
        if mesh is not None:
            axes = (
                ("batch", "sequence", "channels"),
                ("embed", "vocab"),
                *[("batch", "sequence")] * 2,
            )
            args = [
                jax.device_put(x, named_sharding(mesh, *a)) for x, a in zip(args, axes, strict=True)
            ]

        def loss(hidden, kernel):
            sums = next_token_loss(hidden, kernel, *args[2:], z_loss, chunk)
            return 3.0 * sums.objective, sums  # a cotangent other than one

        (value, sums), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*args[:2])
        forward_only = jax.jit(lambda *a: next_token_loss(*a, z_loss, chunk))(*args)
    np.testing.assert_allclose(value, 3 * expected, rtol=1e-6)
    np.testing.assert_allclose(sums.nll, nll, rtol=1e-6)
    np.testing.assert_allclose(sums.weight, args[3].sum(), rtol=1e-6)
    np.testing.assert_allclose(forward_only.objective, expected, rtol=1e-6)
    for actual, wanted in zip(grads, expected_grads, strict=True):
        toy.close(actual, 3 * np.asarray(wanted))


def test_huge_logits_stay_finite():
    hidden, kernel, targets, weights = inputs()
    sums = next_token_loss(1e4 * hidden, kernel, targets, weights, 0.0, 16)
    assert np.isfinite(sums.nll)


def test_no_buffer_of_the_size_of_the_logits():
    """The compiled gradient's temporaries stay far below one float32 [B,T,V]."""
    rows, length, vocab, chunk = 4, 512, 32_768, 128
    shapes = ((rows, length, D), (D, vocab), (rows, length), (rows, length))
    dtypes = (jnp.float32, jnp.float32, jnp.int32, jnp.float32)
    structs = [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, dtypes, strict=True)]

    def temp(loss):
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*structs).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    ours = temp(lambda *a: next_token_loss(*a, 0.0, chunk).objective)
    naive = temp(lambda *a: plain(*a, 0.0)[0])
    logits = rows * length * vocab * 4
    assert naive > logits
    assert ours < logits / 4
