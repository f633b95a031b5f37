"""Paged cache and its attention: the plain form, writing, 8 bits, dispatch, meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.errors import UserError
from qwen_jax.kernels import paged
from qwen_jax.kernels.cache import PagedCache, dequantise, init_paged_cache, quantise
from qwen_jax.kernels.paged import append, paged_attention
from qwen_jax.kernels.selection import log_choice
from tests.kernels.paged_cases import by_loops, check, make_case, release_quantise

LENGTHS = (0, 1, 31, 32, 33, 100)
CASES = {
    "one query": {},
    "a draft of three": {"q_len": 3},
    "window 1": {"window": 1},
    "window over a page border": {"window": 7, "q_len": 2},
    "multi-head": {"kv_heads": 4, "groups": 1},
    "heads of 64": {"width": 64},
    "8 bits": {"dtype": jnp.uint8},
    "third layer": {"layers": 4, "layer": 2},
}


@pytest.mark.parametrize("name", CASES)
def test_matches_float64(name):
    options = {"dtype": jnp.float32, "width": 16} | CASES[name]
    window = options.pop("window", None)
    case = make_case(LENGTHS, **options)
    got = jax.jit(paged_attention)(
        *(jnp.asarray(case.q, jnp.float32), case.cache, case.table, case.lengths),
        layer=options.get("layer", 0),
        window=window,
    )
    check(got, case.expected(window=window), 1e-5)
    assert not np.asarray(got[0])[0].any()


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("q_len", [1, 4])
def test_new_tokens_merge_as_if_they_were_cached(q_len, window):
    case = make_case((0, 1, 40, 63), dtype=jnp.float32, width=16, q_len=q_len)
    rng = np.random.default_rng(0)
    k_new, v_new = rng.normal(size=(2, 4, q_len, 2, 16)).astype(np.float32)
    table = np.minimum(case.table, case.cache.pages.shape[1] - 1)
    # Pages for the slots that are about to be written.
    table[:, 2] = np.setdiff1d(np.arange(case.cache.pages.shape[1]), table[:, :2])[:4]
    table[0, 0], table[1, 0] = np.setdiff1d(np.arange(case.cache.pages.shape[1]), table)[:2]
    cache = PagedCache(jnp.nan_to_num(case.cache.pages))
    attend = jax.jit(functools.partial(paged_attention, jnp.asarray(case.q), window=window))
    merged = attend(cache, table, case.lengths, k_new=k_new, v_new=v_new)
    cache = jax.jit(append)(cache, k_new[None], v_new[None], table, case.lengths)
    cached = attend(cache, table, case.lengths + q_len)
    for a, b in zip(merged, cached, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_quantise_is_the_release_formula():
    x = np.random.default_rng(0).normal(size=(64, 3, 128)).astype(np.float32) * 3 + 1
    codes, scale, zero = quantise(jnp.asarray(x))
    expected = release_quantise(x)
    np.testing.assert_allclose(scale, expected[1], rtol=1e-6)
    np.testing.assert_allclose(zero, expected[2], rtol=1e-6)
    # Numbers are cut off, so one that lies on a whole code may fall to either side of it.
    difference = np.abs(np.asarray(codes, np.int32) - expected[0])
    assert difference.max() <= 1 and (difference != 0).mean() < 0.01
    error = x - np.asarray(dequantise(codes, scale, zero))
    assert error.min() > -1e-4 and (error < scale[..., None] * 1.001).all()
    assert error.mean() == pytest.approx(float(scale.mean()) / 2, rel=0.05)


def test_quantise_by_hand():
    x = jnp.array([[0.0, 127.5, 255.0, 51.9], [-255.0, 255.0, 0.0, 1.9], [3.0, 3.0, 3.0, 3.0]])
    codes, scale, zero = quantise(x)
    np.testing.assert_array_equal(codes, [[0, 127, 255, 51], [0, 255, 127, 128], [0, 0, 0, 0]])
    np.testing.assert_allclose(scale, [1, 2, 1])
    np.testing.assert_allclose(zero, [0, 127.5, -3])
    np.testing.assert_allclose(dequantise(codes, scale, zero)[2], 3.0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.uint8])
def test_append_writes_its_slots_and_nothing_else(dtype):
    rng = np.random.default_rng(1)
    layers, kv_heads, page, width, steps = 3, 2, 8, 4, 5
    cache = init_paged_cache(layers, 20, kv_heads, width, page_size=page, dtype=dtype)
    cache = jax.tree.map(lambda x: x + 7, cache)
    table = rng.permutation(20)[:16].reshape(4, 4)
    lengths, counts = np.array([0, 6, 16, 30]), np.array([5, 3, 0, 5])
    k, v = rng.normal(size=(2, layers, 4, steps, kv_heads, width)).astype(np.float32)
    got = jax.jit(append)(cache, k, v, table, lengths, counts)
    tokens, scales = np.concatenate([k, v], -1), None
    if dtype == jnp.uint8:
        (k_codes, *k_rest), (v_codes, *v_rest) = (jax.jit(quantise)(x) for x in (k, v))
        tokens = np.concatenate([k_codes, v_codes], -1)
        scales = np.stack([*k_rest, *v_rest], -1)
    pages = np.array(cache.pages)
    rows = None if scales is None else np.array(cache.scales)
    for r in range(4):
        for t in range(counts[r]):
            slot = lengths[r] + t
            if slot < 32:  # the table ends here
                pages[:, table[r, slot // page], :, slot % page] = tokens[:, r, t]
                if scales is not None:
                    rows[:, table[r, slot // page], :, :, slot % page] = scales[:, r, t]
    np.testing.assert_array_equal(got.pages, pages)
    if scales is not None:
        np.testing.assert_array_equal(got.scales, rows)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.uint8])
def test_sharded_over_requests_and_heads(dtype):
    """Requests over `data`, heads over `tensor`: as on one device, page ids local to a shard."""
    case = make_case((5, 40, 64, 17), dtype=dtype, width=16, kv_heads=4, q_len=2)
    cache = jax.tree.map(jnp.nan_to_num, case.cache)
    q = jnp.asarray(case.q, jnp.float32)
    k_new, v_new = np.random.default_rng(0).normal(size=(2, 1, 4, 2, 4, 16)).astype(np.float32)
    # Two halves of the requests, with a pool of pages each.
    count = cache.pages.shape[1]
    pools = jax.tree.map(lambda x: jnp.concatenate([x, x], axis=1), cache)
    table = np.minimum(case.table, count - 1)
    single = jax.jit(paged_attention)(
        q, cache, table, case.lengths, k_new=k_new[0], v_new=v_new[0], window=jnp.int32(30)
    )
    # Compiled both times: a number that lies on a whole code falls where the rounding takes it.
    halves = np.array([[2, 2, 0, 0], [0, 0, 2, 2]])
    whole = [jax.jit(append)(cache, k_new, v_new, table, case.lengths, half) for half in halves]
    mesh = jax.make_mesh(
        (2, 1, 1, 4),
        ("data", "fsdp", "context", "tensor"),
        axis_types=(jax.sharding.AxisType.Explicit,) * 4,
    )

    def put(x, *spec):
        return jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec)))

    with jax.set_mesh(mesh):
        pools = jax.tree.map(lambda x: put(x, None, "data", "tensor"), pools)
        rows = (put(table, "data"), put(case.lengths, "data"))
        new = [put(x, None, "data", None, "tensor") for x in (k_new, v_new)]
        step = jax.jit(paged_attention)
        out = step(
            *(put(q, "data", None, "tensor"), pools, *rows),
            k_new=new[0][0],
            v_new=new[1][0],
            window=jnp.int32(30),
        )
        written = jax.jit(append)(pools, *new, *rows)
    for a, b in zip(out, single, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for a, x, y in zip(*map(jax.tree.leaves, (written, *whole)), strict=True):
        np.testing.assert_array_equal(a, np.concatenate([x, y], axis=1))


def test_token_bytes():
    sizes = {jnp.bfloat16: 8 * 256 * 2, jnp.uint8: 8 * (256 + 16)}
    for dtype, size in sizes.items():
        cache = init_paged_cache(1, 2, 8, 128, dtype=dtype)
        leaves = jax.tree.leaves(cache)
        assert cache.token_bytes() == size == sum(x.nbytes for x in leaves) // (2 * 128)


def test_refusals(monkeypatch):
    case = make_case((3, 5), width=16, dtype=jnp.float32)
    q, table, lengths = jnp.asarray(case.q), case.table, case.lengths

    def refuses(match, *operands, **options):
        with pytest.raises(UserError, match=match):
            paged_attention(*(operands or (q, case.cache, table, lengths)), **options)

    refuses("did you mean 'reference'", implementation="referense")
    refuses("'pallas_tpu' runs on tpu only and this is cpu", implementation="pallas_tpu")
    refuses("'pallas_gpu' runs on gpu only and this is cpu", implementation="pallas_gpu")
    refuses("is 8 in queries and 16 in the cache", q[..., :8], case.cache, table, lengths)
    refuses("7 query heads cannot share", q[:, :, :7], case.cache, table, lengths)
    refuses("don't describe 2 requests", q, case.cache, table[:1], lengths)
    refuses("both or neither", k_new=q)
    refuses("New keys are", k_new=q, v_new=q)
    monkeypatch.setattr(paged, "platform", lambda: ("tpu", "tpu"))
    refuses("can't run: heads of 16; the TPU kernel", implementation="pallas_tpu")
    wide = make_case((3, 5), kv_heads=1, groups=1)
    table = np.zeros((2, 120_000), np.int32)
    operands = (jnp.asarray(wide.q), wide.cache, table, lengths)
    refuses("a page table of 240000 entries", *operands, implementation="pallas_tpu")
    monkeypatch.setattr(paged, "platform", lambda: ("gpu", "gpu"))
    refuses("can't run: a cpu; the GPU kernel is made for", implementation="pallas_gpu")
    for size in ("layers", "pages", "kv_heads", "head_dim"):
        with pytest.raises(UserError, match=f"{size} of a paged cache is 0"):
            init_paged_cache(
                **({"layers": 1, "pages": 1, "kv_heads": 1, "head_dim": 8} | {size: 0})
            )
    with pytest.raises(UserError, match="is int8"):
        init_paged_cache(1, 1, 1, 8, dtype=jnp.int8)


def test_auto_says_once_why_it_falls_back(monkeypatch, caplog):
    case = make_case((3, 5), width=16, dtype=jnp.float32)
    monkeypatch.setattr(paged, "platform", lambda: ("tpu", "tpu"))
    log_choice.cache_clear()
    with caplog.at_level("INFO", logger="absl"):
        for _ in range(2):
            got = paged_attention(jnp.asarray(case.q), case.cache, case.table, case.lengths)
    check(got, case.expected(), 1e-5)
    lines = [x.getMessage() for x in caplog.records if "paged attention" in x.getMessage()]
    assert len(lines) == 1
    assert "reference (requested auto; heads of 16; the TPU kernel takes" in lines[0]


def test_a_poisoned_page_harms_nobody_else():
    """A diverged request leaves nan in its pages; the next owner of a page never sees them."""
    case = make_case((20, 5), width=16, dtype=jnp.float32)
    assert np.isnan(np.asarray(case.cache.pages)).any()
    out, _ = paged_attention(jnp.asarray(case.q), case.cache, case.table, case.lengths)
    assert np.isfinite(np.asarray(out)).all()
    expected = by_loops(case.q, case.k, case.v, case.lengths - 1, case.lengths, None)
    np.testing.assert_allclose(out, expected[0], rtol=1e-5, atol=1e-5)
