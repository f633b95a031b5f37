"""Reports of benchmarks: JSON that is saved while rows arrive and printed as the last line.

A benchmark that a time limit stops keeps the rows it had saved.
"""

from __future__ import annotations

import datetime
import json
import platform
from typing import Any

import jax

from qwen_jax.artifact import write_text
from qwen_jax.parallel import platform as device_platform


def save(report: dict[str, Any], path: str) -> None:
    """Writes the report as JSON to `path`, atomically; does nothing if `path` is empty."""
    if path:
        write_text(path, json.dumps(report, indent=2) + "\n")


def emit(report: dict[str, Any], path: str) -> None:
    """Prints the report as one line of JSON and saves it to `path` unless that is empty."""
    print(json.dumps(report), flush=True)
    save(report, path)


def environment() -> dict[str, str]:
    """Returns today's date, and the device and versions of this process, as JSON values."""
    device = jax.devices()[0]
    return {
        "date": datetime.date.today().isoformat(),
        "device": device.device_kind,
        "platform": device_platform()[0],
        "python": platform.python_version(),
        "jax": jax.__version__,
        "backend": device.client.platform_version.split("\n")[0],
    }


def error_summary(error: Exception) -> str:
    """Returns the type and message of an exception in one line of at most 300 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]
