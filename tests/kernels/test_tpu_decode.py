"""TPU decode kernels: interpreted against float64, races, and compiled for real chips on a CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.kernels import paged
from qwen_jax.kernels.cache import PagedCache
from qwen_jax.kernels.paged import append, paged_attention
from qwen_jax.kernels.tpu import paged_decode as tpu_decode
from tests.kernels.paged_cases import NO_WINDOW, check, make_case
from tests.tpu import compiled, needs_libtpu

CASES = {
    "page borders": {"lengths": (0, 1, 31, 32, 33, 128, 0)},
    "float32": {"dtype": jnp.float32, "lengths": (0, 33, 64), "groups": 1},
    "two cores, window": {"head_blocks": 2, "window": 40, "lengths": (0, 35, 64, 128)},
    "heads of 64": {"width": 64, "lengths": (33, 0, 97)},
    "a draft of eight, window": {"q_len": 8, "window": 5, "lengths": (0, 8, 34, 100)},
    "many kv heads": {"kv_heads": 10, "groups": 1, "lengths": (40, 90)},
    "8 bits": {"dtype": jnp.uint8, "page": 128, "lengths": (0, 1, 127, 128, 129, 300)},
    "8 bits, heads of 64, window": {
        "dtype": jnp.uint8,
        "page": 128,
        "width": 64,
        "window": 130,
        "q_len": 2,
        "lengths": (0, 129, 300),
    },
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of two pages, so that few tokens take several of them."""
    monkeypatch.setattr(tpu_decode, "_BLOCK_SCORES", 16 * 64)


def interpreted(case, *, window=None, head_blocks=1, races=False):
    start = jnp.asarray(case.lengths - case.q.shape[1])
    window = jnp.int32(NO_WINDOW if window is None else window)
    params = pltpu.InterpretParams(
        detect_races=races,
        # Copies done at once may be seen too early, and only the detector knows; the other way they
        # are done no sooner than waited for, and reading early shows in the result.
        dma_execution_mode="eager" if races else "on_wait",
        uninitialized_memory="nan",
    )
    with pltpu.force_tpu_interpret_mode(params):
        return tpu_decode.paged_decode(
            *(jnp.asarray(case.q), *case.flat(), start, window),
            scale=case.q.shape[-1] ** -0.5,
            head_blocks=head_blocks,
        )


@pytest.mark.parametrize("name", CASES)
def test_matches_float64(name):
    options = dict(CASES[name])
    how = {key: options.pop(key) for key in ("window", "head_blocks") if key in options}
    case = make_case(options.pop("lengths"), **options)
    # Weights are rounded to bf16 beside bf16 and 8-bit values: 2⁻⁹ of numbers up to about 3.
    tolerance = 1e-5 if options.get("dtype") == jnp.float32 else 1e-2
    check(interpreted(case, **how), case.expected(window=how.get("window")), tolerance)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.uint8])
def test_no_races(dtype):
    page = 128 if dtype == jnp.uint8 else 16
    case = make_case((0, 3 * page + 1, page, 0, 2 * page), dtype=dtype, page=page)
    got = interpreted(case, races=True)
    assert not interpret_pallas_call.races.races_found
    check(got, case.expected(), 1e-2)


def test_eight_bits_are_dequantised_exactly():
    """One visible token: its output is its own value, as the release dequantises it."""
    case = make_case((1, 1, 1), dtype=jnp.uint8, page=128)
    out, _ = interpreted(case)
    expected = np.repeat(case.v[:, 0], 4, axis=1)
    # The only rounding is that of weight · scale to bf16, the same for all of a token's numbers.
    scale = np.asarray(out)[:, 0] / expected
    assert np.ptp(scale, axis=-1).max() < 1e-3 and np.abs(scale - 1).max() < 2**-8


def test_attention_merges_new_tokens_on_tpu(monkeypatch):
    case = make_case((0, 20, 65), dtype=jnp.bfloat16, page=16, columns=5)
    k, v = np.random.default_rng(0).normal(size=(2, 3, 1, 2, 128)).astype(np.float32)
    operands = (jnp.asarray(case.q), case.cache, case.table, case.lengths)
    expected = jax.jit(paged_attention)(*operands, k_new=k, v_new=v)
    monkeypatch.setattr(paged, "platform", lambda: ("tpu", "tpu"))
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        run = jax.jit(functools.partial(paged_attention, implementation="pallas_tpu"))
        got = run(*operands, k_new=k, v_new=v)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (a, b)), atol=0.02)


APPENDS = {
    "one token": ((5, 0, 127, 128, 300), 1, None),
    "idle requests first, between and last": ((5, 6, 127, 128, 300), 1, (0, 1, 0, 1, 0)),
    "nobody": ((5, 6, 7), 1, (0, 0, 0)),
    "a draft over a border": ((30, 127, 383), 4, (4, 4, 3)),
    "a prompt": ((0, 100), 150, (150, 33)),
}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.uint8])
@pytest.mark.parametrize("name", APPENDS)
def test_append_is_the_scatter(name, dtype, monkeypatch):
    lengths, steps, counts = APPENDS[name]
    rng = np.random.default_rng(0)
    requests, layers = len(lengths), 8 if steps == 1 else 2
    count, page = 3 * requests + 1, 128
    table = rng.permutation(count)[: 3 * requests].reshape(requests, 3).astype(np.int32)
    pages = rng.integers(0, 256, (layers, count, 2, page, 128))
    scales = rng.normal(size=(layers, count, 2, 4, page)).astype(np.float32)
    quantised = dtype == jnp.uint8
    cache = PagedCache(jnp.asarray(pages, dtype), jnp.asarray(scales) if quantised else None)
    k, v = jnp.asarray(rng.normal(size=(2, layers, requests, steps, 2, 64)), jnp.bfloat16)
    counts = None if counts is None else np.array(counts, np.int32)
    operands = (cache, k, v, table, np.array(lengths, np.int32), counts)
    expected = jax.jit(append)(*operands)
    monkeypatch.setattr(paged, "platform", lambda: ("tpu", "tpu"))
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        got = jax.jit(lambda *operands: append(*operands))(*operands)
    changed = np.asarray(expected.pages != cache.pages).any()
    assert changed == (counts is None or counts.any())
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("chip", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_compiles_for_chips_without_copying_the_cache(chip):
    """Attention alone, and whole decoding loops over all layers, donated, also split over chips."""
    results = compiled("tests.kernels.compile_decode", chip)
    assert len(results) == 9
    for result in results:
        assert result["kernels"] >= 1, result
        # No copy of the cache, nor of a layer of it (1/8), nor of its scales (about 1/17).
        assert result["temp"] < result["cache"] / 100, result
        assert result["alias"] in (0, result["cache"]), result
