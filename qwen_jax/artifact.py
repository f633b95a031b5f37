"""Results that are computed once: a JSON file that also says what it was computed from."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a UTF-8 file, whole or not at all; makes its folder."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def once(path: str | os.PathLike, key: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
    """Returns `compute()`, or what it returned in an earlier run with the same `key`.

    Args:
      path: the file; one of another key, or one that is damaged, is replaced.
      key: everything the result depends on, in JSON types.
      compute: gives a result in JSON types; tuples come back as lists.

    Returns:
      the result as JSON gives it back, whether it was computed now or before.
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
