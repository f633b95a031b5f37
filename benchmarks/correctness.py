"""Every kernel that runs on this device, against NumPy in float64.

    python -m benchmarks.correctness [--implementations=pallas_gpu,cudnn] [--row_seconds=60]
                                     [--out=FILE.json]

What the tests prove in interpreters, shown on the device itself: outputs and gradients on fresh
random inputs, with odd lengths, packed rows with padding, windows, grouped heads, later slots;
decoding over a paged cache; products by weights quantised in groups. An error is
‖out − reference‖ / ‖reference‖; above 1 % in bf16 the case counts as wrong. The exit status is 1 if
anything of ours is wrong or fails; what the libraries' kernels do is only shown.
"""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.report import emit, reason, save
from benchmarks.runner import Runner
from qwen_jax.errors import UserError
from qwen_jax.kernels import attention
from qwen_jax.kernels.cache import init_paged_cache
from qwen_jax.kernels.paged import append, paged_attention
from qwen_jax.kernels.quantised import GroupWeight, group_matmul, pack

LIMIT = 1e-2
LIBRARIES = ("cudnn", "splash")
HERE = {
    "gpu": ["pallas_gpu", "cudnn", "chunked"],
    "tpu": ["pallas_tpu", "splash", "chunked"],
    "cpu": ["chunked"],
}

_IMPLEMENTATIONS = flags.DEFINE_list(
    "implementations", [], "What to check; by default what this kind of device has."
)
_SEED = flags.DEFINE_integer("seed", None, "Of the inputs; by default a new one each time.")
_SMALL = flags.DEFINE_bool("small", False, "Short sequences, for a slow device.")
_ROW_SECONDS = flags.DEFINE_float(
    "row_seconds", 0, "Run rows in a process that is given up when one takes longer; 0: in this."
)
_PROCESSES = flags.DEFINE_integer("processes", 1, "With --row_seconds: how many work at once.")
_OUT = flags.DEFINE_string("out", "", "Also write the JSON here.")

CASES = {
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
DECODE_CASES = {
    "bf16": {},
    "bf16, heads of 64": {"width": 64},
    "bf16, multi-head": {"groups": 1},
    "bf16, draft of 4, window": {"q_len": 4, "window": 200},
    "8 bits": {"dtype": "uint8"},
    "8 bits, draft of 4": {"dtype": "uint8", "q_len": 4},
}
# name: (rows of x, bits of a code)
PRODUCT_CASES = {"1 row, 4 bits": (1, 4), "70 rows, 4 bits": (70, 4), "8 rows, 8 bits": (8, 8)}


def make(
    rng,
    *,
    length=1024,
    heads=4,
    kv_heads=4,
    head_dim=128,
    window=None,
    documents=0,
    empty_row=False,
    start=0,
    small=False,
):
    """(q, k, v, d_out) as float32 with bf16 values, and the keyword arguments of `attention`."""
    if small:
        length, start = max(length // 8, 5), start // 8
        window = window and max(window // 8, 1)
    keys = length + start

    def draw(tokens, n):
        x = rng.normal(size=(2, tokens, n, head_dim))
        return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)

    arrays = draw(length, heads), draw(keys, kv_heads), draw(keys, kv_heads), draw(length, heads)
    options = {"window": window}
    if documents:  # ascending ids, padding at the end; if wanted a row of nothing but padding
        ids = np.sort(rng.integers(1, documents + 1, (2, keys)), axis=1)
        ids[0, keys - keys // 10 :] = 0
        ids[1] *= not empty_row
        options |= {"q_segments": ids[:, start:], "k_segments": ids}
    if start:
        options["q_start"] = np.full(2, start)
    options = {k: v if k == "window" else jnp.asarray(v, jnp.int32) for k, v in options.items()}
    return arrays, options


def _softmax(s, seen):
    """Over the last axis, 0 where nothing is seen."""
    s = np.where(seen, s, -np.inf)
    p = np.exp(s - np.where(seen.any(-1, keepdims=True), s.max(-1, keepdims=True), 0.0))
    return p / np.maximum(p.sum(-1, keepdims=True), 1e-300)


def by_numpy(q, k, v, d_out, options):
    """(out, dq, dk, dv) [B,T or S,heads,H] in float64."""
    # Heads in front, so that products are matrix products: einsum would loop over numbers.
    q, k, v, d_out = (x.astype(np.float64).swapaxes(1, 2) for x in (q, k, v, d_out))
    groups = q.shape[1] // k.shape[1]
    wide_k, wide_v = (np.repeat(x, groups, axis=1) for x in (k, v))
    rows = np.arange(q.shape[2]) + int(np.max(options.get("q_start", 0)))
    distance = rows[:, None] - np.arange(k.shape[2])
    seen = np.broadcast_to(distance >= 0, (2, *distance.shape)).copy()
    if options["window"] is not None:
        seen &= distance < options["window"]
    if "q_segments" in options:
        a, b = (np.asarray(options[x]) for x in ("q_segments", "k_segments"))
        seen &= (a[:, :, None] == b[:, None]) & (b > 0)[:, None]
    scale = q.shape[-1] ** -0.5
    p = _softmax(q @ wide_k.swapaxes(2, 3) * scale, seen[:, None])
    dp = d_out @ wide_v.swapaxes(2, 3)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale

    def shared(x):  # summed over the query heads that read a kv head
        return x.reshape(x.shape[0], k.shape[1], groups, *x.shape[2:]).sum(2)

    dk, dv = shared(ds.swapaxes(2, 3) @ q), shared(p.swapaxes(2, 3) @ d_out)
    return tuple(x.swapaxes(1, 2) for x in (p @ wide_v, ds @ wide_k, dk, dv))


def error(actual, expected) -> float:
    actual = np.asarray(actual.astype(jnp.float32), np.float64)
    if not np.all(np.isfinite(actual)):
        return float("inf")
    size = np.linalg.norm(expected)
    # With window 1 the gradients of q and k are 0: what is left is measured against the inputs'.
    floor = 1e-2 * np.sqrt(expected.size)
    return float(np.linalg.norm(actual - expected) / max(size, floor))


@functools.lru_cache(maxsize=1)
def attention_case(case: str, seed: int, small: bool):
    """(arrays, options) as `make` returns them, and (out, dq, dk, dv)."""
    rng = np.random.default_rng([seed, list(CASES).index(case)])
    arrays, options = make(rng, **CASES[case], small=small)
    return arrays, options, by_numpy(*arrays, options)


def check_attention(case: str, implementation: str, seed: int, small: bool) -> dict:
    """Errors of output and gradients."""
    arrays, options, expected = attention_case(case, seed, small)
    q, k, v, d_out = (jnp.asarray(x, jnp.bfloat16) for x in arrays)

    @jax.jit
    def run(q, k, v, d_out):
        f = functools.partial(attention, implementation=implementation, **options)
        out, transpose = jax.vjp(f, q, k, v)
        return out, *transpose(d_out)

    results = run(q, k, v, d_out)
    names = ("out", "dq", "dk", "dv")
    return {n: error(a, e) for n, a, e in zip(names, results, expected, strict=True)}


def check_decode(rng, *, dtype="bfloat16", width=128, groups=4, q_len=1, window=None) -> dict:
    """Error of decoding a ragged batch over pages in random order, by the implementation chosen."""
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
        s = np.einsum("TKGH,SKH->KGTS", q_r, k_r) / width**0.5
        distance = np.arange(length - q_len, length)[:, None] - np.arange(length)
        seen = (distance >= 0) & (distance < (window or length + 1))
        if length:
            p = _softmax(s, seen)
            expected[r] = np.einsum("KGTS,SKH->TKGH", p, v_r).reshape(q_len, -1, width)
    return {"out": error(out, expected)}


def check_product(rng, rows: int, bits: int, small: bool) -> dict:
    """Error of x · w for a weight quantised in groups of 128, by the implementation chosen."""
    inputs, outputs, group = (512, 256, 128) if small else (4096, 1024, 128)
    codes = rng.integers(0, 2**bits, (inputs, outputs))
    scales = rng.uniform(0.1, 2, (inputs // group, 1, outputs)).astype(np.float32)
    x = jnp.asarray(rng.standard_normal((rows, inputs)) + 1, jnp.bfloat16)
    weight = GroupWeight(pack(jnp.asarray(codes), bits), jnp.asarray(scales), None, bits=bits)
    grouped = codes.reshape(-1, group, outputs) - 2.0 ** (bits - 1)
    dense = (grouped * scales.astype(np.float64)).reshape(inputs, outputs)
    expected = np.asarray(x.astype(jnp.float32), np.float64) @ dense
    return {"out": error(jax.jit(group_matmul)(x, weight), expected)}


def row(implementation: str, case: str, seed: int, small: bool) -> dict:
    """{array: error}, {"not_run": why} or {"failed": why}; `case` belongs to the implementation."""
    try:
        if implementation == "paged decode":
            rng = np.random.default_rng([seed, 100 + list(DECODE_CASES).index(case)])
            return check_decode(rng, **DECODE_CASES[case])
        if implementation == "quantised product":
            rng = np.random.default_rng([seed, 200 + list(PRODUCT_CASES).index(case)])
            return check_product(rng, *PRODUCT_CASES[case], small)
        return check_attention(case, implementation, seed, small)
    except UserError as problem:
        return {"not_run": str(problem)}
    except Exception as problem:  # also a result; the others go on
        return {"failed": reason(problem)}


def is_wrong(errors: dict, limit: float) -> bool:
    """Whether a row counts as wrong; not a number does."""
    return "failed" in errors or any(not e < limit for e in errors.values() if isinstance(e, float))


def answers(runners: list[Runner], jobs: list[tuple[str, str]], seed: int):
    """The rows in the order of jobs, dealt to the runners in turn; each works on its own."""
    pools = [concurrent.futures.ThreadPoolExecutor(1) for _ in runners]
    hands = itertools.cycle(zip(pools, runners, strict=True))
    futures = [
        pool.submit(runner.row, implementation=i, case=case, seed=seed, small=_SMALL.value)
        for (i, case), (pool, runner) in zip(jobs, hands, strict=False)
    ]
    for future in futures:
        yield future.result()
    for runner in runners:
        runner.close()


def main(_):
    seed = time.time_ns() % 2**32 if _SEED.value is None else _SEED.value
    count = _PROCESSES.value if _ROW_SECONDS.value else 1
    runners = [Runner("benchmarks.correctness", _ROW_SECONDS.value) for _ in range(count)]
    about = runners[0].environment()
    report = {"benchmark": "correctness", **about, "seed": seed}
    report |= {"errors": {}, "wrong": [], "complete": False}
    jobs = [
        *((i, c) for c in CASES for i in _IMPLEMENTATIONS.value or HERE[about["platform"]]),
        *(("paged decode", c) for c in DECODE_CASES),
        *(("quantised product", c) for c in PRODUCT_CASES),
    ]
    print(f"{about['device']}, jax {about['jax']}, seed {seed}")
    print(f"{'implementation':<20}{'case':<26}{'out':>10}{'dq':>10}{'dk':>10}{'dv':>10}")
    for (implementation, case), errors in zip(jobs, answers(runners, jobs, seed), strict=True):
        # The release cuts codes off to whole numbers: an error is up to 1/255 of a vector's range.
        limit = 5 * LIMIT if "dtype" in DECODE_CASES.get(case, {}) else LIMIT
        name, wrong = f"{implementation}, {case}", is_wrong(errors, limit)
        report["errors"][name] = errors
        if wrong and implementation not in LIBRARIES:
            report["wrong"].append(name)
        cells = [f"{e:>10.1e}" if isinstance(e, float) else f"{k}: {e}" for k, e in errors.items()]
        said = "".join(cells) + "   WRONG" * wrong
        print(f"{implementation:<20}{case:<26}{said}", flush=True)
        save(report, _OUT.value)
    report["complete"] = True
    emit(report, _OUT.value)
    sys.exit(1 if report["wrong"] else 0)


if __name__ == "__main__":
    app.run(main)
