"""Attention and its dispatch: one contract, several implementations."""

from qwen_jax.kernels.dispatch import attention, choose_attention

__all__ = ["attention", "choose_attention"]
