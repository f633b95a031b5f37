"""The training benchmark runs both sides end to end; here on a CPU with a toy network."""

import json
import math
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_both_sides_train_the_same_network(tmp_path):
    out = tmp_path / "report.json"
    command = [sys.executable, "-m", "benchmarks.train_gpu", "--networks=toy", "--length=32"]
    command += ["--steps=2", "--notorch_compile", f"--out={out}"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "toy" in text and "torch" in text
    (result,) = json.loads(out.read_text())["results"]
    ours, peer = result["ours"], result["torch"]
    # v1 has no bias on the attention output and neither has Qwen2: as many parameters on each side.
    assert ours["parameters"] == peer["parameters"]
    for side in (ours, peer):
        assert abs(side["loss"] - math.log(512)) < 0.5  # both start from scratch
        assert side["tokens_per_second"] > 0 and side["mfu"] > 0
    assert result["speed_ratio"] > 0


def test_an_unknown_network_is_refused():
    command = [sys.executable, "-m", "benchmarks.train_gpu", "--networks=gpt"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode and "'gpt' is none of qwen-1.8b" in run.stdout + run.stderr
