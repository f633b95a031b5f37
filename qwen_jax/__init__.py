"""Qwen in JAX: the whole road of the Qwen Technical Report (arXiv:2309.16609).

Floors, imports go down only::

    train -> data -> corpus -> interop -> model -> kernels -> parallel -> tokenizer -> errors
"""

__version__ = "0.1.0"
