"""Rotary position embeddings, with the report's dynamic NTK and LogN context extension (§2.5).

Angles are float32 whatever the compute dtype: in bf16, positions 257 and 258 are the same number.
Letters in shapes: B batch, T tokens, H head size, R rotated channels of a head, W distinct
attention windows of the model.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.model.config import ModelConfig, Yarn
from qwen_jax.parallel import platform


def ntk_alpha(length: int, trained_length: int) -> float:
    """Returns the dynamic-NTK factor max(2^ceil(log2(L/S) + 1) − 1, 1) of a prompt.

    Computed once from the prompt and kept while decoding, as in Qwen's released code (Qwen-7B
    modeling_qwen.py): 1 up to S, 3 up to 2S, 7 up to 4S, and so on.

    Args:
      length: L, tokens of the prompt.
      trained_length: S, context length of the training.
    """
    if length <= trained_length:
        return 1.0
    return float(max(2 ** math.ceil(math.log2(length / trained_length) + 1) - 1, 1))


def ntk_alphas(length: int, config: ModelConfig) -> np.ndarray:
    """Returns the dynamic-NTK factors of a prompt of `length` tokens, float32 [W].

    There is one for each of `config.distinct_windows`: a layer with a window of w tokens never uses
    a distance of w or more, so its factor is that of min(length, w) tokens. This combines the
    layer-wise windows of report §2.5 with NTK (github.com/QwenLM/Qwen, issue 422). Because factors
    are frozen with the prompt, keys can be cached rotated. All ones without `config.dynamic_ntk`.
    """
    if not config.dynamic_ntk:
        return np.ones(len(config.distinct_windows), np.float32)
    effective = (length if w is None else min(length, w) for w in config.distinct_windows)
    return np.array([ntk_alpha(n, config.trained_length) for n in effective], np.float32)


def logn_scale(positions: jax.Array, trained_length: int) -> jax.Array:
    """Returns the LogN factor of queries, float32: log_S(p + 1) past S, 1 before.

    Args:
      positions: integers of any shape, 0-based positions p.
      trained_length: S, context length of the training.
    """
    count = positions.astype(jnp.float32) + 1.0
    return jnp.maximum(jnp.log(count) / math.log(trained_length), 1.0)


def _yarn_inverse_frequencies(base: np.ndarray, theta: float, dim: int, yarn: Yarn) -> np.ndarray:
    """Returns YaRN's inverse frequencies: high ones kept, low ones interpolated, blended between.

    YaRN (arXiv:2309.00071) §3.2.

    Args:
      base: float64 [dim / 2], inverse frequencies without scaling.
      theta: RoPE base.
      dim: rotated channels.
      yarn: the scaling.
    """

    def channel(rotations: float) -> float:  # the channel with this many rotations over the length
        return (
            dim * math.log(yarn.original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))
        )

    low = max(math.floor(channel(yarn.beta_fast)), 0)
    high = min(math.ceil(channel(yarn.beta_slow)), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    return base / yarn.factor * ramp + base * (1 - ramp)


def rope_table(
    positions: jax.Array, config: ModelConfig, alpha: jax.Array | float | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns cosines and signed sines of the rotation angles, float32 [B, T, H] each.

    Laid out for `apply_rope`: (cos, cos, 1 …) and (−sin, sin, 0 …); the last H − R channels are not
    rotated.

    Args:
      positions: int32 [B, T].
      config: the model.
      alpha: NTK factors that broadcast against [B, T]: the base becomes base · alpha^(R/(R−2)).
        None is 1.
    """
    dim = config.rope_dim
    exponent = np.arange(0, dim, 2, dtype=np.float64) / dim
    scale = 1.0
    base = config.rope_theta**-exponent
    if config.yarn is not None:
        base = _yarn_inverse_frequencies(base, config.rope_theta, dim, config.yarn)
        if config.yarn.attention_factor is not None:
            scale = config.yarn.attention_factor
        elif config.yarn.factor > 1:
            scale = 0.1 * math.log(config.yarn.factor) + 1.0
    inverse = jnp.asarray(base, jnp.float32)
    if alpha is not None and dim > 2:
        # (θ·α^(R/(R−2)))^(−e) = θ^(−e) · α^(−e·R/(R−2))
        power = jnp.asarray(exponent * dim / (dim - 2), jnp.float32)
        inverse = inverse * jnp.asarray(alpha, jnp.float32)[..., None] ** -power
    angles = positions.astype(jnp.float32)[..., None] * inverse
    cos, sin = jnp.cos(angles) * scale, jnp.sin(angles) * scale
    rest = ((0, 0), (0, 0), (0, config.head_dim - dim))
    cos = jnp.pad(jnp.concatenate([cos, cos], axis=-1), rest, constant_values=1.0)
    return cos, jnp.pad(jnp.concatenate([-sin, sin], axis=-1), rest)


def apply_rope(x: jax.Array, table: tuple[jax.Array, jax.Array], dim: int) -> jax.Array:
    """Returns x [B, T, heads, H] with its first `dim` channels rotated (half-split, NeoX layout).

    Args:
      x: queries or keys, any float dtype; the rotation is computed in float32.
      table: cosines and signed sines of `rope_table`.
      dim: rotated channels of each head.
    """
    cos, sin = (t[:, :, None, :] for t in table)
    swapped = _swap_halves(x, dim).astype(jnp.float32)
    return (x.astype(jnp.float32) * cos + swapped * sin).astype(x.dtype)


def _swap_halves(x: jax.Array, dim: int) -> jax.Array:
    """Returns x with the two halves of its first `dim` channels (of the last axis) exchanged.

    On TPUs half a head is half a vector register. Slicing there turns the rotation into several
    passes over memory and a transposition for the kernel. As a matmul with a permutation, which is
    exact, it fuses with its neighbours: a query projection of 4096 channels, forward and backward,
    takes a fifth fewer of the compiler's estimated cycles (v5e).
    """
    half, width = dim // 2, x.shape[-1]
    if platform()[0] == "tpu":
        order = np.r_[half:dim, :half, dim:width]
        exchange = jnp.asarray(np.eye(width)[order].T, x.dtype)
        return jnp.einsum("BTNH,HJ->BTNJ", x, exchange, precision=jax.lax.Precision.HIGHEST)
    return jnp.concatenate([x[..., half:dim], x[..., :half], x[..., dim:]], axis=-1)
