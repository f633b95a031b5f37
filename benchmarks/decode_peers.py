"""Other implementations of paged decode attention, brought to one calling form for `decode`.

Each peer is `(prepare, call)`: prepare turns float pages [L·P,K,page,2H] into the peer's own
operands, once; call(q [R,N,H], operands, table int32 [R,columns], lengths int32 [R]) is what is
timed. The page table already says the layer, as for our kernels, so no peer copies a layer.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp


def _halves(pages):
    """Keys and values [P,K,page,H] of pages [P,K,page,2H]."""
    width = pages.shape[-1] // 2
    return pages[..., :width], pages[..., width:]


def tpu_paged():
    """`jax.experimental.pallas.ops.tpu.paged_attention`, bf16."""
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    def prepare(pages):
        return tuple(x.swapaxes(0, 1) for x in _halves(pages))

    def call(q, operands, table, lengths):
        block = max(n for n in (1, 2, 4, 8, 16) if table.shape[1] % n == 0)
        q = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
        return paged_attention(q, *operands, lengths, table, pages_per_compute_block=block)

    return prepare, call


def tpu_ragged():
    """`jax.experimental.pallas.ops.tpu.ragged_paged_attention`, bf16."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    def prepare(pages):
        k, v = (x.swapaxes(1, 2) for x in _halves(pages))
        count, page, kv_heads, width = k.shape
        return jnp.stack([k, v], axis=3).reshape(count, page, 2 * kv_heads, width)

    def call(q, operands, table, lengths):
        rows = q.shape[0]
        return ragged_paged_attention(
            *(q, operands, lengths, table, jnp.arange(rows + 1, dtype=jnp.int32)),
            jnp.array([rows], jnp.int32),
            sm_scale=q.shape[-1] ** -0.5,
            num_kv_pages_per_block=min(8, table.shape[1]),
            num_queries_per_block=8,
            vmem_limit_bytes=64 << 20,
        )

    return prepare, call


def cudnn():
    """cuDNN's paged attention through jax's private binding, bf16; a cache of one layer only.

    The binding wants as many pages as the table has entries.
    """
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, paged_attention

    def prepare(pages):
        return tuple(x.swapaxes(1, 2) for x in _halves(pages))

    def call(q, operands, table, lengths):
        table = table[:, None, :, None]
        out = paged_attention(
            *(q[:, None], *operands, jnp.ones_like(lengths), lengths, table, table),
            scale=q.shape[-1] ** -0.5,
            mask_type=MaskType.PADDING,
            qkv_layout="BTNH",
        )
        return (out[0] if isinstance(out, list | tuple) else out)[:, 0]

    return prepare, call


def triton():
    """`jax.experimental.pallas.ops.gpu.paged_attention` (Triton; deprecated in jax 0.11), bf16."""
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    def prepare(pages):
        return tuple(x.swapaxes(0, 1) for x in _halves(pages))

    def call(q, operands, table, lengths):
        q = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
        # One page of 128 a block: with four, the kernel asks for more shared memory than there is.
        splits = max(n for n in (1, 2, 4, 8, 16) if table.shape[1] % n == 0)
        run = functools.partial(paged_attention, pages_per_compute_block=1, k_splits=splits)
        return run(q, *operands, table, lengths)

    return prepare, call


PEERS = {
    "tpu": {"jax tpu paged_attention": tpu_paged, "jax tpu ragged_paged_attention": tpu_ragged},
    "gpu": {"cuDNN": cudnn, "jax triton paged_attention": triton},
    "cpu": {},
}
"""By platform and by the name shown."""
