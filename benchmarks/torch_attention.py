"""Causal attention for the PyTorch peer, without the mask that prevents flash kernels.

`transformers` passes a mask to scaled dot-product attention under `torch.compile`, which keeps
PyTorch from its flash kernels; here attention is declared causal instead.
"""

from __future__ import annotations

from typing import Any


def causal_sdpa(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Any, None]:
    """Computes causal scaled dot-product attention, with the signature that `transformers` calls.

    Args:
      module: unused.
      query: tensor [batch, query heads, tokens, head_dim].
      key: tensor [batch, kv heads, tokens, head_dim].
      value: as key.
      mask: unused.
      scaling: factor on q·k.
      dropout: probability of dropping an attention weight.

    Returns:
      (output [batch, tokens, query heads, head_dim], None for the attention weights).
    """
    from torch.nn.functional import scaled_dot_product_attention

    out = scaled_dot_product_attention(
        query,
        key,
        value,
        dropout_p=dropout,
        scale=scaling,
        is_causal=True,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2), None


def register_causal_sdpa() -> None:
    """Registers `causal_sdpa` in `transformers` as an attention implementation without a mask."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register("causal_sdpa", causal_sdpa)
    AttentionMaskInterface.register("causal_sdpa", lambda *_, **__: None)
