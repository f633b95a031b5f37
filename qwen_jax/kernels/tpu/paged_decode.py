"""Decode attention over a paged cache on TPU: pages streamed from HBM, each read once.

One grid step a request (and, on chips with two cores, a half of the kv heads). Inside it, blocks of
several pages are copied into one of two buffers while the other is computed on; the last block of
a request starts the copies of the next one, so only the very first copy is waited for idly. Only
pages that hold a visible slot are fetched. For each kv head all query heads of its group are one
matrix, so a page serves them all. Softmax is online (arXiv:2205.14135), in base 2, in float32.

8-bit pages become scores and outputs without being dequantised number by number: with codes c,
scale a and zero z of a token, q·k = a·(q·c − z·Σq), and Σ p·v = Σ (p·a)·c − Σ (p·a)·z. Codes are
exact in bf16, and scale and zero lie along the lanes as the scores do.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.kernels.cache import SCALE_ROWS, PagedCache
from qwen_jax.kernels.mask import MASKED
from qwen_jax.kernels.tpu import paged_append
from qwen_jax.parallel import current_mesh

_LANES = 128
_BUFFER_BYTES = 2 << 20
"""Of one of the two buffers: long enough a copy to hide its latency, and small beside VMEM."""
_BLOCK_SCORES = 16384
"""Scores of a kv head kept at once: 16 of the 64 vector registers."""
_VMEM_BYTES = 48 << 20
_LOG2E = math.log2(math.e)
_ENTRIES = 224 << 10
"""Most entries of a device's page table: 896 KiB of the 1 MiB of scalar memory."""
_ROWS = 512
"""Most rows of queries a kv head: beyond it, one page's scores outgrow the registers by far."""


def unsupported_reason(cache: PagedCache, *, q_len: int, heads: int, entries: int) -> str | None:
    """Why this kernel can't serve a cache with `heads` query heads a kv head; None if it can."""
    if entries > _ENTRIES:
        return f"a page table of {entries} entries; the TPU kernel takes {_ENTRIES} on a device"
    if cache.head_dim != 64 and cache.head_dim % _LANES:
        return f"heads of {cache.head_dim}; the TPU kernel takes 64 or a multiple of 128"
    if q_len * heads > _ROWS:
        return f"{q_len} query tokens by {heads} heads a kv head; the TPU kernel takes {_ROWS}"
    return paged_append.unsupported_reason(cache)


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Everything known when compiling."""

    kv_heads: int  # of one grid step
    groups: int  # query heads a kv head
    q_len: int
    rows: int  # groups · q_len, filled up to whole tiles
    width: int  # H
    page: int
    columns: int  # of the page table
    block: int  # pages a block
    scale: float
    quantised: bool

    @property
    def tokens(self) -> int:
        """Tokens a block."""
        return self.block * self.page


def paged_decode(q, pages, scales, page_table, lengths, start, window, *, scale, head_blocks=None):
    """Contract: `kernels.paged._reference`.

    head_blocks: kv heads are split over so many independent grid rows; by default the chip's number
    of cores where that divides them.
    """
    requests, q_len, heads, width = q.shape
    kv_heads, page = pages.shape[1:3]
    groups = heads // kv_heads
    if head_blocks is None:
        head_blocks = _cores() if kv_heads % _cores() == 0 else 1
    rows = -(-groups * q_len // 8) * 8
    head_bytes = page * 2 * width * pages.dtype.itemsize
    block = _BUFFER_BYTES // (kv_heads // head_blocks * head_bytes)
    block = max(1, min(block, _BLOCK_SCORES // rows // page, page_table.shape[1]))
    sizes = _Sizes(
        *(kv_heads // head_blocks, groups, q_len, rows, width, page, page_table.shape[1]),
        *(block, scale, scales is not None),
    )
    plan = _plan(lengths, start, window, sizes)
    compute = jnp.float32 if pages.dtype == jnp.float32 else jnp.bfloat16
    # [R,T,K,G,H] -> [R,K,T·G,H], zeros below.
    q = q.reshape(requests, q_len, kv_heads, groups, width).swapaxes(1, 2).astype(compute)
    q = q.reshape(requests, kv_heads, q_len * groups, width)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, rows - q_len * groups), (0, -width % _LANES)))
    out, lse = _call(sizes, head_blocks, q, pages, scales, page_table, plan)

    def heads_last(x):  # [R,K,rows,·] -> [R,T,N,·]
        x = x[:, :, : q_len * groups].reshape(requests, kv_heads, q_len, groups, -1)
        return x.swapaxes(1, 2).reshape(requests, q_len, heads, -1)

    return heads_last(out)[..., -width:], heads_last(lse)[..., 0].swapaxes(1, 2)


def _cores() -> int:
    """Cores of a chip of the mesh in force, or of this host's: 2 on v4 and v5p."""
    device = current_mesh().abstract_device or jax.devices()[0]
    return getattr(device, "num_cores", None) or 1


def _plan(lengths, start, window, sizes: _Sizes) -> jax.Array:
    """int32 [7,R+1]: per request what the kernel needs to know; divisions are done here.

    Rows: first page, page after the last, blocks, slot of the first query, window, slot after the
    last one seen, and the next request with work after request r − 1.
    """
    end = jnp.minimum(lengths, start + sizes.q_len)
    first = jnp.maximum(start - window + 1, 0) // sizes.page
    last = (end + sizes.page - 1) // sizes.page
    blocks = jnp.maximum((last - first + sizes.block - 1) // sizes.block, 0)
    requests = lengths.shape[0]
    ids = jnp.where(blocks > 0, jnp.arange(requests), requests)
    following = jax.lax.cummin(jnp.append(ids, requests), reverse=True)
    window = jnp.broadcast_to(window, (requests,))
    rows = jnp.stack([first, last, blocks, start, window, end])
    return jnp.vstack([jnp.pad(rows, ((0, 0), (0, 1))), following]).astype(jnp.int32)


_FIRST, _LAST, _BLOCKS, _START, _WINDOW, _END, _NEXT = range(7)


def _call(sizes: _Sizes, head_blocks, q, pages, scales, page_table, plan):
    requests, _, rows, q_width = q.shape
    kv_heads, width = sizes.kv_heads, sizes.width

    def block(lanes):
        return pl.BlockSpec((1, kv_heads, rows, lanes), lambda h, r, *_: (r, h, 0, 0))

    buffers = [pltpu.VMEM((2, kv_heads, sizes.tokens, 2 * width), pages.dtype)]
    operands = [q, pages]
    if sizes.quantised:
        shape = (2, kv_heads, len(SCALE_ROWS), sizes.tokens)
        buffers.append(pltpu.VMEM(shape, jnp.float32))
        operands.append(scales)
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(head_blocks, requests),
        in_specs=[block(q_width), *(pl.BlockSpec(memory_space=pl.ANY) for _ in operands[1:])],
        out_specs=[block(q_width), block(_LANES)],
        scratch_shapes=[
            *buffers,
            pltpu.VMEM((kv_heads, rows, q_width), jnp.float32),
            *(pltpu.VMEM((kv_heads, rows, _LANES), jnp.float32) for _ in range(2)),
            pltpu.SMEM((1,), jnp.int32),
            pltpu.SemaphoreType.DMA((2, len(buffers))),
        ],
    )
    shape = (requests, kv_heads * head_blocks, rows)
    return pl.pallas_call(
        functools.partial(_kernel, sizes),
        grid_spec=grid_spec,
        out_shape=[
            jax.ShapeDtypeStruct((*shape, lanes), jnp.float32) for lanes in (q_width, _LANES)
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        cost_estimate=_cost(sizes, head_blocks, q, operands[1:], page_table.shape),
        name="paged_decode",
    )(page_table.reshape(-1), plan, *operands)


def _cost(sizes: _Sizes, head_blocks, q, caches, table) -> pl.CostEstimate:
    """For the scheduler: every request as long as its row of the table (lengths come later)."""
    tokens = table[0] * min(table[1], caches[0].shape[0]) * sizes.page
    scores = tokens * sizes.kv_heads * head_blocks * sizes.groups * sizes.q_len
    per_token = sum(x.size * x.dtype.itemsize // (x.shape[0] * sizes.page) for x in caches)
    return pl.CostEstimate(
        flops=4 * scores * sizes.width,
        transcendentals=scores,
        bytes_accessed=tokens * per_token + q.size * (q.dtype.itemsize + 4),
    )


@dataclasses.dataclass(frozen=True)
class _Copies:
    """From pages in HBM to buffers in VMEM, for one grid step's kv heads.

    Attributes:
      table, plan: scalars, see `_call`.
      hbm: pages, and scales if there are any; buffers, semaphores: for each of them two.
      h0: first kv head.
    """

    sizes: _Sizes
    table: jax.Array
    plan: jax.Array
    hbm: list
    buffers: list
    semaphores: jax.Array
    h0: jax.Array

    def start(self, request, block, slot) -> None:
        """Starts copying a block's pages into buffer `slot`."""
        self._each(request, block, slot, lambda copy: copy.start())

    def wait(self, request, block, slot) -> None:
        """Until they are there."""
        self._each(request, block, slot, lambda copy: copy.wait())

    def _each(self, request, block, slot, act) -> None:
        sizes = self.sizes
        first = self.plan[_FIRST, request] + block * sizes.block
        count = jnp.minimum(self.plan[_LAST, request] - first, sizes.block)

        def one(i, _):
            page = self.table[request * sizes.columns + first + i]
            place = pl.ds(pl.multiple_of(i * sizes.page, sizes.page), sizes.page)
            for n, (source, buffer) in enumerate(zip(self.hbm, self.buffers, strict=True)):
                # Tokens are the third axis of pages and the last of scales.
                target = buffer.at[slot, :, place] if n == 0 else buffer.at[slot, :, :, place]
                source = source.at[page, pl.ds(self.h0, sizes.kv_heads)]
                act(pltpu.make_async_copy(source, target, self.semaphores.at[slot, n]))
            return 0

        jax.lax.fori_loop(0, count, one, 0)


def _kernel(sizes: _Sizes, table_ref, plan_ref, q_ref, pages_ref, *rest):
    """One request's kv heads. Names ending in _ref are memory; see `_call` for their shapes."""
    hbm, rest = [pages_ref], list(rest)
    if sizes.quantised:
        hbm.append(rest.pop(0))
    out_ref, lse_ref, *rest = rest
    buffers, (acc_ref, top_ref, sum_ref, slot_ref, semaphores) = rest[:-5], rest[-5:]
    r, requests = pl.program_id(1), pl.num_programs(1)
    h0 = pl.program_id(0) * sizes.kv_heads
    copies = _Copies(sizes, table_ref, plan_ref, hbm, buffers, semaphores, h0)

    @pl.when(r == plan_ref[_NEXT, 0])
    def _():
        slot_ref[0] = 0
        copies.start(r, 0, 0)

    top_ref[...] = jnp.full(top_ref.shape, MASKED, jnp.float32)
    sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)
    acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)
    blocks, following = plan_ref[_BLOCKS, r], plan_ref[_NEXT, r + 1]

    def step(block, slot):
        more = block + 1 < blocks

        @pl.when(more | (following < requests))
        def _():
            copies.start(jnp.where(more, r, following), jnp.where(more, block + 1, 0), 1 - slot)

        copies.wait(r, block, slot)
        where = _Where(
            s0=(plan_ref[_FIRST, r] + block * sizes.block) * sizes.page,
            start=plan_ref[_START, r],
            window=plan_ref[_WINDOW, r],
            end=plan_ref[_END, r],
        )
        cut = where.cut(sizes)
        refs = (q_ref, buffers, acc_ref, top_ref, sum_ref)
        pl.when(cut)(lambda: _block(sizes, where, slot, *refs))
        pl.when(~cut)(lambda: _block(sizes, None, slot, *refs))
        return 1 - slot

    @pl.when(blocks > 0)
    def _():
        slot_ref[0] = jax.lax.fori_loop(0, blocks, step, slot_ref[0])

    total = sum_ref[...]
    some = total > 0
    total = jnp.where(some, total, 1.0)
    lse_ref[0] = jnp.where(some, (top_ref[...] + jnp.log2(total)) / _LOG2E, MASKED)
    out_ref[0] = acc_ref[...] / total[:, :, :1]


@dataclasses.dataclass(frozen=True)
class _Where:
    """A block of slots s0 … beside the queries of its request, int32 scalars."""

    s0: jax.Array
    start: jax.Array
    window: jax.Array
    end: jax.Array

    def cut(self, sizes: _Sizes) -> jax.Array:
        """Whether some query does not see some slot of the block."""
        past = self.s0 + sizes.tokens > jnp.minimum(self.end, self.start + 1)
        return past | (self.s0 + self.window < self.start + sizes.q_len)

    def seen(self, sizes: _Sizes) -> jax.Array:
        """bool [rows,tokens]."""
        shape = (sizes.rows, sizes.tokens)
        slots = self.s0 + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        query = jnp.full(shape, self.start)
        for t in range(1, sizes.q_len):
            query += (row >= t * sizes.groups).astype(jnp.int32)
        return (slots <= query) & (query - slots < self.window) & (slots < self.end)

    def written(self, sizes: _Sizes, width: int) -> jax.Array:
        """bool [tokens,width]: slots that hold a token of this request, in pages fetched."""
        slots = self.s0 + jax.lax.broadcasted_iota(jnp.int32, (sizes.tokens, width), 0)
        return slots < self.end


def _block(sizes: _Sizes, where, slot, q_ref, buffers, acc_ref, top_ref, sum_ref):
    """Takes a block of keys and values into the running softmax of every kv head.

    where: None if every query sees every slot.
    """
    seen = None if where is None else where.seen(sizes)

    def head(h):
        tokens = buffers[0][slot, h]
        scales = buffers[1][slot, h] if sizes.quantised else None
        q = q_ref[0, h]
        k, v = _halves(tokens.astype(q.dtype), sizes.width)
        if where is not None and not sizes.quantised:
            # Slots nobody wrote may hold anything, and 0 · nan is nan. Codes are always finite.
            v = jnp.where(where.written(sizes, v.shape[1]), v, jnp.zeros_like(v))
        s = _dot(q, k, 1)
        if scales is None:
            s = s * (sizes.scale * _LOG2E)
        else:
            q_sum = q.astype(jnp.float32).sum(axis=1, keepdims=True)
            s = (s - q_sum * scales[1:2]) * (scales[0:1] * (sizes.scale * _LOG2E))
        if seen is not None:
            s = jnp.where(seen, s, MASKED)
        old = top_ref[h]
        top = jnp.maximum(old, s.max(axis=1, keepdims=True))
        p = jnp.exp2(s - top[:, :1])
        if seen is not None:
            p = jnp.where(seen, p, 0.0)
        keep = jnp.exp2(old - top)
        top_ref[h] = top
        sum_ref[h] = sum_ref[h] * keep + p.sum(axis=1, keepdims=True)
        if scales is not None:
            p = p * scales[2:3]
            if seen is not None:
                p = jnp.where(seen, p, 0.0)
        weights = p.astype(q.dtype)
        out = _dot(weights, v, 0)
        if scales is not None:
            offset = weights.astype(jnp.float32) * scales[3:4]
            if seen is not None:
                offset = jnp.where(seen, offset, 0.0)
            out = out - offset.sum(axis=1, keepdims=True)
        acc_ref[h] = acc_ref[h] * keep[:, :1] + out

    unroll = next(n for n in (8, 5, 4, 3, 2, 1) if sizes.kv_heads % n == 0)
    if unroll == sizes.kv_heads:
        for h in range(unroll):
            head(h)
    else:

        @pl.loop(0, sizes.kv_heads // unroll)
        def _(i):
            for h in range(unroll):
                head(i * unroll + h)


def _halves(tokens, width: int):
    """Keys and values of [tokens,2H].

    Heads of 64 stay side by side in 128 lanes: queries have zeros where the values lie, and outputs
    carry 64 lanes of keys that nobody reads.
    """
    return (tokens[:, :width], tokens[:, width:]) if width % _LANES == 0 else (tokens, tokens)


def _dot(a, b, axis: int):
    """a [rows,x] times b, over b's axis, in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
