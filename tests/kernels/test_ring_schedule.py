"""In the compiled program each exchange of a ring is under way while the step's kernels run."""

import pytest

from tests.tpu import compiled, needs_libtpu


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_exchanges_span_kernels(direction):
    by_computation = compiled("tests.kernels.ring_program", direction)
    spans = [n for exchanges in by_computation.values() for n in exchanges]
    # Keys and values on their way out of the first step, and in the loop over the others.
    assert len(by_computation) >= 2 and len(spans) >= 4
    exposed = [n for n in spans if n == 0]
    # The backward pass ends with gradients going home after the last kernel: two of them.
    assert len(exposed) <= (0 if direction == "forward" else 2), by_computation
