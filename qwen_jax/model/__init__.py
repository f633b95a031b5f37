"""The network: configuration, parameters and forward pass of every dense Qwen."""

from qwen_jax.model.attention_windows import layer_windows
from qwen_jax.model.config import ModelConfig, Yarn
from qwen_jax.model.dense_cache import KVCache, init_cache
from qwen_jax.model.options import ForwardOptions
from qwen_jax.model.rope import ntk_alpha, ntk_alphas
from qwen_jax.model.transformer import (
    Params,
    abstract_params,
    count_params,
    decay_mask,
    declare,
    forward,
    hidden_states,
    init_params,
    logits,
    network,
    output_kernel,
)

__all__ = [
    "ForwardOptions",
    "KVCache",
    "ModelConfig",
    "Params",
    "Yarn",
    "abstract_params",
    "count_params",
    "decay_mask",
    "declare",
    "forward",
    "hidden_states",
    "init_cache",
    "init_params",
    "layer_windows",
    "logits",
    "network",
    "ntk_alpha",
    "ntk_alphas",
    "output_kernel",
]
