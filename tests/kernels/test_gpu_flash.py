"""The Hopper kernels without a GPU: lowered, interpreted warpgroup by warpgroup, and their plans.

Interpreted means: the kernel as it stands, its three warpgroups as threads, with barriers, bulk
copies and shared memory simulated, and its matrix products (which a CPU has not) as plain ones.
"""

import contextlib
import functools
import itertools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams, force_gpu_interpret_mode

from qwen_jax.errors import UserError
from qwen_jax.kernels.flash import flash_attention
from qwen_jax.kernels.gpu import flash_forward, flash_schedule, mosaic
from qwen_jax.kernels.gpu.flash import KERNEL, why_not
from qwen_jax.kernels.gpu.flash_pipeline import TILE, Blocks, Step
from qwen_jax.kernels.mask import MASKED, make_mask, visible

CHECKS = [
    jax.export.DisabledSafetyCheck.custom_call(name) for name in ("mosaic_gpu_v2", "mosaic_gpu")
]


def lower(function, *arrays):
    """The program for CUDA, on any machine."""
    return jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=CHECKS)(*arrays)


def shapes(batch, q_len, k_len, heads, kv_heads, width, dtype):
    q = jax.ShapeDtypeStruct((batch, q_len, heads, width), dtype)
    k = jax.ShapeDtypeStruct((batch, k_len, kv_heads, width), dtype)
    numbers = jax.ShapeDtypeStruct((batch, heads, q_len), jnp.float32)
    q_ids, k_ids = (jax.ShapeDtypeStruct((batch, n), jnp.int32) for n in (q_len, k_len))
    return q, k, k, numbers, q, numbers, q_ids, k_ids, jax.ShapeDtypeStruct((batch,), jnp.int32)


MASKS = [
    {"segments": segments, "window": window, "start": start}
    for segments, window, start in itertools.product(
        (False, True), (None, 100, "traced"), (False, True)
    )
]


def gradients_of(masking, grad_dtype=None):
    """(out, lse, dq, dk, dv) as a function of the arrays of `shapes`."""

    def run(q, k, v, lse, d_out, delta, q_ids, k_ids, start):
        window = masking["window"]
        mask = make_mask(
            start if masking["start"] else None,
            *((q_ids, k_ids) if masking["segments"] else (None, None)),
            start[0] if window == "traced" else window,
        )
        return *KERNEL.forward(q, k, v, mask, 0.1), *KERNEL.backward(
            q, k, v, mask, 0.1, lse, d_out, delta, grad_dtype
        )

    return run


@pytest.fixture
def reproducible(monkeypatch):
    """As if the process had been started with the flag; XLA itself reads it no more."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=true")


@pytest.mark.parametrize(
    ("masking", "width"), [(m, 64 + 64 * ((i + i // 2) % 2)) for i, m in enumerate(MASKS)], ids=str
)
def test_every_mask_lowers_for_cuda(masking, width):
    arrays = shapes(2, 512, 512, 4, 2, width, jnp.bfloat16)
    exported = lower(gradients_of(masking), *arrays)
    module = exported.mlir_module()
    assert module.count("@mosaic_gpu") == 2
    assert "output_operand_alias" in module  # dq, added to in place
    q, k = arrays[:2]
    dims = [q.shape, (2, 4, 512), q.shape, k.shape, k.shape]
    assert [x.shape for x in exported.out_avals] == dims


@pytest.mark.parametrize("width", [64, 128])
def test_reproducible_gradients_add_nothing_in_memory(width, reproducible):
    arrays = shapes(2, 512, 512, 4, 2, width, jnp.bfloat16)
    module = lower(gradients_of(MASKS[-1]), *arrays).mlir_module()
    assert module.count("@mosaic_gpu") == 3
    assert "output_operand_alias" not in module


@pytest.mark.parametrize(
    ("sizes", "dtype", "grad_dtype"),
    [
        ((1, 500, 300, 8, 8), jnp.bfloat16, None),  # odd lengths, multi-head
        ((1, 7, 1000, 8, 1), jnp.float16, jnp.float32),  # few queries, one kv head
        ((3, 4096, 4096, 64, 8), jnp.bfloat16, jnp.float32),  # sections of heads and rows
    ],
)
def test_every_shape_lowers_for_cuda(sizes, dtype, grad_dtype):
    arrays = shapes(*sizes, 128, dtype)
    exported = lower(gradients_of(MASKS[-1], grad_dtype), *arrays)
    assert [x.shape for x in exported.out_avals[2:]] == [x.shape for x in arrays[:3]]
    assert {x.dtype for x in exported.out_avals[2:]} == {jnp.dtype(grad_dtype or dtype)}


def test_gradients_lower_where_a_model_takes_them():
    """Inside a scan over layers, recomputed, on a mesh of two axes."""
    mesh, spec = jax.make_mesh((2, 2), ("data", "tensor")), jax.P("data", None, "tensor")

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False
    )
    def attend(q, k, v):
        mask = make_mask(None, None, None, None)
        return flash_attention(q, k, v, mask, 0.1, KERNEL)[0]

    def loss(q, k, v):
        def layer(q, _):
            return jax.checkpoint(attend)(q, k, v), None

        return jax.lax.scan(layer, q, length=2)[0].astype(jnp.float32).sum()

    place = jax.NamedSharding(mesh, spec)
    q, k = (jax.ShapeDtypeStruct((2, 512, n, 128), jnp.bfloat16, sharding=place) for n in (4, 2))
    module = lower(jax.grad(loss, (0, 1, 2)), q, k, k).mlir_module()
    assert module.count("@mosaic_gpu") >= 2 and "output_operand_alias" in module


def test_more_shared_memory_than_there_is_is_refused(monkeypatch):
    monkeypatch.setattr(flash_forward, "forward_blocks", lambda width: Blocks(128, 4))
    with pytest.raises(ValueError, match="exceeds available shared memory"):
        lower(gradients_of(MASKS[0]), *shapes(1, 512, 512, 2, 2, 128, jnp.bfloat16))


def test_what_it_cannot_serve_is_said():
    good = {"head_dim": 128, "dtype": jnp.bfloat16, "device_kind": "NVIDIA H200"}
    assert why_not(**good) is None
    assert why_not(**good | {"dtype": "float16", "device_kind": "NVIDIA H100 80GB HBM3"}) is None
    assert "not 80" in why_not(**good | {"head_dim": 80})
    assert "not float32" in why_not(**good | {"dtype": jnp.float32})
    assert "'cpu'" in why_not(**good | {"device_kind": "cpu"})
    assert "A100" in why_not(**good | {"device_kind": "NVIDIA A100-SXM4-80GB"})


def test_what_it_cannot_serve_is_refused():
    q = jnp.zeros((1, 128, 2, 64), jnp.bfloat16)
    mask = make_mask(None, None, None, None)
    refused = ((q.astype(jnp.float32),) * 3, (q, q.astype(jnp.float16), q), (q[..., :32],) * 3)
    for operands in refused:
        with pytest.raises(UserError, match="pallas_gpu"):
            KERNEL.forward(*operands, mask, 1.0)
    with pytest.raises(UserError, match="scale"):
        KERNEL.forward(q, q, q, mask, -1.0)
    with pytest.raises(ValueError, match="CPU"):  # never interpreted unless asked to
        KERNEL.forward(q, q, q, mask, 1.0)


# --- Plans ---------------------------------------------------------------------------------------


@st.composite
def maskings(draw):
    """(mask, T, S) with everything a mask may have, ids ascending or not."""
    q_len, k_len = draw(st.sampled_from([(1, 1), (32, 32), (37, 37), (11, 40), (40, 7)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    start = q_ids = k_ids = None
    if draw(st.booleans()):
        start = jnp.asarray(rng.integers(0, k_len, 2), jnp.int32)
    if draw(st.booleans()):
        slots = rng.integers(0, 4, (2, 128))
        if draw(st.booleans()):
            slots.sort(axis=1)
        shift = 0 if start is None else int(start[0])
        q_ids, k_ids = (jnp.asarray(slots[:, a : a + n]) for a, n in ((shift, q_len), (0, k_len)))
    window = draw(st.sampled_from([None, 1, 5, 17, jnp.int32(9)]))
    return make_mask(start, q_ids, k_ids, window), q_len, k_len


def dense(mask, q_len, k_len):
    """The mask itself, bool [2,T,S]."""
    start = jnp.zeros((1,), jnp.int32) if mask.q_start is None else mask.q_start
    seen = visible(
        start[:, None] + jnp.arange(q_len),
        jnp.arange(k_len)[None],
        *(mask.q_segments, mask.k_segments, mask.any_window()),
    )
    return np.broadcast_to(seen, (2, q_len, k_len))


def by_rows(rows):
    """The mask that `Rows` describe, bool [B or 1, R, C or columns of the largest bound]."""
    length = 200 if rows.column_ids is None else rows.column_ids.shape[1]
    columns = np.arange(length)
    seen = np.ones((1, 1, length), bool)
    if rows.low is not None:
        seen = seen & (columns >= rows.low[..., None])
    if rows.high is not None:
        seen = seen & (columns < rows.high[..., None])
    if rows.ids is not None:
        seen = seen & (rows.ids[..., None] == rows.column_ids[:, None])
    return seen


@settings(max_examples=25, deadline=None)
@given(maskings())
def test_rows_are_the_mask(case):
    mask, q_len, k_len = case
    pads = (-q_len % 16, -k_len % 16)
    seen = dense(mask, q_len, k_len)
    queries = by_rows(flash_schedule.query_rows(mask, q_len, k_len, *pads))
    assert (queries[:, :q_len, :k_len] == seen).all()
    assert not queries[:, :, k_len:].any()
    keys = by_rows(flash_schedule.key_rows(mask, q_len, k_len, *pads))
    assert (keys[:, :k_len, :q_len] == seen.swapaxes(1, 2)).all()
    assert not keys[:, k_len:, : q_len + pads[0]].any()


@settings(max_examples=25, deadline=None)
@given(maskings(), st.booleans(), st.booleans())
def test_every_pair_that_sees_is_visited_once_and_masked_where_needed(case, keys, one_section):
    mask, q_len, k_len = case
    blocks = (8, 16)
    tiles = -(-k_len // 16) if keys else -(-q_len // 8)
    queue = flash_schedule.make_queue(2, tiles, 4, 2, row_bytes=8, budget=100 if one_section else 4)
    rows = flash_schedule.query_rows(mask, q_len, k_len, -q_len % 8, -k_len % 16)
    table = flash_schedule.make_table(mask, rows, (q_len, k_len), blocks, 2, keys=keys, queue=queue)
    table = np.asarray(table)
    assert len(table) == 2 * tiles
    assert len({(b, t) for b, t, *_ in table}) == 2 * tiles
    seen = dense(mask, q_len, k_len)
    seen = np.pad(seen, ((0, 0), (0, -q_len % 8), (0, -k_len % 16)))
    seen = seen.reshape(2, -1, 8, seen.shape[2] // 16, 16).swapaxes(2, 3)
    some, every = seen.any(axis=(3, 4)), seen.all(axis=(3, 4))
    # Queries beyond the last count as seeing what the slot they would have sees.
    if keys:
        some, every = some.swapaxes(1, 2), every.swapaxes(1, 2)
    for batch, tile, *ranges in table:
        step = Step(*(int(x) for x in ranges))
        order = [int(step.block(t)) for t in range(step.steps)]
        assert order == [
            *(int(step.masked_block(t)) for t in range(step.masked)),
            *(int(step.full_block(t)) for t in range(step.masked, step.steps)),
        ]
        assert len(set(order)) == len(order)
        assert set(np.flatnonzero(some[batch, tile])) <= set(order)
        unmasked = order[step.masked :]
        last_queries = [] if q_len % 8 == 0 else [q_len // 8]
        for block in unmasked:
            assert every[batch, tile, block] or (block if keys else tile) in last_queries
    if not one_section:
        return
    lengths = table[:, -1] - table[:, 2]
    if mask.q_segments is not None or mask.q_start is not None:
        assert (np.diff(lengths) <= 0).all()


def test_causality_alone_skips_half_and_masks_the_diagonal_only():
    mask = make_mask(None, None, None, None)
    rows = flash_schedule.query_rows(mask, 1024, 1024, 0, 0)
    queue = flash_schedule.make_queue(1, 8, 1, 1, 1, 1)
    table = flash_schedule.make_table(
        mask, rows, (1024, 1024), (128, 128), 1, keys=False, queue=queue
    )
    table = np.asarray(table).tolist()
    assert table[:-1] == [[0, i, 0, 0, i, i + 1] for i in reversed(range(1, 8))]
    assert table[-1] == [0, 0, 0, 1, 1, 1]


def test_packed_rows_skip_other_documents():
    ids = jnp.repeat(jnp.arange(1, 5, dtype=jnp.int32), 256)[None]
    mask = make_mask(None, ids, ids, None)
    rows = flash_schedule.query_rows(mask, 1024, 1024, 0, 0)
    queue = flash_schedule.make_queue(1, 8, 1, 1, 1, 1)
    table = flash_schedule.make_table(
        mask, rows, (1024, 1024), (128, 128), 1, keys=False, queue=queue
    )
    steps = {int(tile): (int(low), int(high)) for _, tile, low, _, _, high in np.asarray(table)}
    assert steps == {i: (i // 2 * 2, i + 1) for i in range(8)}


def test_a_tile_that_sees_nothing_takes_one_masked_step():
    ids = jnp.where(jnp.arange(512) < 100, 1, 0)[None]
    mask = make_mask(None, ids, ids, None)
    rows = flash_schedule.query_rows(mask, 512, 512, 0, 0)
    queue = flash_schedule.make_queue(1, 4, 1, 1, 1, 1)
    table = flash_schedule.make_table(
        mask, rows, (512, 512), (128, 128), 1, keys=False, queue=queue
    )
    for _, tile, *ranges in np.asarray(flash_schedule.at_least_one_step(table)):
        step = Step(*(int(x) for x in ranges))
        assert (step.steps, step.masked, int(step.block(0))) == (1, 1, 0), tile
    causal = flash_schedule.make_table(
        *(make_mask(None, None, None, None), flash_schedule.query_rows(mask, 512, 512, 0, 0)),
        *((512, 512), (128, 128), 1),
        keys=False,
        queue=queue,
    )
    assert (flash_schedule.at_least_one_step(causal) == causal).all()


@pytest.mark.parametrize("budget", [1, 40, 1000])
def test_the_queue_deals_each_tile_of_each_head_once(budget):
    queue = flash_schedule.make_queue(
        batch=3, tiles=5, heads=8, groups=2, row_bytes=60, budget=budget
    )
    places = zip(*jax.vmap(queue.locate)(jnp.arange(queue.items)), strict=True)
    places = [(int(row), int(head)) for row, head in places]
    assert len(set(places)) == queue.items == 3 * 5 * 8
    kv_heads = [head // 2 for _, head in places]
    sections = [len(set(kv_heads[i : i + queue.heads])) for i in range(0, 40, queue.heads)]
    assert max(sections) == (4 if budget >= 60 else max(1, budget * 4 // 60))


# --- Interpreted ---------------------------------------------------------------------------------


@pytest.fixture
def on_cpu(monkeypatch):
    """Puts plain products in the place of wgmma and takes layouts away; two thread blocks.

    jax 0.11 interprets wgmma of two operands in shared memory, transposed or cut as they may be;
    there those stand, unless races are looked for, which it does not see in them.
    """
    real = mosaic.product, mosaic.two_products

    def dot(a, b):
        # Plain reads need a fence before the copy engine writes again; wgmma's own reads do not.
        plgpu.commit_smem()
        return jnp.dot(a, b, preferred_element_type=jnp.float32)

    def product(a_ref, b_ref):
        return dot(a_ref[...], b_ref[...].T)

    def two_products(a_ref, b_ref, c_ref, d_ref, between):
        return between(product(a_ref, b_ref)), product(c_ref, d_ref)

    def accumulate(total, a, b_ref):
        return total + dot(a, b_ref[...])

    def product_beside(total, a, b_ref, q_ref, k_ref, issued, consume, after, results):
        scores, added = mosaic.product(q_ref, k_ref), dot(a, b_ref[...])
        issued()
        made = consume(scores)
        after()
        assert [x.shape for x in made] == [x.shape for x in results]
        return total + added, *made

    def key_gradients(dk, dv, k_ref, v_ref, q_ref, o_ref, weights, gradient):
        p = weights(mosaic.product(k_ref, q_ref))
        ds = gradient(p, mosaic.product(v_ref, o_ref))
        return accumulate(dk, ds, q_ref), accumulate(dv, p.astype(ds.dtype), o_ref)

    def sum_of_products(factors):
        if mosaic.product is not real[0]:
            return sum(dot(a_ref[...].T, b_ref[...]) for a_ref, b_ref in factors)

        def compute(acc_ref):
            for a_ref, b_ref in factors:
                plgpu.wgmma(acc_ref, a_ref.transpose((1, 0)), b_ref)
            return acc_ref[...]

        (a_ref, b_ref), *_ = factors
        return pl.run_scoped(compute, plgpu.ACC((a_ref.shape[1], b_ref.shape[1]), jnp.float32))

    def all_gradients(
        dk, dv, k_ref, v_ref, q_ref, o_ref, weights, gradient, share, factors, deliver
    ):
        laid_down = []

        def shared_gradient(p, dp):
            laid_down.append(gradient(p, dp))
            return laid_down[0]

        dk, dv = key_gradients(dk, dv, k_ref, v_ref, q_ref, o_ref, weights, shared_gradient)
        share(laid_down[0])
        deliver(sum_of_products(factors))
        return dk, dv

    def add_to_memory(source_ref, target_ref):
        target_ref[...] = target_ref[...] + source_ref[...]

    plain = {
        "load": lambda ref, layout: ref[...],
        "full": lambda shape, value, layout: jnp.full(shape, value, jnp.float32),
        "iota": lambda shape, axis: jax.lax.broadcasted_iota(jnp.int32, shape, axis),
        "ctas": lambda: 2,
        **{
            f.__name__: f
            for f in (
                *(product, product_beside, two_products, accumulate),
                *(key_gradients, all_gradients, add_to_memory),
            )
        },
    }
    for name, function in plain.items():
        monkeypatch.setattr(mosaic, name, function)

    @contextlib.contextmanager
    def interpreted(**options):
        if jax.__version_info__ >= (0, 11) and not options:
            for function in real:
                monkeypatch.setattr(mosaic, function.__name__, function)
        try:
            with force_gpu_interpret_mode(InterpretGPUParams(**options)):
                yield
        finally:
            interpreter.reset_gpu_interpret_mode_state()

    return interpreted


def exact(q, k, v, d_out, seen, scale):
    """(out, lse, delta, dq, dk, dv) in float64. seen: bool [B,T,S]."""
    groups = q.shape[2] // k.shape[2]
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    k_, v_ = (np.repeat(x, groups, axis=2) for x in (k, v))
    seen = seen[:, None]
    scores = np.where(seen, np.einsum("btnh,bsnh->bnts", q, k_) * scale, -np.inf)
    highest = np.maximum(scores.max(-1), -1e300)
    weight = np.exp(scores - highest[..., None])
    total = weight.sum(-1)
    p = weight / np.maximum(total, 1e-300)[..., None]
    out = np.einsum("bnts,bsnh->btnh", p, v_)
    lse = np.where(total > 0, highest + np.log(np.maximum(total, 1e-300)), MASKED)
    delta = np.einsum("btnh,btnh->bnt", out, d_out)
    ds = p * (np.einsum("btnh,bsnh->bnts", d_out, v_) - delta[..., None])
    dq = np.einsum("bnts,bsnh->btnh", ds, k_) * scale
    dk = np.einsum("bnts,btnh->bsnh", ds, q) * scale
    dv = np.einsum("bnts,btnh->bsnh", p, d_out)
    dk, dv = (x.reshape(*k.shape[:3], groups, -1).sum(3) for x in (dk, dv))
    return out, lse, delta, dq, dk, dv


CASES = {
    "multi-head, odd length": {"length": 200, "kv_heads": 2},
    "grouped, wide heads": {"width": 128, "heads": 4, "kv_heads": 2},
    "window": {"window": 70, "length": 300, "dtype": jnp.bfloat16},
    "packed, with padding": {"ids": "ascending", "batch": 2},
    "ids in any order": {"ids": "any"},
    "a tile of padding": {"ids": "head"},
    "past, packed, window": {"ids": "ascending", "start": 150, "length": 100, "window": 130},
}


def build(case, length=256, batch=1, heads=2, kv_heads=1, width=64, **more):
    """(q, k, v, d_out), mask, seen."""
    rng = np.random.default_rng(len(case))
    start, dtype = more.get("start", 0), more.get("dtype", jnp.float16)
    keys = length + start
    sizes = ((length, heads), (keys, kv_heads), (keys, kv_heads), (length, heads))
    arrays = [jnp.asarray(rng.normal(size=(batch, *n, width)), dtype) for n in sizes]
    q_ids = k_ids = None
    if "ids" in more:
        ids = rng.integers(0, 5, (batch, keys)).astype(np.int32)
        if more["ids"] == "ascending":
            ids.sort(axis=1)
        if more["ids"] == "head":
            ids[:] = np.arange(keys) < 100
        q_ids, k_ids = jnp.asarray(ids[:, start:]), jnp.asarray(ids)
    starts = jnp.full((batch,), start, jnp.int32) if start else None
    mask = make_mask(starts, q_ids, k_ids, more.get("window"))
    seen = visible(
        start + jnp.arange(length)[None], jnp.arange(keys)[None], q_ids, k_ids, more.get("window")
    )
    return arrays, mask, np.broadcast_to(np.asarray(seen), (batch, length, keys))


def close(got, expected, dtype):
    """Within a few roundings of the weights to `dtype`."""
    error = np.abs(np.asarray(got, np.float64) - expected).max()
    unit = float(jnp.finfo(dtype).eps) * np.abs(expected).max()
    assert error < 3 * unit, (error, unit)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_kernels_compute_attention_and_its_gradients(case, on_cpu, monkeypatch):
    (q, k, v, d_out), mask, seen = build(case, **CASES[case])
    scale = q.shape[-1] ** -0.5
    out, lse, delta, *gradients = exact(q, k, v, d_out, seen, scale)
    with on_cpu():
        got, got_lse = jax.jit(lambda *x: KERNEL.forward(*x, mask, scale))(q, k, v)
        numbers = (jnp.asarray(lse, jnp.float32), d_out, jnp.asarray(delta, jnp.float32))
        # Here, adding to memory is no single operation: one thread block.
        monkeypatch.setattr(mosaic, "ctas", lambda: 1)
        got_gradients = jax.jit(
            lambda q, k, v, *x: KERNEL.backward(q, k, v, mask, scale, *x, jnp.float32)
        )(q, k, v, *numbers)
        jax.block_until_ready((got, got_lse, got_gradients))
    close(got, out, q.dtype)
    # Products and sums in float32: the weights' rounding never enters the log-sum-exp.
    np.testing.assert_allclose(got_lse, lse, rtol=2e-6, atol=2e-6)
    nothing = ~seen.any(-1)
    assert (np.asarray(got)[nothing] == 0).all()
    assert (np.asarray(got_lse).swapaxes(1, 2)[nothing] == np.float32(MASKED)).all()
    for mine, expected in zip(got_gradients, gradients, strict=True):
        assert mine.dtype == jnp.float32
        close(mine, expected, q.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["multi-head, odd length", "packed, with padding"])
def test_reproducible_gradients_are_the_same_gradients(case, on_cpu, reproducible):
    (q, k, v, d_out), mask, seen = build(case, **CASES[case])
    scale = q.shape[-1] ** -0.5
    _, lse, delta, *gradients = exact(q, k, v, d_out, seen, scale)
    numbers = (jnp.asarray(lse, jnp.float32), d_out, jnp.asarray(delta, jnp.float32))
    with on_cpu():
        run = jax.jit(lambda q, k, v, *x: KERNEL.backward(q, k, v, mask, scale, *x, jnp.float32))
        got = jax.block_until_ready(run(q, k, v, *numbers))
    for mine, expected in zip(got, gradients, strict=True):
        close(mine, expected, q.dtype)


def backward_races(case, on_cpu) -> bool:
    """Whether the detector finds a race between the backward kernels' warpgroups."""
    (q, k, v, d_out), mask, _ = case
    numbers = jnp.zeros((1, 2, q.shape[1]))
    with on_cpu(detect_races=True):
        run = jax.jit(lambda *x: KERNEL.backward(*x[:3], mask, 1.0, *x[3:], None))
        jax.block_until_ready(run(q, k, v, numbers, d_out, numbers))
        return interpreter.get_races().races_found


@pytest.mark.slow
def test_no_warpgroup_touches_what_another_still_uses(on_cpu, monkeypatch):
    """The interpreter's race detector over both kernels, with several items a thread block."""
    case = build("races", ids="ascending", heads=2, kv_heads=2)
    (q, k, v, _), mask, _ = case
    with on_cpu(detect_races=True):
        jax.block_until_ready(jax.jit(lambda *x: KERNEL.forward(*x, mask, 1.0))(q, k, v))
        assert not interpreter.get_races().races_found
    # Two thread blocks add to the same memory: one instruction there, none of the interpreter's.
    monkeypatch.setattr(mosaic, "ctas", lambda: 1)
    assert not backward_races(case, on_cpu)


@pytest.mark.slow
def test_no_warpgroup_touches_what_another_still_uses_reproducibly(on_cpu, reproducible):
    assert not backward_races(build("races", ids="ascending", heads=2, kv_heads=2), on_cpu)


@pytest.mark.slow
def test_the_race_detector_sees_warpgroups_that_do_not_meet(on_cpu, monkeypatch):
    """Without the barrier at which each has laid down its ds."""
    monkeypatch.setattr(mosaic, "ctas", lambda: 1)
    monkeypatch.setattr("qwen_jax.kernels.gpu.flash_backward.meet", lambda barrier: None)
    assert backward_races(build("races", length=TILE, heads=2, kv_heads=2), on_cpu)


@pytest.mark.slow
def test_the_race_detector_sees_a_missing_wait(on_cpu, monkeypatch):
    """What makes the test above one that can fail."""
    monkeypatch.setattr("qwen_jax.kernels.gpu.flash_pipeline.Stream.wait", lambda self, step: None)
    (q, k, v, _), mask, _ = build("races", length=TILE, kv_heads=2)
    with on_cpu(detect_races=True):
        jax.block_until_ready(jax.jit(lambda *x: KERNEL.forward(*x, mask, 1.0))(q, k, v))
        assert interpreter.get_races().races_found
