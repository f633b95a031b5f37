"""Decode attention over a paged cache: the share of memory bandwidth it reaches, beside its peers.

    python -m benchmarks.decode [--quick] [--batches=1,8,64] [--contexts=2048,8192,32768]
                                [--dtypes=bfloat16,uint8] [--heads=32,8,128]
                                [--row_seconds=60] [--out=FILE.json]

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
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.decode_peers import PEERS
from benchmarks.report import emit, reason, save
from benchmarks.runner import Runner
from qwen_jax.kernels.cache import PAGE_SIZE, PagedCache, init_paged_cache, quantise
from qwen_jax.kernels.paged import paged_attention
from qwen_jax.parallel import platform as device_platform

_QUICK = flags.DEFINE_bool("quick", False, "Three cases of each dtype only.")
_BATCHES = flags.DEFINE_list("batches", ["1", "8", "64"], "Requests.")
_CONTEXTS = flags.DEFINE_list("contexts", ["2048", "8192", "32768"], "Tokens in the cache.")
_DTYPES = flags.DEFINE_list("dtypes", ["bfloat16", "uint8"], "Of the cache.")
_HEADS = flags.DEFINE_list("heads", ["32", "8", "128"], "Query heads, kv heads, head dim.")
_PEERS = flags.DEFINE_bool("peers", True, "Also time the libraries' kernels.")
_ROW_SECONDS = flags.DEFINE_float(
    "row_seconds", 0, "Run rows in a process that is given up when one takes longer; 0: in this."
)
_OUT = flags.DEFINE_string("out", "", "Also write the JSON here.")

QUICK = ((8, 8192), (64, 8192), (1, 32768))
COPIES = 64
"""Passes over the array; the one that makes room for the result besides weighs little then."""
UNROLLED = 8
"""Steps in one turn of the loop: what does not change between them is then worked out once, and
the loop itself, some microseconds a turn on a GPU, is no part of the time."""
OUTGROWN = 128 << 20
"""Bytes that no cache on a chip holds: 128 MiB of vector memory on v6e, 50 MiB of L2 on an H200."""
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

    @jax.jit
    def copies(x):
        return jax.lax.fori_loop(0, COPIES, lambda _, x: x + 1, x)

    x = jnp.zeros(size // 4, jnp.int32)
    return 2 * x.nbytes / seconds(copies, x, steps=COPIES)


@functools.lru_cache(maxsize=1)
def make_cache(layers: int, pages: int, heads, dtype: str, seed: int) -> PagedCache:
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

    cache = jax.jit(lambda keys: jax.lax.map(layer, keys))(
        jax.random.split(jax.random.key(seed), layers)
    )
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


def contenders(here: str, dtype: str) -> dict:
    """What to run on a platform: name -> function of a cache, as `ours` and `peer` return."""
    found = {}
    if here in ("tpu", "gpu"):
        found = {"qwen_jax": functools.partial(ours, f"pallas_{here}")}
    if dtype != "uint8":
        found |= {name: functools.partial(peer, make) for name, make in PEERS[here].items()}
    return found | {"reference": functools.partial(ours, "reference")}


def problem(build, heads, dtype: str) -> str | None:
    """Why an implementation is not to be timed: what it raises, or how wrong it is."""
    rng = np.random.default_rng(0)
    # A multiple of 16 columns, which some peers want.
    table = jnp.asarray(make_table(3, 16 * PAGE_SIZE, rng))
    cache = make_cache(1, table.size, heads, dtype, 1)
    q = jnp.asarray(rng.normal(size=(3, heads[0], heads[2])), jnp.bfloat16)
    lengths = jnp.array([1, 16 * PAGE_SIZE - 5, PAGE_SIZE + 1], jnp.int32)
    operands = (table, lengths, 0)
    reference = jax.jit(functools.partial(paged_attention, implementation="reference"))
    wide = q.astype(jnp.float32)[:, None]
    expected, _ = reference(wide, cache, table, lengths)
    try:
        inputs, step = build(cache)
        error = jnp.abs(jax.jit(step)(q, inputs, *operands) - expected[:, 0]).max()
    # A peer may refuse in any way it likes; the table then says how.
    except Exception as e:
        return f"refused: {reason(e)}"
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

        turns = jnp.arange(steps, dtype=jnp.int32) % layers
        return jax.lax.scan(one, q, turns, unroll=UNROLLED)[0]

    return seconds(run, q, inputs, table, lengths, steps=steps)


@functools.cache
def _problem(name: str, here: str, heads, dtype: str) -> str | None:
    return problem(contenders(here, dtype)[name], heads, dtype)


def row(
    implementation: str,
    batch: int = 0,
    context: int = 0,
    cache: str = "bfloat16",
    heads: tuple[int, int, int] | list[int] = (32, 8, 128),
    bandwidth: float = 0.0,
) -> dict:
    """One row of the table; or, for the implementation "copy", the yardstick."""
    here, heads = device_platform()[0], tuple(heads)
    if implementation == "copy":
        return {"copy_bytes_per_second": copy_bandwidth(1 << (25 if here == "cpu" else 30))}
    row = {"implementation": implementation, "batch": batch, "context": context, "cache": cache}
    bad = _problem(implementation, here, heads, cache)
    if bad:
        return row | {"problem": bad}
    build = contenders(here, cache)[implementation]
    return row | timed(implementation, build, batch, context, heads, cache, bandwidth)


def timed(name: str, build, batch: int, context: int, heads, dtype: str, bandwidth: float) -> dict:
    """What is found of one implementation and case."""
    rng = np.random.default_rng(batch + context)
    table = jnp.asarray(make_table(batch, context, rng))
    one = jax.eval_shape(lambda: init_paged_cache(1, 1, heads[1], heads[2], dtype=jnp.dtype(dtype)))
    size = batch * context * one.token_bytes()
    # Keys and values collected and widened to float32, each once more as it is multiplied.
    if name == "reference" and size * (16 // jnp.dtype(dtype).itemsize) > 16e9:
        return {"problem": "not run: it would collect the whole cache in float32"}
    # Layers enough to outgrow the caches; 20 ms are timed well.
    layers = int(np.clip(-(-min(OUTGROWN, bandwidth * 2e-4) // size), 1, 64))
    steps = int(np.clip(bandwidth * 2e-2 / size, layers, 256))
    steps = -(-steps // UNROLLED) * UNROLLED
    cache = make_cache(layers, table.size, heads, dtype, 0)
    q = jnp.asarray(rng.normal(size=(batch, heads[0], heads[2])), jnp.bfloat16)
    lengths = jnp.full((batch,), context, jnp.int32)
    try:
        taken = measure(build, cache, q, table, lengths, steps)
    except Exception as e:
        return {"problem": f"failed: {reason(e)}"}
    speed = size / taken
    return {"microseconds": taken * 1e6, "GB/s": speed / 1e9, "share": speed / bandwidth}


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
    runner = Runner("benchmarks.decode", _ROW_SECONDS.value)
    about = runner.environment()
    copy = runner.row(implementation="copy")
    if "failed" in copy:
        raise RuntimeError(f"the copy bandwidth can't be measured: {copy['failed']}")
    bandwidth = copy["copy_bytes_per_second"]
    print(f"{about['device']}, jax {about['jax']}: copies {bandwidth / 1e9:.1f} GB/s")
    print(f"{'batch':>5} {'context':>7} {'cache':<9} {'implementation':<32}", end="")
    print(f" {'us/layer':>10} {'GB/s':>8} {'share':>6}")
    report = {"benchmark": "decode", **about, "heads": heads, "page_size": PAGE_SIZE, **copy}
    report |= {"results": [], "complete": False}
    jobs = [
        {"implementation": name, "batch": batch, "context": context, "cache": dtype}
        for batch, context in cases
        for dtype in _DTYPES.value
        for name in contenders(about["platform"], dtype)
        if _PEERS.value or name in ("qwen_jax", "reference")
    ]
    for job in jobs:
        found = runner.row(**job, heads=heads, bandwidth=bandwidth)
        if "failed" in found:
            found = job | {"problem": f"failed: {found['failed']}"}
        report["results"].append(found)
        show(found)
        save(report, _OUT.value)
    runner.close()
    emit(report | {"complete": True}, _OUT.value)


if __name__ == "__main__":
    app.run(main)
