"""Reads the JSON files of a model folder, with errors that name the file."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from qwen_jax.errors import UserError


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """Reads a file of a model folder that holds one JSON object.

    Raises:
      UserError: the file is missing, unreadable, not JSON, or not an object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{file} does not exist; give the folder of a downloaded Hugging Face model"
        ) from None
    except (OSError, ValueError) as e:
        raise UserError(f"{file} is not readable JSON ({e}); download it again") from e
    if not isinstance(value, dict):
        raise UserError(f"{file} is not a JSON object; download it again")
    return value
