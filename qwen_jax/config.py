"""The one border between `ml_collections` configs and the library's frozen dataclasses.

Recipes in `configs/` build a `ConfigDict`; programs in `launch/` turn it, once, into dataclasses
with `from_config_dict`. The library itself never sees a `ConfigDict`.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union

import ml_collections

from qwen_jax.errors import UserError, nearest

T = TypeVar("T")


def to_config_dict(value: Any) -> Any:
    """A dataclass as a `ConfigDict` of the same fields (dataclasses inside it too)."""
    if not dataclasses.is_dataclass(value):
        return value
    fields = {f.name: to_config_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return ml_collections.ConfigDict(fields)


def from_config_dict(cls: type[T], config: Mapping[str, Any], path: str = "config") -> T:
    """Builds the frozen dataclass `cls` from a mapping with the same field names.

    Raises:
      UserError: an unknown key (names the nearest), a missing one, or a value of another type; the
        message gives the whole path, as on the command line.
    """
    if not isinstance(config, Mapping | ml_collections.ConfigDict):
        raise UserError(f"{path} is {config!r}; it must be a group of keys ({cls.__name__})")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in config:
        if key not in fields:
            raise UserError(
                f"{path}.{key} is not a setting{nearest(key, fields)}; "
                f"{path} has {', '.join(fields)}"
            )
    hints = typing.get_type_hints(cls)
    values = {}
    for name, field in fields.items():
        if name in config:
            values[name] = _convert(hints[name], config[name], f"{path}.{name}")
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise UserError(f"{path}.{name} is missing; give it a value")
    return cls(**values)


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, path)
    if origin is Literal:
        if value not in args:
            close = nearest(str(value), map(str, args))
            raise UserError(
                f"{path} is {value!r}{close}; choose one of {', '.join(map(str, args))}"
            )
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{path} is {value!r}; it must be a list such as (1, 2)")
        return tuple(_convert(args[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return from_config_dict(hint, value, path)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{path} is {value!r} ({type(value).__name__}); it must be {hint.__name__}")
    if hint is float and math.isnan(value):
        raise UserError(f"{path} is not a number (nan); give it one")
    return value
