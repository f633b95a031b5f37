"""Every attention implementation that runs on this device, against NumPy in float64.

    python -m benchmarks.correctness [--implementations=pallas_gpu,cudnn] [--out=FILE.json]

What the tests prove in interpreters, shown on the device itself: outputs and gradients on fresh
random inputs, with odd lengths, packed rows with padding, windows, grouped heads, later slots; and
decoding over a paged cache. An error is ‖out − reference‖ / ‖reference‖; above 1 % in bf16 the case
counts as wrong and the exit status is 1.
"""

from __future__ import annotations

import functools
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from qwen_jax.kernels.cache import init_paged_cache
from qwen_jax.kernels.paged import append, paged_attention

from qwen_jax.errors import UserError
from qwen_jax.kernels import attention

LIMIT = 1e-2

_IMPLEMENTATIONS = flags.DEFINE_list(
    "implementations", ["pallas_tpu", "pallas_gpu", "cudnn", "splash", "chunked"], "What to check."
)
_SEED = flags.DEFINE_integer("seed", None, "Of the inputs; by default a new one each time.")
_SMALL = flags.DEFINE_bool("small", False, "Short sequences, for a slow device.")
_OUT = flags.DEFINE_string("out", "", "Also write the JSON here.")

CASES = {
    "heads of 128": {},
    "heads of 64": {"head_dim": 64},
    "grouped 8/2": {"heads": 8, "kv_heads": 2},
    "odd length": {"length": 1027},
    "short": {"length": 5},
    "window 1": {"window": 1},
    "window 300, grouped": {"window": 300, "kv_heads": 1},
    "packed, padded": {"documents": 5},
    "packed, odd, window": {"documents": 7, "length": 1111, "window": 130},
    "later slot": {"start": 700, "length": 333},
}


def make(rng, *, length=1024, heads=4, kv_heads=4, head_dim=128, window=None, documents=0, start=0):
    """(q, k, v, d_out) as float32 with bf16 values, and the keyword arguments of `attention`."""
    if _SMALL.value:
        length, start = max(length // 8, 5), start // 8
        window = window and max(window // 8, 1)
    keys = length + start

    def draw(tokens, n):
        x = rng.normal(size=(2, tokens, n, head_dim))
        return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)

    arrays = draw(length, heads), draw(keys, kv_heads), draw(keys, kv_heads), draw(length, heads)
    options = {"window": window}
    if documents:  # ascending ids, padding at the end; one row of nothing but padding
        ids = np.sort(rng.integers(1, documents + 1, (2, keys)), axis=1)
        ids[0, keys - keys // 10 :] = 0
        ids[1] = ids[1] * (documents % 2)
        options |= {"q_segments": ids[:, start:], "k_segments": ids}
    if start:
        options["q_start"] = np.full(2, start)
    options = {k: v if k == "window" else jnp.asarray(v, jnp.int32) for k, v in options.items()}
    return arrays, options


def by_numpy(q, k, v, d_out, options):
    """(out, dq, dk, dv) in float64."""
    q, k, v, d_out = (x.astype(np.float64) for x in (q, k, v, d_out))
    groups = q.shape[2] // k.shape[2]
    wide_k, wide_v = (np.repeat(x, groups, axis=2) for x in (k, v))
    rows = np.arange(q.shape[1]) + int(np.max(options.get("q_start", 0)))
    distance = rows[:, None] - np.arange(k.shape[1])
    seen = np.broadcast_to(distance >= 0, (2, *distance.shape)).copy()
    if options["window"] is not None:
        seen &= distance < options["window"]
    if "q_segments" in options:
        a, b = (np.asarray(options[x]) for x in ("q_segments", "k_segments"))
        seen &= (a[:, :, None] == b[:, None]) & (b > 0)[:, None]
    scale = q.shape[-1] ** -0.5
    s = np.einsum("BTNH,BSNH->BNTS", q, wide_k) * scale
    s = np.where(seen[:, None], s, -np.inf)
    p = np.exp(s - np.where(seen.any(-1)[:, None], s.max(-1), 0.0)[..., None])
    p /= np.maximum(p.sum(-1, keepdims=True), 1e-300)
    out = np.einsum("BNTS,BSNH->BTNH", p, wide_v)
    dp = np.einsum("BTNH,BSNH->BNTS", d_out, wide_v)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale

    def shared(x):  # summed over the query heads that read a kv head
        return x.reshape(*x.shape[:2], k.shape[2], groups, -1).sum(3)

    dq = np.einsum("BNTS,BSNH->BTNH", ds, wide_k)
    dk = shared(np.einsum("BNTS,BTNH->BSNH", ds, q))
    return out, dq, dk, shared(np.einsum("BNTS,BTNH->BSNH", p, d_out))


def error(actual, expected) -> float:
    actual = np.asarray(actual.astype(jnp.float32), np.float64)
    if not np.all(np.isfinite(actual)):
        return float("inf")
    size = np.linalg.norm(expected)
    # With window 1 the gradients of q and k are 0: what is left is measured against the inputs'.
    floor = 1e-2 * np.sqrt(expected.size)
    return float(np.linalg.norm(actual - expected) / max(size, floor))


def check_attention(name: str, implementation: str, rng) -> dict:
    """Errors of output and gradients, or {"not_run": why}."""
    arrays, options = make(rng, **CASES[name])
    q, k, v, d_out = (jnp.asarray(x, jnp.bfloat16) for x in arrays)

    @jax.jit
    def run(q, k, v, d_out):
        f = functools.partial(attention, implementation=implementation, **options)
        out, transpose = jax.vjp(f, q, k, v)
        return out, *transpose(d_out)

    try:
        results = run(q, k, v, d_out)
    except UserError as reason:
        return {"not_run": str(reason)}
    expected = by_numpy(*arrays, options)
    names = ("out", "dq", "dk", "dv")
    return {n: error(a, e) for n, a, e in zip(names, results, expected, strict=True)}


def check_decode(dtype: str, rng) -> dict:
    """Error of decoding a ragged batch over pages in random order, by the implementation chosen."""
    kv_heads, groups, width, page = 2, 4, 128, 128
    lengths = np.array([0, 1, page - 1, page, page + 1, 5 * page + 17], np.int32)
    per_request = 6
    table = rng.permutation(len(lengths) * per_request).reshape(len(lengths), -1).astype(np.int32)
    cache = init_paged_cache(1, table.size, kv_heads, width, page_size=page, dtype=dtype)
    shape = (1, len(lengths), per_request * page, kv_heads, width)
    k, v = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for _ in range(2))
    zeros = jnp.zeros_like(jnp.asarray(lengths))
    cache = jax.jit(append)(cache, k, v, jnp.asarray(table), zeros, jnp.asarray(lengths))
    q = jnp.asarray(rng.normal(size=(len(lengths), 1, kv_heads * groups, width)), jnp.bfloat16)
    out, _ = jax.jit(paged_attention)(q, cache, jnp.asarray(table), jnp.asarray(lengths))
    exact = [np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k[0], v[0])]
    expected = np.zeros(out.shape)
    for r, length in enumerate(lengths):
        if length:
            q_r, k_r, v_r = exact[0][r, 0], exact[1][r, :length], exact[2][r, :length]
            s = np.einsum("KGH,SKH->KGS", q_r.reshape(kv_heads, groups, width), k_r) / width**0.5
            p = np.exp(s - s.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            expected[r, 0] = np.einsum("KGS,SKH->KGH", p, v_r).reshape(-1, width)
    return {"out": error(out, expected)}


def main(_):
    seed = time.time_ns() % 2**32 if _SEED.value is None else _SEED.value
    rng = np.random.default_rng(seed)
    results, wrong = {}, []
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, seed {seed}")
    print(f"{'case':<24}{'implementation':<16}{'out':>10}{'dq':>10}{'dk':>10}{'dv':>10}")

    def show(case, implementation, errors, limit=LIMIT):
        results[f"{case} / {implementation}"] = errors
        if "not_run" in errors:
            print(f"{case:<24}{implementation:<16}{errors['not_run']}")
            return
        bad = not all(e < limit for e in errors.values())
        wrong.extend([f"{case} / {implementation}"] * bad)
        cells = "".join(f"{e:>10.1e}" for e in errors.values())
        print(f"{case:<24}{implementation:<16}{cells}{'   WRONG' * bad}", flush=True)

    for implementation in _IMPLEMENTATIONS.value:
        for case in CASES:
            show(case, implementation, check_attention(case, implementation, rng))
    show("paged decode", "bf16", check_decode("bfloat16", rng))
    # 8 bits a number: half a step of 1/255 of the range, about 0.7 % of the values.
    show("paged decode", "8 bits", check_decode("uint8", rng), limit=3 * LIMIT)
    report = {
        "benchmark": "correctness",
        "date": time.strftime("%Y-%m-%d"),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "seed": seed,
        "errors": results,
        "wrong": wrong,
    }
    print(json.dumps(report))
    if _OUT.value:
        with open(_OUT.value, "w") as f:
            f.write(json.dumps(report, indent=2) + "\n")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    app.run(main)
