"""Decode attention over a paged KV cache on TPU: pages are streamed from HBM, each read once.

One grid step per request (and, on chips with two cores, per half of the kv heads). Within it,
blocks of several pages are copied into one of two buffers while the other is processed; the last
block of a request starts the copies of the next request, so only the very first copy is not
overlapped. Only pages with a visible slot are copied. All query heads of a kv head are one matrix,
so a page serves all of them. Softmax is online (arXiv:2205.14135), in base 2, in float32.

8-bit pages enter scores and outputs without being dequantised element by element: with codes c,
scale a and zero z of a token, q·k = a·(q·c − z·Σq), and Σ p·v = Σ (p·a)·c − Σ (p·a)·z. Codes are
exact in bf16, and scale and zero are along the lanes, as the scores are.
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
"""Size of each of the two buffers: enough to hide the latency of a copy, and small against VMEM."""
_BLOCK_SCORES = 16384
"""Scores of a kv head at a time: 16 of the 64 vector registers."""
_VMEM_BYTES = 48 << 20
_LOG2E = math.log2(math.e)
_ENTRIES = 224 << 10
"""Largest number of entries of a device's page table: 896 KiB of 1 MiB of scalar memory."""
_ROWS = 512
"""Largest number of query rows per kv head: with more, scores of a page exceed the registers."""


def unsupported_reason(cache: PagedCache, *, q_len: int, heads: int, entries: int) -> str | None:
    """Returns why this kernel does not support a call; None if it does.

    Args:
      cache: the cache.
      q_len: query tokens per request.
      heads: query heads per kv head.
      entries: entries of a device's page table.
    """
    if entries > _ENTRIES:
        return f"a page table of {entries} entries; the TPU kernel takes {_ENTRIES} on a device"
    if cache.head_dim != 64 and cache.head_dim % _LANES:
        return f"heads of {cache.head_dim}; the TPU kernel takes 64 or a multiple of 128"
    if q_len * heads > _ROWS:
        return f"{q_len} query tokens by {heads} heads a kv head; the TPU kernel takes {_ROWS}"
    return paged_append.unsupported_reason(cache)


@dataclasses.dataclass(frozen=True)
class DecodeParams:
    """Static parameters of a call.

    Attributes:
      kv_heads: kv heads per grid step.
      groups: query heads per kv head.
      q_len: query tokens per request.
      rows: groups · q_len, padded to complete tiles.
      width: head dimension H.
      page: tokens per page.
      columns: pages per request in the page table.
      block: pages per block.
      scale: factor on q·k.
      quantised: whether pages are 8-bit.
    """

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
        """Returns the number of tokens per block."""
        return self.block * self.page


def paged_decode(q, pages, scales, page_table, lengths, start, window, *, scale, head_blocks=None):
    """Attends to cached tokens; the contract is `kernels.paged._reference`.

    Args:
      q: queries [R, T, N, H].
      pages: [P, K, page, 2H].
      scales: float32 [P, K, 4, page] for uint8 pages, else None.
      page_table: int32 [R, pages per request].
      lengths: tokens of each request in the cache, int32 [R].
      start: slot of the first query, int32 [R].
      window: number of slots that a query sees, int32 scalar.
      scale: factor on q·k.
      head_blocks: number of independent grid rows that the kv heads are split over; by default the
        number of cores of the chip, if it divides them.

    Returns:
      (output float32 [R, T, N, H], log-sum-exp float32 [R, N, T]).
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
    static = DecodeParams(
        *(kv_heads // head_blocks, groups, q_len, rows, width, page, page_table.shape[1]),
        *(block, scale, scales is not None),
    )
    plan = _request_plan(lengths, start, window, static)
    compute = jnp.float32 if pages.dtype == jnp.float32 else jnp.bfloat16
    # [R,T,K,G,H] -> [R,K,T·G,H], zeros below.
    q = q.reshape(requests, q_len, kv_heads, groups, width).swapaxes(1, 2).astype(compute)
    q = q.reshape(requests, kv_heads, q_len * groups, width)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, rows - q_len * groups), (0, -width % _LANES)))
    out, lse = _launch(static, head_blocks, q, pages, scales, page_table, plan)

    def heads_last(x):  # [R,K,rows,·] -> [R,T,N,·]
        """Reorders [R, K, rows, ·] to [R, T, N, ·]."""
        x = x[:, :, : q_len * groups].reshape(requests, kv_heads, q_len, groups, -1)
        return x.swapaxes(1, 2).reshape(requests, q_len, heads, -1)

    return heads_last(out)[..., -width:], heads_last(lse)[..., 0].swapaxes(1, 2)


def _cores() -> int:
    """Returns the number of cores per chip of the current mesh or host: 2 on v4 and v5p."""
    device = current_mesh().abstract_device or jax.devices()[0]
    return getattr(device, "num_cores", None) or 1


def _request_plan(lengths, start, window, static: DecodeParams) -> jax.Array:
    """Returns per request what the kernel needs, int32 [7, R+1]; divisions are done here.

    Rows: first page, page after the last, number of blocks, slot of the first query, window, slot
    after the last visible one, and the next request with work after request r − 1.
    """
    end = jnp.minimum(lengths, start + static.q_len)
    first = jnp.maximum(start - window + 1, 0) // static.page
    last = (end + static.page - 1) // static.page
    blocks = jnp.maximum((last - first + static.block - 1) // static.block, 0)
    requests = lengths.shape[0]
    ids = jnp.where(blocks > 0, jnp.arange(requests), requests)
    following = jax.lax.cummin(jnp.append(ids, requests), reverse=True)
    window = jnp.broadcast_to(window, (requests,))
    rows = jnp.stack([first, last, blocks, start, window, end])
    return jnp.vstack([jnp.pad(rows, ((0, 0), (0, 1))), following]).astype(jnp.int32)


_FIRST, _LAST, _BLOCKS, _START, _WINDOW, _END, _NEXT = range(7)


def _launch(static: DecodeParams, head_blocks, q, pages, scales, page_table, plan):
    """Calls the kernel for all requests.

    Args:
      static: static parameters.
      head_blocks: grid rows over kv heads.
      q: queries [R, K, rows, lanes].
      pages: [P, K, page, 2H].
      scales: float32 [P, K, 4, page] or None.
      page_table: int32 [R, pages per request].
      plan: int32 [7, R+1], see `_request_plan`.

    Returns:
      (output [R, K, rows, lanes], log-sum-exp in every lane [R, K, rows, LANES]), float32.
    """
    requests, _, rows, q_width = q.shape
    kv_heads, width = static.kv_heads, static.width

    def block(lanes):
        """Returns the block of one request with so many lanes."""
        return pl.BlockSpec((1, kv_heads, rows, lanes), lambda h, r, *_: (r, h, 0, 0))

    buffers = [pltpu.VMEM((2, kv_heads, static.tokens, 2 * width), pages.dtype)]
    operands = [q, pages]
    if static.quantised:
        shape = (2, kv_heads, len(SCALE_ROWS), static.tokens)
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
    out_dims = (requests, kv_heads * head_blocks, rows)
    return pl.pallas_call(
        functools.partial(_kernel, static),
        grid_spec=grid_spec,
        out_shape=[
            jax.ShapeDtypeStruct((*out_dims, lanes), jnp.float32) for lanes in (q_width, _LANES)
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        cost_estimate=_cost_estimate(static, head_blocks, q, operands[1:], page_table.shape),
        name="paged_decode",
    )(page_table.reshape(-1), plan, *operands)


def _cost_estimate(static: DecodeParams, head_blocks, q, caches, table) -> pl.CostEstimate:
    """Returns the cost for XLA's scheduler.

    Every request is assumed to be as long as its row of the page table.
    """
    tokens = table[0] * min(table[1], caches[0].shape[0]) * static.page
    scores = tokens * static.kv_heads * head_blocks * static.groups * static.q_len
    per_token = sum(x.size * x.dtype.itemsize // (x.shape[0] * static.page) for x in caches)
    return pl.CostEstimate(
        flops=4 * scores * static.width,
        transcendentals=scores,
        bytes_accessed=tokens * per_token + q.size * (q.dtype.itemsize + 4),
    )


@dataclasses.dataclass(frozen=True)
class _AsyncPageCopies:
    """Asynchronous copies of pages from HBM to VMEM buffers, for the kv heads of one grid step.

    Attributes:
      static: static parameters.
      table: page table, scalar reference.
      plan: see `_request_plan`, scalar reference.
      hbm: references to pages and, for an 8-bit cache, scales in HBM.
      buffers: two buffers for each of them.
      semaphores: two DMA semaphores for each of them.
      h0: first kv head.
    """

    static: DecodeParams
    table: jax.Array
    plan: jax.Array
    hbm: list
    buffers: list
    semaphores: jax.Array
    h0: jax.Array

    def start(self, request, block, slot) -> None:
        """Starts copying the pages of a block into buffer `slot`."""
        self._for_each_page(request, block, slot, lambda copy: copy.start())

    def wait(self, request, block, slot) -> None:
        """Waits until the pages of a block are in buffer `slot`."""
        self._for_each_page(request, block, slot, lambda copy: copy.wait())

    def _for_each_page(self, request, block, slot, act) -> None:
        """Calls `act` with the copy descriptor of each page of a block."""
        static = self.static
        first = self.plan[_FIRST, request] + block * static.block
        count = jnp.minimum(self.plan[_LAST, request] - first, static.block)

        def one(i, _):
            page = self.table[request * static.columns + first + i]
            place = pl.ds(pl.multiple_of(i * static.page, static.page), static.page)
            for n, (source, buffer) in enumerate(zip(self.hbm, self.buffers, strict=True)):
                # Tokens are the third axis of pages and the last of scales.
                target = buffer.at[slot, :, place] if n == 0 else buffer.at[slot, :, :, place]
                source = source.at[page, pl.ds(self.h0, static.kv_heads)]
                act(pltpu.make_async_copy(source, target, self.semaphores.at[slot, n]))
            return 0

        jax.lax.fori_loop(0, count, one, 0)


def _kernel(static: DecodeParams, table_ref, plan_ref, q_ref, pages_ref, *rest):
    """Attends to all blocks of one request, for the kv heads of the grid step.

    References in `rest`: scales in HBM (8-bit only), output, log-sum-exp, buffers, accumulator,
    running maximum, running sum, buffer slot, semaphores; see `_launch` for shapes.

    Args:
      static: static parameters.
      table_ref: page table.
      plan_ref: see `_request_plan`.
      q_ref: queries.
      pages_ref: pages in HBM.
      *rest: further references.
    """
    n_arrays = 2 if static.quantised else 1
    hbm = [pages_ref, *rest[: n_arrays - 1]]
    out_ref, lse_ref, *scratch = rest[n_arrays - 1 :]
    buffers, (acc_ref, max_ref, sum_ref, slot_ref, semaphores) = scratch[:-5], scratch[-5:]
    r, requests = pl.program_id(1), pl.num_programs(1)
    h0 = pl.program_id(0) * static.kv_heads
    copies = _AsyncPageCopies(static, table_ref, plan_ref, hbm, buffers, semaphores, h0)

    @pl.when(r == plan_ref[_NEXT, 0])
    def _():
        slot_ref[0] = 0
        copies.start(r, 0, 0)

    max_ref[...] = jnp.full(max_ref.shape, MASKED, jnp.float32)
    sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)
    acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)
    blocks, following = plan_ref[_BLOCKS, r], plan_ref[_NEXT, r + 1]

    def step(block, slot):
        """Starts the next copies, then processes one block."""
        more = block + 1 < blocks

        @pl.when(more | (following < requests))
        def _():
            copies.start(jnp.where(more, r, following), jnp.where(more, block + 1, 0), 1 - slot)

        copies.wait(r, block, slot)
        position = _BlockPosition(
            first_slot=(plan_ref[_FIRST, r] + block * static.block) * static.page,
            start=plan_ref[_START, r],
            window=plan_ref[_WINDOW, r],
            end=plan_ref[_END, r],
        )
        needs_mask = position.needs_mask(static)
        refs = (q_ref, buffers, acc_ref, max_ref, sum_ref)
        pl.when(needs_mask)(lambda: _attend_block(static, position, slot, *refs))
        pl.when(~needs_mask)(lambda: _attend_block(static, None, slot, *refs))
        return 1 - slot

    @pl.when(blocks > 0)
    def _():
        slot_ref[0] = jax.lax.fori_loop(0, blocks, step, slot_ref[0])

    total = sum_ref[...]
    some = total > 0
    total = jnp.where(some, total, 1.0)
    lse_ref[0] = jnp.where(some, (max_ref[...] + jnp.log2(total)) / _LOG2E, MASKED)
    out_ref[0] = acc_ref[...] / total[:, :, :1]


@dataclasses.dataclass(frozen=True)
class _BlockPosition:
    """Position of a block of slots relative to the queries of its request; int32 scalars.

    Attributes:
      first_slot: first slot of the block.
      start: slot of the first query.
      window: number of slots that a query sees.
      end: slot after the last visible one.
    """

    first_slot: jax.Array
    start: jax.Array
    window: jax.Array
    end: jax.Array

    def needs_mask(self, static: DecodeParams) -> jax.Array:
        """Returns whether some query does not see some slot of the block."""
        past = self.first_slot + static.tokens > jnp.minimum(self.end, self.start + 1)
        return past | (self.first_slot + self.window < self.start + static.q_len)

    def visible(self, static: DecodeParams) -> jax.Array:
        """Returns which queries see which slots, bool [rows, tokens]."""
        shape = (static.rows, static.tokens)
        slots = self.first_slot + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        query = jnp.full(shape, self.start)
        for t in range(1, static.q_len):
            query += (row >= t * static.groups).astype(jnp.int32)
        return (slots <= query) & (query - slots < self.window) & (slots < self.end)

    def is_written(self, static: DecodeParams, width: int) -> jax.Array:
        """Returns which slots of copied pages have a token of the request, bool [tokens, width]."""
        slots = self.first_slot + jax.lax.broadcasted_iota(jnp.int32, (static.tokens, width), 0)
        return slots < self.end


def _attend_block(static: DecodeParams, position, slot, q_ref, buffers, acc_ref, max_ref, sum_ref):
    """Updates the running softmax of every kv head with one block of keys and values.

    Args:
      static: static parameters.
      position: position of the block; None if every query sees every slot.
      slot: buffer that has the block.
      q_ref: queries.
      buffers: buffers of tokens and scales.
      acc_ref: accumulated output.
      max_ref: running maximum.
      sum_ref: running sum of weights.
    """
    visible = None if position is None else position.visible(static)

    def head(h):
        """Updates the running softmax of one kv head."""
        tokens = buffers[0][slot, h]
        scales = buffers[1][slot, h] if static.quantised else None
        q = q_ref[0, h]
        k, v = _split(tokens.astype(q.dtype), static.width)
        if position is not None and not static.quantised:
            # Unwritten slots may contain nan, and 0 · nan is nan. Codes are always finite.
            v = jnp.where(position.is_written(static, v.shape[1]), v, jnp.zeros_like(v))
        s = _dot(q, k, 1)
        if scales is None:
            s = s * (static.scale * _LOG2E)
        else:
            q_sum = q.astype(jnp.float32).sum(axis=1, keepdims=True)
            s = (s - q_sum * scales[1:2]) * (scales[0:1] * (static.scale * _LOG2E))
        if visible is not None:
            s = jnp.where(visible, s, MASKED)
        old_max = max_ref[h]
        new_max = jnp.maximum(old_max, s.max(axis=1, keepdims=True))
        p = jnp.exp2(s - new_max[:, :1])
        if visible is not None:
            p = jnp.where(visible, p, 0.0)
        decay = jnp.exp2(old_max - new_max)
        max_ref[h] = new_max
        sum_ref[h] = sum_ref[h] * decay + p.sum(axis=1, keepdims=True)
        if scales is not None:
            p = p * scales[2:3]
            if visible is not None:
                p = jnp.where(visible, p, 0.0)
        weights = p.astype(q.dtype)
        out = _dot(weights, v, 0)
        if scales is not None:
            offset = weights.astype(jnp.float32) * scales[3:4]
            if visible is not None:
                offset = jnp.where(visible, offset, 0.0)
            out = out - offset.sum(axis=1, keepdims=True)
        acc_ref[h] = acc_ref[h] * decay[:, :1] + out

    unroll = next(n for n in (8, 5, 4, 3, 2, 1) if static.kv_heads % n == 0)
    if unroll == static.kv_heads:
        for h in range(unroll):
            head(h)
    else:

        @pl.loop(0, static.kv_heads // unroll)
        def _(i):
            for h in range(unroll):
                head(i * unroll + h)


def _split(tokens, width: int):
    """Returns keys and values of [tokens, 2H].

    Heads of 64 stay side by side in 128 lanes: queries are zero in the lanes of values, and outputs
    have 64 lanes of keys that are ignored.
    """
    return (tokens[:, :width], tokens[:, width:]) if width % _LANES == 0 else (tokens, tokens)


def _dot(a, b, axis: int):
    """Returns a [rows, x] times b, contracted over b's `axis`, in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
