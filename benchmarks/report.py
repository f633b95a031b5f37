"""How a benchmark reports: JSON written as rows come in and printed at the end.

A part that is cut off by a time limit thus keeps the rows it had.
"""

from __future__ import annotations

import datetime
import json
import platform

import jax

from qwen_jax.artifact import write_text
from qwen_jax.parallel import platform as device_platform


def save(report: dict, path: str) -> None:
    """Writes the report so far to `path`, "" for nowhere; whole or not at all."""
    if path:
        write_text(path, json.dumps(report, indent=2) + "\n")


def emit(report: dict, path: str) -> None:
    """Prints the report and writes it to `path`, "" for nowhere."""
    print(json.dumps(report, indent=2))
    save(report, path)


def environment() -> dict:
    """Date, device and versions of this process."""
    device = jax.devices()[0]
    return {
        "date": datetime.date.today().isoformat(),
        "device": device.device_kind,
        "platform": device_platform()[0],
        "python": platform.python_version(),
        "jax": jax.__version__,
        "backend": device.client.platform_version.split("\n")[0],
    }


def reason(problem: Exception) -> str:
    """What an exception says, in one line of at most 300 characters."""
    text = " ".join(str(problem).split())
    return f"{type(problem).__name__}: {text}"[:300]
