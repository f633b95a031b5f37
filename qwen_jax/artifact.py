"""Results on disk that are computed once: JSON files that also record what they depend on."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a UTF-8 file atomically, creating its folder if needed."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def once(path: str | os.PathLike, key: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
    """Returns the result stored by an earlier run with the same `key`, else computes and stores it.

    Args:
      path: the file; if it has another key or is damaged, it is replaced.
      key: everything the result depends on, in JSON types.
      compute: returns the result, in JSON types.

    Returns:
      The result as parsed from JSON (tuples become lists), whether it was computed or stored.
    """
    path = pathlib.Path(path)
    key = json.loads(json.dumps(key))
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["key"] == key:
            return stored["result"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # Absent, cut short by hand, or of another kind: computed again.
    text = json.dumps({"key": key, "result": compute()}, indent=1)
    write_text(path, text + "\n")
    return json.loads(text)["result"]
