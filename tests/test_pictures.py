"""The diagrams of the README are what the script beside them draws."""

import pathlib
import runpy

import pytest

PICTURES = pathlib.Path(__file__).parent.parent / "docs" / "pictures"


@pytest.mark.parametrize("name", ["overview", "layers"])
def test_committed_picture_equals_what_the_script_draws(name):
    drawn = runpy.run_path(str(PICTURES / "draw.py"))[name]()
    assert (PICTURES / f"{name}.svg").read_text("utf-8") == drawn
