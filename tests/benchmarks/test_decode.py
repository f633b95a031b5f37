"""The decode benchmark runs end to end on a CPU and does not time wrong implementations."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from benchmarks import decode, decode_peers


@pytest.mark.slow
def test_benchmark_runs_end_to_end_on_a_cpu(tmp_path):
    sizes = ["--batches=2", "--contexts=130", "--heads=4,2,64"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.decode", *sizes, f"--out={tmp_path / 'out.json'}"],
        env={"JAX_PLATFORMS": "cpu", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "out.json").read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == report
    assert report["device"] == "cpu" and report["jax"] == jax.__version__
    rows = report["results"]
    assert [(x["cache"], x["batch"]) for x in rows] == [("bfloat16", 2), ("uint8", 2)]
    for row in rows:
        size = row["batch"] * 130 * 2 * (128 * 2 if row["cache"] == "bfloat16" else 128 + 16)
        speed = size / row["microseconds"] * 1e6
        assert abs(row["GB/s"] * 1e9 / speed - 1) < 1e-6
        assert abs(row["share"] * report["copy_bytes_per_second"] / speed - 1) < 1e-6
        shown = f"{row['microseconds']:.1f}"
        assert any(shown in line and "reference" in line for line in done.stdout.splitlines())


def test_wrong_or_refusing_implementations_are_not_timed(monkeypatch):
    heads = (4, 2, 64)

    def scaled(cache):
        inputs, step = decode.build_ours("reference", cache)
        return inputs, lambda *operands: 1.1 * step(*operands)

    def refuses(cache):
        raise NotImplementedError("no such heads\nat all")

    assert decode.find_problem(lambda c: decode.build_ours("reference", c), heads, "uint8") is None
    assert decode.find_problem(scaled, heads, "bfloat16").startswith("wrong: off by")
    found = decode.find_problem(refuses, heads, "bfloat16")
    assert found == "refused: NotImplementedError: no such heads at all"
    monkeypatch.setattr(decode, "implementations", lambda *_: {"library": refuses})
    job = {"implementation": "library", "batch": 1, "context": 130, "cache": "bfloat16"}
    assert decode.measure_row(**job, heads=heads, bandwidth=1e10) == job | {"problem": found}


def test_ragged_peer_computes_the_same_attention(monkeypatch):
    """The library's plain form of ragged paged attention, called through our adapter."""
    import jax.experimental.pallas.ops.tpu.ragged_paged_attention as library
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel

    def plain(q, pages, lengths, table, starts, rows, *, sm_scale, **_):
        return kernel.ref_ragged_paged_attention(
            q, pages, lengths, table, starts, rows, sm_scale=sm_scale
        )

    monkeypatch.setattr(library, "ragged_paged_attention", plain)
    prepare, call = decode_peers.tpu_ragged()
    cache = decode.make_cache(1, 8, (4, 2, 64), "float32", 0)
    table, lengths = jnp.arange(8).reshape(2, 4), jnp.array([130, 500])
    q = jax.random.normal(jax.random.key(1), (2, 4, 64))
    operands = prepare(cache.pages[0])
    with jax.disable_jit():  # the plain form loops over requests in Python
        got = call(q, operands, table, lengths)
    inputs, step = decode.build_ours("reference", cache)
    expected = jax.jit(step)(q, inputs, table, lengths, 0)
    assert jnp.abs(got - expected).max() < 1e-4
