"""Batches of packed token windows: the global batch of a step is a pure function of the step."""

from qwen_jax.data.batches import Batches, HostBatch, Prefetch, eval_batches
from qwen_jax.data.config import DataConfig, DataSource, Packing, parse_sources
from qwen_jax.data.mixture import check_fingerprint, data_fingerprint, epochs_at

__all__ = [
    "Batches",
    "DataConfig",
    "DataSource",
    "HostBatch",
    "Packing",
    "Prefetch",
    "check_fingerprint",
    "data_fingerprint",
    "epochs_at",
    "eval_batches",
    "parse_sources",
]
