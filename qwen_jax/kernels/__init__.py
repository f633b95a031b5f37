"""Attention over sequences and over paged KV caches, with one implementation per platform."""

from qwen_jax.kernels.cache import PagedCache, init_paged_cache
from qwen_jax.kernels.dispatch import attention, choose_attention
from qwen_jax.kernels.paged import append, paged_attention

__all__ = [
    "PagedCache",
    "append",
    "attention",
    "choose_attention",
    "init_paged_cache",
    "paged_attention",
]
