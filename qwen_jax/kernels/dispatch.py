"""Attention dispatch: selects an implementation by platform and shapes, logs it and calls it.

All implementations share the contract documented at `attention`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from qwen_jax.errors import UserError, nearest
from qwen_jax.kernels import vendor_kernels
from qwen_jax.kernels.chunked import chunked_kernel
from qwen_jax.kernels.flash import OUTPUT, FlashKernel, flash_attention
from qwen_jax.kernels.mask import Mask, make_mask
from qwen_jax.kernels.reference import reference_attention
from qwen_jax.kernels.ring import ring_attention
from qwen_jax.kernels.selection import log_choice
from qwen_jax.parallel import context_size, on_mesh, platform, reshard, spec, zigzag_slots

IMPLEMENTATIONS = ("auto", "pallas_tpu", "pallas_gpu", "cudnn", "splash", "chunked", "reference")

_REFERENCE_MAX_SCORES = 512 * 512
"""Largest number of scores per head and batch row for which `auto` uses the reference (1 MiB)."""
_BLOCK_QUERIES = 128
"""Queries from which skipping masked blocks pays off, so that `auto` never uses the reference."""


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """Properties of an attention call that decide which implementations support it.

    Shapes are those of one device.

    Attributes:
      q_len: number of queries.
      k_len: number of keys.
      head_dim: dimension of a head.
      dtype: name of the queries' dtype.
      dropout: whether there is dropout on the attention weights.
      segments: whether segment ids are given.
      q_start: whether the first query may be in a later slot than the first key (a KV cache).
      layer_window: whether the window is a traced array.
      context: number of devices that the sequence is sharded over.
      platform: "cpu", "gpu" or "tpu".
      device: kind of the device as jax spells it, such as "TPU v5 lite".
    """

    q_len: int
    k_len: int
    head_dim: int
    dtype: str = "bfloat16"
    dropout: bool = False
    segments: bool = False
    q_start: bool = False
    layer_window: bool = False
    context: int = 1
    platform: str = "cpu"
    device: str = "cpu"


def _tpu_unsupported_reason(call: AttentionCall) -> str | None:
    """Returns one clause saying why the TPU kernel cannot serve a call, or None if it can."""
    if call.platform != "tpu":
        return f"it runs on TPUs and this is {call.device}"
    from qwen_jax.kernels.tpu import flash

    return flash.unsupported_reason(
        head_dim=call.head_dim, dtype=call.dtype, device_kind=call.device
    )


def _gpu_unsupported_reason(call: AttentionCall) -> str | None:
    """Returns one clause saying why the Hopper kernel cannot serve a call, or None if it can."""
    if call.platform != "gpu":
        return f"it runs on Hopper GPUs and this is {call.device}"
    from qwen_jax.kernels.gpu import flash

    return flash.unsupported_reason(
        head_dim=call.head_dim, dtype=call.dtype, device_kind=call.device
    )


def _vendor_unsupported_reason(call: AttentionCall, name: str, runs_on: str) -> str | None:
    """Returns one clause saying why a kernel that comes with JAX cannot serve a call, or None.

    Args:
      call: properties of the attention call.
      name: "splash" or "cudnn".
      runs_on: platform of the kernel.
    """
    if call.platform != runs_on:
        return f"it runs on {runs_on.upper()}s and this is {call.device}"
    unsupported = {
        "a context axis": call.context > 1,
        "queries that start in a later slot (a KV cache)": call.q_start,
        "windows that differ between layers": call.layer_window,
        "segment ids": call.segments and name == "cudnn",
    }
    for feature, requested in unsupported.items():
        if requested:
            return f"it has no support for {feature}"
    if name == "cudnn" and call.dtype not in ("bfloat16", "float16"):
        return f"it computes in bfloat16 or float16 and this is {call.dtype}"
    if name == "splash" and (call.q_len % 128 or call.k_len % 128):
        return f"it needs a multiple of 128 tokens and this is {call.q_len}×{call.k_len}"
    return None


def unsupported_reason(name: str, call: AttentionCall) -> str | None:
    """Returns one clause saying why an implementation cannot serve a call, or None if it can."""
    if call.dropout and name != "reference":
        return "it has no dropout on attention weights (set model.attn_dropout to 0)"
    if name == "pallas_tpu":
        return _tpu_unsupported_reason(call)
    if name == "pallas_gpu":
        return _gpu_unsupported_reason(call)
    if name in ("splash", "cudnn"):
        return _vendor_unsupported_reason(call, name, "tpu" if name == "splash" else "gpu")
    return None


def _choose_automatically(call: AttentionCall) -> tuple[str, str]:
    """Returns (implementation, reason): what "auto" chooses for a call."""
    if call.dropout:
        return "reference", "the only one with dropout on attention weights"
    few = call.q_len * call.k_len <= _REFERENCE_MAX_SCORES
    if call.context == 1 and few and call.q_len < _BLOCK_QUERIES:
        return "reference", "few scores: all at once"
    reasons = []
    for name in ("pallas_tpu", "pallas_gpu", "cudnn"):
        reason = unsupported_reason(name, call)
        if reason is None:
            return name, f"the kernel for {call.device}"
        if call.platform in ("tpu", "gpu"):
            reasons.append(f"{name}: {reason}")
    return "chunked", "; ".join(reasons) or "long sequences: scores a block at a time"


def choose_attention(requested: str, call: AttentionCall) -> str:
    """Returns the implementation to run: resolves "auto" and logs each choice once.

    Args:
      requested: one of `IMPLEMENTATIONS`.
      call: properties of the attention call.

    Raises:
      UserError: the name is unknown, or the requested implementation cannot serve the call.
    """
    if requested not in IMPLEMENTATIONS:
        raise UserError(
            f"attention implementation {requested!r} is unknown"
            f"{nearest(requested, IMPLEMENTATIONS)}; choose one of {', '.join(IMPLEMENTATIONS)}"
        )
    if requested == "auto":
        chosen, why = _choose_automatically(call)
    else:
        reason = unsupported_reason(requested, call)
        if reason is not None:
            raise UserError(
                f"attention implementation {requested!r} can't serve this model here: {reason}; "
                "choose 'auto'"
            )
        chosen, why = requested, "as requested"
    log_choice("attention", requested, chosen, why)
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
    """Computes causal grouped-query attention.

    On a mesh whose `context` axis is larger than 1 the sequence of queries and keys is in zigzag
    order (`parallel.to_zigzag`), and flash-attention kernels run in a ring.

    Args:
      q: [B, T, N, H] (batch, queries, query heads, head dimension).
      k: keys [B, S, K, H] (S keys, K kv heads, N a multiple of K); query head n reads kv head
        n // (N/K).
      v: values [B, S, K, H].
      q_segments: segment id of each query, int32 [B, T]; None: one segment. A query sees only keys
        of its own segment, and segment 0 (padding) is never visible.
      k_segments: segment id of each key, int32 [B, S]; given exactly if `q_segments` is.
      q_start: slot of the first query among the keys, int32 [B]; None: 0. A query in slot i sees
        keys in slots up to i.
      window: a query sees at most this many slots, its own included; None: all.
      scale: factor on q·k; None: 1/√H.
      dropout_rate: probability of dropping an attention weight ("reference" only).
      dropout_key: PRNG key for dropout; None: no dropout.
      implementation: one of `IMPLEMENTATIONS`.

    Returns:
      [B, T, N, H] in q's dtype, softmax in float32; queries without a visible key give 0.

    Raises:
      UserError: the implementation is unknown or cannot serve the call.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dropout = bool(dropout_rate) and dropout_key is not None
    context = context_size()
    platform_name, device = platform()
    call = AttentionCall(
        q_len=q.shape[1] // context,
        k_len=k.shape[1] // context,
        head_dim=q.shape[-1],
        dtype=q.dtype.name,
        dropout=dropout,
        segments=q_segments is not None,
        q_start=q_start is not None,
        layer_window=not (window is None or isinstance(window, int)),
        context=context,
        platform=platform_name,
        device=device,
    )
    chosen = choose_attention(implementation, call)
    if chosen == "reference":
        return _sharded_reference(
            q,
            k,
            v,
            q_start=q_start,
            q_segments=q_segments,
            k_segments=k_segments,
            window=window,
            scale=scale,
            dropout_rate=dropout_rate if dropout else 0.0,
            dropout_key=dropout_key,
        )
    return _attend_per_device(
        q,
        k,
        v,
        q_start=q_start,
        q_segments=q_segments,
        k_segments=k_segments,
        window=window,
        attend=functools.partial(_DEVICE_LOCAL[chosen], scale=scale),
    )


def _repeat_heads(x: jax.Array, groups: int, out_sharding: jax.P | None = None) -> jax.Array:
    """Repeats each kv head `groups` times: [B, S, K, H] to [B, S, K·groups, H].

    B batch rows, S keys, K kv heads, H head dimension. Four-dimensional products run nearly twice
    as fast on CPUs as grouped, five-dimensional ones.

    Args:
      x: keys or values.
      groups: query heads per kv head.
      out_sharding: sharding of the result; None: without a mesh.
    """
    if groups == 1:
        return x
    batch, length, heads, width = x.shape
    x = jnp.broadcast_to(x[:, :, :, None], (batch, length, heads, groups, width))
    shape = (batch, length, heads * groups, width)
    return jax.lax.reshape(x, shape, out_sharding=out_sharding)


def _slots(length: int) -> jax.Array:
    """Returns the position in natural order of each token of a sequence: int32 [length].

    On a mesh with a `context` axis the sequence is in zigzag order.
    """
    size = context_size()
    if size == 1:
        return jnp.arange(length, dtype=jnp.int32)
    return jnp.concatenate([zigzag_slots(length // size, i, size) for i in range(size)])


def _sharded_reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_start: jax.Array | None,
    q_segments: jax.Array | None,
    k_segments: jax.Array | None,
    window: jax.Array | int | None,
    scale: float,
    dropout_rate: float,
    dropout_key: jax.Array | None,
) -> jax.Array:
    """Computes reference attention of global arrays under explicit sharding.

    Keys and values are all-gathered along the sequence; the compiler partitions the rest.

    Args:
      q: [B, T, N, H] (batch, queries, query heads, head dimension).
      k: keys [B, S, K, H] (S keys, K kv heads).
      v: values [B, S, K, H].
      q_start: slot of the first query among the keys, int32 [B]; None: 0.
      q_segments: segment id of each query, int32 [B, T], or None.
      k_segments: segment id of each key, int32 [B, S], or None.
      window: number of slots a query sees, its own included; None: all.
      scale: factor on q·k.
      dropout_rate: probability of dropping an attention weight; 0: no dropout.
      dropout_key: PRNG key for dropout; may be None without it.

    Returns:
      [B, T, N, H] in q's dtype.
    """
    k, v = (reshard(x, "batch", None, "kv_heads", None) for x in (k, v))
    k_segments = None if k_segments is None else reshard(k_segments, "batch", None)
    groups = q.shape[2] // k.shape[2]
    k, v = (_repeat_heads(x, groups, spec("batch", None, "heads", None)) for x in (k, v))
    q_slots = reshard(_slots(q.shape[1])[None], None, "sequence")
    if q_start is not None:
        q_slots = q_slots + q_start[:, None]
    out = reference_attention(
        q,
        k,
        v,
        q_slots,
        _slots(k.shape[1])[None],
        q_segments,
        k_segments,
        window=window,
        scale=scale,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
    )
    return checkpoint_name(out, OUTPUT)


def _flash_or_ring(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    *,
    scale: float,
    make_kernel: Callable[[], FlashKernel],
) -> jax.Array:
    """Runs a flash-attention kernel on one device's arrays, in a ring if the sequence is sharded.

    Args:
      q: [B, T, N, H] (batch, queries, query heads, head dimension), local to the device.
      k: keys [B, S, K, H] (S keys, K kv heads).
      v: values [B, S, K, H].
      mask: which keys a query sees.
      scale: factor on q·k.
      make_kernel: returns the kernel.

    Returns:
      [B, T, N, H] in q's dtype.
    """
    kernel = make_kernel()
    if context_size() > 1:
        return ring_attention(q, k, v, mask, scale, kernel)
    return flash_attention(q, k, v, mask, scale, kernel)[0]


def _vendor_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    *,
    scale: float,
    kernel: Callable[..., jax.Array],
) -> jax.Array:
    """Runs a kernel that comes with JAX, and is differentiable already, on one device's arrays.

    Args:
      q: [B, T, N, H] (batch, queries, query heads, head dimension), local to the device.
      k: keys [B, S, K, H] (S keys, K kv heads).
      v: values [B, S, K, H].
      mask: which keys a query sees.
      scale: factor on q·k.
      kernel: a function of `vendor_kernels`.

    Returns:
      [B, T, N, H] in q's dtype.
    """
    return checkpoint_name(kernel(q, k, v, mask, scale), OUTPUT)


def _tpu_kernel() -> FlashKernel:
    """Returns the TPU kernel; imports it only when it is used."""
    from qwen_jax.kernels.tpu.flash import KERNEL

    return KERNEL


def _gpu_kernel() -> FlashKernel:
    """Returns the Hopper kernel; imports it only when it is used."""
    from qwen_jax.kernels.gpu.flash import KERNEL

    return KERNEL


_DEVICE_LOCAL: dict[str, Callable[..., jax.Array]] = {
    "pallas_tpu": functools.partial(_flash_or_ring, make_kernel=_tpu_kernel),
    "pallas_gpu": functools.partial(_flash_or_ring, make_kernel=_gpu_kernel),
    "chunked": functools.partial(_flash_or_ring, make_kernel=chunked_kernel),
    "splash": functools.partial(_vendor_attention, kernel=vendor_kernels.splash),
    "cudnn": functools.partial(_vendor_attention, kernel=vendor_kernels.cudnn),
}
"""Implementations that work on one device's arrays: functions of (q, k, v, mask, scale=)."""


def _attend_per_device(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_start: jax.Array | None,
    q_segments: jax.Array | None,
    k_segments: jax.Array | None,
    window: jax.Array | int | None,
    attend: Callable[[jax.Array, jax.Array, jax.Array, Mask], jax.Array],
) -> jax.Array:
    """Runs `attend` under `shard_map` on each device's heads, batch rows and part of the sequence.

    Without a mesh, `attend` is called directly.

    Args:
      q: [B, T, N, H] (batch, queries, query heads, head dimension).
      k: keys [B, S, K, H] (S keys, K kv heads).
      v: values [B, S, K, H].
      q_start: slot of the first query among the keys, int32 [B]; None: 0.
      q_segments: segment id of each query, int32 [B, T], or None.
      k_segments: segment id of each key, int32 [B, S], or None.
      window: number of slots a query sees, its own included; None: all.
      attend: attention of one device's arrays: (q, k, v, mask) -> [B, T, N, H].

    Returns:
      [B, T, N, H] in q's dtype.
    """
    is_static = window is None or isinstance(window, int)

    def local(q, k, v, start, q_segments, k_segments, traced_window):
        if start is not None:
            start = jnp.broadcast_to(start, q.shape[:1])
        mask = make_mask(start, q_segments, k_segments, window if is_static else traced_window)
        return attend(q, k, v, mask)

    operands = (q, k, v, q_start, q_segments, k_segments, None if is_static else window)
    if not on_mesh():
        return local(*operands)
    queries = spec("batch", "sequence", "heads", None)
    keys = spec("batch", "sequence", "kv_heads", None)
    ids = spec("batch", "sequence")
    in_specs = (queries, keys, keys, spec("batch"), ids, ids, jax.P())
    return jax.shard_map(local, in_specs=in_specs, out_specs=queries, check_vma=False)(*operands)
