"""Compiling for TPUs that are not there, in a process of its own: libtpu reads settings once."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from qwen_jax.aot.topology import ENVIRONMENT

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="compiles for TPUs: libtpu is not installed (pip install -r requirements/dev.txt)",
)

_ENVIRONMENT = ENVIRONMENT | {"JAX_PLATFORMS": "cpu"}


def compiled(module: str, *arguments: str) -> Any:
    """Runs `python -m module arguments`; its last line is what it found, as JSON."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=os.environ | _ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])
