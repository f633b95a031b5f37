"""Configurations of every released dense Qwen, by name: `preset("qwen-7b")`.

Sources: report Table 1 and the releases' config.json (Qwen v1); config.json of the hub repositories
(1.5, 2, 2.5, 3). Head dim is 128 unless given. Base models; where an Instruct release differs (a
norm epsilon, a shorter `max_length`), use its own config.json, read by `interop`.
"""

from __future__ import annotations

from typing import Any

from qwen_jax.errors import UserError, nearest
from qwen_jax.model.config import ModelConfig


def _qwen(
    d_model: int, n_layers: int, heads: int, d_ff: int, vocab_size: int, **kwargs: Any
) -> ModelConfig:
    """Returns a Qwen v1 configuration: multi-head attention, q/k/v biases, untied head."""
    defaults: dict[str, Any] = {
        "max_length": 8192,
        "trained_length": 8192,
        "dynamic_ntk": True,
        "logn": True,
    }
    return ModelConfig(
        family="qwen",
        vocab_size=vocab_size,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=heads,
        n_kv_heads=heads,
        head_dim=128,
        d_ff=d_ff,
        **(defaults | kwargs),
    )


def _qwen2(
    d_model: int,
    n_layers: int,
    heads: int,
    kv_heads: int,
    d_ff: int,
    vocab_size: int,
    **kwargs: Any,
) -> ModelConfig:
    """Returns a Qwen1.5, 2 or 2.5 configuration: RoPE base 1e6, no NTK or LogN, grouped queries."""
    defaults: dict[str, Any] = {
        "head_dim": 128,
        "max_length": 32768,
        "rope_theta": 1e6,
        "trained_length": 32768,
    }
    return ModelConfig(
        family="qwen2",
        vocab_size=vocab_size,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=heads,
        n_kv_heads=kv_heads,
        d_ff=d_ff,
        **(defaults | kwargs),
    )


def _qwen3(d_model: int, n_layers: int, heads: int, d_ff: int, **kwargs: Any) -> ModelConfig:
    """Returns a dense Qwen3 configuration: 8 kv heads, q/k norms, no biases, 32,768 positions."""
    return ModelConfig(
        family="qwen3",
        vocab_size=151_936,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=heads,
        n_kv_heads=8,
        head_dim=128,
        d_ff=d_ff,
        max_length=32768,
        trained_length=32768,
        rope_theta=1e6,
        qkv_bias=False,
        qk_norm=True,
        **kwargs,
    )


_SMALL, _LARGE = 151_936, 152_064  # embedding rows, both multiples of 128
_LONG = {"max_length": 131_072}

PRESETS: dict[str, ModelConfig] = {
    "qwen-1.8b": _qwen(2048, 24, 16, 5504, _SMALL),
    "qwen-7b": _qwen(4096, 32, 32, 11008, _SMALL, max_length=32768),
    "qwen-14b": _qwen(5120, 40, 40, 13696, _LARGE, trained_length=2048),
    "qwen-72b": _qwen(
        *(8192, 80, 64, 24576, _LARGE),
        max_length=32768,
        trained_length=32768,
        rope_theta=1e6,
        dynamic_ntk=False,
        logn=False,
    ),
    "qwen1.5-0.5b": _qwen2(1024, 24, 16, 16, 2816, _SMALL, head_dim=64, tie_embeddings=True),
    "qwen1.5-1.8b": _qwen2(2048, 24, 16, 16, 5504, _SMALL),
    "qwen1.5-4b": _qwen2(2560, 40, 20, 20, 6912, _SMALL, rope_theta=5e6),
    "qwen1.5-7b": _qwen2(4096, 32, 32, 32, 11008, _SMALL),
    "qwen1.5-14b": _qwen2(5120, 40, 40, 40, 13696, _LARGE),
    "qwen1.5-32b": _qwen2(5120, 64, 40, 8, 27392, _LARGE),
    "qwen1.5-72b": _qwen2(8192, 80, 64, 64, 24576, _LARGE),
    "qwen1.5-110b": _qwen2(8192, 80, 64, 8, 49152, _LARGE),
    "qwen2-0.5b": _qwen2(896, 24, 14, 2, 4864, _SMALL, head_dim=64, tie_embeddings=True, **_LONG),
    "qwen2-1.5b": _qwen2(1536, 28, 12, 2, 8960, _SMALL, tie_embeddings=True, **_LONG),
    "qwen2-7b": _qwen2(3584, 28, 28, 4, 18944, _LARGE, **_LONG),
    "qwen2-72b": _qwen2(8192, 80, 64, 8, 29568, _LARGE, norm_eps=1e-5, **_LONG),
    "qwen2.5-0.5b": _qwen2(896, 24, 14, 2, 4864, _SMALL, head_dim=64, tie_embeddings=True),
    "qwen2.5-1.5b": _qwen2(1536, 28, 12, 2, 8960, _SMALL, tie_embeddings=True, **_LONG),
    "qwen2.5-3b": _qwen2(2048, 36, 16, 2, 11008, _SMALL, tie_embeddings=True),
    "qwen2.5-7b": _qwen2(3584, 28, 28, 4, 18944, _LARGE, **_LONG),
    "qwen2.5-14b": _qwen2(5120, 48, 40, 8, 13824, _LARGE, **_LONG),
    "qwen2.5-32b": _qwen2(5120, 64, 40, 8, 27648, _LARGE, norm_eps=1e-5, **_LONG),
    "qwen2.5-72b": _qwen2(8192, 80, 64, 8, 29568, _LARGE, norm_eps=1e-5, **_LONG),
    "qwen3-0.6b": _qwen3(1024, 28, 16, 3072, tie_embeddings=True),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 6144, tie_embeddings=True),
    "qwen3-4b": _qwen3(2560, 36, 32, 9728, tie_embeddings=True),
    "qwen3-8b": _qwen3(4096, 36, 32, 12288),
    "qwen3-14b": _qwen3(5120, 40, 40, 17408),
    "qwen3-32b": _qwen3(5120, 64, 64, 25600),
}


def preset(name: str) -> ModelConfig:
    """Returns the configuration of a released model, e.g. "qwen-7b" or "qwen2.5-0.5b".

    Raises:
      UserError: there is no such model; the message suggests the closest name.
    """
    if name not in PRESETS:
        raise UserError(
            f"model {name!r} is not a released dense Qwen{nearest(name, PRESETS)}; "
            f"choose one of {', '.join(PRESETS)}"
        )
    return PRESETS[name]
