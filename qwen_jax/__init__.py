"""Qwen in JAX: the system of the Qwen Technical Report (arXiv:2309.16609).

Subpackages, each of which imports only from those after it::

    server -> evaluate -> generate -> engine -> aot -> train -> data -> corpus -> interop -> model
    -> kernels -> parallel -> chat -> tokenizer

From a path to an answer::

    from qwen_jax import load
    qwen = load("Qwen-7B-Chat")
    print(qwen.chat("Hello!"))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_jax.generate.load import load

__all__ = ["load"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Returns `load`, imported on first use, so that importing this package stays fast."""
    if name == "load":
        from qwen_jax.generate.load import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
