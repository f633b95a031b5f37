"""Paged decode attention of other libraries, adapted to one calling form for `benchmarks.decode`.

Each adapter returns (prepare, call): `prepare` converts float pages [layers · pages, kv heads, page
size, 2 · head_dim] (key and value of a token side by side) to the operands of the library, once;
`call(q, operands, table, lengths)` is what is timed, with q [requests, query heads, head_dim],
table int32 [requests, pages per request] and lengths int32 [requests]. Page ids already include the
layer, as for our kernels, so no library copies a layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

PeerFunctions: TypeAlias = tuple[Callable[[jax.Array], Any], Callable[..., jax.Array]]
"""(prepare, call), see above."""


def _split_keys_and_values(pages: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Splits pages [pages, kv heads, page size, 2 · head_dim] into keys and values."""
    width = pages.shape[-1] // 2
    return pages[..., :width], pages[..., width:]


def tpu_paged() -> PeerFunctions:
    """Returns (prepare, call) of `jax.experimental.pallas.ops.tpu.paged_attention`, bf16."""
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    def prepare(pages):
        return tuple(x.swapaxes(0, 1) for x in _split_keys_and_values(pages))

    def call(q, operands, table, lengths):
        block = max(n for n in (1, 2, 4, 8, 16) if table.shape[1] % n == 0)
        q = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
        return paged_attention(q, *operands, lengths, table, pages_per_compute_block=block)

    return prepare, call


def tpu_ragged() -> PeerFunctions:
    """Returns (prepare, call) of jax's TPU kernel `ragged_paged_attention`, bf16."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    def prepare(pages):
        k, v = (x.swapaxes(1, 2) for x in _split_keys_and_values(pages))
        count, page, kv_heads, width = k.shape
        return jnp.stack([k, v], axis=3).reshape(count, page, 2 * kv_heads, width)

    def call(q, operands, table, lengths):
        rows = q.shape[0]
        return ragged_paged_attention(
            q,
            operands,
            lengths,
            table,
            jnp.arange(rows + 1, dtype=jnp.int32),
            jnp.array([rows], jnp.int32),
            sm_scale=q.shape[-1] ** -0.5,
            num_kv_pages_per_block=min(8, table.shape[1]),
            num_queries_per_block=8,
            vmem_limit_bytes=64 << 20,
        )

    return prepare, call


def cudnn() -> PeerFunctions:
    """Returns (prepare, call) of cuDNN's paged attention by jax's private binding, bf16.

    The binding wants as many pages as the table has entries, so the cache must have one layer.
    """
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, paged_attention

    def prepare(pages):
        return tuple(x.swapaxes(1, 2) for x in _split_keys_and_values(pages))

    def call(q, operands, table, lengths):
        k, v = operands
        table = table[:, None, :, None]
        out = paged_attention(
            q[:, None],
            k,
            v,
            jnp.ones_like(lengths),
            lengths,
            table,
            table,
            scale=q.shape[-1] ** -0.5,
            mask_type=MaskType.PADDING,
            qkv_layout="BTNH",
        )
        return (out[0] if isinstance(out, list | tuple) else out)[:, 0]

    return prepare, call


def triton() -> PeerFunctions:
    """Returns (prepare, call) of `jax.experimental.pallas.ops.gpu.paged_attention`, bf16.

    A Triton kernel, deprecated in jax 0.11.
    """
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    def prepare(pages):
        return tuple(x.swapaxes(0, 1) for x in _split_keys_and_values(pages))

    def call(q, operands, table, lengths):
        q = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
        # One page of 128 tokens per block: with four, the kernel exceeds shared memory.
        splits = max(n for n in (1, 2, 4, 8, 16) if table.shape[1] % n == 0)
        run = functools.partial(paged_attention, pages_per_compute_block=1, k_splits=splits)
        return run(q, *operands, table, lengths)

    return prepare, call


PEERS: dict[str, dict[str, Callable[[], PeerFunctions]]] = {
    "tpu": {"jax tpu paged_attention": tpu_paged, "jax tpu ragged_paged_attention": tpu_ragged},
    "gpu": {"cuDNN": cudnn, "jax triton paged_attention": triton},
    "cpu": {},
}
"""Adapters by platform and by the name shown in the table."""
