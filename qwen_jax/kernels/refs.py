"""References that Pallas passes to kernel bodies: their type, and passing them by keyword."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

Ref: TypeAlias = Any
"""Reference to memory, semaphores or barriers in a kernel; jax's own type is private."""


def bind_by_name(body: Callable[..., None], names: Sequence[str]) -> Callable[..., None]:
    """Returns a kernel body that takes references by position and calls `body` with keywords.

    Args:
      body: kernel body with one keyword parameter for each name.
      names: parameter names in the order in which Pallas passes scalars, inputs, outputs and
        scratch.
    """

    def positional(*refs: Ref) -> None:
        body(**dict(zip(names, refs, strict=True)))

    return positional
