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
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.kernels.cache import SCALE_ROWS, PagedCache
from qwen_jax.kernels.mask import MASKED
from qwen_jax.kernels.refs import Ref, bind_by_name
from qwen_jax.kernels.tpu import mosaic, paged_append
from qwen_jax.kernels.tpu.mosaic import LANES, LOG2E, dot_f32

_BUFFER_BYTES = 2 << 20
"""Size of each of the two buffers: enough to hide the latency of a copy, and small against VMEM."""
_BLOCK_SCORES = 16384
"""Scores of a kv head at a time: 16 of the 64 vector registers."""
_VMEM_BYTES = 48 << 20
"""Vector memory that the kernel requests."""
_MAX_ENTRIES = 224 << 10
"""Largest number of entries of a device's page table: 896 KiB of 1 MiB of scalar memory."""
_MAX_ROWS = 512
"""Largest number of query rows per kv head: with more, scores of a page exceed the registers."""


def unsupported_reason(cache: PagedCache, *, q_len: int, heads: int, entries: int) -> str | None:
    """Returns one clause saying why this kernel cannot serve a call, or None if it can.

    Args:
      cache: the cache.
      q_len: query tokens per request.
      heads: query heads per kv head.
      entries: entries of a device's page table.
    """
    if entries > _MAX_ENTRIES:
        return f"a page table of {entries} entries; the TPU kernel takes {_MAX_ENTRIES} on a device"
    if cache.head_dim != 64 and cache.head_dim % LANES:
        return f"heads of {cache.head_dim}; the TPU kernel takes 64 or a multiple of 128"
    if q_len * heads > _MAX_ROWS:
        return f"{q_len} query tokens by {heads} heads a kv head; the TPU kernel takes {_MAX_ROWS}"
    return paged_append.unsupported_reason(cache)


@dataclasses.dataclass(frozen=True)
class DecodeParams:
    """Sizes of a decode call that are known at compile time.

    Attributes:
      kv_heads: kv heads per grid step.
      groups: query heads per kv head.
      q_len: query tokens per request.
      rows: groups · q_len rounded up to a multiple of 8.
      head_dim: dimension of a head, 64 or a multiple of 128.
      page_size: tokens per page.
      pages_per_request: columns of the page table.
      block_pages: pages per block.
      scale: factor on q·k.
      quantised: whether pages are 8-bit codes.
    """

    kv_heads: int
    groups: int
    q_len: int
    rows: int
    head_dim: int
    page_size: int
    pages_per_request: int
    block_pages: int
    scale: float
    quantised: bool

    @property
    def block_tokens(self) -> int:
        """Returns the number of tokens per block."""
        return self.block_pages * self.page_size


def paged_decode(
    q: jax.Array,
    pages: jax.Array,
    scales: jax.Array | None,
    page_table: jax.Array,
    lengths: jax.Array,
    start: jax.Array,
    window: jax.Array,
    *,
    scale: float,
    head_blocks: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes attention of a few query tokens per request over one layer of a paged cache.

    Args:
      q: [R, T, N, H] (requests, query tokens per request, query heads, head dimension).
      pages: [pages, K, page size, 2H] (K kv heads), key and value of a token side by side; a float
        dtype or uint8 codes.
      scales: float32 [pages, K, 4, page size], (key scale, key zero, value scale, value zero) of
        8-bit pages; None otherwise.
      page_table: int32 [R, pages per request].
      lengths: int32 [R], tokens of each request in the cache.
      start: int32 [R], slot of the first query; negative for an idle request.
      window: int32 scalar; a query sees at most this many slots, its own included.
      scale: factor on q·k.
      head_blocks: into how many independent grid rows the kv heads are split; None: the number of
        cores of the chip if it divides the kv heads, else 1.

    Returns:
      (out float32 [R, T, N, H], lse float32 [R, N, T], natural logarithm); 0 and `MASKED` for a
      query that sees no key.
    """
    requests, q_len, heads, head_dim = q.shape
    kv_heads, page_size = pages.shape[1:3]
    groups = heads // kv_heads
    if head_blocks is None:
        cores = mosaic.num_cores()
        head_blocks = cores if kv_heads % cores == 0 else 1
    rows = mosaic.round_up(groups * q_len, 8)
    head_bytes = page_size * 2 * head_dim * pages.dtype.itemsize
    block_pages = _BUFFER_BYTES // (kv_heads // head_blocks * head_bytes)
    most = min(block_pages, _BLOCK_SCORES // rows // page_size, page_table.shape[1])
    static = DecodeParams(
        kv_heads=kv_heads // head_blocks,
        groups=groups,
        q_len=q_len,
        rows=rows,
        head_dim=head_dim,
        page_size=page_size,
        pages_per_request=page_table.shape[1],
        block_pages=max(1, most),
        scale=scale,
        quantised=scales is not None,
    )
    plan = _request_plan(lengths, start, window, static)
    compute_dtype = jnp.float32 if pages.dtype == jnp.float32 else jnp.bfloat16
    # [R, T, K, groups, H] -> [R, K, T·groups, H], padded with zeros to [R, K, rows, lanes].
    q = q.reshape(requests, q_len, kv_heads, groups, head_dim).swapaxes(1, 2)
    q = q.astype(compute_dtype).reshape(requests, kv_heads, q_len * groups, head_dim)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, rows - q_len * groups), (0, -head_dim % LANES)))
    out, lse = _launch(static, head_blocks, q, pages, scales, page_table, plan)

    def heads_last(x: jax.Array) -> jax.Array:
        """Reorders [R, K, rows, ·] to [R, T, N, ·]."""
        x = x[:, :, : q_len * groups].reshape(requests, kv_heads, q_len, groups, -1)
        return x.swapaxes(1, 2).reshape(requests, q_len, heads, -1)

    return heads_last(out)[..., -head_dim:], heads_last(lse)[..., 0].swapaxes(1, 2)


def _request_plan(
    lengths: jax.Array, start: jax.Array, window: jax.Array, static: DecodeParams
) -> jax.Array:
    """Returns which blocks of pages the kernel visits for each request.

    Computed outside the kernel because it needs divisions.

    Args:
      lengths: int32 [R] (requests), tokens of each request in the cache.
      start: int32 [R], slot of the first query.
      window: int32 scalar, slots that a query sees, its own included.
      static: sizes of the call.

    Returns:
      int32 [7, R + 1]; column r belongs to request r. Rows: first page; page after the last; number
      of blocks; slot of the first query; window; slot after the last visible one; and, in column r,
      the first request from r on that has blocks (R if there is none).
    """
    end = jnp.minimum(lengths, start + static.q_len)
    first = jnp.maximum(start - window + 1, 0) // static.page_size
    last = (end + static.page_size - 1) // static.page_size
    blocks = jnp.maximum((last - first + static.block_pages - 1) // static.block_pages, 0)
    requests = lengths.shape[0]
    ids = jnp.where(blocks > 0, jnp.arange(requests), requests)
    following = jax.lax.cummin(jnp.append(ids, requests), reverse=True)
    window = jnp.broadcast_to(window, (requests,))
    rows = jnp.stack([first, last, blocks, start, window, end])
    return jnp.vstack([jnp.pad(rows, ((0, 0), (0, 1))), following]).astype(jnp.int32)


_FIRST, _LAST, _BLOCKS, _START, _WINDOW, _END, _NEXT = range(7)
"""Rows of `_request_plan`."""


def _launch(
    static: DecodeParams,
    head_blocks: int,
    q: jax.Array,
    pages: jax.Array,
    scales: jax.Array | None,
    page_table: jax.Array,
    plan: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Runs the kernel for all requests.

    Args:
      static: sizes of the call.
      head_blocks: grid rows that the kv heads are split over.
      q: queries [R, K, rows, lanes] (requests, kv heads, query rows of a kv head, head dimension
        padded to a multiple of 128).
      pages: [pages, K, page size, 2H] (H head dimension).
      scales: float32 [pages, K, 4, page size] of 8-bit pages, or None.
      page_table: int32 [R, pages per request].
      plan: int32 [7, R + 1], see `_request_plan`.

    Returns:
      (out float32 [R, K, rows, lanes], lse float32 [R, K, rows, 128], equal in all lanes).
    """
    requests, _, rows, q_lanes = q.shape
    kv_heads = static.kv_heads

    def request_block(lanes: int) -> pl.BlockSpec:
        """Returns the block of one request and one grid row of kv heads."""
        return pl.BlockSpec((1, kv_heads, rows, lanes), lambda h, r, *_: (r, h, 0, 0))

    hbm = {"pages_ref": pages}
    buffer_shape = (2, kv_heads, static.block_tokens, 2 * static.head_dim)
    buffers: dict[str, Any] = {"page_buffers": pltpu.VMEM(buffer_shape, pages.dtype)}
    if scales is not None:
        hbm["scales_ref"] = scales
        buffer_shape = (2, kv_heads, len(SCALE_ROWS), static.block_tokens)
        buffers["scale_buffers"] = pltpu.VMEM(buffer_shape, jnp.float32)
    scalars = {"table_ref": page_table.reshape(-1), "plan_ref": plan}
    out_dims = (requests, kv_heads * head_blocks, rows)
    outputs = {
        "out_ref": jax.ShapeDtypeStruct((*out_dims, q_lanes), jnp.float32),
        "lse_ref": jax.ShapeDtypeStruct((*out_dims, LANES), jnp.float32),
    }
    scratch = buffers | {
        "acc_ref": pltpu.VMEM((kv_heads, rows, q_lanes), jnp.float32),
        "max_ref": pltpu.VMEM((kv_heads, rows, LANES), jnp.float32),
        "sum_ref": pltpu.VMEM((kv_heads, rows, LANES), jnp.float32),
        "slot_ref": pltpu.SMEM((1,), jnp.int32),
        "semaphores": pltpu.SemaphoreType.DMA((2, len(buffers))),
    }
    body = functools.partial(_decode_kernel, static)
    out, lse = pl.pallas_call(
        bind_by_name(body, [*scalars, "q_ref", *hbm, *outputs, *scratch]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(head_blocks, requests),
            in_specs=[request_block(q_lanes), *(pl.BlockSpec(memory_space=pl.ANY) for _ in hbm)],
            out_specs=[request_block(q_lanes), request_block(LANES)],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=list(outputs.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        cost_estimate=_cost_estimate(static, head_blocks, q, list(hbm.values()), page_table.shape),
        name="paged_decode",
    )(*scalars.values(), q, *hbm.values())
    return out, lse


def _cost_estimate(
    static: DecodeParams,
    head_blocks: int,
    q: jax.Array,
    caches: Sequence[jax.Array],
    table_shape: tuple[int, ...],
) -> pl.CostEstimate:
    """Returns the cost for XLA's scheduler, as if each request filled its row of the page table.

    Args:
      static: sizes of the call.
      head_blocks: grid rows that the kv heads are split over.
      q: queries [R, K, rows, lanes], see `_launch`.
      caches: pages and, for an 8-bit cache, scales.
      table_shape: shape of the page table.
    """
    requests, columns = table_shape
    tokens = requests * min(columns, caches[0].shape[0]) * static.page_size
    scores = tokens * static.kv_heads * head_blocks * static.groups * static.q_len
    per_token = sum(x.size * x.dtype.itemsize // (x.shape[0] * static.page_size) for x in caches)
    return pl.CostEstimate(
        flops=4 * scores * static.head_dim,
        transcendentals=scores,
        bytes_accessed=tokens * per_token + q.size * (q.dtype.itemsize + 4),
    )


@dataclasses.dataclass(frozen=True)
class _AsyncPageCopies:
    """Asynchronous copies of pages from HBM to VMEM buffers, for the kv heads of one grid step.

    Attributes:
      static: sizes of the call.
      table: page table in scalar memory, int32 [requests · pages per request].
      plan: `_request_plan` in scalar memory.
      hbm: references to pages and, for an 8-bit cache, scales in HBM.
      buffers: for each of them two buffers in VMEM, along the first axis.
      semaphores: DMA semaphores [2, arrays in `hbm`], one for each buffer.
      first_head: first kv head of the grid step, int32 scalar.
    """

    static: DecodeParams
    table: Ref
    plan: Ref
    hbm: Sequence[Ref]
    buffers: Sequence[Ref]
    semaphores: Ref
    first_head: jax.Array

    def start(self, request: jax.Array, block: jax.Array | int, slot: jax.Array | int) -> None:
        """Starts copying the pages of a request's block into buffer `slot` (0 or 1)."""
        self._for_each_copy(request, block, slot, lambda copy: copy.start())

    def wait(self, request: jax.Array, block: jax.Array | int, slot: jax.Array | int) -> None:
        """Waits until the pages of a request's block are in buffer `slot` (0 or 1)."""
        self._for_each_copy(request, block, slot, lambda copy: copy.wait())

    def _for_each_copy(
        self,
        request: jax.Array,
        block: jax.Array | int,
        slot: jax.Array | int,
        act: Callable[[Any], None],
    ) -> None:
        """Calls `act` with each asynchronous copy of a block: one per page and array."""
        static = self.static
        first = self.plan[_FIRST, request] + block * static.block_pages
        count = jnp.minimum(self.plan[_LAST, request] - first, static.block_pages)

        def for_page(i, _):
            """Calls `act` with the copies of page i of the block."""
            page = self.table[request * static.pages_per_request + first + i]
            tokens = pl.ds(pl.multiple_of(i * static.page_size, static.page_size), static.page_size)
            for n, (source, buffer) in enumerate(zip(self.hbm, self.buffers, strict=True)):
                # Tokens are the third axis of pages and the last of scales.
                target = buffer.at[slot, :, tokens] if n == 0 else buffer.at[slot, :, :, tokens]
                source = source.at[page, pl.ds(self.first_head, static.kv_heads)]
                act(pltpu.make_async_copy(source, target, self.semaphores.at[slot, n]))
            return 0

        jax.lax.fori_loop(0, count, for_page, 0)


def _decode_kernel(
    static: DecodeParams,
    *,
    table_ref: Ref,
    plan_ref: Ref,
    q_ref: Ref,
    pages_ref: Ref,
    scales_ref: Ref | None = None,
    out_ref: Ref,
    lse_ref: Ref,
    page_buffers: Ref,
    scale_buffers: Ref | None = None,
    acc_ref: Ref,
    max_ref: Ref,
    sum_ref: Ref,
    slot_ref: Ref,
    semaphores: Ref,
) -> None:
    """Kernel body: attends to all blocks of one request, for the kv heads of a grid step.

    Shapes: K kv heads of the grid step, `rows` query rows of a kv head, `lanes` the head dimension
    H padded to a multiple of 128.

    Args:
      static: sizes of the call.
      table_ref: page table in scalar memory, int32 [requests · pages per request].
      plan_ref: `_request_plan` in scalar memory.
      q_ref: queries [1, K, rows, lanes].
      pages_ref: pages of all requests in HBM, [pages, all kv heads, page size, 2H].
      scales_ref: scales in HBM, float32 [pages, all kv heads, 4, page size], or None.
      out_ref: output, float32 [1, K, rows, lanes].
      lse_ref: log-sum-exp, float32 [1, K, rows, 128], equal in all lanes.
      page_buffers: two blocks of pages, [2, K, tokens of a block, 2H].
      scale_buffers: scales of two blocks, float32 [2, K, 4, tokens of a block], or None.
      acc_ref: unnormalised output so far, float32 [K, rows, lanes].
      max_ref: largest score so far as an exponent of 2, float32 [K, rows, 128], equal in all lanes.
      sum_ref: sum of weights so far, float32 [K, rows, 128], equal in all lanes.
      slot_ref: buffer of the next block, int32 [1]; kept from one grid step to the next.
      semaphores: DMA semaphores [2, copied arrays].
    """
    hbm, buffers = [pages_ref], [page_buffers]
    if scales_ref is not None:
        hbm.append(scales_ref)
        buffers.append(scale_buffers)
    r, requests = pl.program_id(1), pl.num_programs(1)
    first_head = pl.program_id(0) * static.kv_heads
    copies = _AsyncPageCopies(static, table_ref, plan_ref, hbm, buffers, semaphores, first_head)
    softmax = _OnlineSoftmaxRefs(
        q=q_ref,
        pages=page_buffers,
        scales=scale_buffers,
        acc=acc_ref,
        row_max=max_ref,
        row_sum=sum_ref,
    )

    @pl.when(r == plan_ref[_NEXT, 0])
    def start_first_copies():
        slot_ref[0] = 0
        copies.start(r, 0, 0)

    max_ref[...] = jnp.full(max_ref.shape, MASKED, jnp.float32)
    sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)
    acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)
    blocks, following = plan_ref[_BLOCKS, r], plan_ref[_NEXT, r + 1]

    def attend_block(block, slot):
        """Starts the copies of the next block, attends to this one, returns the next buffer."""
        more = block + 1 < blocks

        @pl.when(more | (following < requests))
        def start_next_copies():
            copies.start(jnp.where(more, r, following), jnp.where(more, block + 1, 0), 1 - slot)

        copies.wait(r, block, slot)
        position = _BlockPosition(
            first_slot=(plan_ref[_FIRST, r] + block * static.block_pages) * static.page_size,
            start=plan_ref[_START, r],
            window=plan_ref[_WINDOW, r],
            end=plan_ref[_END, r],
        )
        needs_mask = position.needs_mask(static)
        pl.when(needs_mask)(lambda: softmax.attend(static, position, slot))
        pl.when(~needs_mask)(lambda: softmax.attend(static, None, slot))
        return 1 - slot

    @pl.when(blocks > 0)
    def attend_all_blocks():
        slot_ref[0] = jax.lax.fori_loop(0, blocks, attend_block, slot_ref[0])

    row_sum = sum_ref[...]
    some = row_sum > 0
    row_sum = jnp.where(some, row_sum, 1.0)
    lse_ref[0] = jnp.where(some, (max_ref[...] + jnp.log2(row_sum)) / LOG2E, MASKED)
    out_ref[0] = acc_ref[...] / row_sum[:, :, :1]


@dataclasses.dataclass(frozen=True)
class _BlockPosition:
    """Position of a block of tokens relative to the queries of its request; int32 scalars.

    Attributes:
      first_slot: slot of the block's first token.
      start: slot of the request's first query token.
      window: slots that a query sees, its own included.
      end: slot after the last visible one.
    """

    first_slot: jax.Array
    start: jax.Array
    window: jax.Array
    end: jax.Array

    def needs_mask(self, static: DecodeParams) -> jax.Array:
        """Returns whether some query does not see some token of the block, a bool scalar."""
        past = self.first_slot + static.block_tokens > jnp.minimum(self.end, self.start + 1)
        return past | (self.first_slot + self.window < self.start + static.q_len)

    def visible(self, static: DecodeParams) -> jax.Array:
        """Returns bool [query rows, tokens of a block]: whether a row's query sees a token."""
        shape = (static.rows, static.block_tokens)
        slots = self.first_slot + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        query = jnp.full(shape, self.start)
        for t in range(1, static.q_len):
            query += (row >= t * static.groups).astype(jnp.int32)
        return (slots <= query) & (query - slots < self.window) & (slots < self.end)

    def written(self, static: DecodeParams, width: int) -> jax.Array:
        """Returns bool [tokens of a block, width]: whether a token belongs to the request."""
        slots = self.first_slot + jax.lax.broadcasted_iota(
            jnp.int32, (static.block_tokens, width), 0
        )
        return slots < self.end


@dataclasses.dataclass(frozen=True)
class _OnlineSoftmaxRefs:
    """References of the online softmax over the blocks of one request.

    The attributes have the shapes of the arguments of `_decode_kernel`.

    Attributes:
      q: queries.
      pages: two buffers of pages.
      scales: two buffers of scales, or None.
      acc: unnormalised output so far.
      row_max: largest score so far as an exponent of 2.
      row_sum: sum of weights so far.
    """

    q: Ref
    pages: Ref
    scales: Ref | None
    acc: Ref
    row_max: Ref
    row_sum: Ref

    def attend(
        self, static: DecodeParams, position: _BlockPosition | None, slot: jax.Array
    ) -> None:
        """Adds one block of keys and values to the online softmax of every kv head.

        Args:
          static: sizes of the call.
          position: position of the block; None if every query sees every token of it.
          slot: buffer that holds the block, 0 or 1.
        """
        visible = None if position is None else position.visible(static)
        attend_head = functools.partial(self._attend_head, static, position, visible, slot)
        unroll = next(n for n in (8, 5, 4, 3, 2, 1) if static.kv_heads % n == 0)
        if unroll == static.kv_heads:
            for h in range(unroll):
                attend_head(h)
        else:

            @pl.loop(0, static.kv_heads // unroll)
            def attend_heads(i):
                for h in range(unroll):
                    attend_head(i * unroll + h)

    def _attend_head(
        self,
        static: DecodeParams,
        position: _BlockPosition | None,
        visible: jax.Array | None,
        slot: jax.Array,
        head: jax.Array | int,
    ) -> None:
        """Adds one block of keys and values to the online softmax of one kv head.

        Args:
          static: sizes of the call.
          position: position of the block; None if every query sees every token of it.
          visible: bool [query rows, tokens of a block], or None like `position`.
          slot: buffer that holds the block, 0 or 1.
          head: index of the kv head within the grid step.
        """

        def masked(x: jax.Array, value: float) -> jax.Array:
            """Returns x with `value` where a token is not visible."""
            return x if visible is None else jnp.where(visible, x, value)

        tokens = self.pages[slot, head]
        scales = None if self.scales is None else self.scales[slot, head]
        q = self.q[0, head]
        k, v = _split_key_value(tokens.astype(q.dtype), static.head_dim)
        if position is not None and not static.quantised:
            # Slots never written may hold anything, and 0 · nan is nan. Codes are always finite.
            v = jnp.where(position.written(static, v.shape[1]), v, jnp.zeros_like(v))
        s = dot_f32(q, k, (1, 1))
        if scales is None:
            s = s * (static.scale * LOG2E)
        else:
            q_sum = q.astype(jnp.float32).sum(axis=1, keepdims=True)
            s = (s - q_sum * scales[1:2]) * (scales[0:1] * (static.scale * LOG2E))
        s = masked(s, MASKED)
        old_max = self.row_max[head]
        new_max = jnp.maximum(old_max, s.max(axis=1, keepdims=True))
        p = masked(jnp.exp2(s - new_max[:, :1]), 0.0)
        rescale = jnp.exp2(old_max - new_max)
        self.row_max[head] = new_max
        self.row_sum[head] = self.row_sum[head] * rescale + p.sum(axis=1, keepdims=True)
        if scales is not None:
            p = masked(p * scales[2:3], 0.0)
        weights = p.astype(q.dtype)
        out = dot_f32(weights, v)
        if scales is not None:
            offset = masked(weights.astype(jnp.float32) * scales[3:4], 0.0)
            out = out - offset.sum(axis=1, keepdims=True)
        self.acc[head] = self.acc[head] * rescale[:, :1] + out


def _split_key_value(tokens: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Returns (keys, values) of [tokens, 2 · head_dim].

    Heads of 64 stay side by side in 128 lanes, so both results are `tokens` itself: queries are
    zero in the lanes of values, and outputs have 64 lanes of keys that are ignored.
    """
    if head_dim % LANES:
        return tokens, tokens
    return tokens[:, :head_dim], tokens[:, head_dim:]
