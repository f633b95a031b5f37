"""Speed of attention forward and backward: our kernels beside their peers, on this device.

    python -m benchmarks.attention                  # T 2k-32k, head_dim 64/128, all masks
    python -m benchmarks.attention --quick          # eight cases, minutes on one GPU
    python -m benchmarks.attention --only pallas_gpu cudnn --out=attention.json

Each implementation is first compared with float32 on one group of heads. One with wrong results is
reported as wrong and not timed; one that cannot run is listed with the reason. Kernels are timed
first over all cases, plain jnp forms, which take longest, last (with --quick at the first case
only). Times are medians of repeated batches of calls after a warm-up. FLOPs count the query-key
pairs that the mask leaves visible, 4·head_dim each, and 2.5 times as many for the backward pass,
whatever an implementation computes.

Prints a table and, as its last line, one JSON object, which --out saves with every row.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.report import emit, error_summary, save
from benchmarks.runner import RowRunner
from qwen_jax.errors import UserError
from qwen_jax.kernels import attention
from qwen_jax.kernels.chunked import chunked_kernel
from qwen_jax.kernels.dispatch import IMPLEMENTATIONS
from qwen_jax.kernels.flash import row_delta
from qwen_jax.kernels.mask import make_mask
from qwen_jax.parallel import platform as device_platform

MAX_SCORE_BYTES = 8 * 2**30
"""Bytes of float32 scores above which implementations that hold all of them are not run."""


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """Sizes and mask of one measurement.

    Attributes:
      length: tokens per row, both queries and keys.
      heads: query heads.
      kv_heads: key and value heads.
      width: head dimension.
      mask: "causal", "packed" (eight documents per row) or "window" (an eighth of the length).
      batch: rows.
      dtype: of the operands.
    """

    length: int
    heads: int
    kv_heads: int
    width: int
    mask: str = "causal"
    batch: int = 1
    dtype: str = "bfloat16"

    @property
    def window(self) -> int | None:
        """Returns how many slots a query sees, its own included; None without a window."""
        return max(1, self.length // 8) if self.mask == "window" else None

    def segments(self) -> np.ndarray | None:
        """Returns segment ids of documents of uneven length, int32 [batch, length], or None."""
        if self.mask != "packed":
            return None
        rng = np.random.default_rng(0)
        cuts = np.sort(rng.integers(1, self.length, (self.batch, 7)), axis=1)
        return (1 + (np.arange(self.length) >= cuts[..., None]).sum(axis=1)).astype(np.int32)

    def visible_pairs(self) -> int:
        """Returns the number of visible query-key pairs of one head, over the whole batch."""
        slots = np.arange(self.length)
        visible = np.broadcast_to(slots + 1, (self.batch, self.length))
        if self.window:
            visible = np.minimum(visible, self.window)
        ids = self.segments()
        if ids is not None:
            first = np.stack([np.searchsorted(row, row, side="left") for row in ids])
            visible = slots - first + 1
        return int(visible.sum())


GRID = [
    AttentionCase(length, *heads_and_width, mask, max(1, 16384 // length))
    for heads_and_width in ((64, 8, 128), (16, 16, 128), (32, 32, 64), (32, 8, 64))
    for mask in ("causal", "packed", "window")
    for length in (2048, 4096, 8192, 16384, 32768)
]
QUICK = [
    AttentionCase(2048, 16, 16, 128, batch=8),
    AttentionCase(4096, 16, 16, 128, batch=4),
    AttentionCase(8192, 16, 16, 128, batch=2),
    AttentionCase(16384, 16, 16, 128),
    AttentionCase(8192, 64, 8, 128),
    AttentionCase(8192, 64, 8, 128, "packed"),
    AttentionCase(8192, 64, 8, 128, "window"),
    AttentionCase(8192, 32, 32, 64, batch=2),
]
TINY = [
    AttentionCase(128, 2, 1, 64, mask, batch=2, dtype=dtype)
    for mask, dtype in (("causal", "float32"), ("packed", "float32"), ("window", "bfloat16"))
]


# --- Implementations ------------------------------------------------------------------------------


def implementations() -> list[str]:
    """Returns the names that `kernels.attention` takes; it refuses those that cannot run here."""
    return [name for name in IMPLEMENTATIONS if name != "auto"]


PLAIN = ("chunked", "reference")
"""Implementations in plain jnp, which are timed last: many times slower than any kernel."""


def _attention_function(
    name: str, case: AttentionCase, segments: jax.Array | None
) -> Callable[..., jax.Array]:
    """Returns attention(q, k, v) by one implementation, with the mask of a case."""
    return lambda q, k, v: attention(
        q,
        k,
        v,
        q_segments=segments,
        k_segments=segments,
        window=case.window,
        implementation=name,
    )


def _too_large(name: str, case: AttentionCase) -> str | None:
    """Returns why an implementation would need too much memory for a case, or None."""
    score_bytes = 4 * case.batch * case.heads * case.length**2
    if name == "reference" and score_bytes > MAX_SCORE_BYTES:
        return f"its scores would take {score_bytes / 2**30:.0f} GiB"
    return None


# --- Measuring -----------------------------------------------------------------------------------


def _operands(case: AttentionCase) -> list[jax.Array]:
    """Returns random [q, k, v, d_out] of a case, each [batch, length, heads, head_dim]."""
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    return [
        jax.random.normal(key, (case.batch, case.length, n, case.width), case.dtype)
        for key, n in zip(keys, heads, strict=True)
    ]


def _segments(case: AttentionCase) -> jax.Array | None:
    """Returns `AttentionCase.segments` on the device."""
    ids = case.segments()
    return None if ids is None else jnp.asarray(ids)


@functools.lru_cache(maxsize=len(GRID))
def _float32_results(case: AttentionCase) -> tuple[np.ndarray, ...]:
    """Computes (out, dq, dk, dv) of the last kv head of the last row, in float32 on the host."""
    q, k, v, d_out = _operands(case)
    segments = _segments(case)
    groups = case.heads // case.kv_heads
    q, d_out = (x[-1:, :, -groups:].astype(jnp.float32) for x in (q, d_out))
    k, v = (x[-1:, :, -1:].astype(jnp.float32) for x in (k, v))
    ids = None if segments is None else segments[-1:]
    mask, scale, kernel = make_mask(None, ids, ids, case.window), case.width**-0.5, chunked_kernel()

    # Autotuning of products takes seconds per case on a GPU, and this runs once.
    untuned = {"xla_gpu_autotune_level": 0} if device_platform()[0] == "gpu" else None

    @functools.partial(jax.jit, compiler_options=untuned)
    def run(q, k, v, d_out):
        with jax.default_matmul_precision("highest"):
            out, lse = kernel.forward(q, k, v, mask, scale)
            delta = row_delta(out, d_out)
            return out, *kernel.backward(q, k, v, mask, scale, lse, d_out, delta, None)

    return tuple(np.asarray(x) for x in run(q, k, v, d_out))


def _relative_error(case: AttentionCase, got, expected) -> float:
    """Returns the largest relative root-mean-square error of (out, dq, dk, dv).

    Args:
      case: the case.
      got: the four arrays, [batch, length, heads, head_dim].
      expected: the same for the last kv head of the last row (`_float32_results`).

    Returns:
      the error; inf if an element is NaN or infinite.
    """
    groups, worst = case.heads // case.kv_heads, 0.0
    for x, e, heads in zip(got, expected, (groups, groups, 1, 1), strict=True):
        x, e = (np.asarray(a, np.float64) for a in (x[-1:, :, -heads:], e))
        error = np.sqrt(np.square(x - e).mean() / np.square(e).mean())
        worst = max(worst, float(error) if np.isfinite(error) else float("inf"))
    return worst


def _seconds_per_call(function: Callable[..., Any], *operands: Any, repeats: int) -> float:
    """Returns the median seconds per call; calls are queued, so their launches overlap."""
    for _ in range(2):
        jax.block_until_ready(function(*operands))
    start = time.perf_counter()
    jax.block_until_ready(function(*operands))
    calls = max(1, min(50, int(0.05 / max(time.perf_counter() - start, 1e-6))))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            result = function(*operands)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def measure(name: str, case: AttentionCase, repeats: int) -> dict[str, Any]:
    """Measures one implementation at one case.

    Args:
      name: implementation, as `kernels.attention` takes it.
      case: sizes and mask.
      repeats: batches of calls whose median is taken.

    Returns:
      the fields of the case, "implementation", and "status": "ok" with times and TFLOP/s, or
      "wrong", "failed" or "not run" with a "reason".
    """
    row = {"implementation": name, **dataclasses.asdict(case)}
    too_large = _too_large(name, case)
    if too_large is not None:
        return row | {"status": "not run", "reason": too_large}
    segments = _segments(case)
    *operands, d_out = _operands(case)
    try:
        function = _attention_function(name, case, segments)
        forward = jax.jit(function)
        differentiate = jax.jit(lambda *x: jax.vjp(function, *x))
        backward = jax.jit(lambda pull, d_out: pull(d_out))
        out, pull = differentiate(*operands)
        got = (out, *backward(pull, d_out))
        error = _relative_error(case, got, _float32_results(case))
    except UserError as refusal:
        return row | {"status": "not run", "reason": str(refusal)}
    except Exception as failure:  # a peer that fails is a result and must not end the benchmark
        return row | {"status": "failed", "reason": error_summary(failure)}
    del out, got
    row["error"] = error
    if error > (0.02 if jnp.dtype(case.dtype).itemsize == 2 else 1e-3):
        return row | {"status": "wrong", "reason": f"relative error {error:.2g} against float32"}
    flops = 4 * case.width * case.heads * case.visible_pairs()
    seconds = _seconds_per_call(forward, *operands, repeats=repeats)
    backward_seconds = _seconds_per_call(backward, pull, d_out, repeats=repeats)
    return row | {
        "status": "ok",
        "forward_ms": seconds * 1e3,
        "backward_ms": backward_seconds * 1e3,
        "forward_tflops": flops / seconds / 1e12,
        "backward_tflops": 2.5 * flops / backward_seconds / 1e12,
    }


def measure_row(implementation: str, case: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Returns `measure` of a case given as a dict of its fields, for `RowRunner`."""
    return measure(implementation, AttentionCase(**case), repeats)


def _format_row(row: dict[str, Any]) -> str:
    """Returns the table line of a row of `measure`."""
    case = f"T={row['length']} B={row['batch']} {row['heads']}/{row['kv_heads']}x{row['width']}"
    head = f"{case:28}{row['mask']:8}{row['implementation']:12}"
    if row["status"] != "ok":
        return f"{head}{row['status']}: {row['reason']}"
    return (
        f"{head}{row['forward_ms']:9.3f} ms {row['forward_tflops']:7.1f} TFLOP/s"
        f"{row['backward_ms']:10.3f} ms {row['backward_tflops']:7.1f} TFLOP/s"
        f"  error {row['error']:.1e}"
    )


def _parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    sets = parser.add_mutually_exclusive_group()
    sets.add_argument("--quick", action="store_true", help="measure eight cases only")
    sets.add_argument("--tiny", action="store_true", help="use tiny cases that run on a CPU")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=implementations(),
        metavar="NAME",
        help=f"implementations to measure, of {', '.join(implementations())} (default: all)",
    )
    parser.add_argument(
        "--repeats", type=int, default=10, help="timed batches of calls (default: 10)"
    )
    parser.add_argument(
        "--row-seconds",
        type=float,
        default=0,
        help="measure rows in a child process and kill it when one takes longer; 0: no child",
    )
    parser.add_argument("--out", type=pathlib.Path, help="also write the JSON to this file")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Measures all cases; returns 1 if one of our implementations is wrong or fails, else 0."""
    options = _parser().parse_args(arguments)
    cases = TINY if options.tiny else QUICK if options.quick else GRID
    runner = RowRunner("benchmarks.attention", options.row_seconds)
    environment = runner.environment()
    print(*(f"{key}: {value}" for key, value in environment.items()), sep="\n")
    print(f"{'case':28}{'mask':8}{'':12}{'forward':>12}{'':24}backward", flush=True)
    rows: list[dict[str, Any]] = []
    report = {"benchmark": "attention", **environment, "rows": rows, "complete": False}
    path = str(options.out or "")
    jobs = [
        (name, case)
        for case in cases
        for name in options.only or implementations()
        if not options.quick or name not in PLAIN or case == QUICK[0]
    ]
    # A stable sort: kernels first, then plain forms, each in the order of the cases.
    for name, case in sorted(jobs, key=lambda job: job[0] in PLAIN):
        case_fields = dataclasses.asdict(case)
        row = runner.measure_row(implementation=name, case=case_fields, repeats=options.repeats)
        if "failed" in row:
            row = {"implementation": name, **case_fields, "reason": row["failed"]}
            row["status"] = "failed"
        rows.append(row)
        print(_format_row(row), flush=True)
        save(report, path)
    runner.close()
    emit(report | {"complete": True}, path)
    bad = [r for r in rows if r["status"] in ("wrong", "failed")]
    return int(any(r["implementation"] not in ("cudnn", "splash") for r in bad))


if __name__ == "__main__":
    sys.exit(main())
