"""The network decodes as it prefills, alone as in a batch, and computes in float32 what must be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.interop import load_params, read_config
from qwen_jax.model import (
    ForwardOptions,
    ModelConfig,
    abstract_params,
    forward,
    init_cache,
    init_params,
    ntk_alpha,
)
from qwen_jax.model.layers import RMSNorm, mean_square
from qwen_jax.model.rope import apply_rope, rope_table
from tests.model.families import FLOAT32, MODELS, params

PROMPT, SLOTS, NEW = 12, 20, 5


@pytest.fixture(scope="module", autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def released(qwen1_small):
    config = read_config(qwen1_small)
    return load_params(qwen1_small, config, abstract_params(config)), config


def decode(params, config, cache, tokens, **kwargs):
    """Logits [n,B,V] of tokens [n,B] given one at a time through the cache."""

    @jax.jit
    def run(params, cache, tokens):
        def step(cache, token):
            logits, cache = forward(params, token[:, None], config, FLOAT32, cache=cache, **kwargs)
            return cache, logits[:, 0]

        return jax.lax.scan(step, cache, tokens)[1]

    return np.asarray(run(params, cache, jnp.asarray(tokens)))


@pytest.mark.parametrize("name", MODELS)
def test_prefill_and_decode_of_ragged_rows_equal_each_row_alone(name):
    """Prompts of 12, 7 and 1 tokens, right-padded, then five tokens through the cache.

    NTK's factor differs from row to row and stays that of the prompt.
    """
    config = MODELS[name]
    weights = params(config)
    lengths = np.array([12, 7, 1])
    rng = np.random.default_rng(0)
    texts = rng.integers(0, config.vocab_size, (3, PROMPT + NEW)).astype(np.int32)
    switches = {}
    if config.dynamic_ntk:
        alphas = [ntk_alpha(int(n), config.trained_length) for n in lengths]
        assert alphas == [3.0, 1.0, 1.0]
        switches = {"ntk_alpha": jnp.asarray(alphas)[:, None], "logn": config.logn}
    segments = (np.arange(PROMPT) < lengths[:, None]).astype(np.int32)
    prompts = np.where(segments, texts[:, :PROMPT], 17)  # whatever stands in the padding
    prefill = jax.jit(
        lambda w, cache: forward(
            w, prompts, config, FLOAT32, segment_ids=jnp.asarray(segments), cache=cache, **switches
        )
    )
    first, cache = prefill(weights, init_cache(config, 3, SLOTS, jnp.float32))
    np.testing.assert_array_equal(cache.length, lengths)
    after = np.stack([texts[i, n : n + NEW] for i, n in enumerate(lengths)], 1)
    later = decode(weights, config, cache, after, **switches)

    # All rows at once without a cache: what follows a row's end cannot matter to it.
    full = jax.jit(lambda w: forward(w, texts, config, FLOAT32, **switches)[0])(weights)
    first, full = np.asarray(first), np.asarray(full)
    for i, n in enumerate(lengths):
        np.testing.assert_allclose(first[i, :n], full[i, :n], atol=2e-5, rtol=1e-5)
        np.testing.assert_allclose(later[:, i], full[i, n : n + NEW], atol=2e-5, rtol=1e-5)
    if switches:
        alone = jax.jit(
            lambda w: forward(w, texts[:1], config, FLOAT32, **(switches | {"ntk_alpha": 3.0}))[0]
        )(weights)
        np.testing.assert_allclose(full[0], alone[0], atol=2e-5, rtol=1e-5)
        without = jax.jit(lambda w: forward(w, texts[:1], config, FLOAT32)[0])(weights)
        assert np.abs(without - alone).max() > 1e-2


@pytest.mark.parametrize("name", ["p40_n20", "p90_n30"])
def test_decoding_equals_the_released_code(released, qwen1_small, name):
    """The factor of NTK stays what it was at prefill, though the text grows past a doubling."""
    weights, config = released
    reference = np.load(qwen1_small / "decode.npz")
    ids, logits = reference[f"ids_{name}"].astype(np.int32), reference[f"logits_{name}"]
    prompt = int(reference[f"prompt_len_{name}"])
    alpha = ntk_alpha(prompt, config.trained_length)
    assert alpha == reference[f"alpha_{name}"]
    switches = {"ntk_alpha": jnp.asarray([[alpha]]), "logn": True}
    first, cache = jax.jit(
        lambda w, c: forward(w, ids[None, :prompt], config, FLOAT32, cache=c, **switches)
    )(weights, init_cache(config, 1, len(ids), jnp.float32))
    later = decode(weights, config, cache, ids[prompt:, None], **switches)
    ours = np.concatenate([first[0], later[:, 0]])
    np.testing.assert_allclose(ours, logits, atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize("length", ["short", "long"])
def test_left_padded_rows_equal_each_row_alone(released, qwen1_small, length):
    """What the released code gives for each row without padding; its own padded LogN differs."""
    weights, config = released
    reference = np.load(qwen1_small / "batch_leftpad.npz")
    ids, mask = reference[f"ids_{length}"], reference[f"mask_{length}"].astype(np.int32)
    assert (mask[:, -1] == 1).all() and (mask[:, 0] == 0).any()
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0).astype(np.int32)
    alphas = [ntk_alpha(int(n), config.trained_length) for n in mask.sum(1)]
    logits = jax.jit(
        lambda w: forward(
            w,
            jnp.asarray(ids, jnp.int32),
            config,
            FLOAT32,
            positions=jnp.asarray(positions),
            segment_ids=jnp.asarray(mask),
            ntk_alpha=jnp.asarray(alphas)[:, None],
            logn=True,
        )[0]
    )(weights)
    for row in range(len(ids)):
        alone = reference[f"unpadded_last_{length}_{row}"]
        np.testing.assert_allclose(logits[row, -1], alone, atol=5e-4, rtol=1e-4)


def test_rotations_are_float32_in_every_compute_dtype():
    """Positions 256 to 4095 against float64; in bfloat16 neighbours there are the same number."""
    config = MODELS["2: windows"]
    positions = np.arange(256, 4096)
    cos, sin = rope_table(jnp.asarray(positions, jnp.int32)[None], config)
    assert cos.dtype == sin.dtype == jnp.float32
    angle = positions[:, None] * config.rope_theta ** -(np.arange(0, 8, 2) / 8)
    np.testing.assert_allclose(cos[0, :, :4], np.cos(angle), atol=5e-4)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, len(positions), 1, 8)), jnp.bfloat16)
    rotated = apply_rope(x, (cos, sin), 8)
    assert rotated.dtype == jnp.bfloat16
    a, b = np.split(np.asarray(x[0, :, 0], np.float64), 2, axis=-1)
    c, s = np.cos(angle), np.sin(angle)
    expected = np.concatenate([a * c - b * s, b * c + a * s], -1)
    np.testing.assert_allclose(np.asarray(rotated[0, :, 0], np.float64), expected, atol=2e-2)
    assert len(np.unique(np.asarray(cos[0, :, 0]))) > 0.99 * len(positions)


def test_norm_statistics_are_float32_in_bfloat16_models():
    """Against float64, to one rounding of each of two bfloat16 products."""
    x = np.random.default_rng(0).normal(3.0, 1.0, (4, 4096))
    x = jnp.asarray(x, jnp.bfloat16)
    config = MODELS["2: windows"]
    layer = RMSNorm(config, ForwardOptions(dtype="bfloat16"))
    y = layer.apply({"params": {"scale": jnp.ones(4096)}}, x)
    assert y.dtype == jnp.bfloat16
    wide = np.asarray(x, np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + config.norm_eps)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-8)


def test_norm_with_precomputed_mean_square_has_the_same_gradients():
    """It uses the given number, and differentiates as if it had taken it itself."""
    rng = np.random.default_rng(2)
    x, scale, d = (rng.normal(size=s).astype(np.float32) for s in ((4, 96), (96,), (4, 96)))
    layer = RMSNorm(MODELS["2: windows"], FLOAT32)

    def objective(x, scale, known):
        variance = mean_square(x) if known else None
        return (layer.apply({"params": {"scale": scale}}, x, variance) * d).sum()

    both = [jax.grad(objective, argnums=(0, 1))(x, scale, known) for known in (False, True)]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *both)
    handed = jax.grad(lambda x, v: layer.apply({"params": {"scale": scale}}, x, v).sum(), (0, 1))
    assert not np.asarray(handed(x, mean_square(x))[1]).any()
    doubled = layer.apply({"params": {"scale": scale}}, x, 4 * mean_square(x))
    own = layer.apply({"params": {"scale": scale}}, x)
    np.testing.assert_allclose(doubled, own / 2, rtol=1e-5)


def test_bfloat16_forward_is_close_to_float32():
    config = MODELS["3: q and k norms, one window"]
    tokens = np.random.default_rng(1).integers(0, 300, (2, 24)).astype(np.int32)
    small = jax.jit(functools.partial(init_params, config))(jax.random.key(0))
    exact, half = (
        jax.jit(lambda w, d=d: forward(w, tokens, config, ForwardOptions(dtype=d))[0])(small)
        for d in ("float32", "bfloat16")
    )
    assert half.dtype == jnp.float32
    error = np.linalg.norm(exact - half) / np.linalg.norm(exact)
    assert 1e-5 < error < 2e-2


def test_initial_weights_follow_the_release():
    """Qwen-7B modeling_qwen.py: N(0, 0.02²), the two output projections 0.02/√(2L)."""
    config = ModelConfig(
        family="qwen", vocab_size=512, d_model=128, n_layers=3, n_heads=4, n_kv_heads=4,
        head_dim=32, d_ff=192, max_length=64,
    )  # fmt: skip
    tree = jax.jit(functools.partial(init_params, config))(jax.random.key(0))
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert leaf.dtype == jnp.float32
        if name.endswith("scale"):
            assert (leaf == 1).all()
        elif name.endswith("bias"):
            assert (leaf == 0).all()
        else:
            last = name.endswith(("attn/o", "mlp/down"))
            std = 0.02 / np.sqrt(2 * config.n_layers) if last else 0.02
            np.testing.assert_allclose(np.std(leaf), std, rtol=0.02, err_msg=name)
            assert abs(np.mean(leaf)) < 5 * std / np.sqrt(leaf.size), name
            layers = np.asarray(leaf) if name.startswith("layers") else None
            assert layers is None or not np.array_equal(layers[0], layers[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dim", [8, 6])
def test_exchanging_halves_by_matmul_equals_slicing(dim, dtype, monkeypatch):
    """What TPUs run instead of cutting heads apart, also where only some channels rotate."""
    rng = np.random.default_rng(dim)
    x = jnp.asarray(rng.normal(size=(2, 5, 3, 8)), dtype)
    table = tuple(jnp.asarray(rng.normal(size=(2, 2, 5, 8)), jnp.float32))
    by_slices = apply_rope(x, table, dim)
    monkeypatch.setattr("qwen_jax.model.rope.platform", lambda: ("tpu", "TPU v5 lite"))
    np.testing.assert_array_equal(apply_rope(x, table, dim), by_slices)
