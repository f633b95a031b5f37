"""Attention, forward and backward: ours beside its peers, on whatever device is here.

    python -m benchmarks.attention                  # T 2k-32k, D 64/128, causal, packed, window
    python -m benchmarks.attention --quick          # eight cases, minutes on one GPU
    python -m benchmarks.attention --only pallas_gpu cudnn --out=attention.json

Each implementation is first compared with float32 on one group of heads; one that is wrong is
reported as wrong and not timed, one that can't run is listed with the reason. Kernels come first
over all cases, the plain forms, which take longest, last (with --quick for the first case only);
the JSON is written with every row. Times are medians of repeated batches of calls after a warm-up.
FLOPs count the pairs that the mask lets through, 4·H each, and 2.5 times as many for the backward
pass, whatever an implementation computes.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.report import emit, reason, save
from benchmarks.runner import Runner
from qwen_jax.errors import UserError
from qwen_jax.kernels import attention
from qwen_jax.kernels.chunked import chunked_kernel
from qwen_jax.kernels.dispatch import IMPLEMENTATIONS
from qwen_jax.kernels.flash import row_delta
from qwen_jax.kernels.mask import make_mask
from qwen_jax.parallel import platform as device_platform

MOST_SCORES = 8 * 2**30
"""Bytes of float32 scores above which forms that hold all of them are not tried."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes and mask; `packed` means eight documents a row, `window` an eighth of the length."""

    length: int
    heads: int
    kv_heads: int
    width: int
    mask: str = "causal"
    batch: int = 1
    dtype: str = "bfloat16"

    @property
    def window(self) -> int | None:
        """Slots a query sees, its own included."""
        return max(1, self.length // 8) if self.mask == "window" else None

    def segments(self) -> np.ndarray | None:
        """int32 [B,T], documents of uneven length."""
        if self.mask != "packed":
            return None
        rng = np.random.default_rng(0)
        cuts = np.sort(rng.integers(1, self.length, (self.batch, 7)), axis=1)
        return (1 + (np.arange(self.length) >= cuts[..., None]).sum(axis=1)).astype(np.int32)

    def pairs(self) -> int:
        """Pairs of query and key that see each other, per head, over the whole batch."""
        slots = np.arange(self.length)
        seen = np.broadcast_to(slots + 1, (self.batch, self.length))
        if self.window:
            seen = np.minimum(seen, self.window)
        ids = self.segments()
        if ids is not None:
            first = np.stack([np.searchsorted(row, row, side="left") for row in ids])
            seen = slots - first + 1
        return int(seen.sum())


GRID = [
    Case(length, *shape, mask, max(1, 16384 // length))
    for shape in ((64, 8, 128), (16, 16, 128), (32, 32, 64), (32, 8, 64))
    for mask in ("causal", "packed", "window")
    for length in (2048, 4096, 8192, 16384, 32768)
]
QUICK = [
    Case(2048, 16, 16, 128, batch=8),
    Case(4096, 16, 16, 128, batch=4),
    Case(8192, 16, 16, 128, batch=2),
    Case(16384, 16, 16, 128),
    Case(8192, 64, 8, 128),
    Case(8192, 64, 8, 128, "packed"),
    Case(8192, 64, 8, 128, "window"),
    Case(8192, 32, 32, 64, batch=2),
]
TINY = [
    Case(128, 2, 1, 64, mask, batch=2, dtype=dtype)
    for mask, dtype in (("causal", "float32"), ("packed", "float32"), ("window", "bfloat16"))
]


# --- Implementations ------------------------------------------------------------------------------


def implementations() -> list[str]:
    """Names of the dispatch; which of them run here, and why not, it says itself."""
    return [name for name in IMPLEMENTATIONS if name != "auto"]


PLAIN = ("chunked", "reference")
"""Forms in plain jnp, which are timed last: many times slower than any kernel."""


def _function(name: str, case: Case, segments):
    return lambda q, k, v: attention(
        *(q, k, v),
        q_segments=segments,
        k_segments=segments,
        window=case.window,
        implementation=name,
    )


def _too_large(name: str, case: Case) -> str | None:
    scores = 4 * case.batch * case.heads * case.length**2
    if name == "reference" and scores > MOST_SCORES:
        return f"its scores would take {scores / 2**30:.0f} GiB"
    return None


# --- Measuring -----------------------------------------------------------------------------------


def _operands(case: Case):
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    return [
        jax.random.normal(key, (case.batch, case.length, n, case.width), case.dtype)
        for key, n in zip(keys, heads, strict=True)
    ]


def _segments(case: Case) -> jax.Array | None:
    ids = case.segments()
    return None if ids is None else jnp.asarray(ids)


@functools.lru_cache(maxsize=len(GRID))
def _exact(case: Case) -> tuple[np.ndarray, ...]:
    """(out, dq, dk, dv) of the last kv head of the last row, in float32, on the host."""
    q, k, v, d_out = _operands(case)
    segments = _segments(case)
    groups = case.heads // case.kv_heads
    q, d_out = (x[-1:, :, -groups:].astype(jnp.float32) for x in (q, d_out))
    k, v = (x[-1:, :, -1:].astype(jnp.float32) for x in (k, v))
    ids = None if segments is None else segments[-1:]
    mask, scale, kernel = make_mask(None, ids, ids, case.window), case.width**-0.5, chunked_kernel()

    # Trying out products for the fastest takes seconds a case on a GPU, and this runs once.
    untuned = {"xla_gpu_autotune_level": 0} if device_platform()[0] == "gpu" else None

    @functools.partial(jax.jit, compiler_options=untuned)
    def run(q, k, v, d_out):
        with jax.default_matmul_precision("highest"):
            out, lse = kernel.forward(q, k, v, mask, scale)
            delta = row_delta(out, d_out)
            return out, *kernel.backward(q, k, v, mask, scale, lse, d_out, delta, None)

    return tuple(np.asarray(x) for x in run(q, k, v, d_out))


def _error(case: Case, got, exact) -> float:
    """Largest over (out, dq, dk, dv) of the root mean square error, relative; NaN counts as inf."""
    groups, worst = case.heads // case.kv_heads, 0.0
    for x, e, heads in zip(got, exact, (groups, groups, 1, 1), strict=True):
        x, e = (np.asarray(a, np.float64) for a in (x[-1:, :, -heads:], e))
        error = np.sqrt(np.square(x - e).mean() / np.square(e).mean())
        worst = max(worst, float(error) if np.isfinite(error) else float("inf"))
    return worst


def _seconds(function, *operands, repeats: int) -> float:
    """Median seconds a call; calls are queued behind each other, so launching is hidden."""
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


def measure(name: str, case: Case, repeats: int) -> dict:
    """One row: sizes, and either times, or an error above the bound, or why it didn't run."""
    row = {"implementation": name, **dataclasses.asdict(case)}
    large = _too_large(name, case)
    if large is not None:
        return row | {"status": "not run", "reason": large}
    segments = _segments(case)
    *operands, d_out = _operands(case)
    try:
        function = _function(name, case, segments)
        forward = jax.jit(function)
        differentiate = jax.jit(lambda *x: jax.vjp(function, *x))
        backward = jax.jit(lambda pull, d_out: pull(d_out))
        out, pull = differentiate(*operands)
        got = (out, *backward(pull, d_out))
        error = _error(case, got, _exact(case))
    except UserError as problem:
        return row | {"status": "not run", "reason": str(problem)}
    except Exception as problem:  # a peer that fails here is a result, not the benchmark's end
        return row | {"status": "failed", "reason": reason(problem)}
    del out, got
    row["error"] = error
    if error > (0.02 if jnp.dtype(case.dtype).itemsize == 2 else 1e-3):
        return row | {"status": "wrong", "reason": f"relative error {error:.2g} against float32"}
    flops = 4 * case.width * case.heads * case.pairs()
    seconds = _seconds(forward, *operands, repeats=repeats)
    seconds_back = _seconds(backward, pull, d_out, repeats=repeats)
    return row | {
        "status": "ok",
        "forward_ms": seconds * 1e3,
        "backward_ms": seconds_back * 1e3,
        "forward_tflops": flops / seconds / 1e12,
        "backward_tflops": 2.5 * flops / seconds_back / 1e12,
    }


def row(implementation: str, case: dict, repeats: int) -> dict:
    """`measure`, from JSON."""
    return measure(implementation, Case(**case), repeats)


def _line(row: dict) -> str:
    case = f"T={row['length']} B={row['batch']} {row['heads']}/{row['kv_heads']}x{row['width']}"
    head = f"{case:28}{row['mask']:8}{row['implementation']:12}"
    if row["status"] != "ok":
        return f"{head}{row['status']}: {row['reason']}"
    return (
        f"{head}{row['forward_ms']:9.3f} ms {row['forward_tflops']:7.1f} TFLOP/s"
        f"{row['backward_ms']:10.3f} ms {row['backward_tflops']:7.1f} TFLOP/s"
        f"  error {row['error']:.1e}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the cases; exit status 1 if an implementation of ours is wrong or fails."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    sets = parser.add_mutually_exclusive_group()
    sets.add_argument("--quick", action="store_true", help="eight cases")
    sets.add_argument("--tiny", action="store_true", help="sizes for a CPU, to try the program")
    parser.add_argument("--only", nargs="+", choices=implementations(), metavar="NAME")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument(
        "--row-seconds",
        type=float,
        default=0,
        help="run rows in a process that is given up when one takes longer (0: in this process)",
    )
    parser.add_argument("--out", type=pathlib.Path, help="also write JSON here")
    options = parser.parse_args(arguments)
    cases = TINY if options.tiny else QUICK if options.quick else GRID
    runner = Runner("benchmarks.attention", options.row_seconds)
    about = runner.environment()
    print(*(f"{key}: {value}" for key, value in about.items()), sep="\n")
    print(f"{'case':28}{'mask':8}{'':12}{'forward':>12}{'':24}backward", flush=True)
    report = {"benchmark": "attention", **about, "rows": [], "complete": False}
    rows, path = report["rows"], str(options.out or "")
    jobs = [
        (name, case)
        for case in cases
        for name in options.only or implementations()
        if not options.quick or name not in PLAIN or case == QUICK[0]
    ]
    # Sorting keeps the order of cases within the kernels and within the plain forms.
    for name, case in sorted(jobs, key=lambda job: job[0] in PLAIN):
        job = {"implementation": name, "case": dataclasses.asdict(case)}
        found = runner.row(**job, repeats=options.repeats)
        if "failed" in found:
            found = {"implementation": name, **job["case"], "reason": found["failed"]}
            found["status"] = "failed"
        rows.append(found)
        print(_line(found), flush=True)
        save(report, path)
    runner.close()
    emit(report | {"complete": True}, path)
    bad = [r for r in rows if r["status"] in ("wrong", "failed")]
    return int(any(r["implementation"] not in ("cudnn", "splash") for r in bad))


if __name__ == "__main__":
    sys.exit(main())
