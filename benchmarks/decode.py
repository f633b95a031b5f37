"""Speed of paged decode attention as a share of memory bandwidth, beside its peers.

    python -m benchmarks.decode [--quick] [--batches=1,8,64] [--contexts=2048,8192,32768]
                                [--dtypes=bfloat16,uint8] [--heads=32,8,128]
                                [--row_seconds=60] [--out=FILE.json]

Decoding reads every key and value of the cache once and does little else, so its speed is compared
with the speed at which the device copies memory, measured in the same run. A case is one token for
each request of a batch, all with the same context. Time is per layer, from a jitted chain of
dependent steps over enough layers to exceed every cache of the chip. GB/s count the bytes of keys,
values and scales that must be read, nothing else. Every implementation is first compared with plain
float32 on a small ragged batch; one that is wrong or refuses is reported as such and not timed.

`--quick` measures batch 8 and 64 at 8k and batch 1 at 32k, for each cache dtype, in a few minutes.

Prints a table and, as its last line, one JSON object, which --out saves with every row.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.decode_peers import PEERS, PeerFunctions
from benchmarks.report import emit, error_summary, save
from benchmarks.runner import RowRunner
from qwen_jax.kernels.cache import PAGE_SIZE, PagedCache, init_paged_cache, quantise
from qwen_jax.kernels.paged import paged_attention
from qwen_jax.parallel import platform as device_platform

_QUICK = flags.DEFINE_bool("quick", False, "Measure three cases of each cache dtype only.")
_BATCHES = flags.DEFINE_list("batches", ["1", "8", "64"], "Numbers of requests.")
_CONTEXTS = flags.DEFINE_list(
    "contexts", ["2048", "8192", "32768"], "Tokens of each request in the cache."
)
_DTYPES = flags.DEFINE_list("dtypes", ["bfloat16", "uint8"], "Dtypes of the cache.")
_HEADS = flags.DEFINE_list("heads", ["32", "8", "128"], "Query heads, kv heads, head dimension.")
_PEERS = flags.DEFINE_bool("peers", True, "Also time the kernels of other libraries.")
_ROW_SECONDS = flags.DEFINE_float(
    "row_seconds",
    0,
    "Measure rows in a child process and kill it when one takes longer; 0: no child.",
)
_OUT = flags.DEFINE_string("out", "", "Also write the JSON to this file.")

QUICK = ((8, 8192), (64, 8192), (1, 32768))
"""(batch, context) of the cases of --quick."""
COPIES = 64
"""Passes over the copied array; the extra pass that allocates the result then weighs little."""
UNROLL = 8
"""Steps per turn of the timed loop.

Whatever does not change between them is computed once per turn, and the overhead of the loop, some
microseconds a turn on a GPU, is spread over them.
"""
CACHE_BYTES = 128 << 20
"""Bytes that exceed every cache of a chip: 128 MiB of VMEM on v6e, 50 MiB of L2 on an H200."""
TOLERANCE = 2e-2
"""For outputs of size about 1: weights are bf16, and the peers scale queries in bf16."""

HeadSizes: TypeAlias = tuple[int, int, int]
"""(query heads, kv heads, head dimension)."""
Step: TypeAlias = Callable[..., jax.Array]
"""step(q [requests, heads, head_dim], operands, table, lengths, layer) -> output like q."""
BuildStep: TypeAlias = Callable[[PagedCache], tuple[Any, Step]]
"""Takes a cache and returns (operands, step) of one implementation."""


def seconds_per_step(
    function: Callable[..., Any], *operands: Any, steps: int, rounds: int = 5
) -> float:
    """Returns the median seconds per step of a function that runs `steps` steps per call."""
    jax.block_until_ready(function(*operands))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(function(*operands))
        times.append((time.perf_counter() - start) / steps)
    return statistics.median(times)


def copy_bandwidth(size: int) -> float:
    """Returns the bytes per second, read and written together, of copying `size` bytes."""

    @jax.jit
    def copies(x):
        return jax.lax.fori_loop(0, COPIES, lambda _, x: x + 1, x)

    x = jnp.zeros(size // 4, jnp.int32)
    return 2 * x.nbytes / seconds_per_step(copies, x, steps=COPIES)


@functools.lru_cache(maxsize=1)
def make_cache(layers: int, pages: int, heads: HeadSizes, dtype: str, seed: int) -> PagedCache:
    """Returns a cache of normally distributed keys and values, created a layer at a time.

    Args:
      layers: number of layers.
      pages: pages per layer.
      heads: head counts and dimension.
      dtype: of the cache; "uint8" quantises.
      seed: of the numbers.
    """
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


def make_page_table(batch: int, context: int, rng: np.random.Generator) -> np.ndarray:
    """Returns int32 [batch, pages per request]: distinct page ids in random order."""
    columns = -(-context // PAGE_SIZE)
    return rng.permutation(batch * columns).reshape(batch, columns).astype(np.int32)


def build_ours(implementation: str, cache: PagedCache) -> tuple[Any, Step]:
    """Returns (operands, step) of an implementation of `paged_attention`."""

    def step(q, cache, table, lengths, layer):
        out, _ = paged_attention(
            q[:, None], cache, table, lengths, layer=layer, implementation=implementation
        )
        return out[:, 0]

    return cache, step


def build_peer(adapter: Callable[[], PeerFunctions], cache: PagedCache) -> tuple[Any, Step]:
    """Returns (operands, step) of another library's kernel (`decode_peers`)."""
    prepare, call = adapter()
    layers, pages = cache.pages.shape[:2]

    def step(q, operands, table, lengths, layer):
        return call(q, operands, table + layer * pages, lengths)

    return jax.jit(prepare)(cache.pages.reshape(layers * pages, *cache.pages.shape[2:])), step


def implementations(platform: str, dtype: str) -> dict[str, BuildStep]:
    """Returns the implementations to time on a platform for a cache dtype, by name."""
    found: dict[str, BuildStep] = {}
    if platform in ("tpu", "gpu"):
        found = {"qwen_jax": functools.partial(build_ours, f"pallas_{platform}")}
    if dtype != "uint8":
        peers = PEERS[platform].items()
        found |= {name: functools.partial(build_peer, adapter) for name, adapter in peers}
    return found | {"reference": functools.partial(build_ours, "reference")}


def find_problem(build: BuildStep, heads: HeadSizes, dtype: str) -> str | None:
    """Returns why an implementation is not to be timed, or None if its results are right.

    Args:
      build: the implementation.
      heads: head counts and dimension.
      dtype: of the cache.
    """
    rng = np.random.default_rng(0)
    # A multiple of 16 columns, which some peers want.
    table = jnp.asarray(make_page_table(3, 16 * PAGE_SIZE, rng))
    cache = make_cache(1, table.size, heads, dtype, 1)
    q = jnp.asarray(rng.normal(size=(3, heads[0], heads[2])), jnp.bfloat16)
    lengths = jnp.array([1, 16 * PAGE_SIZE - 5, PAGE_SIZE + 1], jnp.int32)
    operands = (table, lengths, 0)
    reference = jax.jit(functools.partial(paged_attention, implementation="reference"))
    q_float32 = q.astype(jnp.float32)[:, None]
    expected, _ = reference(q_float32, cache, table, lengths)
    try:
        inputs, step = build(cache)
        error = jnp.abs(jax.jit(step)(q, inputs, *operands) - expected[:, 0]).max()
    # A peer may refuse by any exception; the table then shows it.
    except Exception as e:
        return f"refused: {error_summary(e)}"
    return None if error < TOLERANCE else f"wrong: off by {float(error):.3g}"


def seconds_per_layer(
    build: BuildStep,
    cache: PagedCache,
    q: jax.Array,
    table: jax.Array,
    lengths: jax.Array,
    steps: int,
) -> float:
    """Returns the median seconds per layer of one implementation.

    Args:
      build: the implementation.
      cache: the cache; steps use its layers in turn.
      q: [requests, query heads, head_dim].
      table: int32 [requests, pages per request].
      lengths: int32 [requests].
      steps: length of the chain of dependent steps.
    """
    inputs, step = build(cache)
    layers = cache.pages.shape[0]

    @jax.jit
    def run(q, inputs, table, lengths):
        def one(q, layer):
            out = step(q, inputs, table, lengths, layer)
            return q + out.astype(q.dtype) / 1024, None

        turns = jnp.arange(steps, dtype=jnp.int32) % layers
        return jax.lax.scan(one, q, turns, unroll=UNROLL)[0]

    return seconds_per_step(run, q, inputs, table, lengths, steps=steps)


@functools.cache
def _cached_problem(name: str, platform: str, heads: HeadSizes, dtype: str) -> str | None:
    """Returns `find_problem` of an implementation by name."""
    return find_problem(implementations(platform, dtype)[name], heads, dtype)


def measure_row(
    implementation: str,
    batch: int = 0,
    context: int = 0,
    cache: str = "bfloat16",
    heads: tuple[int, int, int] | list[int] = (32, 8, 128),
    bandwidth: float = 0.0,
) -> dict[str, Any]:
    """Measures one row of the table, or the copy bandwidth.

    Args:
      implementation: name in `implementations`, or "copy" for the copy bandwidth.
      batch: requests.
      context: tokens of each request in the cache.
      cache: dtype of the cache.
      heads: (query heads, kv heads, head dimension).
      bandwidth: copy bandwidth in bytes per second.

    Returns:
      the arguments and the results of `time_case`, or a "problem"; for "copy",
      "copy_bytes_per_second".
    """
    platform = device_platform()[0]
    query_heads, kv_heads, width = heads
    sizes = (query_heads, kv_heads, width)
    if implementation == "copy":
        return {"copy_bytes_per_second": copy_bandwidth(1 << (25 if platform == "cpu" else 30))}
    row = {"implementation": implementation, "batch": batch, "context": context, "cache": cache}
    problem = _cached_problem(implementation, platform, sizes, cache)
    if problem:
        return row | {"problem": problem}
    build = implementations(platform, cache)[implementation]
    return row | time_case(implementation, build, batch, context, sizes, cache, bandwidth)


def time_case(
    name: str,
    build: BuildStep,
    batch: int,
    context: int,
    heads: HeadSizes,
    dtype: str,
    bandwidth: float,
) -> dict[str, Any]:
    """Times one implementation at one case.

    Args:
      name: of the implementation.
      build: the implementation.
      batch: requests.
      context: tokens of each request in the cache.
      heads: head counts and dimension.
      dtype: of the cache.
      bandwidth: copy bandwidth in bytes per second.

    Returns:
      {"microseconds": per layer, "GB/s": of keys, values and scales, "share": of the copy
      bandwidth}, or {"problem": reason}.
    """
    rng = np.random.default_rng(batch + context)
    table = jnp.asarray(make_page_table(batch, context, rng))
    one = jax.eval_shape(lambda: init_paged_cache(1, 1, heads[1], heads[2], dtype=jnp.dtype(dtype)))
    size = batch * context * one.token_bytes()
    # The reference gathers keys and values in float32, and once more as it multiplies.
    if name == "reference" and size * (16 // jnp.dtype(dtype).itemsize) > 16e9:
        return {"problem": "not run: it would collect the whole cache in float32"}
    # Enough layers to exceed the chip's caches, and enough steps for 20 ms, which are timed well.
    layers = int(np.clip(-(-min(CACHE_BYTES, bandwidth * 2e-4) // size), 1, 64))
    steps = int(np.clip(bandwidth * 2e-2 / size, layers, 256))
    steps = -(-steps // UNROLL) * UNROLL
    cache = make_cache(layers, table.size, heads, dtype, 0)
    q = jnp.asarray(rng.normal(size=(batch, heads[0], heads[2])), jnp.bfloat16)
    lengths = jnp.full((batch,), context, jnp.int32)
    try:
        seconds = seconds_per_layer(build, cache, q, table, lengths, steps)
    except Exception as e:
        return {"problem": f"failed: {error_summary(e)}"}
    speed = size / seconds
    return {"microseconds": seconds * 1e6, "GB/s": speed / 1e9, "share": speed / bandwidth}


def print_row(row: dict[str, Any]) -> None:
    """Prints the table line of a row of `measure_row`."""
    head = f"{row['batch']:>5} {row['context']:>7} {row['cache']:<9} {row['implementation']:<32}"
    if "problem" in row:
        print(f"{head} {row['problem']}", flush=True)
    else:
        speed = f"{row['microseconds']:>10.1f} {row['GB/s']:>8.1f} {row['share']:>6.1%}"
        print(f"{head} {speed}", flush=True)


def main(_):
    """Measures the copy bandwidth and all cases."""
    heads = tuple(int(x) for x in _HEADS.value)
    cases = [(int(b), int(c)) for c in _CONTEXTS.value for b in _BATCHES.value]
    cases = QUICK if _QUICK.value else cases
    runner = RowRunner("benchmarks.decode", _ROW_SECONDS.value)
    environment = runner.environment()
    copy = runner.measure_row(implementation="copy")
    if "failed" in copy:
        raise RuntimeError(f"the copy bandwidth can't be measured: {copy['failed']}")
    bandwidth = copy["copy_bytes_per_second"]
    device, version = environment["device"], environment["jax"]
    print(f"{device}, jax {version}: copies {bandwidth / 1e9:.1f} GB/s")
    print(f"{'batch':>5} {'context':>7} {'cache':<9} {'implementation':<32}", end="")
    print(f" {'us/layer':>10} {'GB/s':>8} {'share':>6}")
    report = {"benchmark": "decode", **environment, "heads": heads, "page_size": PAGE_SIZE, **copy}
    report |= {"results": [], "complete": False}
    jobs = [
        {"implementation": name, "batch": batch, "context": context, "cache": dtype}
        for batch, context in cases
        for dtype in _DTYPES.value
        for name in implementations(environment["platform"], dtype)
        if _PEERS.value or name in ("qwen_jax", "reference")
    ]
    for job in jobs:
        row = runner.measure_row(**job, heads=heads, bandwidth=bandwidth)
        if "failed" in row:
            row = job | {"problem": f"failed: {row['failed']}"}
        report["results"].append(row)
        print_row(row)
        save(report, _OUT.value)
    runner.close()
    emit(report | {"complete": True}, _OUT.value)


if __name__ == "__main__":
    app.run(main)
