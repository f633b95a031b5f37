"""`attention(...)`: one contract, dispatched to an implementation that is chosen out loud."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from absl import logging
from jax.ad_checkpoint import checkpoint_name

from qwen_jax.errors import UserError, nearest
from qwen_jax.kernels.chunked import chunked_kernel
from qwen_jax.kernels.flash import OUTPUT, flash_attention
from qwen_jax.kernels.mask import make_mask
from qwen_jax.kernels.reference import reference_attention
from qwen_jax.parallel import current_mesh, on_mesh, reshard, spec

IMPLEMENTATIONS = ("auto", "reference", "chunked")

# Scores of one head and row up to this size are materialised whole (1 MiB in float32): fastest on
# CPU at training lengths up to 512. Above it the chunked form wins by memory.
_WHOLE_SCORES = 512 * 512


@functools.cache
def _announce(requested: str, chosen: str, why: str) -> None:
    logging.info("attention: %s (requested %s; %s)", chosen, requested, why)


def choose_attention(requested: str, *, q_len: int, k_len: int, dropout: bool = False) -> str:
    """Resolves `auto` and refuses what can't run; logs each choice once.

    Raises:
      UserError: unknown name, or a request that the implementation can't serve.
    """
    if requested not in IMPLEMENTATIONS:
        raise UserError(
            f"attention implementation {requested!r} is unknown"
            f"{nearest(requested, IMPLEMENTATIONS)}; choose one of {', '.join(IMPLEMENTATIONS)}"
        )
    if requested == "chunked" and dropout:
        raise UserError(
            "attention implementation 'chunked' has no dropout on attention weights; set "
            "model.attn_dropout to 0 or choose 'reference'"
        )
    if requested == "auto":
        if dropout:
            chosen, why = "reference", "the only one with dropout on attention weights"
        elif q_len * k_len <= _WHOLE_SCORES:
            chosen, why = "reference", "short sequences: all scores at once"
        else:
            chosen, why = "chunked", "long sequences: scores a block of queries at a time"
    else:
        chosen, why = requested, "as requested"
    _announce(requested, chosen, why)
    return chosen


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_segments: jax.Array | None = None,
    k_segments: jax.Array | None = None,
    q_start: jax.Array | None = None,
    window: jax.Array | int | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Causal grouped-query attention.

    Args:
      q: [B,T,N,H]. k, v: [B,S,K,H] with N a multiple of K; query head n reads kv head n // (N/K).
      q_segments: int32 [B,T], k_segments: int32 [B,S]; a query sees keys of its own segment only,
        and segment 0 (padding) is never seen. None: one segment.
      q_start: int32 [B], slot of the first query among the keys (None: 0); a query in slot i sees
        keys in slots <= i.
      window: a query sees at most this many slots, its own included. None: all.
      scale: factor on q·k, 1/√H by default.
      dropout_rate, dropout_key: dropout on the attention weights (reference only).
      implementation: one of `IMPLEMENTATIONS`.

    Returns:
      [B,T,N,H] in q's dtype, softmax in float32; rows that see no key are 0.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dropout = bool(dropout_rate) and dropout_key is not None
    chosen = choose_attention(implementation, q_len=q.shape[1], k_len=k.shape[1], dropout=dropout)
    operands = (q, k, v, q_start, q_segments, k_segments, window, scale)
    if chosen == "reference":
        return _whole(*operands, dropout_rate if dropout else 0.0, dropout_key)
    return _per_device(*operands, chunked_kernel())


def _repeat_heads(x: jax.Array, groups: int, out_sharding=None) -> jax.Array:
    """[B,S,K,H] -> [B,S,K·groups,H]: each kv head once for every query head that reads it.

    Four-dimensional products run nearly twice as fast on CPU as grouped, five-dimensional ones.
    """
    if groups == 1:
        return x
    batch, length, heads, width = x.shape
    x = jnp.broadcast_to(x[:, :, :, None], (batch, length, heads, groups, width))
    shape = (batch, length, heads * groups, width)
    return jax.lax.reshape(x, shape, out_sharding=out_sharding)


def _collect_keys(k, v, k_segments):
    """Every query block needs all keys before it: collects keys along the sequence."""
    k, v = (reshard(x, "batch", None, "kv_heads", None) for x in (k, v))
    return k, v, None if k_segments is None else reshard(k_segments, "batch", None)


def _whole(q, k, v, start, q_segments, k_segments, window, scale, rate, key):
    """The reference under explicit sharding: the compiler partitions it."""
    k, v, k_segments = _collect_keys(k, v, k_segments)
    groups = q.shape[2] // k.shape[2]
    k, v = (_repeat_heads(x, groups, spec("batch", None, "heads", None)) for x in (k, v))
    q_slots = reshard(jnp.arange(q.shape[1], dtype=jnp.int32)[None], None, "sequence")
    if start is not None:
        q_slots = q_slots + start[:, None]
    k_slots = jnp.arange(k.shape[1], dtype=jnp.int32)[None]
    out = reference_attention(
        *(q, k, v, q_slots, k_slots, q_segments, k_segments),
        window=window,
        scale=scale,
        dropout_rate=rate,
        dropout_key=key,
    )
    return checkpoint_name(out, OUTPUT)


def _per_device(q, k, v, start, q_segments, k_segments, window, scale, kernel):
    """Runs a block kernel on each device's own heads, batch rows and query block."""
    k, v, k_segments = _collect_keys(k, v, k_segments)

    def local(q, k, v, start, q_segments, k_segments, window):
        if on_mesh() and current_mesh().shape["context"] > 1:
            offset = jax.lax.axis_index("context").astype(jnp.int32) * q.shape[1]
            start = offset[None] if start is None else start + offset
        if start is not None:
            start = jnp.broadcast_to(start, q.shape[:1])
        mask = make_mask(start, q_segments, k_segments, window)
        return flash_attention(q, k, v, mask, scale, kernel)[0]

    if isinstance(window, int):
        local, window = functools.partial(local, window=window), ()
    else:
        window = (window,)
    operands = (q, k, v, start, q_segments, k_segments, *window)
    if not on_mesh():
        return local(*operands)
    queries = spec("batch", "sequence", "heads", None)
    keys = spec("batch", None, "kv_heads", None)
    segments = (spec("batch", "sequence"), spec("batch", None))
    in_specs = (queries, keys, keys, spec("batch"), *segments, *(jax.P() for _ in window))
    return jax.shard_map(local, in_specs=in_specs, out_specs=queries, check_vma=False)(*operands)
