"""Every kernel that runs on this device, against NumPy in float64.

    python -m benchmarks.correctness [--implementations=pallas_gpu,cudnn] [--out=FILE.json]

What the tests prove in interpreters, shown on the device itself: outputs and gradients on fresh
random inputs, with odd lengths, packed rows with padding, windows, grouped heads, later slots;
decoding over a paged cache; products by weights quantised in groups. An error is
‖out − reference‖ / ‖reference‖; above 1 % in bf16 the case counts as wrong. The exit status is 1 if
anything of ours is wrong or fails; what the libraries' kernels do is only shown.
"""

from __future__ import annotations

import functools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.report import emit, environment, reason, save
from qwen_jax.errors import UserError
from qwen_jax.kernels import attention
from qwen_jax.kernels.cache import init_paged_cache
from qwen_jax.kernels.paged import append, paged_attention
from qwen_jax.kernels.quantised import GroupWeight, group_matmul, pack
from qwen_jax.parallel import platform as device_platform

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
):
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


def check_attention(arrays, options, expected, implementation: str) -> dict:
    """Errors of output and gradients."""
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


def check_product(rng, rows: int, bits: int) -> dict:
    """Error of x · w for a weight quantised in groups of 128, by the implementation chosen."""
    inputs, outputs, group = (512, 256, 128) if _SMALL.value else (4096, 1024, 128)
    codes = rng.integers(0, 2**bits, (inputs, outputs))
    scales = rng.uniform(0.1, 2, (inputs // group, 1, outputs)).astype(np.float32)
    x = jnp.asarray(rng.standard_normal((rows, inputs)) + 1, jnp.bfloat16)
    weight = GroupWeight(pack(jnp.asarray(codes), bits), jnp.asarray(scales), None, bits=bits)
    grouped = codes.reshape(-1, group, outputs) - 2.0 ** (bits - 1)
    dense = (grouped * scales.astype(np.float64)).reshape(inputs, outputs)
    expected = np.asarray(x.astype(jnp.float32), np.float64) @ dense
    return {"out": error(jax.jit(group_matmul)(x, weight), expected)}


class Table:
    """The results as they come in: printed, and written with each row."""

    def __init__(self, seed: int):
        self.wrong: list[str] = []
        self.report = {"benchmark": "correctness", **environment(), "seed": seed}
        self.report |= {"errors": {}, "wrong": self.wrong, "complete": False}
        print(f"{self.report['device']}, jax {jax.__version__}, seed {seed}")
        print(f"{'case':<26}{'implementation':<26}{'out':>10}{'dq':>10}{'dk':>10}{'dv':>10}")

    def add(self, case: str, implementation: str, check, limit: float = LIMIT) -> None:
        """Runs check() -> {array: error} and adds its row; a failure is a row too."""
        head, name = f"{case:<26}{implementation:<26}", f"{case} / {implementation}"
        try:
            row = check()
        except UserError as problem:
            row = {"not_run": str(problem)}
        except Exception as problem:
            row = {"failed": reason(problem)}
        self.report["errors"][name] = row
        # Not a number compares as wrong.
        bad = "failed" in row or not all(e < limit for e in row.values() if isinstance(e, float))
        if bad and implementation not in LIBRARIES:
            self.wrong.append(name)
        said = [f"{e:>10.1e}" if isinstance(e, float) else f"{k}: {e}" for k, e in row.items()]
        print(f"{head}{''.join(said)}{'   WRONG' * bad}", flush=True)
        save(self.report, _OUT.value)


def main(_):
    seed = time.time_ns() % 2**32 if _SEED.value is None else _SEED.value
    rng, table = np.random.default_rng(seed), Table(seed)
    for case, sizes in CASES.items():
        arrays, options = make(rng, **sizes)
        expected = by_numpy(*arrays, options)
        for name in _IMPLEMENTATIONS.value or HERE[device_platform()[0]]:
            table.add(
                case, name, functools.partial(check_attention, arrays, options, expected, name)
            )
    for name, sizes in DECODE_CASES.items():
        # The release cuts codes off to whole numbers: an error is up to 1/255 of a vector's range.
        limit = 5 * LIMIT if "dtype" in sizes else LIMIT
        table.add("paged decode", name, functools.partial(check_decode, rng, **sizes), limit)
    for name, sizes in PRODUCT_CASES.items():
        table.add("quantised product", name, functools.partial(check_product, rng, *sizes))
    table.report["complete"] = True
    emit(table.report, _OUT.value)
    sys.exit(1 if table.wrong else 0)


if __name__ == "__main__":
    app.run(main)
