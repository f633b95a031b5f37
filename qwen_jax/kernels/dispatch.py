"""`attention(...)`: one contract, dispatched to an implementation that is chosen out loud."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from absl import logging
from jax.ad_checkpoint import checkpoint_name

from qwen_jax.errors import UserError, nearest
from qwen_jax.kernels import vendor_kernels
from qwen_jax.kernels.chunked import chunked_kernel
from qwen_jax.kernels.flash import OUTPUT, FlashKernel, flash_attention
from qwen_jax.kernels.mask import make_mask
from qwen_jax.kernels.reference import reference_attention
from qwen_jax.kernels.ring import ring_attention
from qwen_jax.parallel import context_size, on_mesh, platform, reshard, spec, zigzag_slots

IMPLEMENTATIONS = ("auto", "pallas_tpu", "pallas_gpu", "cudnn", "splash", "chunked", "reference")

# Scores of one head and row up to this size are materialised whole (1 MiB in float32) where queries
# are a handful. Above it, or with a block of queries, blocks win.
_WHOLE_SCORES = 512 * 512
_BLOCK = 128  # queries from which it is worth while to skip what the mask hides


@dataclasses.dataclass(frozen=True)
class Request:
    """What decides whether an implementation can serve a call; shapes are those of one device.

    Attributes:
      q_len, k_len: tokens of queries and keys. head_dim: H. dtype: name of q's dtype.
      dropout: on attention weights. segments: whether segment ids are given.
      q_start: whether queries start in a later slot. layer_window: whether the window is traced.
      context: devices the sequence is spread over.
      platform: "cpu", "gpu" or "tpu". device: its kind, such as "TPU v5 lite".
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


def _no_tpu_kernel(request: Request) -> str | None:
    if request.platform != "tpu":
        return f"it runs on TPUs and this is {request.device}"
    from qwen_jax.kernels.tpu import flash

    return flash.unsupported_reason(
        head_dim=request.head_dim, dtype=request.dtype, device_kind=request.device
    )


def _no_gpu_kernel(request: Request) -> str | None:
    if request.platform != "gpu":
        return f"it runs on Hopper GPUs and this is {request.device}"
    from qwen_jax.kernels.gpu import flash

    return flash.unsupported_reason(
        head_dim=request.head_dim, dtype=request.dtype, device_kind=request.device
    )


def _no_library_kernel(request: Request, name: str, runs_on: str) -> str | None:
    if request.platform != runs_on:
        return f"it runs on {runs_on.upper()}s and this is {request.device}"
    lacks = {
        "a context axis": request.context > 1,
        "queries that start in a later slot (a KV cache)": request.q_start,
        "windows that differ between layers": request.layer_window,
        "segment ids": request.segments and name == "cudnn",
    }
    for what, wanted in lacks.items():
        if wanted:
            return f"it has no support for {what}"
    if name == "cudnn" and request.dtype not in ("bfloat16", "float16"):
        return f"it computes in bfloat16 or float16 and this is {request.dtype}"
    if name == "splash" and (request.q_len % 128 or request.k_len % 128):
        return f"it needs a multiple of 128 tokens and this is {request.q_len}×{request.k_len}"
    return None


def unsupported_reason(name: str, request: Request) -> str | None:
    """Why an implementation can't serve a request, in one clause; None when it can."""
    if request.dropout and name != "reference":
        return "it has no dropout on attention weights (set model.attn_dropout to 0)"
    if name == "pallas_tpu":
        return _no_tpu_kernel(request)
    if name == "pallas_gpu":
        return _no_gpu_kernel(request)
    if name in ("splash", "cudnn"):
        return _no_library_kernel(request, name, "tpu" if name == "splash" else "gpu")
    return None


def _automatic(request: Request) -> tuple[str, str]:
    """The choice of `auto` and its reason."""
    if request.dropout:
        return "reference", "the only one with dropout on attention weights"
    few = request.q_len * request.k_len <= _WHOLE_SCORES
    if request.context == 1 and few and request.q_len < _BLOCK:
        return "reference", "few scores: all at once"
    reasons = []
    for name in ("pallas_tpu", "pallas_gpu", "cudnn"):
        reason = unsupported_reason(name, request)
        if reason is None:
            return name, f"the kernel for {request.device}"
        if request.platform in ("tpu", "gpu"):
            reasons.append(f"{name}: {reason}")
    return "chunked", "; ".join(reasons) or "long sequences: scores a block at a time"


def choose_attention(requested: str, request: Request) -> str:
    """Resolves `auto` and refuses what can't run; logs each choice once.

    Raises:
      UserError: unknown name, or a request that the implementation can't serve.
    """
    if requested not in IMPLEMENTATIONS:
        raise UserError(
            f"attention implementation {requested!r} is unknown"
            f"{nearest(requested, IMPLEMENTATIONS)}; choose one of {', '.join(IMPLEMENTATIONS)}"
        )
    if requested == "auto":
        chosen, why = _automatic(request)
    else:
        reason = unsupported_reason(requested, request)
        if reason is not None:
            raise UserError(
                f"attention implementation {requested!r} can't serve this model here: {reason}; "
                "choose 'auto'"
            )
        chosen, why = requested, "as requested"
    _announce(requested, chosen, why)
    return chosen


@functools.cache
def _announce(requested: str, chosen: str, why: str) -> None:
    logging.info("attention: %s (requested %s; %s)", chosen, requested, why)


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

    On a mesh whose `context` axis is larger than 1 the sequence of queries and keys is in zigzag
    order (`parallel.to_zigzag`), and block kernels run in a ring.

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

    Raises:
      UserError: the implementation is unknown or can't serve the request.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dropout = bool(dropout_rate) and dropout_key is not None
    context = context_size()
    where, device = platform()
    request = Request(
        q_len=q.shape[1] // context,
        k_len=k.shape[1] // context,
        head_dim=q.shape[-1],
        dtype=q.dtype.name,
        dropout=dropout,
        segments=q_segments is not None,
        q_start=q_start is not None,
        layer_window=not (window is None or isinstance(window, int)),
        context=context,
        platform=where,
        device=device,
    )
    chosen = choose_attention(implementation, request)
    operands = (q, k, v, q_start, q_segments, k_segments, window)
    if chosen == "reference":
        return _whole(*operands, scale, dropout_rate if dropout else 0.0, dropout_key)
    return _per_device(*operands, functools.partial(_LOCAL[chosen], scale=scale))


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


def _slots(length: int) -> jax.Array:
    """Natural slot of each token along a sequence as it lies on the context axis: int32 [T]."""
    size = context_size()
    if size == 1:
        return jnp.arange(length, dtype=jnp.int32)
    return jnp.concatenate([zigzag_slots(length // size, i, size) for i in range(size)])


def _whole(q, k, v, start, q_segments, k_segments, window, scale, rate, key):
    """The reference under explicit sharding: the compiler partitions it, keys are collected."""
    k, v = (reshard(x, "batch", None, "kv_heads", None) for x in (k, v))
    k_segments = None if k_segments is None else reshard(k_segments, "batch", None)
    groups = q.shape[2] // k.shape[2]
    k, v = (_repeat_heads(x, groups, spec("batch", None, "heads", None)) for x in (k, v))
    q_slots = reshard(_slots(q.shape[1])[None], None, "sequence")
    if start is not None:
        q_slots = q_slots + start[:, None]
    out = reference_attention(
        *(q, k, v, q_slots, _slots(k.shape[1])[None], q_segments, k_segments),
        window=window,
        scale=scale,
        dropout_rate=rate,
        dropout_key=key,
    )
    return checkpoint_name(out, OUTPUT)


def _flash(q, k, v, mask, *, scale, kernel):
    """A block kernel on one device's arrays, in a ring where the sequence is spread."""
    kernel: FlashKernel = kernel()
    if context_size() > 1:
        return ring_attention(q, k, v, mask, scale, kernel)
    return flash_attention(q, k, v, mask, scale, kernel)[0]


def _opaque(q, k, v, mask, *, scale, kernel):
    """A library kernel, which differentiates itself."""
    return checkpoint_name(kernel(q, k, v, mask, scale), OUTPUT)


def _tpu_kernel() -> FlashKernel:
    from qwen_jax.kernels.tpu.flash import KERNEL

    return KERNEL


def _gpu_kernel() -> FlashKernel:
    from qwen_jax.kernels.gpu.flash import KERNEL

    return KERNEL


_LOCAL = {
    "pallas_tpu": functools.partial(_flash, kernel=_tpu_kernel),
    "pallas_gpu": functools.partial(_flash, kernel=_gpu_kernel),
    "chunked": functools.partial(_flash, kernel=chunked_kernel),
    "splash": functools.partial(_opaque, kernel=vendor_kernels.splash),
    "cudnn": functools.partial(_opaque, kernel=vendor_kernels.cudnn),
}


def _per_device(q, k, v, start, q_segments, k_segments, window, attend):
    """Runs `attend` on each device's own heads, batch rows and part of the sequence."""
    static = window is None or isinstance(window, int)

    def local(q, k, v, start, q_segments, k_segments, traced):
        if start is not None:
            start = jnp.broadcast_to(start, q.shape[:1])
        mask = make_mask(start, q_segments, k_segments, window if static else traced)
        return attend(q, k, v, mask)

    operands = (q, k, v, start, q_segments, k_segments, None if static else window)
    if not on_mesh():
        return local(*operands)
    queries = spec("batch", "sequence", "heads", None)
    keys = spec("batch", "sequence", "kv_heads", None)
    ids = spec("batch", "sequence")
    in_specs = (queries, keys, keys, spec("batch"), ids, ids, jax.P())
    return jax.shard_map(local, in_specs=in_specs, out_specs=queries, check_vma=False)(*operands)
