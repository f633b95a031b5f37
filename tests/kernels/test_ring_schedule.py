"""In the compiled program each exchange of a ring is under way while the step's kernels run."""

import importlib.util
import json
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="compiling for TPUs needs libtpu: pip install -r requirements/tpu.txt",
)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_exchanges_span_kernels(direction):
    command = [sys.executable, "-m", "tests.kernels.ring_program", direction]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    by_computation = json.loads(run.stdout.strip().splitlines()[-1])
    spans = [n for exchanges in by_computation.values() for n in exchanges]
    # Keys and values on their way out of the first step, and in the loop over the others.
    assert len(by_computation) >= 2 and len(spans) >= 4
    exposed = [n for n in spans if n == 0]
    # The backward pass ends with gradients going home after the last kernel: two of them.
    assert len(exposed) <= (0 if direction == "forward" else 2), by_computation
