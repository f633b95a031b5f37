"""50 steps of the toy recipe give the losses that are kept in `tests/golden/*.jsonl`."""

import pytest

from tests.golden import renew


@pytest.mark.slow
@pytest.mark.parametrize("devices", renew.MESHES)
def test_toy_recipe_reproduces_the_golden_losses(devices):
    header, expected = renew.read(devices)
    found_header, rows = renew.run(devices)
    del header["jax"], found_header["jax"]  # another version rounds differently, within tolerance
    assert found_header == header, "the recipe or its data changed: see tests/golden/renew.py"
    found = renew.deviations(rows, expected)
    wrong = {k: (v, renew.TOLERANCES[k]) for k, v in found.items() if v > renew.TOLERANCES[k]}
    assert not wrong, f"metric: (largest relative difference, tolerance) = {wrong}"
