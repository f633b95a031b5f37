"""Which of a plain form and its kernels runs: decided out loud, never silently.

For operations with one kernel a platform and a `reference` in plain jnp. Attention over whole
sequences has more to choose from, and its own `dispatch`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

from absl import logging

from qwen_jax.errors import UserError, nearest

KERNELS = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}
"""The kernel of each platform; elsewhere `reference` runs."""

IMPLEMENTATIONS = ("auto", "reference", *KERNELS.values())


@functools.cache
def announce(what: str, requested: str, chosen: str, why: str) -> None:
    """Logs a choice, once."""
    logging.info("%s: %s (requested %s; %s)", what, chosen, requested, why)


def choose(
    what: str,
    requested: str,
    here: str,
    modules: Mapping[str, str],
    refusal_of: Callable[[Any], str | None],
) -> str:
    """Resolves `auto` and refuses what can't run; logs each choice once.

    Args:
      what: the operation, for people.
      requested: one of `IMPLEMENTATIONS`.
      here: the platform.
      modules: the module of each kernel by name, imported only when it is meant.
      refusal_of: asks a kernel's module why it can't serve; None if it can.

    Raises:
      UserError: unknown name, a kernel on another platform than its own, or a request that the
        kernel can't serve, with the reason.
    """
    if requested not in IMPLEMENTATIONS:
        raise UserError(
            f"{what} implementation {requested!r} is unknown{nearest(requested, IMPLEMENTATIONS)}; "
            f"choose one of {', '.join(IMPLEMENTATIONS)}"
        )
    chosen = KERNELS.get(here, "reference") if requested == "auto" else requested
    why = f"on {here}" if requested == "auto" else "as requested"
    if chosen != "reference":
        home = next(place for place, kernel in KERNELS.items() if kernel == chosen)
        if home != here:
            raise UserError(
                f"{what} implementation {chosen!r} runs on {home} only and this is {here}; "
                "choose 'auto' or 'reference'"
            )
        refusal = refusal_of(importlib.import_module(modules[chosen]))
        if refusal is not None:
            if requested != "auto":
                raise UserError(f"{what} implementation {chosen!r} can't run: {refusal}")
            chosen, why = "reference", refusal
    announce(what, requested, chosen, why)
    return chosen
