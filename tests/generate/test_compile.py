"""The engine's programs compiled for TPUs on this host: the cache stays where it is."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

MIB = 2**20


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, isn't installed"
)
@pytest.mark.parametrize("chip", ["v5e:2x2", "v6e:2x2"])
def test_programs_copy_neither_cache_nor_weights(chip):
    """8 layers of 7B: 2.4 GB of cache, 4.5 GB of weights."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.generate.compile_engine", chip],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = {result["what"]: result for result in json.loads(done.stdout.splitlines()[-1])}
    assert len(results) == 4
    for what, result in results.items():
        assert result["alias"] >= result["cache"], result
        if what.startswith("prefill"):  # activations and one layer's past, not the cache
            assert result["temp"] < 200 * MIB < result["cache"] / 10, result
        else:
            assert result["temp"] < 64 * MIB, result
