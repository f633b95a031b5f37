"""Selects a kernel or the plain jnp form for operations with one kernel per platform, and logs it.

Used for paged attention and quantised matmuls. Attention over whole sequences has more
implementations and a selection of its own, in `dispatch`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from types import ModuleType

from absl import logging

from qwen_jax.errors import UserError, nearest

KERNELS = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}
"""Name of the kernel implementation of each platform; other platforms use `reference`."""

IMPLEMENTATIONS = ("auto", "reference", *KERNELS.values())
"""Names accepted as an `implementation` argument."""


@functools.cache
def log_choice(operation: str, requested: str, chosen: str, why: str) -> None:
    """Logs which implementation an operation uses and why; repeated calls log nothing.

    Args:
      operation: name of the operation, such as "paged attention".
      requested: the implementation that was requested, possibly "auto".
      chosen: the implementation that is used.
      why: the reason, one clause.
    """
    logging.info("%s: %s (requested %s; %s)", operation, chosen, requested, why)


def choose_implementation(
    operation: str,
    requested: str,
    platform: str,
    modules: Mapping[str, str],
    unsupported_reason: Callable[[ModuleType], str | None],
) -> str:
    """Returns the implementation to run: resolves "auto" and logs each choice once.

    With "auto", a request that the platform's kernel does not support falls back to "reference".

    Args:
      operation: name of the operation in logs and errors.
      requested: one of `IMPLEMENTATIONS`.
      platform: "cpu", "gpu" or "tpu".
      modules: module path of each kernel implementation; imported only if it may be used.
      unsupported_reason: returns for a kernel's module one clause saying why the kernel cannot
        serve the request, or None if it can.

    Raises:
      UserError: the name is unknown, or a kernel requested by name belongs to another platform or
        cannot serve the request.
    """
    if requested not in IMPLEMENTATIONS:
        raise UserError(
            f"{operation} implementation {requested!r} is unknown"
            f"{nearest(requested, IMPLEMENTATIONS)}; choose one of {', '.join(IMPLEMENTATIONS)}"
        )
    chosen = KERNELS.get(platform, "reference") if requested == "auto" else requested
    why = f"on {platform}" if requested == "auto" else "as requested"
    if chosen != "reference":
        required = next(name for name, kernel in KERNELS.items() if kernel == chosen)
        if required != platform:
            raise UserError(
                f"{operation} implementation {chosen!r} runs on {required} only and this is "
                f"{platform}; choose 'auto' or 'reference'"
            )
        reason = unsupported_reason(importlib.import_module(modules[chosen]))
        if reason is not None:
            if requested != "auto":
                raise UserError(f"{operation} implementation {chosen!r} can't run: {reason}")
            chosen, why = "reference", reason
    log_choice(operation, requested, chosen, why)
    return chosen
