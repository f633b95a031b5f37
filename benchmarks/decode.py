"""Decode attention over a paged cache: the share of memory bandwidth it reaches, beside its peers.

    python -m benchmarks.decode [--quick] [--batches=1,8,64] [--contexts=2048,8192,32768]
                                [--dtypes=bfloat16,uint8] [--heads=32,8,128] [--out=FILE.json]

Decoding reads every key and value of the cache once and does little else, so the yardstick is how
fast this device copies memory, measured in the same run. A case is one token for each request of a
batch, all with the same context; time is per layer, from a jitted chain of steps over enough layers
that no cache on the chip holds them, each waiting for the one before. GB/s count the bytes of keys,
values and scales that must be read, nothing else. Every implementation is first compared with plain
float32 on a small ragged batch; one that is wrong or refuses is reported as such and not timed.

`--quick` takes batch 8 and 64 at 8k for both dtypes besides batch 1 at 32k: a few minutes.
"""

from __future__ import annotations

import functools
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.decode_peers import PEERS
from benchmarks.report import emit
from qwen_jax.kernels.cache import PAGE_SIZE, PagedCache, init_paged_cache, quantise
from qwen_jax.kernels.paged import paged_attention
from qwen_jax.parallel import platform as device_platform

_QUICK = flags.DEFINE_bool("quick", False, "Three cases of each dtype only.")
_BATCHES = flags.DEFINE_list("batches", ["1", "8", "64"], "Requests.")
_CONTEXTS = flags.DEFINE_list("contexts", ["2048", "8192", "32768"], "Tokens in the cache.")
_DTYPES = flags.DEFINE_list("dtypes", ["bfloat16", "uint8"], "Of the cache.")
_HEADS = flags.DEFINE_list("heads", ["32", "8", "128"], "Query heads, kv heads, head dim.")
_PEERS = flags.DEFINE_bool("peers", True, "Also time the libraries' kernels.")
_OUT = flags.DEFINE_string("out", "", "Also write the JSON here.")

QUICK = ((8, 8192), (64, 8192), (1, 32768))
TOLERANCE = 2e-2
"""Of outputs of size about 1: bf16 weights, and in the peers bf16 queries scaled beforehand."""


def seconds(function, *operands, steps: int, rounds: int = 5) -> float:
    """Median time of one of the `steps` that function(*operands) takes."""
    jax.block_until_ready(function(*operands))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(function(*operands))
        times.append((time.perf_counter() - start) / steps)
    return statistics.median(times)


def copy_bandwidth(size: int) -> float:
    """Bytes a second of reading and writing an array of `size` bytes, both counted."""
    steps = 16

    @jax.jit
    def copies(x):
        return jax.lax.fori_loop(0, steps, lambda _, x: x + 1, x)

    x = jnp.zeros(size // 4, jnp.int32)
    return 2 * x.nbytes / seconds(copies, x, steps=steps)


def make_cache(layers: int, pages: int, heads, dtype: str, key) -> PagedCache:
    """Normal keys and values, made a layer at a time on the device."""
    _, kv_heads, width = heads

    def layer(key):
        tokens = jax.random.normal(key, (pages, kv_heads, PAGE_SIZE, 2, width), jnp.bfloat16)
        shape = (pages, kv_heads, PAGE_SIZE, 2 * width)
        if dtype != "uint8":
            return PagedCache(tokens.reshape(shape).astype(dtype))
        codes, scale, zero = quantise(tokens)
        scales = jnp.stack([scale[..., 0], zero[..., 0], scale[..., 1], zero[..., 1]], axis=2)
        return PagedCache(codes.reshape(shape), scales)

    cache = jax.jit(lambda keys: jax.lax.map(layer, keys))(jax.random.split(key, layers))
    expected = jax.eval_shape(
        lambda: init_paged_cache(layers, pages, kv_heads, width, dtype=jnp.dtype(dtype))
    )
    assert jax.tree.map(jnp.shape, cache) == jax.tree.map(jnp.shape, expected)
    return cache


def make_table(batch: int, context: int, rng) -> np.ndarray:
    """Pages of each request, all different, in random order."""
    columns = -(-context // PAGE_SIZE)
    return rng.permutation(batch * columns).reshape(batch, columns).astype(np.int32)


def ours(implementation: str, cache: PagedCache):
    """(operands, step(q, operands, table, lengths, layer)) of one of our implementations."""

    def step(q, cache, table, lengths, layer):
        out, _ = paged_attention(
            q[:, None], cache, table, lengths, layer=layer, implementation=implementation
        )
        return out[:, 0]

    return cache, step


def peer(make, cache: PagedCache):
    """The same of a library's kernel."""
    prepare, call = make()
    layers, pages = cache.pages.shape[:2]

    def step(q, operands, table, lengths, layer):
        return call(q, operands, table + layer * pages, lengths)

    return jax.jit(prepare)(cache.pages.reshape(layers * pages, *cache.pages.shape[2:])), step


def contenders(cache: PagedCache) -> dict:
    """What to run on this device: name -> function of a cache, as `ours` and `peer` return."""
    here, _ = device_platform()
    found = {"reference": functools.partial(ours, "reference")}
    if here in ("tpu", "gpu"):
        found = {"qwen_jax": functools.partial(ours, f"pallas_{here}"), **found}
    if _PEERS.value and not cache.quantised:
        found |= {name: functools.partial(peer, make) for name, make in PEERS[here].items()}
    return found


def problem(build, heads, dtype: str) -> str | None:
    """Why an implementation is not to be timed: what it raises, or how wrong it is."""
    rng = np.random.default_rng(0)
    # A multiple of 16 columns, which some peers want.
    table = jnp.asarray(make_table(3, 16 * PAGE_SIZE, rng))
    cache = make_cache(2, table.size, heads, dtype, jax.random.key(1))
    q = jnp.asarray(rng.normal(size=(3, heads[0], heads[2])), jnp.bfloat16)
    lengths = jnp.array([1, 16 * PAGE_SIZE - 5, PAGE_SIZE + 1], jnp.int32)
    operands = (table, lengths, 1)
    reference = jax.jit(functools.partial(paged_attention, implementation="reference"))
    wide = q.astype(jnp.float32)[:, None]
    expected, _ = reference(wide, cache, table, lengths, layer=1)
    try:
        inputs, step = build(cache)
        error = jnp.abs(jax.jit(step)(q, inputs, *operands) - expected[:, 0]).max()
    # A peer may refuse in any way it likes; the table then says how.
    except Exception as e:
        return f"refused: {type(e).__name__}: {str(e).strip().splitlines()[0][:160]}"
    return None if error < TOLERANCE else f"wrong: off by {float(error):.3g}"


def measure(build, cache: PagedCache, q, table, lengths, steps: int) -> float:
    """Seconds a layer."""
    inputs, step = build(cache)
    layers = cache.pages.shape[0]

    @jax.jit
    def run(q, inputs, table, lengths):
        def one(q, layer):
            out = step(q, inputs, table, lengths, layer)
            return q + out.astype(q.dtype) / 1024, None

        return jax.lax.scan(one, q, jnp.arange(steps, dtype=jnp.int32) % layers)[0]

    return seconds(run, q, inputs, table, lengths, steps=steps)


def run_case(batch: int, context: int, heads, dtype: str, bad: dict, bandwidth: float) -> list:
    """Rows of the table for one case."""
    rng = np.random.default_rng(batch + context)
    table = jnp.asarray(make_table(batch, context, rng))
    one = jax.eval_shape(lambda: init_paged_cache(1, 1, heads[1], heads[2], dtype=jnp.dtype(dtype)))
    size = batch * context * one.token_bytes()
    # As many layers as are copied in 0.2 ms outgrow any cache on the chip; 20 ms are timed well.
    layers = int(np.clip(bandwidth * 2e-4 / size, 1, 64))
    steps = int(np.clip(bandwidth * 2e-2 / size, layers, 256))
    cache = make_cache(layers, table.size, heads, dtype, jax.random.key(0))
    q = jnp.asarray(rng.normal(size=(batch, heads[0], heads[2])), jnp.bfloat16)
    lengths = jnp.full((batch,), context, jnp.int32)
    rows = []
    for name, build in contenders(cache).items():
        row = {"implementation": name, "batch": batch, "context": context, "cache": dtype}
        if bad[name]:
            rows.append(row | {"problem": bad[name]})
            continue
        # Keys and values collected and widened to float32, each once more as it is multiplied.
        if name == "reference" and size * (16 // jnp.dtype(dtype).itemsize) > 16e9:
            rows.append(row | {"problem": "not run: it would collect the whole cache in float32"})
            continue
        try:
            taken = measure(build, cache, q, table, lengths, steps)
        except Exception as e:
            rows.append(row | {"problem": f"failed: {str(e).strip().splitlines()[0][:160]}"})
            continue
        speed = size / taken
        rows.append(
            row | {"microseconds": taken * 1e6, "GB/s": speed / 1e9, "share": speed / bandwidth}
        )
    return rows


def show(row: dict) -> None:
    """One line of the table."""
    head = f"{row['batch']:>5} {row['context']:>7} {row['cache']:<9} {row['implementation']:<32}"
    if "problem" in row:
        print(f"{head} {row['problem']}", flush=True)
    else:
        speed = f"{row['microseconds']:>10.1f} {row['GB/s']:>8.1f} {row['share']:>6.1%}"
        print(f"{head} {speed}", flush=True)


def main(_):
    heads = tuple(int(x) for x in _HEADS.value)
    cases = [(int(b), int(c)) for c in _CONTEXTS.value for b in _BATCHES.value]
    cases = QUICK if _QUICK.value else cases
    accelerated = device_platform()[0] in ("tpu", "gpu")
    bandwidth = copy_bandwidth(1 << 30 if accelerated else 1 << 25)
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}: copies {bandwidth / 1e9:.1f} GB/s")
    print(f"{'batch':>5} {'context':>7} {'cache':<9} {'implementation':<32}", end="")
    print(f" {'us/layer':>10} {'GB/s':>8} {'share':>6}")
    rows = []
    for dtype in _DTYPES.value:
        one = make_cache(1, 1, heads, dtype, jax.random.key(0))
        bad = {name: problem(build, heads, dtype) for name, build in contenders(one).items()}
        for batch, context in cases:
            for row in run_case(batch, context, heads, dtype, bad, bandwidth):
                show(row)
                rows.append(row)
    report = {
        "benchmark": "decode",
        "date": time.strftime("%Y-%m-%d"),
        "device": device.device_kind,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "heads": heads,
        "page_size": PAGE_SIZE,
        "copy_bytes_per_second": bandwidth,
        "results": rows,
    }
    emit(report, _OUT.value)


if __name__ == "__main__":
    app.run(main)
