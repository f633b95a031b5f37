"""Rows that hang or crash are lost alone; the suite's bars are read from what was written."""

import json
import os
import pathlib
import subprocess

import jax
import pytest

from benchmarks import targets
from benchmarks.report import save
from benchmarks.runner import Runner

MODULE = "tests.benchmarks.flaky_rows"


def test_in_this_process():
    runner = Runner(MODULE)
    assert runner.row(implementation="a", does="answer") == {"answer": "a", "process": os.getpid()}
    assert runner.environment()["jax"] == jax.__version__


@pytest.mark.slow
def test_a_row_that_hangs_or_crashes_is_lost_alone():
    runner = Runner(MODULE, seconds=20)
    assert runner.environment()["jax"] == jax.__version__

    def answers(name):
        found = runner.row(implementation=name, does="answer")
        assert found["answer"] == name
        return found["process"]

    first = answers("good")
    assert first != os.getpid()
    failed = runner.row(implementation="bad", does="fail")
    assert failed == {"failed": "ValueError: bad can't do this"}
    assert answers("good") == first
    ended = runner.row(implementation="bad", does="end")
    assert ended == {"failed": "its process ended with status 7"}
    second = answers("good")
    assert second != first
    runner._seconds = 1
    assert runner.row(implementation="bad", does="hang") == {"failed": "no answer in 1 s"}
    # Two rows of it were lost: its others are not tried, those of the rest are.
    assert "not tried" in runner.row(implementation="bad", does="answer")["failed"]
    runner._seconds = 20
    assert answers("good") != second
    runner.close()


def test_a_process_that_cannot_start_is_an_error():
    with pytest.raises(RuntimeError, match="ended before its first row"):
        Runner("benchmarks.no_such_module", seconds=60).environment()


def attention_row(name, speed, **sizes):
    row = {"length": 4096, "heads": 8, "kv_heads": 8, "width": 128, "mask": "causal", "batch": 1}
    row |= {"dtype": "bfloat16", "implementation": name, "status": "ok"} | sizes
    return row | {"forward_tflops": speed, "backward_tflops": speed / 2}


def test_bars_take_the_worst_case_that_counts():
    pairs = [
        (600, 500, {}),
        (550, 500, {"length": 8192}),
        # Neither short rows nor other widths and masks count.
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
    found = targets.bars(
        {"attention": {"rows": rows}, "decode": {"results": decode}, "train": train}
    )
    assert [(x.found, x.cases, x.verdict) for x in found] == [
        (1.1, 2, "met"),
        (1.1, 2, "met"),
        (0.7, 2, "MISSED"),
        (None, 0, "not measured"),
        (0.51, 1, "met"),
        (1.1, 1, "MISSED"),
    ]
    assert all(x.verdict == "not measured" for x in targets.bars({}))


def test_the_table_says_what_was_cut_off(tmp_path, capsys):
    save(
        {"rows": [attention_row("pallas_gpu", 1.0)], "complete": False}, tmp_path / "attention.json"
    )
    assert targets.main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "attention: cut off before its end" in text and "correctness: not measured" in text
    save({"wrong": ["cudnn, short"], "complete": True}, tmp_path / "correctness.json")
    assert targets.main([str(tmp_path)]) == 1
    assert "correctness: cudnn, short" in capsys.readouterr().out


def test_the_suite_goes_on_after_a_part_that_fails(tmp_path):
    """With a stand-in for python: parts are called in turn, one fails, the bars come last."""
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
    assert names == ["correctness", "attention", "decode", "train_gpu", "bars"]
    assert (out / "suite.log").read_text() == done.stdout
    limits = [line for line in calls.read_text().splitlines() if "train_gpu" in line]
    assert 400 < float(limits[0].split("--seconds=")[1].split()[0]) <= 515
    flags = json.dumps(calls.read_text())
    assert all(f"--out={out}/{x}.json" in flags for x in ("correctness", "attention", "train"))
