"""The chunked, vocabulary-parallel loss equals the plain one without holding all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.errors import UserError
from qwen_jax.parallel import named_sharding
from qwen_jax.train.losses import next_token_loss
from qwen_jax.train.vocab_split import best_parts, vocab_split
from tests import toy

B, T, D, V = 8, 20, 32, 64


def inputs(vocab=V):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (B, T, D))
    kernel = jax.random.normal(keys[1], (D, vocab))
    targets = jax.random.randint(keys[2], (B, T), 0, vocab)
    weights = jnp.where(jax.random.uniform(keys[3], (B, T)) > 0.3, 1.5, 0.0)
    return hidden, kernel, targets, weights


def plain(hidden, kernel, targets, weights, z_loss):
    logits = jnp.einsum("BTD,DV->BTV", hidden, kernel)
    lse = jax.nn.logsumexp(logits, axis=-1)
    nll = lse - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return jnp.sum(weights * (nll + z_loss * lse**2)), jnp.sum(weights * nll)


def check_against_plain(name, vocab, z_loss, *options):
    """Compares value, sums and both gradients on a named mesh with the plain form on one device."""
    with jax.default_matmul_precision("highest"):
        args = inputs(vocab)
        (expected, nll), expected_grads = jax.value_and_grad(plain, (0, 1), has_aux=True)(
            *args, z_loss
        )
    with jax.default_matmul_precision("highest"), toy.use(name) as mesh:
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
            sums = next_token_loss(hidden, kernel, *args[2:], z_loss, *options)
            return 3.0 * sums.objective, sums  # a cotangent other than one

        (value, sums), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*args[:2])
        forward_only = jax.jit(lambda *a: next_token_loss(*a, z_loss, *options))(*args)
    np.testing.assert_allclose(value, 3 * expected, rtol=1e-6)
    np.testing.assert_allclose(sums.nll, nll, rtol=1e-6)
    np.testing.assert_allclose(sums.weight, args[3].sum(), rtol=1e-6)
    np.testing.assert_allclose(forward_only.objective, expected, rtol=1e-6)
    for actual, wanted in zip(grads, expected_grads, strict=True):
        toy.close(actual, 3 * np.asarray(wanted))


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("chunk", [1, 7, 1000])  # 7 does not divide the tokens
@pytest.mark.parametrize("name", ["none", "2 × 2 × 2 fsdp, context, tensor", "8 tensor"])
def test_loss_and_gradients_equal_the_plain_ones(name, chunk, z_loss):
    check_against_plain(name, V, z_loss, chunk)


@pytest.mark.parametrize(
    ("name", "parts"),
    [("8 fsdp", p) for p in (1, 2, 4, 8)]
    + [("4 fsdp × 2 tensor", p) for p in (2, 4)]
    + [("2 × 2 × 2 fsdp, context, tensor", 2), ("4 data × 2 fsdp", 2)],
)
@pytest.mark.parametrize("vocab", [V, 20_014])  # the second needs padding for any parts
def test_splitting_the_vocabulary_along_fsdp_changes_nothing(name, parts, vocab):
    check_against_plain(name, vocab, 1e-2, 3, parts)


def test_parts_that_do_not_divide_fsdp_are_refused():
    with toy.use("8 fsdp"), pytest.raises(UserError, match=r"vocab_parts=3 .* mesh.fsdp=8"):
        vocab_split(64, V, 3)


def test_best_parts_move_nearly_the_fewest_bytes():
    """At most a quarter more bytes than the best power of two, and no more memory on a device."""

    def moved(parts, tokens, columns):
        return 6 * columns / parts + 6 * parts * tokens

    for tokens in (512, 2048, 8192, 16_384, 10**6):
        for tensor in (1, 4):
            columns = 151_936 // tensor
            sizes = [2**i for i in range(9)]
            best = min(sizes, key=lambda g: moved(g, tokens, columns))
            chosen = best_parts(tokens, columns, 256)
            assert chosen >= best
            assert moved(chosen, tokens, columns) <= 1.25 * moved(best, tokens, columns)
            assert best_parts(tokens, columns, 2) == min(chosen, 2)
            assert best_parts(tokens, columns, 3) == 1
    assert best_parts(8192, 151_936, 256) == 8  # the 7B recipe


def test_loss_of_huge_logits_is_finite():
    hidden, kernel, targets, weights = inputs()
    sums = next_token_loss(1e4 * hidden, kernel, targets, weights, 0.0, 16)
    assert np.isfinite(sums.nll)


def test_no_buffer_has_the_size_of_the_logits():
    """The compiled gradient's temporaries stay far below one float32 [B, T, V]."""
    rows, length, vocab, chunk = 4, 512, 32_768, 128
    shapes = ((rows, length, D), (D, vocab), (rows, length), (rows, length))
    dtypes = (jnp.float32, jnp.float32, jnp.int32, jnp.float32)
    structs = [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, dtypes, strict=True)]

    def temp(loss):
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*structs).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    chunked = temp(lambda *a: next_token_loss(*a, 0.0, chunk).objective)
    plain_form = temp(lambda *a: plain(*a, 0.0)[0])
    logits = rows * length * vocab * 4
    assert plain_form > logits
    assert chunked < logits / 4


def test_no_device_holds_the_whole_kernel_or_its_gradient():
    """In 8 parts, temporaries stay below one float32 [D, V]; in one part they exceed two."""
    rows, length, width, vocab = 8, 64, 256, 32_768
    with toy.use("8 fsdp") as mesh:
        table = [
            ((rows, length, width), jnp.float32, ("batch", "sequence", "channels")),
            ((width, vocab), jnp.float32, ("embed", "vocab")),
            ((rows, length), jnp.int32, ("batch", "sequence")),
            ((rows, length), jnp.float32, ("batch", "sequence")),
        ]
        structs = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=named_sharding(mesh, *axes))
            for shape, dtype, axes in table
        ]

        def temp(parts):
            loss = jax.grad(lambda *a: next_token_loss(*a, 0.0, 8, parts).objective, (0, 1))
            compiled = jax.jit(loss).lower(*structs).compile()
            return compiled.memory_analysis().temp_size_in_bytes

        one_part, eight_parts = temp(1), temp(8)
    kernel = width * vocab * 4
    assert one_part > 2 * kernel  # the kernel and its gradient
    assert eight_parts < kernel
