"""Long context of Qwen v1 (report §2.5): the released code where it goes, float64 where it doesn't.

The release has no windows. With them, and a factor of NTK for each layer, the network is compared
with the naive one of `tests/model/naive.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.errors import UserError
from qwen_jax.interop import load_params, read_config
from qwen_jax.kernels import attention
from qwen_jax.model import (
    abstract_params,
    forward,
    init_cache,
    layer_windows,
    logits,
    network,
    ntk_alpha,
    ntk_alphas,
)
from qwen_jax.model.presets import PRESETS, preset
from tests import toy
from tests.model.families import FLOAT32, params
from tests.model.naive import CONFIG, S, factor, naive

# On either side of the trained length and of each window.
LENGTHS = (1, 7, 8, 9, 16, 17, 32, 33, 40)
T = max(LENGTHS)


@pytest.fixture(scope="module", autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def texts(rows=len(LENGTHS), length=T, seed=0):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (rows, length), np.int32)


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)


def alphas(lengths):
    return np.stack([ntk_alphas(int(n), CONFIG) for n in lengths])


# --- windows with a factor of NTK for each layer --------------------------------------------------


def test_ntk_factor_follows_each_window():
    """A layer interpolates for what it sees: S at most is 1, then 3, 7, 15 for each doubling."""
    assert CONFIG.windows == (8, 16, 32, None)
    assert alphas((8, 9, 16, 17, 33, 64, 65)).tolist() == [
        [1, 1, 1, 1], [1, 3, 3, 3], [1, 3, 3, 3], [1, 3, 7, 7], [1, 3, 7, 15], [1, 3, 7, 15],
        [1, 3, 7, 31],
    ]  # fmt: skip
    for length in range(1, 200):
        assert alphas([length])[0, -1] == factor(length) == ntk_alpha(length, S)


@pytest.mark.parametrize("length", [9, T])
def test_windows_and_ntk_equal_the_naive_network(length):
    """One prompt without padding, and that a factor for each layer and LogN matter to it."""
    tokens = texts(1, length)
    of_all = jnp.full((1, 4), ntk_alpha(length, S))

    @jax.jit
    def run(weights):
        how = ((jnp.asarray(alphas([length])), True), (of_all, True), (of_all, False))
        return [
            forward(weights, tokens, CONFIG, FLOAT32, ntk_alpha=a, logn=logn)[0][0]
            for a, logn in how
        ]

    ours, one_for_all, without_logn = run(params(CONFIG))
    close(ours, naive(tokens[0]))
    assert np.abs(one_for_all - ours).max() > 1e-2
    assert np.abs(without_logn - one_for_all).max() > 1e-2


@pytest.mark.parametrize("mesh", ["none", "2 × 2 × 2 fsdp, context, tensor", "4 fsdp × 2 tensor"])
def test_ragged_prompts_at_every_boundary_equal_the_naive_network(mesh):
    """Prompts on either side of S and of each window in one padded batch, each as it is alone."""
    rows, lengths = texts(12), np.resize(LENGTHS, 12)
    segments = (np.arange(T) < lengths[:, None]).astype(np.int32)
    with toy.use(mesh) as devices:
        batch = toy.place({"tokens": rows, "segments": segments}, devices)
        weights, alpha = params(CONFIG), jnp.asarray(alphas(lengths))
        if devices is not None:
            shardings = jax.tree.map(lambda x: x.sharding, abstract_params(CONFIG, devices))
            weights = jax.device_put(weights, shardings)
            alpha = jax.device_put(alpha, jax.NamedSharding(devices, jax.P(("data", "fsdp"))))
        run = jax.jit(
            lambda w, b, a: forward(
                w, b["tokens"], CONFIG, FLOAT32,
                segment_ids=b["segments"], ntk_alpha=a, logn=True,
            )[0]
        )  # fmt: skip
        ours = np.asarray(run(weights, batch, alpha))
    for row, length, logits_ in zip(rows, lengths, ours, strict=True):
        close(logits_[:length], naive(row[:length]))


def test_decoding_past_every_boundary_equals_the_naive_network():
    """20 tokens after ragged prompts, through the cache: factors stay those of the prompt."""
    lengths, new = np.array([7, 8, 9, 16, 17, 33]), 20
    width = lengths.max()
    rows = texts(len(lengths), width + new, seed=1)
    segments = (np.arange(width) < lengths[:, None]).astype(np.int32)
    how = {"ntk_alpha": jnp.asarray(alphas(lengths)), "logn": True}

    @jax.jit
    def run(weights, prompts, later):
        cache = init_cache(CONFIG, len(lengths), int(width) + new, jnp.float32)
        first, cache = forward(
            weights, prompts, CONFIG, FLOAT32, segment_ids=segments, cache=cache, **how
        )

        def step(cache, tokens):
            out, cache = forward(weights, tokens[:, None], CONFIG, FLOAT32, cache=cache, **how)
            return cache, out[:, 0]

        return first, jax.lax.scan(step, cache, later)[1]

    after = np.stack([row[n : n + new] for row, n in zip(rows, lengths, strict=True)], 1)
    first, later = map(np.asarray, run(params(CONFIG), rows[:, :width], after))
    for b, n in enumerate(lengths):
        expected = naive(rows[b, : n + new], prompt=n)
        close(first[b, :n], expected[:n])
        close(later[:, b], expected[n:])
    regrown = naive(rows[0])  # had the factors followed the text, this would be its last token
    assert np.abs(regrown[lengths[0] + new - 1] - later[-1, 0]).max() > 1e-2


def test_packed_prompts_use_their_own_ntk_factors():
    """Prompts one after the other in a row, each token with its prompt's factors [B,T,W]."""
    lengths = [(7, 33), (9, 17, 14), (40,)]
    rows = texts(len(lengths))
    segments = np.stack([np.repeat(np.arange(1, len(n) + 1), n) for n in lengths]).astype(np.int32)
    positions = np.stack([np.concatenate([np.arange(m) for m in n]) for n in lengths])
    alpha = np.stack([np.repeat(alphas(n), n, axis=0) for n in lengths])

    def attend(q, k, v, layer):
        out = attention(q, k, v, window=layer.window, q_segments=segments, k_segments=segments)
        return out, None

    @jax.jit
    def run(weights):
        at = positions.astype(np.int32)
        x, _ = network(weights, rows, at, CONFIG, FLOAT32, attend, ntk_alpha=alpha, logn=True)
        return logits(weights, x, CONFIG)

    ours = np.asarray(run(params(CONFIG)))
    for row, each, out in zip(rows, lengths, ours, strict=True):
        ends = np.cumsum(each)
        for start, end in zip(ends - each, ends, strict=True):
            close(out[start:end], naive(row[start:end]))


# --- which windows --------------------------------------------------------------------------------


def test_windows_follow_the_maintainers_description():
    """2,048 in four layers, 4,096 in four, 8,192 above; wider than the text is full."""
    windows = layer_windows(32, 2048, longest=16384)
    assert windows == (2048,) * 4 + (4096,) * 4 + (8192,) * 4 + (None,) * 20
    assert layer_windows(32, 2048, longest=2048) == (None,) * 32
    assert layer_windows(5, 6, layers_per_window=2) == (6, 6, 12, 12, 24)
    for bad in ({"n_layers": 0}, {"trained_length": 0}, {"layers_per_window": 0}, {"longest": 0}):
        with pytest.raises(UserError, match=f"{next(iter(bad))} is 0"):
            layer_windows(**({"n_layers": 4, "trained_length": 8} | bad))


def test_released_models_have_no_windows():
    """Dynamic NTK and LogN act in the releases that have them, windows in none (issue 422)."""
    v1 = {name for name in PRESETS if preset(name).family == "qwen"}
    assert v1 == {"qwen-1.8b", "qwen-7b", "qwen-14b", "qwen-72b"}
    assert not any(preset(name).windows for name in v1)
    on = {name for name in v1 if preset(name).dynamic_ntk and preset(name).logn}
    assert on == v1 - {"qwen-72b"}


# --- the released code ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def released(qwen1_small):
    config = read_config(qwen1_small)
    return load_params(qwen1_small, config, abstract_params(config)), config


def test_chunked_prefill_equals_the_released_code(released, qwen1_small):
    """Prompts at every boundary in one batch, 64 tokens at a time through the cache.

    The factor of the whole prompt acts from the first piece on.
    """
    weights, config = released
    with np.load(qwen1_small / "prefill.npz") as stored:
        reference = dict(stored)
    lengths = sorted(int(name.removeprefix("ids_")) for name in reference if name[:4] == "ids_")
    assert lengths == [1, 9, 48, 49, 96, 97, 150, 193]
    piece, width = 64, 256
    tokens = np.zeros((len(lengths), width), np.int32)
    for row, n in zip(tokens, lengths, strict=True):
        row[:n] = reference[f"ids_{n}"]
    segments = (np.arange(width) < np.array(lengths)[:, None]).astype(np.int32)
    alpha = np.stack([ntk_alphas(n, config) for n in lengths])
    assert alpha[:, 0].tolist() == [float(reference[f"ntk_alpha_{n}"]) for n in lengths]

    @jax.jit
    def run(weights, pieces):
        cache = init_cache(config, len(lengths), width + piece, jnp.float32)

        def step(cache, piece):
            out, cache = forward(
                weights, piece[0], config, FLOAT32,
                segment_ids=piece[1], cache=cache, ntk_alpha=alpha, logn=True,
            )  # fmt: skip
            return cache, out

        return jax.lax.scan(step, cache, pieces)[1]

    def split(x):
        return np.stack(np.split(x, width // piece, axis=1))

    ours = np.concatenate(run(weights, (split(tokens), split(segments))), axis=1)
    for row, n in zip(ours, lengths, strict=True):
        np.testing.assert_allclose(row[:n], reference[f"logits_{n}"], atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["p40_n20", "p90_n30"])
def test_released_answer_prefilled_as_a_prompt_gets_new_ntk_factors(released, qwen1_small, name):
    """The next turn of a chat prefills the whole text with its own factor; decoding had another."""
    weights, config = released
    with np.load(qwen1_small / "decode.npz") as stored:
        ids, decoded = stored[f"ids_{name}"], stored[f"logits_{name}"]
        again, alpha = stored[f"full_recompute_last_{name}"], float(stored[f"alpha_{name}"])
    own = ntk_alpha(len(ids), config.trained_length)
    assert own > alpha
    tokens = ids[None].astype(np.int32)
    last = jax.jit(
        lambda w: forward(w, tokens, config, FLOAT32, ntk_alpha=own, logn=True)[0][0, -1]
    )(weights)
    np.testing.assert_allclose(last, again, atol=5e-4, rtol=1e-4)
    assert np.abs(last - decoded[-1]).max() > 0.05
