"""Conversion between `ml_collections` configs and the frozen dataclasses of the library.

Recipes in `configs/` build a `ConfigDict`; programs in `launch/` convert it once, with
`from_config_dict`. Only dataclasses are used below that.
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

if typing.TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


def to_config_dict(value: Any) -> Any:
    """Returns a dataclass, with the dataclasses inside it, as a `ConfigDict` of the same fields."""
    if not dataclasses.is_dataclass(value):
        return value
    fields = {f.name: to_config_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return ml_collections.ConfigDict(fields)


def from_config_dict(cls: type[T], config: Mapping[str, Any], path: str = "config") -> T:
    """Builds the frozen dataclass `cls` from a mapping with the same field names.

    Args:
      cls: the dataclass.
      config: field name -> value; nested mappings for fields that are dataclasses.
      path: dotted path of `config`, for error messages.

    Raises:
      UserError: a key is unknown (the message suggests the nearest) or missing, or a value has the
        wrong type; the message has the complete path, as on the command line.
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
    """Returns a config value as the type of a field, converting lists, groups and int to float.

    Args:
      hint: type of the field.
      value: the value in the config.
      path: its dotted path, for error messages.

    Raises:
      UserError: the value does not have this type.
    """
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
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_config_dict(hint, value, path)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{path} is {value!r} ({type(value).__name__}); it must be {hint.__name__}")
    if hint is float and math.isnan(value):
        raise UserError(f"{path} is not a number (nan); give it one")
    return value
