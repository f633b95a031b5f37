"""Architecture configuration of a Qwen network, for every released dense family.

How a network runs (dtype, remat, attention) is in `model/options.py`, released sizes in
`model/presets.py`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from qwen_jax.errors import UserError

Family = Literal["qwen", "qwen2", "qwen3"]
"""Hugging Face `model_type`: Qwen v1; Qwen1.5, 2 and 2.5; Qwen3 dense."""


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN rotary scaling (arXiv:2309.00071), used by Qwen2.5 and 3 past their trained length.

    Attributes:
      factor: context multiple, target length / `original_length`.
      original_length: context length of the training, in tokens.
      beta_fast: rotations over `original_length` above which a frequency is kept.
      beta_slow: rotations over `original_length` below which a frequency is interpolated.
      attention_factor: factor on both cosines and sines; None means 0.1·ln(factor) + 1.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self):
        if not self.factor >= 1 or self.original_length < 1:
            raise UserError(
                f"model.yarn.factor={self.factor} and original_length={self.original_length} must "
                "be at least 1"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of a dense Qwen (report §2.3; released configs of v1, 1.5, 2, 2.5 and 3).

    Attributes:
      family: released family whose weight names and layout are used.
      vocab_size: embedding rows V, padding included (151,936 or 152,064 in the releases).
      d_model: hidden size D.
      n_layers: number of layers L.
      n_heads: query heads N.
      n_kv_heads: key and value heads K.
      head_dim: head size H.
      d_ff: width F of the SwiGLU (the v1 config's `intermediate_size` is twice that).
      max_length: longest supported sequence in tokens, `max_position_embeddings`.
      tie_embeddings: the output projection is the transposed embedding table.
      qkv_bias: biases on the q, k, v projections (all families but Qwen3).
      qk_norm: RMSNorm over H on q and k before RoPE (Qwen3).
      norm_eps: epsilon of every RMSNorm.
      rope_theta: RoPE base.
      rope_fraction: fraction of H that is rotated (`rotary_pct`).
      yarn: static YaRN scaling or None.
      trained_length: `seq_length` of Qwen v1, the threshold of dynamic NTK and LogN.
      dynamic_ntk: whether inference uses dynamic NTK (never in training).
      logn: whether inference scales queries by LogN (never in training).
      windows: sliding window of each layer in tokens, None for a full layer; () means all full.
        With `dynamic_ntk`, the factor of a layer is computed from its window.
      init_std: standard deviation of initial weight matrices; the output projections of attention
        and FFN use init_std/√(2L).
      embed_dropout: dropout rate after the embedding; rates apply only with a dropout key.
      attn_dropout: dropout rate on attention weights.
      residual_dropout: dropout rate on the outputs of attention and FFN.
    """

    family: Family
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    max_length: int
    tie_embeddings: bool = False
    qkv_bias: bool = True
    qk_norm: bool = False
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_fraction: float = 1.0
    yarn: Yarn | None = None
    trained_length: int = 2048
    dynamic_ntk: bool = False
    logn: bool = False
    windows: tuple[int | None, ...] = ()
    init_std: float = 0.02
    embed_dropout: float = 0.0
    attn_dropout: float = 0.0
    residual_dropout: float = 0.0

    def __post_init__(self):
        sizes = ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff")
        for name in sizes:
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        for name, least in (("max_length", 1), ("trained_length", 2)):
            if (value := getattr(self, name)) < least:
                raise UserError(f"model.{name} is {value}; it must be at least {least}")
        for name in ("norm_eps", "rope_theta", "rope_fraction", "init_std"):
            if not getattr(self, name) > 0:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be above 0")
        if self.rope_fraction > 1:
            raise UserError(f"model.rope_fraction is {self.rope_fraction}; it must be at most 1")
        for name in ("embed_dropout", "attn_dropout", "residual_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be in [0, 1)")
        if any(window is not None and window < 1 for window in self.windows):
            raise UserError(
                f"model.windows has {min(w for w in self.windows if w is not None)}; give 1 or more"
            )
        if self.n_heads % self.n_kv_heads:
            raise UserError(
                f"model.n_heads={self.n_heads} is not a multiple of "
                f"model.n_kv_heads={self.n_kv_heads}; change one of them"
            )
        if self.windows and len(self.windows) != self.n_layers:
            raise UserError(
                f"model.windows names {len(self.windows)} layers but model.n_layers is "
                f"{self.n_layers}; give one entry per layer or none"
            )
        if self.rope_dim < 2 or self.rope_dim % 2:
            raise UserError(
                f"model.head_dim={self.head_dim} × model.rope_fraction={self.rope_fraction} gives "
                f"{self.rope_dim} rotated channels; it must be an even number of at least 2"
            )

    @property
    def rope_dim(self) -> int:
        """Number of rotated channels of each head."""
        return int(self.head_dim * self.rope_fraction)

    @property
    def distinct_windows(self) -> tuple[int | None, ...]:
        """The W distinct windows of the layers, narrowest first, None (a full layer) last."""
        found = set(self.windows) or {None}
        return tuple(sorted(found, key=lambda w: math.inf if w is None else w))

    @property
    def window_of_layer(self) -> tuple[int, ...]:
        """Index of each layer's window in `distinct_windows`."""
        windows = self.windows or (None,) * self.n_layers
        return tuple(self.distinct_windows.index(w) for w in windows)
