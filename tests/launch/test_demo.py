"""The demo ends in the same bits when it is killed at several moments and started again."""

import json
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from qwen_jax.train.metrics import read_metrics

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
# Compilation is most of the time: one layer, one head per device.
TINY = [
    "--config=configs/pretrain.py:toy",
    "--stdlib_bytes=250000",
    "--heldout=0.2",
    "--config.model.n_layers=1",
    "--config.train.steps=16",
    "--config.train.checkpoint_every=4",
]


def start(workdir, *more):
    command = [sys.executable, "-m", "launch.demo", f"--workdir={workdir}", *TINY, *more]
    with open(f"{workdir}.out", "ab") as out, open(f"{workdir}.err", "ab") as err:
        return subprocess.Popen(command, stdout=out, stderr=err, cwd=ROOT)


def run(workdir, *more):
    """Runs the demo; returns the exit status and what this call printed."""
    out, err = pathlib.Path(f"{workdir}.out"), pathlib.Path(f"{workdir}.err")
    before = [len(file.read_bytes()) if file.exists() else 0 for file in (out, err)]
    status = start(workdir, *more).wait(timeout=180)
    texts = [file.read_bytes()[n:].decode() for file, n in zip((out, err), before, strict=True)]
    return status, *texts


def kill_when(workdir, condition):
    """Starts the demo and kills it (SIGKILL) as soon as `condition()` holds."""
    process = start(workdir)
    deadline = time.monotonic() + 180
    while not condition():
        assert process.poll() is None, pathlib.Path(f"{workdir}.err").read_text()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def numbers(workdir):
    """Returns all computed results, without times and speeds."""
    found = {p.name: json.loads(p.read_text()) for p in (workdir / "results").glob("*.json")}
    found["metrics"] = [
        {k: v for k, v in row.items() if k in ("step", "loss", "lr", "grad_norm", "param_norm")}
        for row in read_metrics(workdir / "metrics.jsonl")
    ]
    return found


@pytest.mark.slow
def test_demo_killed_and_started_again_ends_in_the_same_bits(tmp_path):
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    status, printed, errors = run(uninterrupted)
    assert status == 0, errors
    table = printed[printed.index("bits per byte") :]
    for name in ("code", "prose", "Qwen", "gzip -9", "xz -9e, primed", "byte 8-gram"):
        assert name in table
    assert [f"{i}/7" in printed for i in range(1, 8)] == [True] * 7
    page = (uninterrupted / "report.html").read_text()
    for word in ("src=", "href="):
        assert page.count(word) == page.count(f'{word}"data:')

    rng = random.Random(time.time_ns())
    printed = pathlib.Path(f"{killed}.out")
    steps = killed / "metrics.jsonl"
    wait = rng.uniform(0, 0.3)
    kill_when(killed, lambda: "2/7" in printed.read_text() and not time.sleep(wait))
    kill_when(killed, lambda: (killed / "checkpoints" / "step_00000004").exists())
    row = rng.randrange(9, 16)
    kill_when(killed, lambda: steps.exists() and steps.read_bytes().count(b"\n") >= row)
    status, printed, errors = run(killed)
    assert status == 0, errors
    assert (
        printed[printed.index("bits per byte") :].replace(str(killed), str(uninterrupted)) == table
    )
    assert numbers(killed) == numbers(uninterrupted)
    assert (killed / "metrics.dropped.jsonl").exists(), "no step was ever done twice"

    # Finished stages are not repeated.
    results = {p: p.stat().st_mtime_ns for p in (killed / "results").iterdir()}
    status, again, errors = run(killed)
    assert status == 0 and "compiled" not in errors
    assert again[again.index("bits per byte") :] == printed[printed.index("bits per byte") :]
    assert results == {p: p.stat().st_mtime_ns for p in (killed / "results").iterdir()}
    # Another recipe in the same folder is refused and changes nothing.
    for change, what in (
        (
            "--config.data.seq_len=32 --config.model.trained_length=32",
            "contains other data",
        ),
        ("--config.model.vocab_size=528", "another recipe"),
        ("--config.optimizer.peak_lr=0.5", "peak_lr"),
    ):
        status, _, errors = run(killed, *change.split())
        last = errors.strip().splitlines()[-1]
        assert status == 2 and last.startswith("error:") and what in last
    assert numbers(killed) == numbers(uninterrupted)
