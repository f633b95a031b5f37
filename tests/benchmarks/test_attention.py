"""The attention benchmark runs end to end on a CPU and does not time wrong implementations."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import attention as benchmark
from qwen_jax.kernels.mask import visible


def test_every_implementation_is_timed_or_has_a_reason(tmp_path, capsys):
    path = tmp_path / "rows.json"
    assert benchmark.main(["--tiny", "--repeats", "1", "--out", str(path)]) == 0
    report = json.loads(path.read_text())
    assert {"date", "device", "jax"} <= set(report)
    rows = report["rows"]
    assert len(rows) == len(benchmark.TINY) * len(benchmark.implementations())
    status = {row["implementation"]: row["status"] for row in rows}
    assert status["reference"] == status["chunked"] == "ok"
    for row in rows:
        if row["status"] == "ok":
            assert row["forward_ms"] > 0 and row["backward_tflops"] > 0 and row["error"] < 0.02
        else:
            assert row["status"] == "not run" and row["reason"]
    text = capsys.readouterr().out
    assert "pallas_gpu" in text and "Hopper" in text
    assert json.loads(text.splitlines()[-1]) == report


def test_a_wrong_implementation_is_not_timed(monkeypatch):
    def without_mask(q, k, v, **_):
        k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
        scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) * q.shape[-1] ** -0.5
        scores = jnp.exp(scores - scores.max(-1, keepdims=True))
        return jnp.einsum("BNTS,BSNH->BTNH", scores / scores.sum(-1, keepdims=True), v)

    monkeypatch.setattr(benchmark, "attention", without_mask)
    row = benchmark.measure("chunked", benchmark.TINY[0], repeats=1)
    assert row["status"] == "wrong" and row["error"] > 0.1 and "forward_ms" not in row
    assert benchmark.main(["--tiny", "--repeats", "1", "--only", "chunked"]) == 1


@pytest.mark.parametrize("mask", ["causal", "packed", "window"])
def test_flops_count_visible_pairs(mask):
    case = benchmark.AttentionCase(96, 2, 1, 64, mask, batch=3)
    ids = case.segments()
    slots = jnp.arange(96)[None]
    seen = np.asarray(visible(slots, slots, ids, ids, case.window))
    assert case.visible_pairs() == np.broadcast_to(seen, (3, 96, 96)).sum()
