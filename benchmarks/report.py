"""How a benchmark ends: its report as JSON, printed and, where wanted, written."""

from __future__ import annotations

import json

from qwen_jax.artifact import write_text


def emit(report: dict, path: str) -> None:
    """Prints the report and writes it to `path`, "" for nowhere."""
    text = json.dumps(report, indent=2)
    print(text)
    if path:
        write_text(path, text + "\n")
