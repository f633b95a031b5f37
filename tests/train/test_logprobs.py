"""Log-probabilities in chunks, and losses made of them, equal the plain forms on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.errors import UserError
from qwen_jax.parallel import named_sharding
from qwen_jax.train.losses import logprob_loss, next_token_loss, token_logprobs
from tests import toy

B, T, D, V = 8, 20, 32, 64
AXES = (("batch", "sequence", "channels"), ("embed", "vocab"), ("batch", "sequence"))
# Mesh, and the number of neighbours along fsdp that split the vocabulary.
SPLITS = [
    ("none", 0),
    ("8 fsdp", 0),
    ("8 fsdp", 4),
    ("4 fsdp × 2 tensor", 0),
    ("4 fsdp × 2 tensor", 2),
    ("2 × 2 × 2 fsdp, context, tensor", 2),
    ("8 tensor", 1),
]


@pytest.fixture(autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def inputs(vocab=V):
    """Hidden states, output projection and targets, as numpy arrays."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (B, T, D))
    kernel = jax.random.normal(keys[1], (D, vocab))
    targets = jax.random.randint(keys[2], (B, T), 0, vocab)
    return jax.device_get((hidden, kernel, targets))


def place(args, mesh):
    if mesh is None:
        return jax.device_put(args)
    return [jax.device_put(x, named_sharding(mesh, *a)) for x, a in zip(args, AXES, strict=True)]


def plain_logprobs(hidden, kernel, targets):
    logprobs = jax.nn.log_softmax(jnp.einsum("BTD,DV->BTV", hidden, kernel))
    return jnp.take_along_axis(logprobs, targets[..., None], -1)[..., 0]


@pytest.mark.parametrize(
    "vocab", [V, 20_024]
)  # the second needs padding wherever it is split along fsdp
@pytest.mark.parametrize("chunk", [7, 1000])  # 7 does not divide the tokens
@pytest.mark.parametrize(("name", "parts"), SPLITS)
def test_token_logprobs_equal_log_softmax(name, parts, chunk, vocab):
    args = inputs(vocab)
    expected = jax.device_get(plain_logprobs(*args))
    with toy.use(name) as mesh:
        found = jax.jit(lambda *a: token_logprobs(*a, chunk, parts))(*place(args, mesh))
        if mesh is not None:
            wanted = named_sharding(mesh, "batch", "sequence")
            assert found.sharding.is_equivalent_to(wanted, 2)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_token_logprobs_are_the_negative_of_the_loss():
    hidden, kernel, targets = inputs()
    logprobs = token_logprobs(hidden, kernel, targets, 7)
    weights = np.random.default_rng(0).normal(size=(B, T)).astype(np.float32)  # some negative
    loss = next_token_loss(hidden, kernel, targets, weights, 0.0, 7)
    np.testing.assert_allclose(loss.nll, -(weights * logprobs).sum(), rtol=1e-5)


def test_token_logprobs_of_huge_logits_stay_finite():
    hidden, kernel, targets = inputs()
    assert np.isfinite(token_logprobs(1e4 * hidden, kernel, targets, 16)).all()


def test_token_logprobs_have_no_gradient():
    hidden, kernel, targets = inputs()
    grads = jax.grad(lambda h, k: token_logprobs(h, k, targets).sum(), (0, 1))(hidden, kernel)
    assert not any(np.any(g) for g in grads)


def test_token_logprobs_refuse_parts_that_do_not_divide_fsdp():
    with toy.use("8 fsdp") as mesh, pytest.raises(UserError, match=r"vocab_parts=3 .* mesh.fsdp=8"):
        token_logprobs(*place(inputs(), mesh), 24, 3)


def dpo_loss(logprobs, reference, sign, beta=0.3):
    """DPO over rows that hold a chosen (sign 1) and a rejected (sign −1) answer; some tokens 0."""
    margin = beta * (sign * (logprobs - reference)).sum(-1)
    return -jax.nn.log_sigmoid(margin).sum(), margin


def dpo_inputs():
    rng = np.random.default_rng(1)
    reference = rng.normal(-4, 0.5, (B, T)).astype(np.float32)
    sign = np.where(np.arange(T) < T // 2, 1.0, -1.0) * (rng.random((B, T)) > 0.2)
    return reference, sign.astype(np.float32)


@pytest.mark.parametrize(("name", "parts"), SPLITS)
def test_two_pass_gradient_of_dpo_equals_the_plain_one(name, parts):
    args, (reference, sign) = inputs(), dpo_inputs()

    def plain(hidden, kernel):
        return dpo_loss(plain_logprobs(hidden, kernel, args[2]), reference, sign)

    (expected, margin), grads = jax.value_and_grad(plain, (0, 1), has_aux=True)(*args[:2])
    with toy.use(name) as mesh:
        hidden, kernel, targets = place(args, mesh)
        pair = toy.place({"reference": reference, "sign": sign}, mesh)

        def two_pass(hidden, kernel, targets, pair):
            loss, aux = logprob_loss(
                lambda logprobs: dpo_loss(logprobs, **pair), hidden, kernel, targets, 7, parts
            )
            return 3.0 * loss, aux  # a cotangent other than one

        differentiated = jax.jit(jax.value_and_grad(two_pass, (0, 1), has_aux=True))
        (value, aux), found = differentiated(hidden, kernel, targets, pair)
        forward_only, _ = jax.jit(two_pass)(hidden, kernel, targets, pair)
    np.testing.assert_allclose(value, 3 * expected, rtol=1e-5)
    np.testing.assert_allclose(forward_only, 3 * expected, rtol=1e-5)
    np.testing.assert_allclose(aux, margin, rtol=1e-4, atol=1e-4)
    for actual, wanted in zip(found, grads, strict=True):
        toy.close(actual, 3 * np.asarray(wanted))


def test_logprob_loss_keeps_gradients_through_other_inputs():
    """A trained scale of the log-probabilities, used inside the loss, gets its gradient."""
    hidden, kernel, targets = inputs()

    def two_pass(scale, hidden):
        return logprob_loss(
            lambda logprobs: ((scale * logprobs).sum(), None), hidden, kernel, targets, 7
        )[0]

    def plain(scale, hidden):
        return (scale * plain_logprobs(hidden, kernel, targets)).sum()

    found, expected = (jax.grad(f, (0, 1))(0.7, hidden) for f in (two_pass, plain))
    jax.tree.map(toy.close, found, expected)


def test_no_logprob_buffer_has_the_size_of_the_logits():
    """Temporaries of both passes stay far below one float32 [B, T, V]."""
    rows, length, vocab = 4, 512, 32_768
    shapes = ((rows, length, D), (D, vocab), (rows, length))
    dtypes = (jnp.float32, jnp.float32, jnp.int32)
    structs = [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, dtypes, strict=True)]

    def loss(hidden, kernel, targets):
        return logprob_loss(lambda x: (jnp.exp(x).sum(), None), hidden, kernel, targets, 128)[0]

    for function in (lambda *a: token_logprobs(*a, 128), jax.grad(loss, (0, 1))):
        compiled = jax.jit(function).lower(*structs).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < rows * length * vocab * 4 / 4
