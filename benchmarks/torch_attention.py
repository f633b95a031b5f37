"""Attention of the PyTorch peer: `transformers` without the mask that keeps flash kernels away."""

from __future__ import annotations


def causal_sdpa(module, query, key, value, mask, *, scaling=None, dropout=0.0, **_):
    """Scaled dot-product attention as `transformers` calls it: q, k, v [B,N,T,H] -> [B,T,N,H]."""
    from torch.nn.functional import scaled_dot_product_attention

    out = scaled_dot_product_attention(
        *(query, key, value),
        dropout_p=dropout,
        scale=scaling,
        is_causal=True,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2), None


def register_causal_sdpa() -> None:
    """Makes "causal_sdpa" an attention of `transformers`, one that is given no mask."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register("causal_sdpa", causal_sdpa)
    AttentionMaskInterface.register("causal_sdpa", lambda *_, **__: None)
