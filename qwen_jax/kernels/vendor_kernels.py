"""Attention kernels that come with JAX (splash on TPU, cuDNN on GPU), selectable as baselines.

Neither returns its log-sum-exp here, so neither can be used in ring attention.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from qwen_jax.kernels.mask import Mask

_SPLASH_BLOCK = 1024
"""Tokens per block: the best of eight by estimated cycles on v6e and v5e at 4,096 tokens."""


def _splash_kernel(
    q_len: int, k_len: int, heads: int, window: int | None, interpret: bool
) -> Callable[..., jax.Array]:
    """Returns JAX's splash attention for one batch row.

    Args:
      q_len: number of queries, T.
      k_len: number of keys, S.
      heads: number of query heads, N.
      window: a query attends to at most this many slots, its own included; None: all.
      interpret: run in Pallas' interpreter.

    Returns:
      function of q [N, T, H], k and v [K, S, H] and optional segment ids, to [N, T, H].
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = (q_len, k_len)
    head_mask = (
        masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    )
    block, compute = min(_SPLASH_BLOCK, q_len, k_len), min(_SPLASH_BLOCK // 2, q_len, k_len)
    sizes = kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=compute,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=compute,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return kernel.make_splash_mha(
        masks.MultiHeadMask([head_mask] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=sizes,
        interpret=interpret,
    )


def splash(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: float, *, interpret: bool = False
) -> jax.Array:
    """Computes attention with JAX's TPU splash attention kernel.

    Inside the kernel padding attends to padding, because a query without visible keys has no
    defined output there; outputs of padding are then set to 0.

    Args:
      q: [B, T, N, H] (batch, queries, query heads, head dimension).
      k: keys [B, S, K, H] (S keys, K kv heads).
      v: values [B, S, K, H].
      mask: segments and a static window; `q_start` and `layer_window` are not supported.
      scale: factor on q·k.
      interpret: run in Pallas' interpreter (any platform, slow).

    Returns:
      [B, T, N, H] in q's dtype.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    kernel = _splash_kernel(q.shape[1], k.shape[1], q.shape[2], mask.window, interpret)
    q, k, v = (x.swapaxes(1, 2) for x in ((q * scale).astype(q.dtype), k, v))
    if mask.q_segments is None:
        return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)
    assert mask.k_segments is not None
    ids = SegmentIds(mask.q_segments, mask.k_segments)
    out = jax.vmap(kernel)(q, k, v, ids).swapaxes(1, 2)
    return jnp.where((mask.q_segments > 0)[:, :, None, None], out, 0)


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: float) -> jax.Array:
    """Computes attention with cuDNN through `jax.nn.dot_product_attention`.

    Args:
      q: [B, T, N, H] (batch, queries, query heads, head dimension), bfloat16 or float16.
      k: keys [B, S, K, H] (S keys, K kv heads).
      v: values [B, S, K, H].
      mask: a static window at most; segments, `q_start` and `layer_window` are not supported.
      scale: factor on q·k.

    Returns:
      [B, T, N, H] in q's dtype.
    """
    window = None if mask.window is None else (mask.window - 1, 0)
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=True,
        local_window_size=window,
        implementation="cudnn",
    )
