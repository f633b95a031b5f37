"""Rotary positions, and the report's training-free context extension: dynamic NTK and LogN (§2.5).

Angles are float32 whatever the compute dtype: in bf16, position 257 and 258 are the same number.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.model.config import ModelConfig, Yarn
from qwen_jax.parallel import platform


def ntk_alpha(length: int, trained_length: int) -> float:
    """Dynamic NTK factor for a prompt of `length` tokens, max(2^ceil(log2(L/S) + 1) − 1, 1).

    Chosen once from the prompt and kept while decoding, as the release does (Qwen-7B
    modeling_qwen.py): 1 up to S, then 3, 7, 15, … for each doubling.
    """
    if length <= trained_length:
        return 1.0
    return float(max(2 ** math.ceil(math.log2(length / trained_length) + 1) - 1, 1))


def ntk_alphas(length: int, config: ModelConfig) -> np.ndarray:
    """Dynamic-NTK factors of a prompt of `length` tokens, float32 [W], constant over its life.

    One for each of `config.distinct_windows`: a layer that sees at most w tokens back never meets a
    distance of w or more, and interpolates for min(length, w) only. This is how the layer-wise
    windows of report §2.5 join with NTK (github.com/QwenLM/Qwen, issue 422). Because the factor is
    frozen with the prompt, keys can be cached rotated. All ones without `config.dynamic_ntk`.
    """
    if not config.dynamic_ntk:
        return np.ones(len(config.distinct_windows), np.float32)
    seen = (length if w is None else min(length, w) for w in config.distinct_windows)
    return np.array([ntk_alpha(n, config.trained_length) for n in seen], np.float32)


def logn_scale(positions: jax.Array, trained_length: int) -> jax.Array:
    """LogN factor of a query at 0-based `positions`: log_S(p + 1) past S, 1 before. float32."""
    count = positions.astype(jnp.float32) + 1.0
    return jnp.maximum(jnp.log(count) / math.log(trained_length), 1.0)


def _yarn_inverse_frequencies(base: np.ndarray, theta: float, dim: int, yarn: Yarn) -> np.ndarray:
    """Keeps fast frequencies, interpolates slow ones, and blends between (YaRN §3.2)."""

    def channel(rotations: float) -> float:  # which channel turns this often over the length
        return (
            dim * math.log(yarn.original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))
        )

    low = max(math.floor(channel(yarn.beta_fast)), 0)
    high = min(math.ceil(channel(yarn.beta_slow)), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    return base / yarn.factor * ramp + base * (1 - ramp)


def rope_table(
    positions: jax.Array, config: ModelConfig, alpha: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cosines and signed sines, float32 [B,T,H] each, for int32 `positions` [B,T].

    Laid out as `apply_rope` uses them: (cos, cos, 1 …) and (−sin, sin, 0 …); the last H − R
    channels are not rotated.

    Args:
      alpha: float32, NTK factors that broadcast against [B,T]: the base becomes
        base · alpha^(R/(R−2)). None is 1.
    """
    dim = config.rope_dim
    exponent = np.arange(0, dim, 2, dtype=np.float64) / dim
    scale = 1.0
    inverse = config.rope_theta**-exponent
    if config.yarn is not None:
        inverse = _yarn_inverse_frequencies(inverse, config.rope_theta, dim, config.yarn)
        scale = config.yarn.attention_factor
        if scale is None:
            scale = 0.1 * math.log(config.yarn.factor) + 1.0 if config.yarn.factor > 1 else 1.0
    inverse = jnp.asarray(inverse, jnp.float32)
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
    """Rotates the first `dim` channels of x [B,T,heads,H] in float32, half-split (NeoX) layout."""
    cos, sin = (t[:, :, None, :] for t in table)
    swapped = _swap_halves(x, dim).astype(jnp.float32)
    return (x.astype(jnp.float32) * cos + swapped * sin).astype(x.dtype)


def _swap_halves(x: jax.Array, dim: int) -> jax.Array:
    """The first `dim` channels of the last axis with their halves exchanged.

    On TPUs half a head is half a vector register. Cut there, the rotation becomes several passes
    over memory and a transposition for the kernel; as a product with a permutation, which is exact,
    it joins its neighbours: a layer's query projection of 4096 channels, forward and backward,
    takes a fifth fewer of the compiler's cycles (v5e).
    """
    half, width = dim // 2, x.shape[-1]
    if platform()[0] == "tpu":
        order = np.r_[half:dim, :half, dim:width]
        exchange = jnp.asarray(np.eye(width)[order].T, x.dtype)
        return jnp.einsum("BTNH,HJ->BTNJ", x, exchange, precision=jax.lax.Precision.HIGHEST)
    return jnp.concatenate([x[..., half:dim], x[..., :half], x[..., dim:]], axis=-1)
