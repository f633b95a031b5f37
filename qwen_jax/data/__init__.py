"""Packed windows to global batches: the batch of a step is a pure function of the step."""

from qwen_jax.data.batches import Batch, Batches, Prefetch, eval_batches
from qwen_jax.data.config import DataConfig, Source, parse_sources
from qwen_jax.data.mixture import check_fingerprint, data_fingerprint, epochs_at

__all__ = [
    "Batch",
    "Batches",
    "DataConfig",
    "Prefetch",
    "Source",
    "check_fingerprint",
    "data_fingerprint",
    "epochs_at",
    "eval_batches",
    "parse_sources",
]
