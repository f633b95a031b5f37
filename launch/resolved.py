"""The resolved flags and recipe of a program as text, for --print_config.

The text is an absl flag file: one `--name=value` line per flag and per key of the recipe, sorted.
Two of them can be compared with `diff`, and `--flagfile=FILE` runs the same program again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from absl import flags

from qwen_jax.config import from_config_dict, to_config_dict

_FLAGS_OF_A_RUN = ("print_config", "flagfile")
"""Flags that say how a program was started and do not belong to its configuration."""


def resolved_flags(recipe: type | None = None) -> str:
    """Returns all flags of the running program with their values, one per line.

    Unset flags are comments, and so are keys of the recipe whose value is None, which a command
    line cannot express. Flags that hold secrets (`*_key`) are named without their values.

    Args:
      recipe: dataclass that `--config` describes; its derived values are filled in. None for a
        program without recipes.

    Raises:
      UserError: the recipe has an unknown key, a missing one, or an invalid value.
    """
    lines = []
    for name in sorted(_own_flags()):
        flag = flags.FLAGS[name]
        if name == "config" and recipe is not None:
            lines += _recipe_lines(flag, recipe)
        elif name.endswith("_key"):
            lines.append(f"# --{name} is {'set' if flag.value else 'not set'}")
        elif flag.value is None or flag.value == []:
            lines.append(f"# --{name} is not set")
        else:
            lines += flag.serialize().split("\n")
    return "\n".join(lines) + "\n"


def _own_flags() -> Iterator[str]:
    """Yields the names of the flags that the modules of `launch` define."""
    for module, defined in flags.FLAGS.flags_by_module_dict().items():
        if module == sys.argv[0] or module.split(".")[0] == "launch":
            yield from (f.name for f in defined if f.name not in _FLAGS_OF_A_RUN)


def _recipe_lines(flag: Any, recipe: type) -> list[str]:
    """Returns the line of the recipe's file and one line per key, with derived values."""
    if flag.value is None:
        return ["# --config is not set"]
    resolved = to_config_dict(from_config_dict(recipe, flag.value))
    lines = [f"--config={flag.config_filename}"]
    for name, value in sorted(_flatten("config", resolved)):
        if value is None:
            lines.append(f"# --{name} is None")
        else:
            lines.append(f"--{name}={value}")
    return lines


def _flatten(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yields (dotted path, value) of every leaf of nested mappings."""
    if not isinstance(value, Mapping) and not hasattr(value, "keys"):
        yield path, value
        return
    for key in value:
        yield from _flatten(f"{path}.{key}", value[key])
