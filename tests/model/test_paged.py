"""The network over pages gives each request what the whole text gives at once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.kernels import append, init_paged_cache
from qwen_jax.kernels.cache import read_pages, round_trip
from qwen_jax.model import abstract_params, forward, logits, ntk_alphas
from qwen_jax.model.paged import decode, prefill
from qwen_jax.parallel import MeshConfig, make_mesh
from tests.model.families import FLOAT32, MODELS, params

PAGE, PAGES, TABLE = 4, 24, 8
LENGTHS = (19, 4, 9)
NEW = 5


class Paged:
    """Requests over one cache: pages handed out in a scattered order."""

    def __init__(self, config, weights, dtype=jnp.float32):
        self.config, self.weights = config, weights
        kv = (config.n_kv_heads, config.head_dim)
        self.cache = init_paged_cache(config.n_layers, PAGES, *kv, page_size=PAGE, dtype=dtype)
        order = np.random.default_rng(0).permutation(PAGES).astype(np.int32)
        self.table = order.reshape(-1, TABLE)[: len(LENGTHS)]
        self.alphas = np.stack([ntk_alphas(n, config) for n in LENGTHS])
        self._prefill = jax.jit(functools.partial(prefill, config=config, options=FLOAT32))
        self._decode = jax.jit(functools.partial(decode, config=config, options=FLOAT32))

    def prefill(self, chunks, width=32, past=4):
        """chunks: (request, start, ids) in order; returns [len(chunks)] lists of logits [n,V]."""
        tokens, positions, segments, owner = (np.zeros(width, np.int32) for _ in range(4))
        new_pages = np.full(width // PAGE, PAGES, np.int32)
        past_pages, past_segments, places, at = [], [], [], 0
        for i, (request, start, ids) in enumerate(chunks):
            here = slice(at, at + len(ids))
            tokens[here], segments[here], owner[here] = ids, i + 1, request
            positions[here] = start + np.arange(len(ids))
            n = -(-len(ids) // PAGE)
            first = start // PAGE
            new_pages[at // PAGE : at // PAGE + n] = self.table[request, first : first + n]
            past_pages += [*self.table[request, :first]]
            past_segments += [i + 1] * first
            places.append(here)
            at += n * PAGE
        pad = [0] * (past - len(past_pages))
        hidden, self.cache = self._prefill(
            *(self.weights, tokens, positions, segments, self.cache, new_pages),
            cached_pages=np.array(pad + past_pages, np.int32),
            cached_segments=np.array(pad + past_segments, np.int32),
            ntk_alpha=self.alphas[owner],
        )
        out = np.asarray(logits(self.weights, hidden[None], self.config)[0])
        return [out[here] for here in places]

    def decode(self, tokens, lengths, alive):
        hidden, self.cache = self._decode(
            *(self.weights, np.array(tokens, np.int32), self.cache, self.table),
            *(np.array(lengths, np.int32), np.array(alive)),
            ntk_alpha=self.alphas,
        )
        return np.asarray(logits(self.weights, hidden[None], self.config)[0])


def texts(config):
    rng = np.random.default_rng(1)
    return [rng.integers(0, config.vocab_size, n + NEW).astype(np.int32) for n in LENGTHS]


def whole(config, weights, ids, prompt):
    switches = {"ntk_alpha": ntk_alphas(prompt, config)[None], "logn": config.logn}
    run = jax.jit(lambda w: forward(w, ids[None], config, FLOAT32, **switches)[0][0])
    return np.asarray(run(weights))


def one_by_one(model, ids):
    """The first prompt in two chunks, the second of them beside the others; then five tokens."""
    first = model.prefill([(0, 0, ids[0][:12])])[0]
    rest = model.prefill([(0, 12, ids[0][12:19]), (1, 0, ids[1][:4]), (2, 0, ids[2][:9])])
    got = [[*first, *rest[0]], [*rest[1]], [*rest[2]]]
    for step in range(NEW):
        # The second request sits out a step in the middle and comes back.
        at = [n + step - (r == 1 and step > 2) for r, n in enumerate(LENGTHS)]
        alive = [True, step != 2, True]
        out = model.decode([ids[r][n] for r, n in enumerate(at)], at, alive)
        for r in range(3):
            if alive[r]:
                got[r].append(out[r])
    return [np.stack(rows) for rows in got]


@pytest.mark.parametrize("name", MODELS)
def test_packed_prefill_and_decode_equal_one_forward_pass(name):
    config = MODELS[name]
    weights, ids = params(config), texts(config)
    for r, got in enumerate(one_by_one(Paged(config, weights), ids)):
        expected = whole(config, weights, ids[r], LENGTHS[r])[: len(got)]
        np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-5)


def test_ntk_factor_of_a_layer_follows_its_window():
    """Layers with windows of 8 and everything at a trained length of 8: factors 1 and 7."""
    config = dataclasses.replace(MODELS["v1: NTK, LogN"], windows=(8, None))
    weights, ids = params(config), texts(config)
    assert ntk_alphas(19, config).tolist() == [1.0, 7.0]
    for r, got in enumerate(one_by_one(Paged(config, weights), ids)):
        expected = whole(config, weights, ids[r], LENGTHS[r])[: len(got)]
        np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.bfloat16])
def test_new_tokens_are_attended_to_as_the_cache_stores_them(dtype):
    """What attention gets before the write is bit for bit what it gets after, so that the place
    where a prompt is cut changes rounding only."""
    rng = np.random.default_rng(0)
    k, v = jnp.asarray(rng.normal(size=(2, 3, 1, 9, 2, 8)), jnp.float32)
    cache = init_paged_cache(3, PAGES, 2, 8, page_size=PAGE, dtype=dtype)
    ids = np.array([5, 0, 7], np.int32)
    cache = append(cache, k, v, ids[None], np.zeros(1, np.int32))
    for layer in range(3):
        read = read_pages(cache, layer, ids, jnp.float32)
        for stored, new in zip(read, (k[layer], v[layer]), strict=True):
            np.testing.assert_array_equal(stored[:, :9], round_trip(new, cache))
            assert np.abs(np.asarray(round_trip(new, cache) - new)).max() > 1e-4


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.bfloat16])
def test_low_precision_cache_changes_logits_slightly(dtype):
    config = MODELS["2.5: grouped, tied, YaRN"]
    weights, ids = params(config), texts(config)
    for r, got in enumerate(one_by_one(Paged(config, weights, dtype), ids)):
        exact = whole(config, weights, ids[r], LENGTHS[r])[: len(got)]
        assert 1e-4 < np.linalg.norm(got - exact) / np.linalg.norm(exact) < 0.15


def test_tensor_parallel_steps_equal_one_device():
    config = MODELS["2.5: grouped, tied, YaRN"]
    ids, weights = texts(config), params(config)
    expected = one_by_one(Paged(config, weights), ids)
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=2), jax.devices()[:2])
    shardings = jax.tree.map(lambda x: x.sharding, abstract_params(config, mesh))
    with jax.set_mesh(mesh):
        model = Paged(config, jax.device_put(weights, shardings))
        for got, alone in zip(one_by_one(model, ids), expected, strict=True):
            np.testing.assert_allclose(got, alone, atol=1e-4, rtol=1e-5)
