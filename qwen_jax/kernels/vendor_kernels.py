"""Attention kernels that come with JAX: baselines, selectable by name.

Neither returns its log-sum-exp here, so neither can be a ring's.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen_jax.kernels.mask import Mask

_SPLASH_BLOCK = 1024  # best of eight tilings by estimated cycles on v6e and v5e at 4,096 tokens


def _splash_kernel(q_len: int, k_len: int, heads: int, window: int | None, interpret: bool):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = (q_len, k_len)
    one = masks.CausalMask(shape)
    if window is not None:
        one = masks.LocalMask(shape, (window - 1, 0), 0)
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
        masks.MultiHeadMask([one] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=sizes,
        interpret=interpret,
    )


def splash(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: float, *, interpret: bool = False
) -> jax.Array:
    """JAX's TPU splash attention: q [B,T,N,H], k, v [B,S,K,H] -> [B,T,N,H].

    Padding sees padding inside, since a row that sees no key has no defined output there; such rows
    are set to 0 afterwards. interpret: run Pallas' interpreter (any platform, slow).
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    kernel = _splash_kernel(q.shape[1], k.shape[1], q.shape[2], mask.window, interpret)
    q, k, v = (x.swapaxes(1, 2) for x in ((q * scale).astype(q.dtype), k, v))
    if mask.q_segments is None:
        return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)
    ids = SegmentIds(mask.q_segments, mask.k_segments)
    out = jax.vmap(kernel)(q, k, v, ids).swapaxes(1, 2)
    return jnp.where((mask.q_segments > 0)[:, :, None, None], out, 0)


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: float) -> jax.Array:
    """cuDNN through `jax.nn.dot_product_attention`: shapes as in `splash`."""
    window = None if mask.window is None else (mask.window - 1, 0)
    return jax.nn.dot_product_attention(
        *(q, k, v),
        scale=scale,
        is_causal=True,
        local_window_size=window,
        implementation="cudnn",
    )
