"""Correctness of every kernel that runs on this device, against NumPy in float64.

    python -m benchmarks.correctness [--implementations=pallas_gpu,cudnn] [--row_seconds=60]
                                     [--out=FILE.json]

Checks on the device itself what the tests check in interpreters: outputs and gradients of attention
on random inputs, with odd lengths, packed rows with padding, windows, grouped heads and queries
that start in a later slot; decoding over a paged cache; products with weights quantised in groups.
An error is ‖result − reference‖ / ‖reference‖; a bf16 case above 1 % counts as wrong. The exit
status is 1 if one of our kernels is wrong or fails; those of other libraries are only shown.

Prints a table and, as its last line, one JSON object, which --out saves with every row.
"""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.report import emit, error_summary, save
from benchmarks.runner import RowRunner
from qwen_jax.errors import UserError
from qwen_jax.kernels import attention
from qwen_jax.kernels.cache import init_paged_cache
from qwen_jax.kernels.paged import append, paged_attention
from qwen_jax.kernels.quantised import GroupWeight, group_matmul, pack

ERROR_LIMIT = 1e-2
LIBRARIES = ("cudnn", "splash")
"""Implementations of other libraries."""
DEFAULT_IMPLEMENTATIONS = {
    "gpu": ["pallas_gpu", "cudnn", "chunked"],
    "tpu": ["pallas_tpu", "splash", "chunked"],
    "cpu": ["chunked"],
}
"""Attention implementations to check, by platform."""

_IMPLEMENTATIONS = flags.DEFINE_list(
    "implementations", [], "Attention implementations to check; by default those of the platform."
)
_SEED = flags.DEFINE_integer("seed", None, "Seed of the random inputs; by default the time.")
_SMALL = flags.DEFINE_bool("small", False, "Use short sequences, for a slow device.")
_ROW_SECONDS = flags.DEFINE_float(
    "row_seconds",
    0,
    "Check rows in a child process and kill it when one takes longer; 0: no child.",
)
_PROCESSES = flags.DEFINE_integer(
    "processes", 1, "Number of child processes that check rows at the same time (--row_seconds)."
)
_OUT = flags.DEFINE_string("out", "", "Also write the JSON to this file.")

CASES: dict[str, dict[str, Any]] = {
    "heads of 128": {},
    "heads of 64": {"head_dim": 64},
    "grouped 8/2": {"heads": 8, "kv_heads": 2},
    "odd length": {"length": 1027},
    "short": {"length": 5},
    "window 1": {"window": 1},
    "window 300, grouped": {"window": 300, "kv_heads": 1},
    "packed, padded": {"documents": 5, "empty_row": True},
    "packed, odd, window": {"documents": 7, "length": 1111, "window": 130},
    "later slot": {"start": 700, "length": 333},
}
"""Attention cases: arguments of `make_inputs` by name."""
DECODE_CASES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "bf16, heads of 64": {"width": 64},
    "bf16, multi-head": {"groups": 1},
    "bf16, draft of 4, window": {"q_len": 4, "window": 200},
    "8 bits": {"dtype": "uint8"},
    "8 bits, draft of 4": {"dtype": "uint8", "q_len": 4},
}
"""Paged decode cases: arguments of `check_decode` by name."""
PRODUCT_CASES = {"1 row, 4 bits": (1, 4), "70 rows, 4 bits": (70, 4), "8 rows, 8 bits": (8, 8)}
"""Quantised product cases: (rows of x, bits of a code) by name."""


def make_inputs(
    rng: np.random.Generator,
    *,
    length: int = 1024,
    heads: int = 4,
    kv_heads: int = 4,
    head_dim: int = 128,
    window: int | None = None,
    documents: int = 0,
    empty_row: bool = False,
    start: int = 0,
    small: bool = False,
) -> tuple[tuple[np.ndarray, ...], dict[str, Any]]:
    """Returns random inputs of attention with two batch rows.

    Args:
      rng: source of randomness.
      length: queries.
      heads: query heads.
      kv_heads: key and value heads.
      head_dim: head dimension.
      window: slots that a query sees, its own included; None: all.
      documents: documents per row, with padding at the end; 0: no segment ids.
      empty_row: the second row is padding only.
      start: slot of the first query; there are length + start keys.
      small: divide lengths and window by 8.

    Returns:
      ((q, k, v, d_out), options): arrays [2, tokens, heads, head_dim] in float32 that hold bf16
      values, and keyword arguments of `kernels.attention`.
    """
    if small:
        length, start = max(length // 8, 5), start // 8
        window = window and max(window // 8, 1)
    keys = length + start

    def normal(tokens, n):
        x = rng.normal(size=(2, tokens, n, head_dim))
        return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)

    arrays = (
        normal(length, heads),
        normal(keys, kv_heads),
        normal(keys, kv_heads),
        normal(length, heads),
    )
    options: dict[str, Any] = {"window": window}
    if documents:
        ids = np.sort(rng.integers(1, documents + 1, (2, keys)), axis=1)
        ids[0, keys - keys // 10 :] = 0
        ids[1] *= not empty_row
        options |= {"q_segments": ids[:, start:], "k_segments": ids}
    if start:
        options["q_start"] = np.full(2, start)
    options = {k: v if k == "window" else jnp.asarray(v, jnp.int32) for k, v in options.items()}
    return arrays, options


def _softmax(scores: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Returns the softmax over the last axis of the visible scores; 0 where none is visible."""
    scores = np.where(visible, scores, -np.inf)
    highest = np.where(visible.any(-1, keepdims=True), scores.max(-1, keepdims=True), 0.0)
    p = np.exp(scores - highest)
    return p / np.maximum(p.sum(-1, keepdims=True), 1e-300)


def attention_in_float64(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, d_out: np.ndarray, options: dict[str, Any]
) -> tuple[np.ndarray, ...]:
    """Computes (out, dq, dk, dv) in float64.

    Args:
      q: [batch, queries, query heads, head_dim].
      k: [batch, keys, kv heads, head_dim].
      v: as k.
      d_out: gradient of the output, as q.
      options: keyword arguments of `kernels.attention`.

    Returns:
      four arrays shaped like q, q, k and v.
    """
    # Heads in front, so that products are matrix products: einsum would loop over numbers.
    q, k, v, d_out = (x.astype(np.float64).swapaxes(1, 2) for x in (q, k, v, d_out))
    groups = q.shape[1] // k.shape[1]
    wide_k, wide_v = (np.repeat(x, groups, axis=1) for x in (k, v))
    rows = np.arange(q.shape[2]) + int(np.max(options.get("q_start", 0)))
    distance = rows[:, None] - np.arange(k.shape[2])
    visible = np.broadcast_to(distance >= 0, (2, *distance.shape)).copy()
    if options["window"] is not None:
        visible &= distance < options["window"]
    if "q_segments" in options:
        a, b = (np.asarray(options[x]) for x in ("q_segments", "k_segments"))
        visible &= (a[:, :, None] == b[:, None]) & (b > 0)[:, None]
    scale = q.shape[-1] ** -0.5
    p = _softmax(q @ wide_k.swapaxes(2, 3) * scale, visible[:, None])
    dp = d_out @ wide_v.swapaxes(2, 3)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale

    def sum_groups(x):  # over the query heads that share a kv head
        return x.reshape(x.shape[0], k.shape[1], groups, *x.shape[2:]).sum(2)

    dk, dv = sum_groups(ds.swapaxes(2, 3) @ q), sum_groups(p.swapaxes(2, 3) @ d_out)
    return tuple(x.swapaxes(1, 2) for x in (p @ wide_v, ds @ wide_k, dk, dv))


def relative_error(actual: jax.Array, expected: np.ndarray) -> float:
    """Returns ‖actual − expected‖ / ‖expected‖, or inf if an element of `actual` is not finite.

    The denominator is at least 1 % of the norm of standard normal numbers of that shape: with a
    window of 1 the gradients of q and k are 0.
    """
    actual = np.asarray(actual.astype(jnp.float32), np.float64)
    if not np.all(np.isfinite(actual)):
        return float("inf")
    floor = 1e-2 * np.sqrt(expected.size)
    return float(np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), floor))


@functools.lru_cache(maxsize=1)
def attention_case(case: str, seed: int, small: bool):
    """Returns (arrays, options) of `make_inputs` for a case of `CASES`, and its float64 results."""
    rng = np.random.default_rng([seed, list(CASES).index(case)])
    arrays, options = make_inputs(rng, **CASES[case], small=small)
    return arrays, options, attention_in_float64(*arrays, options)


def check_attention(case: str, implementation: str, seed: int, small: bool) -> dict[str, float]:
    """Returns the relative errors of attention by array name: out, dq, dk, dv.

    Args:
      case: name in `CASES`.
      implementation: as `kernels.attention` takes it.
      seed: of the inputs.
      small: use short sequences.
    """
    arrays, options, expected = attention_case(case, seed, small)
    q, k, v, d_out = (jnp.asarray(x, jnp.bfloat16) for x in arrays)

    @jax.jit
    def run(q, k, v, d_out):
        f = functools.partial(attention, implementation=implementation, **options)
        out, transpose = jax.vjp(f, q, k, v)
        return out, *transpose(d_out)

    results = run(q, k, v, d_out)
    names = ("out", "dq", "dk", "dv")
    return {n: relative_error(a, e) for n, a, e in zip(names, results, expected, strict=True)}


def check_decode(
    rng: np.random.Generator,
    *,
    dtype: str = "bfloat16",
    width: int = 128,
    groups: int = 4,
    q_len: int = 1,
    window: int | None = None,
) -> dict[str, float]:
    """Returns the relative error of decoding a ragged batch over pages in random order.

    Runs the implementation that `paged_attention` selects on this device.

    Args:
      rng: source of randomness.
      dtype: of the cache, "bfloat16" or "uint8".
      width: head dimension.
      groups: query heads per kv head.
      q_len: query tokens per request.
      window: slots that a query sees, its own included; None: all.
    """
    kv_heads, page, per_request = 2, 128, 6
    lengths = np.array([0, 1, page - 1, page, page + 1, 5 * page + 17], np.int32)
    table = rng.permutation(len(lengths) * per_request).reshape(len(lengths), -1).astype(np.int32)
    cache = init_paged_cache(1, table.size, kv_heads, width, page_size=page, dtype=dtype)
    shape = (1, len(lengths), per_request * page, kv_heads, width)
    k, v = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for _ in range(2))
    zeros = jnp.zeros_like(jnp.asarray(lengths))
    cache = jax.jit(append)(cache, k, v, jnp.asarray(table), zeros, jnp.asarray(lengths))
    q = jnp.asarray(rng.normal(size=(len(lengths), q_len, kv_heads * groups, width)), jnp.bfloat16)
    run = jax.jit(functools.partial(paged_attention, window=window))
    out, _ = run(q, cache, jnp.asarray(table), jnp.asarray(lengths))
    exact = [np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k[0], v[0])]
    expected = np.zeros(out.shape)
    for r, length in enumerate(lengths):
        q_r = exact[0][r].reshape(q_len, kv_heads, groups, width)
        k_r, v_r = exact[1][r, :length], exact[2][r, :length]
        scores = np.einsum("TKGH,SKH->KGTS", q_r, k_r) / width**0.5
        distance = np.arange(length - q_len, length)[:, None] - np.arange(length)
        visible = (distance >= 0) & (distance < (window or length + 1))
        if length:
            p = _softmax(scores, visible)
            expected[r] = np.einsum("KGTS,SKH->TKGH", p, v_r).reshape(q_len, -1, width)
    return {"out": relative_error(out, expected)}


def check_product(rng: np.random.Generator, rows: int, bits: int, small: bool) -> dict[str, float]:
    """Returns the relative error of x · w for a weight quantised in groups of 128 inputs.

    Runs the implementation that `group_matmul` selects on this device.

    Args:
      rng: source of randomness.
      rows: of x.
      bits: of a code, 4 or 8.
      small: use a small matrix.
    """
    inputs, outputs, group = (512, 256, 128) if small else (4096, 1024, 128)
    codes = rng.integers(0, 2**bits, (inputs, outputs))
    scales = rng.uniform(0.1, 2, (inputs // group, 1, outputs)).astype(np.float32)
    x = jnp.asarray(rng.standard_normal((rows, inputs)) + 1, jnp.bfloat16)
    weight = GroupWeight(pack(jnp.asarray(codes), bits), jnp.asarray(scales), None, bits=bits)
    grouped = codes.reshape(-1, group, outputs) - 2.0 ** (bits - 1)
    dense = (grouped * scales.astype(np.float64)).reshape(inputs, outputs)
    expected = np.asarray(x.astype(jnp.float32), np.float64) @ dense
    return {"out": relative_error(jax.jit(group_matmul)(x, weight), expected)}


def measure_row(implementation: str, case: str, seed: int, small: bool) -> dict[str, Any]:
    """Checks one case.

    Args:
      implementation: an attention implementation, "paged decode" or "quantised product".
      case: name in `CASES`, `DECODE_CASES` or `PRODUCT_CASES`, in this order.
      seed: of the inputs.
      small: use small sizes.

    Returns:
      relative errors by array name, {"not_run": reason} or {"failed": reason}.
    """
    try:
        if implementation == "paged decode":
            rng = np.random.default_rng([seed, 100 + list(DECODE_CASES).index(case)])
            return check_decode(rng, **DECODE_CASES[case])
        if implementation == "quantised product":
            rng = np.random.default_rng([seed, 200 + list(PRODUCT_CASES).index(case)])
            return check_product(rng, *PRODUCT_CASES[case], small)
        return check_attention(case, implementation, seed, small)
    except UserError as refusal:
        return {"not_run": str(refusal)}
    except Exception as failure:  # a failure is a result and must not end the benchmark
        return {"failed": error_summary(failure)}


def is_wrong(errors: dict[str, Any], limit: float) -> bool:
    """Returns whether a row of `measure_row` failed or has an error that is NaN or ≥ `limit`."""
    return "failed" in errors or any(not e < limit for e in errors.values() if isinstance(e, float))


def measure_rows(
    runners: list[RowRunner], jobs: list[tuple[str, str]], seed: int
) -> Iterator[dict[str, Any]]:
    """Yields the rows of (implementation, case) jobs in order, and closes the runners at the end.

    Jobs are assigned to the runners in turn; the runners work at the same time.
    """
    pools = [concurrent.futures.ThreadPoolExecutor(1) for _ in runners]
    workers = itertools.cycle(zip(pools, runners, strict=True))
    futures = [
        pool.submit(
            runner.measure_row, implementation=name, case=case, seed=seed, small=_SMALL.value
        )
        for (name, case), (pool, runner) in zip(jobs, workers, strict=False)
    ]
    for future in futures:
        yield future.result()
    for runner in runners:
        runner.close()


def main(_):
    """Checks all cases; exits with status 1 if one of our kernels is wrong or fails."""
    seed = time.time_ns() % 2**32 if _SEED.value is None else _SEED.value
    count = _PROCESSES.value if _ROW_SECONDS.value else 1
    runners = [RowRunner("benchmarks.correctness", _ROW_SECONDS.value) for _ in range(count)]
    environment = runners[0].environment()
    report: dict[str, Any] = {"benchmark": "correctness", **environment, "seed": seed}
    report |= {"errors": {}, "wrong": [], "complete": False}
    names = _IMPLEMENTATIONS.value or DEFAULT_IMPLEMENTATIONS[environment["platform"]]
    jobs = [
        *((name, case) for case in CASES for name in names),
        *(("paged decode", case) for case in DECODE_CASES),
        *(("quantised product", case) for case in PRODUCT_CASES),
    ]
    print(f"{environment['device']}, jax {environment['jax']}, seed {seed}")
    print(f"{'implementation':<20}{'case':<26}{'out':>10}{'dq':>10}{'dk':>10}{'dv':>10}")
    for (implementation, case), errors in zip(jobs, measure_rows(runners, jobs, seed), strict=True):
        # The release truncates codes to whole numbers: errors reach 1/255 of a vector's range.
        limit = 5 * ERROR_LIMIT if "dtype" in DECODE_CASES.get(case, {}) else ERROR_LIMIT
        name, wrong = f"{implementation}, {case}", is_wrong(errors, limit)
        report["errors"][name] = errors
        if wrong and implementation not in LIBRARIES:
            report["wrong"].append(name)
        cells = [f"{e:>10.1e}" if isinstance(e, float) else f"{k}: {e}" for k, e in errors.items()]
        line = "".join(cells) + "   WRONG" * wrong
        print(f"{implementation:<20}{case:<26}{line}", flush=True)
        save(report, _OUT.value)
    report["complete"] = True
    emit(report, _OUT.value)
    sys.exit(1 if report["wrong"] else 0)


if __name__ == "__main__":
    app.run(main)
