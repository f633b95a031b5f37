"""The TPU attention kernel, interpreted, against float64; and that it compiles for each chip."""

import functools
import itertools
import json
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.test_util import check_grads

from qwen_jax.aot.topology import ENVIRONMENT
from qwen_jax.errors import UserError
from qwen_jax.kernels.flash import FlashKernel, flash_attention
from qwen_jax.kernels.mask import MASKED, Mask, full_blocks, visible
from qwen_jax.kernels.tpu import flash_backward, flash_forward
from qwen_jax.kernels.tpu.block_sizes import FLASH_CONFIGS, MIB, BlockSizes, FlashConfig
from qwen_jax.kernels.tpu.flash import KERNEL, tpu_kernel, unsupported_reason
from qwen_jax.kernels.tpu.flash_blocks import make_flash_layout
from tests.tpu import needs_libtpu

SCALE = 0.11
# Several blocks of each kind at lengths that interpret quickly: blocks of 256 queries and 128 keys,
# keys in chunks of 512. In float32 the kernels take a quarter of the sizes given.
CHUNK = 512 * 128
SMALL = BlockSizes(1024, 512, 128, 256, resident_bytes=4 * CHUNK)
SMALL_BFLOAT16 = BlockSizes(256, 128, 128, 256, resident_bytes=2 * CHUNK)


@functools.cache
def kernel(sizes=SMALL, interpret=True) -> FlashKernel:
    """The TPU kernel with the same block sizes in both passes."""
    config = FlashConfig(sizes, sizes, 60 * MIB)
    return FlashKernel(
        "interpreted",
        functools.partial(flash_forward.flash_forward, config=config, interpret=interpret),
        functools.partial(flash_backward.flash_backward, config=config, interpret=interpret),
    )


def seen_by(mask: Mask, batch, q_len, k_len):
    start = np.zeros(batch, np.int32) if mask.q_start is None else np.asarray(mask.q_start)
    q_slots = jnp.asarray(start[:, None] + np.arange(q_len, dtype=np.int32))
    k_slots = jnp.arange(k_len, dtype=jnp.int32)[None]
    seen = visible(q_slots, k_slots, mask.q_segments, mask.k_segments, mask.any_window())
    return np.broadcast_to(np.asarray(seen), (batch, q_len, k_len))[:, None]


def exact(q, k, v, mask, d_out):
    """(out, lse, (dq, dk, dv), delta) in float64."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    batch, q_len, heads, _ = q.shape
    k_len, kv_heads = k.shape[1:3]
    kk, vv = (np.repeat(x, heads // kv_heads, axis=2) for x in (k, v))
    seen = seen_by(mask, batch, q_len, k_len)
    scores = np.where(seen, np.einsum("BTNH,BSNH->BNTS", q, kk) * SCALE, -np.inf)
    highest = np.maximum(scores.max(axis=-1, keepdims=True), MASKED)
    weights = np.exp(scores - highest)
    total = weights.sum(axis=-1, keepdims=True)
    lse = np.where(total > 0, highest + np.log(np.maximum(total, 1e-300)), MASKED)[..., 0]
    p = weights / np.where(total > 0, total, 1)
    out = np.einsum("BNTS,BSNH->BTNH", p, vv)
    delta = np.einsum("BTNH,BTNH->BNT", out, d_out)
    ds = p * (np.einsum("BTNH,BSNH->BNTS", d_out, vv) - delta[..., None]) * SCALE

    def grouped(x):
        return x.reshape(batch, k_len, kv_heads, heads // kv_heads, -1).sum(axis=3)

    dq = np.einsum("BNTS,BSNH->BTNH", ds, kk)
    dk = grouped(np.einsum("BNTS,BTNH->BSNH", ds, q))
    dv = grouped(np.einsum("BNTS,BTNH->BSNH", p, d_out))
    return out, lse, (dq, dk, dv), delta


def packed_ids(rng, batch, length, documents=4, padding=0):
    """Ascending ids 1..documents with random borders, then padding."""
    borders = np.sort(rng.integers(0, length - padding + 1, (batch, documents - 1)), axis=1)
    ids = 1 + (np.arange(length)[None, :, None] >= borders[:, None]).sum(axis=-1)
    ids[:, length - padding :] = 0
    return ids.astype(np.int32)


def make(seed, batch=2, q_len=300, k_len=None, heads=4, kv_heads=2, width=64, dtype="float32"):
    rng = np.random.default_rng(seed)
    k_len = k_len or q_len

    def normal(length, n):
        return jnp.asarray(rng.normal(size=(batch, length, n, width)), dtype)

    q, k, v = normal(q_len, heads), normal(k_len, kv_heads), normal(k_len, kv_heads)
    return q, k, v, normal(q_len, heads)


def segments(q_ids, k_ids=None):
    return {
        "q_segments": jnp.asarray(q_ids),
        "k_segments": jnp.asarray(q_ids if k_ids is None else k_ids),
    }


# Interpreted kernels are large programs that run once.
QUICK = {"xla_backend_optimization_level": 0}


@functools.partial(jax.jit, static_argnums=(0,), compiler_options=QUICK)
def both_passes(kernel, q, k, v, mask, lse, d_out, delta):
    """(out, lse, (dq, dk, dv))."""
    forward = kernel.forward(q, k, v, mask, SCALE)
    return *forward, kernel.backward(q, k, v, mask, SCALE, lse, d_out, delta, None)


def compare(kernel, operands, mask, tolerance):
    """Forward and backward against float64."""
    q, k, v, d_out = operands
    out, lse, grads, delta = exact(q, k, v, mask, d_out)
    lse, delta = (jnp.asarray(x, jnp.float32) for x in (lse, delta))
    got, got_lse, got_grads = both_passes(kernel, q, k, v, mask, lse, d_out, delta)
    assert got.dtype == q.dtype and got_lse.dtype == jnp.float32
    # A single key has weight 1 whatever its score: gradients of 0, to be judged beside d_out.
    least = 1e-6 * np.linalg.norm(np.asarray(d_out, np.float64))
    errors = [relative(a, b, least) for a, b in zip((got, *got_grads), (out, *grads), strict=True)]
    assert max(errors) < tolerance, errors
    empty = np.asarray(lse) == np.float32(MASKED)
    assert np.array_equal(np.asarray(got_lse) == np.float32(MASKED), empty)
    assert not np.any(np.asarray(got, np.float32).swapaxes(1, 2)[empty])
    difference = np.where(empty, 0, np.asarray(got_lse) - np.asarray(lse))
    assert np.abs(difference).max() < tolerance * 2


def relative(got, expected, least=0.0):
    """‖got − expected‖ / ‖expected‖, or / (least · 10⁶) where that norm is below `least`."""
    got = np.asarray(got, np.float64)
    assert np.all(np.isfinite(got))
    norm = np.linalg.norm(expected)
    norm = norm if norm > least else least * 1e6
    return np.linalg.norm(got - expected) / norm if norm else np.linalg.norm(got)


def ids(*shape, **kwargs):
    return packed_ids(np.random.default_rng(shape[-1]), *shape, **kwargs)


SHUFFLED = np.random.default_rng(3).integers(0, 3, (2, 300)).astype(np.int32)
EMPTY_ROW = np.array([[0] * 300, [5] * 300], np.int32)

CASES = {
    "causal": ({}, {}),
    "multi-head, 128 wide": ({"kv_heads": 4, "width": 128}, {}),
    "grouped 8/2, 128 wide": ({"heads": 8, "batch": 1, "width": 128}, {}),
    "40 wide": ({"width": 40}, {}),
    "whole blocks": ({"q_len": 512, "batch": 1}, {}),
    "one token": ({"q_len": 1}, {}),
    "several chunks of keys": ({"q_len": 900, "batch": 1}, {}),
    "several chunks, packed": (
        {"q_len": 700, "batch": 1},
        segments(ids(1, 700, padding=70)),
    ),
    "packed": ({}, segments(ids(2, 300))),
    "packed and padded": ({}, segments(ids(2, 300, padding=131))),
    "ids in any order": ({}, segments(SHUFFLED)),
    "a row of padding": ({}, segments(EMPTY_ROW)),
    "window 1": ({}, {"window": 1}),
    "window 2": ({}, {"window": 2}),
    "window 100": ({"q_len": 700, "batch": 1}, {"window": 100}),
    "window 300 = T": ({}, {"window": 300}),
    "window 128, packed": ({"q_len": 600, "batch": 1}, {"window": 128, **segments(ids(1, 600))}),
    "traced window": ({"q_len": 600, "batch": 1}, {"layer_window": jnp.int32(70)}),
    "traced window, packed": ({}, {"layer_window": jnp.int32(70), **segments(ids(2, 300))}),
    "T < S": ({"q_len": 200, "k_len": 500}, {}),
    "T > S": ({"q_len": 500, "k_len": 200}, {}),
    "past": ({"q_len": 200, "k_len": 500}, {"q_start": jnp.array([300, 17], jnp.int32)}),
    "a few queries": ({"q_len": 5, "k_len": 700}, {"q_start": jnp.array([690, 400], jnp.int32)}),
    "ring, seen whole": ({}, {"q_start": jnp.array([300, 900], jnp.int32)}),
    "ring, seen partly and not": ({}, {"q_start": jnp.array([-100, -300], jnp.int32)}),
    "past, packed, traced window": (
        {"q_len": 200, "k_len": 500},
        {
            "q_start": jnp.array([300, 300], jnp.int32),
            "layer_window": jnp.int32(150),
            **segments(ids(2, 500)[:, 300:], ids(2, 500)),
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_both_passes_equal_float64(case):
    shape, mask = CASES[case]
    compare(kernel(), make(len(case), **shape), Mask(**mask), 1e-5)


@pytest.mark.parametrize("case", ["causal", "packed and padded", "several chunks, packed"])
def test_both_passes_in_bfloat16_are_within_one_percent(case):
    shape, mask = CASES[case]
    small = kernel(SMALL_BFLOAT16)
    compare(small, make(1, dtype="bfloat16", **shape), Mask(**mask), 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("chip", FLASH_CONFIGS)
def test_shipped_block_sizes_equal_float64(chip):
    """The block sizes whose cycles are quoted, at lengths with whole, cut and skipped blocks."""
    tpu = tpu_kernel(chip, interpret=True)
    length = 2 * FLASH_CONFIGS[chip].forward.block_q + 300
    operands = make(4, batch=1, q_len=length, heads=1, kv_heads=1, width=128, dtype="bfloat16")
    compare(tpu, operands, Mask(), 1e-2)
    compare(tpu, operands, Mask(**segments(ids(1, length, padding=200))), 1e-2)


@pytest.mark.parametrize("chip", FLASH_CONFIGS)
def test_short_rows_are_padded_to_short_blocks(chip):
    for sizes in (FLASH_CONFIGS[chip].forward, FLASH_CONFIGS[chip].backward):
        for length, most in ((1, 128), (100, 128), (300, 512), (2100, 3072), (4096, 4096)):
            layout = make_flash_layout(length, length, 128, 2, Mask(), sizes)
            assert length <= layout.padded_q_len == layout.padded_k_len <= most
        few = make_flash_layout(16, 9000, 128, 2, Mask(q_start=jnp.zeros(1, jnp.int32)), sizes)
        assert few.padded_q_len == 128 and few.sizes.block_k >= 512 and few.padded_k_len <= 10240


def test_gradients_equal_finite_differences():
    mask = Mask(layer_window=jnp.int32(90), **segments(ids(1, 130, documents=3, padding=9)))
    q, k, v, _ = make(9, batch=1, q_len=130, heads=2, kv_heads=1, width=16)

    @jax.jit
    def f(q, k, v):
        out, lse = flash_attention(q, k, v, mask, SCALE, kernel())
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(lse > MASKED / 2, jnp.cos(lse), 0))

    check_grads(f, (q, k, v), 1, modes=("rev",), eps=1e-2, atol=0.02, rtol=0.02)


def test_gradients_have_the_requested_dtype():
    q, k, v, d_out = make(2, dtype="bfloat16", batch=1, q_len=200)
    _, lse, grads, delta = exact(q, k, v, Mask(), d_out)
    lse, delta = (jnp.asarray(x, jnp.float32) for x in (lse, delta))
    small = kernel(SMALL_BFLOAT16)
    got = small.backward(q, k, v, Mask(), SCALE, lse, d_out, delta, jnp.float32)
    for a, b in zip(got, grads, strict=True):
        assert a.dtype == jnp.float32 and relative(a, b) < 1e-2


def test_packed_documents_equal_each_document_alone():
    """Bit by bit it can't be: blocks fall elsewhere."""
    lengths = (130, 300, 57)
    q, k, v, d_out = make(5, batch=1, q_len=sum(lengths))
    ids = np.repeat(np.arange(1, 4, dtype=np.int32), lengths)[None]

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(mask, q, k, v, d_out):
        def f(q, k, v):
            return flash_attention(q, k, v, mask, SCALE, kernel())[0]

        out, pullback = jax.vjp(f, q, k, v)
        return out, *pullback(d_out)

    together = run(Mask(**segments(ids)), q, k, v, d_out)
    ends = np.cumsum(lengths)
    for start, end in zip(ends - lengths, ends, strict=True):
        alone = run(Mask(), *(x[:, start:end] for x in (q, k, v, d_out)))
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_allclose(a[:, start:end], b, atol=3e-6)


def poisoned(operands, mask, needed):
    """Forward and backward with NaN in the keys that are not needed, beside the clean results."""
    q, k, v, d_out = operands
    _, lse, _, delta = exact(q, k, v, mask, d_out)
    lse, delta = (jnp.asarray(x, jnp.float32) for x in (lse, delta))
    needed = jnp.asarray(needed)[None, :, None, None]
    results = []
    for spoil in (lambda x: x, lambda x: jnp.where(needed, x, jnp.nan)):
        operands = (q, spoil(k), spoil(v), mask, lse, d_out, delta)
        out, _, grads = both_passes(kernel(), *operands)
        results.append((out, *grads))
    return zip(*results, strict=True)


@pytest.mark.parametrize("why", ["segments", "window", "traced window", "past"])
def test_masked_key_blocks_are_never_read(why):
    """NaN × 0 is NaN: one key read, even to be weighted by 0, and it shows."""
    q, k, v, d_out = make(6, batch=1, q_len=1024)
    slots = np.arange(1024)
    if why == "segments":  # The first blocks hold documents of which no query is left.
        ids = np.where(slots < 512, 1, np.where(slots < 900, 2, 3)).astype(np.int32)[None]
        mask = Mask(q_start=jnp.array([512], jnp.int32), **segments(ids[:, 512:], ids))
    elif why == "past":  # Slots after the last query's.
        mask = Mask(q_start=jnp.array([0], jnp.int32))
        q, d_out = q[:, :512], d_out[:, :512]
    elif why == "window":
        mask = Mask(q_start=jnp.array([512], jnp.int32), window=129)
    else:
        mask = Mask(q_start=jnp.array([512], jnp.int32), layer_window=jnp.int32(129))
    if why != "past":
        q, d_out = q[:, 512:], d_out[:, 512:]
    needed = slots < 512 if why == "past" else slots >= 384
    if why == "segments":
        needed = slots >= 512
    for a, b in poisoned((q, k, v, d_out), mask, needed):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("packed", [False, True])
def test_full_blocks_are_exactly_the_completely_visible_ones(packed):
    rng = np.random.default_rng(packed)
    found = jax.jit(full_blocks, static_argnums=(1, 2, 3, 4))
    some = 0
    shapes = [(37, 37), (9, 52), (40, 16)]
    for (q_len, k_len), window in itertools.product(shapes, (1, 7, 15, 30, 100)):
        ids = np.sort(rng.integers(0, 3, (2, 60)), axis=1).astype(np.int32)
        given = segments(ids[:, :q_len], ids[:, :k_len]) if packed else {}
        start = jnp.asarray(rng.integers(-5, 60, 2).astype(np.int32))
        mask = Mask(q_start=start, layer_window=jnp.int32(window), **given)
        full = np.asarray(found(mask, q_len, k_len, 8, 4))
        seen = seen_by(mask, 2, q_len, k_len)[:, 0]
        for b, i, j in np.ndindex(*full.shape):
            block = seen[b, i * 8 : i * 8 + 8, j * 4 : j * 4 + 4]
            assert full[b, i, j] == (block.all() and block.shape[1] == 4)
            some += full[b, i, j]
    assert some


@pytest.mark.parametrize("case", ["several chunks of keys", "packed and padded", "traced window"])
def test_kernels_are_free_of_races(case):
    """Copies, semaphores and memory of the chip simulated; uninitialised memory is NaN."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    shape, mask = CASES[case]
    operands = make(1, **(shape | {"heads": 2, "kv_heads": 1, "batch": 1}))
    given = jax.tree.map(lambda x: x[:1] if jnp.ndim(x) else x, Mask(**mask))
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    with pltpu.force_tpu_interpret_mode(params):
        compare(kernel(interpret=False), operands, given, 1e-5)
    assert interpreter.races is not None and not interpreter.races.races_found


def test_unsupported_requests_are_refused_with_the_reason():
    assert "this device is 'cpu'" in unsupported_reason(
        head_dim=128, dtype=jnp.bfloat16, device_kind="cpu"
    )
    q = jnp.zeros((1, 128, 1, 128), jnp.bfloat16)
    with pytest.raises(UserError, match=r"it runs on TPU v5e, v5p, v6e and this device is 'cpu'"):
        KERNEL.forward(q, q, q, Mask(), 1.0)
    with pytest.raises(UserError, match="operands are float16"):
        tpu_kernel("v5e").forward(*[q.astype(jnp.float16)] * 3, Mask(), 1.0)
    wide = jnp.zeros((1, 128, 1, 512), jnp.bfloat16)
    with pytest.raises(UserError, match="head_dim is 512"):
        tpu_kernel("v5e").backward(*[wide] * 3, Mask(), 1.0, *[None] * 4)


COMPILE = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from qwen_jax.kernels.flash import flash_attention
from qwen_jax.kernels.mask import Mask
from qwen_jax.kernels.tpu.flash import KERNEL

def case(mesh, length, q_heads, kv_heads, width, dtype, packed, started, windowed):
    def local(q, k, v, ids, start, window):
        mask = Mask(
            q_start=start if started else None,
            q_segments=ids if packed else None,
            k_segments=ids if packed else None,
            layer_window=window if windowed else None,
        )
        return flash_attention(q, k, v, mask, width**-0.5, KERNEL)[0]

    def loss(*operands):
        specs = (*[jax.P("data", None, "tensor")] * 3, *[jax.P("data")] * 2, jax.P())
        run = jax.shard_map(
            local, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False
        )
        return run(*operands).astype(jnp.float32).sum()

    def arg(spec, dtype, *shape):
        sharding = jax.sharding.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    heads = jax.P("data", None, "tensor")
    args = (
        arg(heads, dtype, 2, length, q_heads, width),
        *[arg(heads, dtype, 2, length, kv_heads, width)] * 2,
        arg(jax.P("data"), jnp.int32, 2, length),
        arg(jax.P("data"), jnp.int32, 2),
        arg(jax.P(), jnp.int32),
    )
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*args).compile()
    return compiled.as_text().count('custom_call_target="tpu_custom_call"')

name, cases = sys.argv[1], json.loads(sys.argv[2])
chips = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
mesh = jax.sharding.Mesh(np.array(chips[:4]).reshape(2, 2), ("data", "tensor"))
print(json.dumps([case(mesh, *c) for c in cases]))
"""

# length, query heads, kv heads, width, dtype, packed, q_start, window
COMPILED = [
    (4096, 4, 2, 128, "bfloat16", True, False, False),
    (32768, 4, 2, 128, "bfloat16", False, False, False),
    (4096, 4, 4, 64, "bfloat16", True, True, True),
    (300, 4, 2, 128, "float32", True, False, True),
]


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_kernels_compile_for_each_chip(topology):
    """Mosaic accepts the kernels under shard_map, inside the chip's vector memory."""
    environment = os.environ | ENVIRONMENT | {"JAX_PLATFORMS": "cpu"}
    arguments = [sys.executable, "-c", textwrap.dedent(COMPILE), topology, json.dumps(COMPILED)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    # One forward kernel, one backward kernel for each chunk of keys: 32k keys are four chunks.
    assert json.loads(done.stdout.splitlines()[-1]) == [2, 5, 2, 2]
