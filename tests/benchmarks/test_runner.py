"""Rows that hang or crash cost one row only; targets are read from the suite's reports."""

import json
import os
import pathlib
import subprocess

import jax
import pytest

from benchmarks import targets
from benchmarks.report import save
from benchmarks.runner import RowRunner

MODULE = "tests.benchmarks.flaky_rows"


def test_rows_run_in_this_process_without_a_time_limit():
    runner = RowRunner(MODULE)
    row = runner.measure_row(implementation="a", does="answer")
    assert row == {"answer": "a", "process": os.getpid()}
    assert runner.environment()["jax"] == jax.__version__


@pytest.mark.slow
def test_a_row_that_hangs_or_crashes_costs_one_row_only():
    runner = RowRunner(MODULE, seconds=20)
    assert runner.environment()["jax"] == jax.__version__

    def process_of_row(name):
        found = runner.measure_row(implementation=name, does="answer")
        assert found["answer"] == name
        return found["process"]

    first = process_of_row("good")
    assert first != os.getpid()
    failed = runner.measure_row(implementation="bad", does="fail")
    assert failed == {"failed": "ValueError: bad can't do this"}
    assert process_of_row("good") == first
    ended = runner.measure_row(implementation="bad", does="end")
    assert ended == {"failed": "its process ended with status 7"}
    second = process_of_row("good")
    assert second != first
    runner._seconds = 1
    assert runner.measure_row(implementation="bad", does="hang") == {"failed": "no answer in 1 s"}
    # After two lost rows of an implementation its other rows are skipped.
    assert "not tried" in runner.measure_row(implementation="bad", does="answer")["failed"]
    runner._seconds = 20
    assert process_of_row("good") != second
    runner.close()


def test_a_process_that_cannot_start_is_an_error():
    with pytest.raises(RuntimeError, match="ended before its first row"):
        RowRunner("benchmarks.no_such_module", seconds=60).environment()


def attention_row(name, speed, **sizes):
    """Returns a row of attention.json with this forward speed, and half of it backward."""
    row = {"length": 4096, "heads": 8, "kv_heads": 8, "width": 128, "mask": "causal", "batch": 1}
    row |= {"dtype": "bfloat16", "implementation": name, "status": "ok"} | sizes
    return row | {"forward_tflops": speed, "backward_tflops": speed / 2}


def test_targets_take_the_worst_case_that_counts():
    pairs = [
        (600, 500, {}),
        (550, 500, {"length": 8192}),
        # Short rows, other head dimensions and other masks do not count.
        (1, 9, {"length": 2048}),
        (1, 9, {"width": 64}),
        (1, 9, {"mask": "window"}),
    ]
    rows = [
        attention_row(name, speed, **sizes)
        for ours, peer, sizes in pairs
        for name, speed in (("pallas_gpu", ours), ("cudnn", peer))
    ]
    # A case without its peer does not count either.
    rows += [attention_row("pallas_gpu", 1, heads=16), {"status": "failed"}]
    shares = [(8, 8192, "bfloat16", 0.9), (64, 8192, "bfloat16", 0.7), (1, 32768, "uint8", 0.1)]
    decode = [
        {"implementation": "qwen_jax", "batch": b, "context": c, "cache": dtype, "share": share}
        for b, c, dtype, share in shares
    ]
    decode.append({"implementation": "qwen_jax", "batch": 8, "context": 8192, "cache": "uint8"})
    ours = {"mfu": 0.51}
    train = {"sequence": 2048, "results": [{"network": "qwen-1.8b", "ours": ours, "torch": {}}]}
    train["results"][0]["speed_ratio"] = 1.1
    found = targets.targets(
        {"attention": {"rows": rows}, "decode": {"results": decode}, "train": train}
    )
    assert [(x.measured, x.cases, x.verdict) for x in found] == [
        (1.1, 2, "met"),
        (1.1, 2, "met"),
        (0.7, 2, "MISSED"),
        (None, 0, "not measured"),
        (0.51, 1, "met"),
        (1.1, 1, "MISSED"),
    ]
    assert all(x.verdict == "not measured" for x in targets.targets({}))


def test_the_table_names_incomplete_reports(tmp_path, capsys):
    save(
        {"rows": [attention_row("pallas_gpu", 1.0)], "complete": False}, tmp_path / "attention.json"
    )
    assert targets.main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "attention: incomplete, stopped before its end" in text
    assert "correctness: not measured" in text
    save({"wrong": ["cudnn, short"], "complete": True}, tmp_path / "correctness.json")
    assert targets.main([str(tmp_path)]) == 1
    assert "correctness: cudnn, short" in capsys.readouterr().out


def test_the_suite_continues_after_a_part_that_fails(tmp_path):
    """With a fake python: parts are called in turn, one fails, the targets come last."""
    calls = tmp_path / "calls"
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\necho "$@" >> {calls}\necho "$2 ran"\n[ "$2" != benchmarks.decode ]\n'
    )
    python.chmod(0o755)
    (tmp_path / "nvidia-smi").symlink_to("/bin/true")
    script = pathlib.Path(targets.__file__).parent / "gpu_suite.sh"
    environment = os.environ | {"PYTHON": str(python), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    out = tmp_path / "out"
    done = subprocess.run(
        ["bash", script, out], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "failed: decode" in done.stdout, done.stdout + done.stderr
    names = [line.split()[1].removeprefix("benchmarks.") for line in calls.read_text().splitlines()]
    assert names == ["correctness", "attention", "decode", "train_gpu", "targets"]
    assert (out / "suite.log").read_text() == done.stdout
    limits = [line for line in calls.read_text().splitlines() if "train_gpu" in line]
    assert 400 < float(limits[0].split("--seconds=")[1].split()[0]) <= 515
    flags = json.dumps(calls.read_text())
    assert all(f"--out={out}/{x}.json" in flags for x in ("correctness", "attention", "train"))
