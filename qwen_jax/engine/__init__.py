"""Continuous-batching inference engine: scheduler, paged KV cache, compiled steps, sampling."""

from qwen_jax.engine.engine import Engine, EngineStats
from qwen_jax.engine.options import EngineOptions
from qwen_jax.engine.request import Output, Request, SamplingParams

__all__ = ["Engine", "EngineOptions", "EngineStats", "Output", "Request", "SamplingParams"]
