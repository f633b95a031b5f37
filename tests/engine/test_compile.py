"""The engine's programs, compiled for TPUs on this host, update the cache in place."""

import pytest

from tests.tpu import compiled, needs_libtpu

MIB = 2**20


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("chip", ["v5e:2x2", "v6e:2x2"])
def test_programs_copy_neither_cache_nor_weights(chip):
    """8 layers of 7B: 2.4 GB of cache, 4.5 GB of weights."""
    results = {result["what"]: result for result in compiled("tests.engine.compile_engine", chip)}
    assert len(results) == 4
    for what, result in results.items():
        assert result["alias"] >= result["cache"], result
        if what.startswith("prefill"):  # activations and one layer's past, not the cache
            assert result["temp"] < 200 * MIB < result["cache"] / 10, result
        else:
            assert result["temp"] < 64 * MIB, result
