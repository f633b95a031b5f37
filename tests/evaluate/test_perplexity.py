"""Perplexity is that of the plain logits, whatever the batch, the parts and the mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.errors import UserError
from qwen_jax.evaluate.perplexity import Perplexity, perplexity, split_windows, window_nll
from qwen_jax.model import ForwardOptions, abstract_params, forward, ntk_alphas
from tests import toy
from tests.model.families import FLOAT32, params
from tests.model.naive import CONFIG

T, ROWS = 32, 5


@pytest.fixture(scope="module", autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def windows(rows=ROWS, length=T):
    return np.random.default_rng(0).integers(0, CONFIG.vocab_size, (rows, length + 1))


@functools.cache
def plain(config) -> np.ndarray:
    """−log p of every target of `windows()` [n,T] from all the logits, in float64."""
    rows = windows()
    alpha = np.tile(ntk_alphas(rows.shape[1] - 1, config), (len(rows), 1))
    run = jax.jit(lambda w, x: forward(w, x, config, FLOAT32, ntk_alpha=alpha, logn=config.logn)[0])
    logits = np.asarray(run(params(CONFIG), jnp.asarray(rows[:, :-1], jnp.int32)), np.float64)
    highest = logits.max(-1, keepdims=True)
    lse = np.log(np.exp(logits - highest).sum(-1)) + highest[..., 0]
    return lse - np.take_along_axis(logits, rows[:, 1:, None], -1)[..., 0]


@pytest.mark.parametrize("switches", ["as released", "none"])
def test_perplexity_equals_that_of_all_logits(switches):
    """A last batch that is not full, parts of the window, and a chunk that does not divide them."""
    off = {"dynamic_ntk": False, "logn": False, "windows": ()}
    config = dataclasses.replace(CONFIG, **(off if switches == "none" else {}))
    rows = windows()
    nll = plain(config)
    seen = []
    found = perplexity(
        params(CONFIG), rows, config, FLOAT32, batch=2, parts=4, chunk=12, on_batch=seen.append
    )
    assert found.tokens == nll.size and seen == [2 * T, 2 * T, T]
    by_part = nll.reshape(ROWS, 4, T // 4).sum((0, 2))
    np.testing.assert_allclose(found.nll_by_position, by_part, rtol=1e-5)
    np.testing.assert_allclose(found.curve, by_part / (ROWS * T / 4), rtol=1e-5)
    np.testing.assert_allclose(found.perplexity, np.exp(nll.mean()), rtol=1e-4)
    np.testing.assert_allclose(found.bits_per_byte(700), nll.sum() / np.log(2) / 700, rtol=1e-5)
    if switches == "none":
        assert abs(nll.sum() - plain(CONFIG).sum()) > 1.0  # the switches matter here


@pytest.mark.parametrize("batch", [1, ROWS, 64])
def test_perplexity_does_not_depend_on_the_batch(batch):
    rows = windows()
    a = perplexity(params(CONFIG), rows, CONFIG, FLOAT32, batch=batch)
    np.testing.assert_allclose(a.nll, plain(CONFIG).sum(), rtol=1e-5)


@pytest.mark.parametrize("name", ["4 fsdp × 2 tensor", "2 × 2 × 2 fsdp, context, tensor"])
def test_perplexity_does_not_depend_on_the_mesh(name):
    rows = windows()
    expected = plain(CONFIG).reshape(ROWS, 8, T // 8).sum((0, 2))
    with toy.use(name) as mesh:
        shardings = jax.tree.map(lambda x: x.sharding, abstract_params(CONFIG, mesh))
        weights = jax.device_put(params(CONFIG), shardings)
        found = perplexity(weights, rows, CONFIG, FLOAT32, batch=3, parts=8)
        np.testing.assert_allclose(found.nll_by_position, expected, rtol=1e-5)
        assert found.tokens == rows.size - ROWS
        whole = perplexity(weights, rows, CONFIG, FLOAT32)
        np.testing.assert_allclose(whole.nll, expected.sum(), rtol=1e-5)


def test_logits_of_all_tokens_are_never_stored():
    """The compiled program's temporaries are a few chunks of logits, not all 16 of them."""
    config = dataclasses.replace(CONFIG, vocab_size=65_536)
    inputs, chunk = jnp.zeros((4, 256), jnp.int32), 64
    run = jax.jit(
        lambda w: window_nll(
            w, inputs, inputs, jnp.ones((4, 256)), None,
            config=config, options=FLOAT32, parts=2, chunk=chunk,
        )
    )  # fmt: skip
    memory = run.lower(abstract_params(config)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * chunk * config.vocab_size * 4


@given(documents=st.lists(st.integers(0, 70), max_size=8), exponent=st.integers(0, 4))
@settings(max_examples=60, deadline=None)
def test_all_lengths_score_the_same_tokens(documents, exponent):
    """Targets of windows of any length are those of the longest; inputs stand before them."""
    texts, first = [], 0
    for size in documents:
        texts.append(range(first, first + size))
        first += 1000
    longest, length = 16, 2**exponent
    if max(documents, default=0) <= longest:
        with pytest.raises(UserError, match="no document has the 17 tokens"):
            split_windows(texts, length, longest)
        return
    made = split_windows(texts, length, longest)
    assert made.dtype == np.int32 and made.shape[1] == length + 1
    np.testing.assert_array_equal(np.diff(made), 1)
    np.testing.assert_array_equal(made[:, 1:].ravel(), split_windows(texts, longest)[:, 1:].ravel())
    targets = [t for text in texts for t in text[1 : (len(text) - 1) // longest * longest + 1]]
    assert made[:, 1:].ravel().tolist() == targets


def test_refusals():
    weights, rows = params(CONFIG), windows()
    cases = [
        ({}, rows[:0], r"windows have the shape \[0, 33\]"),
        ({}, rows[:, :1], r"windows have the shape \[5, 1\]"),
        ({}, np.full((1, 5), 96), "windows hold the id 96; ids of this model are 0 to 95"),
        ({}, np.full((1, 5), -1), "windows hold the id -1"),
        ({"parts": 5}, rows, "parts=5 .* divisor of the length 32"),
        ({"batch": 0}, rows, "batch=0 must be at least 1"),
    ]
    for options, bad, message in cases:
        with pytest.raises(UserError, match=message):
            perplexity(weights, bad, CONFIG, FLOAT32, **options)
    with pytest.raises(UserError, match="a length of 3 does not divide the longest, 8"):
        split_windows([range(20)], 3, 8)
    broken = weights | {"final_norm": {"scale": jnp.full(32, jnp.nan)}}
    with pytest.raises(UserError, match="loss of windows 0 to 1 is not a number in float32"):
        perplexity(broken, rows[:3], CONFIG, FLOAT32, batch=2)


def test_bfloat16_perplexity_is_close_to_float32():
    exact, half = (
        perplexity(params(CONFIG), windows(), CONFIG, ForwardOptions(dtype=d)).loss
        for d in ("float32", "bfloat16")
    )
    assert 0 < abs(exact - half) < 0.03 * exact


def test_overflowing_loss_gives_infinite_perplexity():
    assert Perplexity((1e6,), (10,)).perplexity == float("inf")
