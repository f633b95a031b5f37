"""One small network per family, with every switch of that family on, and weights that matter."""

import dataclasses
import functools

import jax

from qwen_jax.model import ForwardOptions, ModelConfig, Yarn, init_params

FLOAT32 = ForwardOptions(dtype="float32")

_COMMON = {
    "vocab_size": 300,
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "head_dim": 8,
    "d_ff": 48,
    "max_length": 64,
}
MODELS = {
    "v1: NTK, LogN": ModelConfig(
        family="qwen", n_kv_heads=4, trained_length=8, dynamic_ntk=True, logn=True, **_COMMON
    ),
    "2.5: grouped, tied, YaRN": ModelConfig(
        family="qwen2", n_kv_heads=2, tie_embeddings=True, yarn=Yarn(4.0, 16), **_COMMON
    ),
    "2: windows": ModelConfig(family="qwen2", n_kv_heads=1, windows=(None, 5), **_COMMON),
    "3: q and k norms, one window": ModelConfig(
        family="qwen3", n_kv_heads=2, qkv_bias=False, qk_norm=True, windows=(4, 4), **_COMMON
    ),
}


@functools.cache
def params(config: ModelConfig):
    """Weights so large that every part shows in the logits, biases and norms included."""
    loud = dataclasses.replace(config, init_std=0.3)

    def make(key):
        leaves, structure = jax.tree.flatten(init_params(loud, key))
        keys = jax.random.split(jax.random.key(8), len(leaves))
        noise = (jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True))
        return structure.unflatten(x + 0.2 * n for x, n in zip(leaves, noise, strict=True))

    return jax.jit(make)(jax.random.key(7))
