"""Quantised parameters: the rounding itself, the network over them, on a mesh, and refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.errors import UserError
from qwen_jax.kernels.quantised import GroupWeight, dequantise
from qwen_jax.model import ForwardOptions, ModelConfig, abstract_params, forward, init_params
from qwen_jax.model.dense_cache import init_cache
from qwen_jax.model.quantised import (
    ChannelWeight,
    QuantFormat,
    abstract_quantised,
    dequantise_params,
    quantise_leaf,
    quantise_matrix,
    quantise_params,
    weight_bytes,
)
from qwen_jax.parallel import named_sharding
from tests.interop.folders import toy_mesh

CONFIG = ModelConfig(
    family="qwen2", vocab_size=96, d_model=64, n_layers=3, n_heads=8, n_kv_heads=2, head_dim=8,
    d_ff=128, max_length=64, trained_length=64,
)  # fmt: skip
FORMATS = {
    "int8 and its head": QuantFormat(8, None, head=True),
    "int4": QuantFormat(4, None),
    "int4 in groups": QuantFormat(4, 16),
    "int8 in groups": QuantFormat(8, 32, head=True),
}
OPTIONS = ForwardOptions(dtype="float32")


@pytest.fixture(scope="module")
def params():
    tree = jax.jit(lambda key: init_params(CONFIG, key))(jax.random.key(0))
    # Weights of the size that makes logits matter.
    return jax.tree.map(lambda x: 4 * x if x.ndim > 2 else x, tree)


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, 96, (4, 12)), jnp.int32)


def run(params, tokens, **how):
    with jax.default_matmul_precision("highest"):
        return jax.jit(lambda p, t: forward(p, t, CONFIG, OPTIONS, **how)[0])(params, tokens)


def matrix(seed, inputs=64, outputs=6):
    return np.random.default_rng(seed).standard_t(4, (inputs, outputs)).astype(np.float32)


@given(
    seed=st.integers(0, 2**32 - 1),
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([16, None]),
    size=st.floats(-3, 3),
)
@settings(max_examples=40, deadline=None)
def test_integers_are_nearest_and_the_scale_beats_no_clipping(seed, bits, group, size):
    """Codes are within half a step or clipped; the search never loses to the largest weight."""
    w = matrix(seed) * 10**size
    codes, scales = map(np.asarray, quantise_matrix(jnp.asarray(w), bits=bits, group=group))
    half, width = 2 ** (bits - 1), group or 64
    assert codes.min() >= -half and codes.max() <= half - 1
    np.testing.assert_array_equal(scales, scales.astype(np.float16))
    steps = w / np.repeat(scales, width, axis=0)
    inside = (steps > -half - 0.5) & (steps < half - 0.5)
    assert np.abs(codes - steps)[inside].max() <= 0.5 + 1e-4
    np.testing.assert_array_equal(codes[~inside], np.where(steps > 0, half - 1, -half)[~inside])
    grouped = w.reshape(-1, width, 6)
    plain = np.abs(grouped).max(axis=1, keepdims=True) / (half - 0.5)
    plain = plain.astype(np.float16).astype(np.float32)
    rounded = np.clip(np.round(grouped / plain), -half, half - 1) * plain
    ours = codes.reshape(grouped.shape) * scales[:, None]
    worse = np.square(ours - grouped).sum(axis=1) - np.square(rounded - grouped).sum(axis=1)
    assert (worse <= 1e-5 * np.square(grouped).sum(axis=1)).all()


def test_representable_weights_are_quantised_exactly():
    """Whole multiples of a scale, a group of zeros, the largest numbers of either sign."""
    codes = np.random.default_rng(0).integers(-8, 8, (32, 5))
    codes[0], codes[16] = -8, -8
    codes[:16, 2] = 0
    scale = np.float32(0.25)
    w = codes * scale
    # −8 is 7.5 scales of the plain grid: no share of it is the true scale, but one is near.
    for bits, tolerance in ((8, 0.005), (4, 0.05)):
        got, scales = quantise_matrix(jnp.asarray(w), bits=bits, group=16)
        back = np.asarray(got) * np.repeat(np.asarray(scales), 16, axis=0)
        assert np.linalg.norm(back - w) < tolerance * np.linalg.norm(w)
        assert not back[:16, 2].any() and np.isfinite(back).all()


def test_scale_search_reduces_the_error_of_four_bits():
    """On normal weights the squared error falls by more than a tenth."""
    w = jnp.asarray(np.random.default_rng(0).standard_normal((1024, 64)), jnp.float32)
    weight = quantise_leaf(w, QuantFormat(4, 128), 1)
    error = float(jnp.square(dequantise(weight) - w).mean())
    grouped = w.reshape(8, 128, 64)
    plain = jnp.abs(grouped).max(axis=1, keepdims=True) / 7.5
    rounded = jnp.clip(jnp.round(grouped / plain), -8, 7) * plain
    assert error < 0.9 * float(jnp.square(rounded - grouped).mean())


@pytest.mark.parametrize("name", FORMATS)
def test_quantised_network_equals_the_dequantised_one(params, tokens, name):
    fmt = FORMATS[name]
    quantised = quantise_params(params, fmt)
    abstract = abstract_quantised(abstract_params(CONFIG), fmt)
    assert jax.tree.structure(abstract) == jax.tree.structure(quantised)
    for a, b in zip(jax.tree.leaves(abstract), jax.tree.leaves(quantised), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    dense = dequantise_params(quantised, abstract_params(CONFIG))
    expected, original = run(dense, tokens), run(params, tokens)
    got = run(quantised, tokens)
    np.testing.assert_allclose(got, expected, atol=2e-5)
    lost = float(jnp.abs(expected - original).max() / jnp.abs(original).max())
    assert 0 < lost < (0.1 if fmt.bits == 8 else 0.9)
    assert weight_bytes(quantised) < weight_bytes(params) * (0.36 if fmt.bits == 8 else 0.3)


@pytest.mark.parametrize("name", ["int8 and its head", "int4 in groups"])
def test_quantised_network_on_a_mesh_equals_one_device(params, tokens, name):
    fmt = FORMATS[name]
    quantised = quantise_params(params, fmt)
    expected = run(quantised, tokens)
    mesh = toy_mesh(data=2, fsdp=2, tensor=2)
    abstract = abstract_quantised(abstract_params(CONFIG, mesh), fmt)
    placed = jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), quantised, abstract)
    with jax.set_mesh(mesh):
        spread = jax.device_put(tokens, named_sharding(mesh, "batch", "sequence"))
        got = np.asarray(run(placed, spread))
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_decoding_with_quantised_weights_equals_one_forward_pass(params, tokens):
    quantised = quantise_params(params, QuantFormat(4, 16))
    expected = run(quantised, tokens)
    cache = init_cache(CONFIG, 4, 12, jnp.float32)

    @jax.jit
    def step(cache, tokens):
        return forward(quantised, tokens, CONFIG, OPTIONS, cache=cache)

    with jax.default_matmul_precision("highest"):
        got = []
        for t in range(12):
            logits, cache = step(cache, tokens[:, t : t + 1])
            got.append(logits)
    np.testing.assert_allclose(jnp.concatenate(got, axis=1), expected, atol=2e-5)


def test_consumed_weights_are_freed_and_bfloat16_weights_accepted(params):
    copy = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    quantised = quantise_params(copy, QuantFormat(8, None), consume=True)
    assert copy["layers"]["mlp"]["up"].is_deleted()
    assert not copy["embed"]["table"].is_deleted()
    assert quantised["embed"]["table"] is copy["embed"]["table"]
    assert isinstance(quantised["layers"]["mlp"]["up"], ChannelWeight)
    assert not isinstance(quantised["head"]["kernel"], ChannelWeight)
    up = jnp.asarray(quantised["layers"]["mlp"]["up"].codes, jnp.float32)
    assert up.shape == (3, 64, 128) and float(jnp.abs(up).max()) > 100


def test_refusals(params):
    with pytest.raises(UserError, match="3 bits"):
        QuantFormat(3, 128)
    with pytest.raises(UserError, match="group of 12"):
        QuantFormat(4, 12)
    with pytest.raises(UserError, match=r"64 inputs.*groups of 48"):
        quantise_params(params, QuantFormat(4, 48))
    tied = dataclasses.replace(CONFIG, tie_embeddings=True)
    with pytest.raises(UserError, match="tied"):
        abstract_quantised(abstract_params(tied), QuantFormat(8, None, head=True))
    with pytest.raises(UserError, match=r"64 inputs, split over 2 devices.*fewer devices"):
        abstract_quantised(abstract_params(CONFIG, toy_mesh()), QuantFormat(4, 64))
    weight = quantise_params(params, QuantFormat(4, 16))["layers"]["mlp"]["up"]
    assert isinstance(weight, GroupWeight) and weight.group == 16
