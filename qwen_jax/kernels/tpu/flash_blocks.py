"""Operand layout of the TPU flash-attention kernels, and the key blocks that a grid step visits.

Shared by the forward and the backward kernel. The grid iterates over blocks of queries, the inner
loop over blocks of keys: query block i needs key blocks low to high - 1, of which full_low to
full_high - 1 are visible completely and skip the mask. What is known at compile time (causality) is
computed from program ids. What segments, windows and a traced q_start leave out is passed as
scalars: differences from those static bounds, so that 0 means that nothing more is skipped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from qwen_jax.kernels.mask import Mask, full_blocks, live_blocks
from qwen_jax.kernels.refs import Ref
from qwen_jax.kernels.tpu.block_sizes import MIB, BlockSizes
from qwen_jax.kernels.tpu.mosaic import LANES, round_up

MASKED_SCORE = -2e30
"""Score of a masked pair: below the initial running maximum, so that its weight is 0 even in a row
without a visible key so far."""

_WORKING_BYTES = 24 * MIB
"""Vector memory for blocks of scores, weights and their gradients, spills, and a grid step's own
operands.

Together with the keys of a chunk the compiler requests at most 20 MiB at 4,096 tokens (v6e) and 18
MiB at 32,768.
"""


def _fit_block(block: int, length: int) -> int:
    """Returns the block size, `block` or halves of it, for which the padded length costs least.

    A block of n tokens costs about as much as n + 512 tokens at the rate of infinitely long blocks:
    fitted to cycle estimates of blocks of 512, 1,024 and 2,048.
    """
    sizes = [block]
    while sizes[-1] > LANES:
        sizes.append(sizes[-1] // 2)
    return min(sizes, key=lambda n: round_up(length, n) * (n + 512) / n)


def fit_block_sizes(
    sizes: BlockSizes, q_len: int, k_len: int, *, has_diagonal: bool, packed: bool
) -> BlockSizes:
    """Returns block sizes reduced to the lengths of a call.

    Args:
      sizes: block sizes for long sequences.
      q_len: number of queries.
      k_len: number of keys.
      has_diagonal: as `FlashLayout.has_diagonal`; if False, queries and keys are divided
        independently.
      packed: whether segments or a window restrict what a query sees.
    """
    largest = min(sizes.block_q, sizes.packed_block_q) if packed else sizes.block_q
    block_q = _fit_block(largest, q_len)
    block_k = min(sizes.block_k, block_q) if has_diagonal else _fit_block(sizes.block_k, k_len)
    diagonal_block = min(sizes.diagonal_block, block_q)
    return dataclasses.replace(
        sizes, block_q=block_q, block_k=block_k, diagonal_block=diagonal_block
    )


@dataclasses.dataclass(frozen=True)
class FlashLayout:
    """What is known at compile time about one attention call.

    Attributes:
      q_len: number of queries, without padding.
      k_len: number of keys, without padding.
      sizes: block sizes.
      chunk: keys that are in VMEM at one time; a multiple of block_k.
      has_diagonal: queries and keys have the same slots, so it is known at compile time which
        blocks are causal: of each block of queries, one block [block_q, block_q] is on the
        diagonal, and the inner loop covers the key blocks before it.
      window: window known at compile time, or None.
      traced_window: whether the window is passed as a scalar.
      traced_start: whether the slot of the first query is passed as a scalar.
      has_segments: whether segment ids are given.
    """

    q_len: int
    k_len: int
    sizes: BlockSizes
    chunk: int
    has_diagonal: bool
    window: int | None
    traced_window: bool
    traced_start: bool
    has_segments: bool

    @property
    def padded_q_len(self) -> int:
        """Returns the number of queries, padded to full blocks."""
        return round_up(self.q_len, self.sizes.block_q)

    @property
    def padded_k_len(self) -> int:
        """Returns the number of keys, padded to full chunks."""
        return round_up(self.k_len, self.chunk)

    @property
    def has_key_ranges(self) -> bool:
        """Returns whether `key_ranges` are passed, since not only causality excludes key blocks."""
        return (
            not self.has_diagonal
            or self.has_segments
            or self.traced_window
            or (self.window is not None and self.window < self.k_len)
        )

    @property
    def has_slot_scalars(self) -> bool:
        """Returns whether `slot_scalars` are passed."""
        return self.traced_start or self.traced_window

    @property
    def num_q_blocks(self) -> int:
        """Returns the number of blocks of queries."""
        return self.padded_q_len // self.sizes.block_q

    @property
    def num_chunks(self) -> int:
        """Returns the number of chunks of keys."""
        return self.padded_k_len // self.chunk

    @property
    def blocks_per_chunk(self) -> int:
        """Returns the number of key blocks in a chunk."""
        return self.chunk // self.sizes.block_k

    def vmem_limit(self, bytes_per_key: int, max_bytes: int) -> int:
        """Returns the vector memory to request for a kernel.

        A kernel that requests less than there is leaves the rest to the operations around it.

        Args:
          bytes_per_key: bytes that the kernel holds in VMEM for each key of a chunk.
          max_bytes: vector memory that a kernel may request on this chip.
        """
        return min(self.chunk * bytes_per_key + _WORKING_BYTES, max_bytes)

    def num_pairs(self) -> int:
        """Returns the number of visible query-key pairs per row and head, for cost estimates.

        Only what is known at compile time is taken into account.
        """
        if self.traced_start:
            return self.q_len * self.k_len
        widest = self.k_len if self.window is None else min(self.window, self.k_len)
        ramp = min(self.q_len, widest)
        return ramp * (ramp + 1) // 2 + (self.q_len - ramp) * widest


def make_flash_layout(
    q_len: int, k_len: int, width: int, itemsize: int, mask: Mask, sizes: BlockSizes
) -> FlashLayout:
    """Returns the layout of an attention call.

    Args:
      q_len: number of queries.
      k_len: number of keys.
      width: head dimension, padded (`padded_width`).
      itemsize: bytes per element of q, k and v.
      mask: the attention mask.
      sizes: block sizes for long sequences of bfloat16 and heads of at most 128.
    """
    has_diagonal = mask.q_start is None and q_len == k_len
    packed = mask.q_segments is not None or mask.any_window() is not None
    # A float32 product takes six bfloat16 ones and a wide head several products: smaller blocks
    # keep the size of the code unrolled for one iteration, and what it spills, the same.
    shrink = max(width // LANES, 1) * (4 if itemsize == 4 else 1)
    block_q, block_k = (max(x // shrink, LANES) for x in (sizes.block_q, sizes.block_k))
    sizes = dataclasses.replace(sizes, block_q=block_q, block_k=block_k)
    sizes = fit_block_sizes(sizes, q_len, k_len, has_diagonal=has_diagonal, packed=packed)
    if has_diagonal:
        assert sizes.block_q % sizes.block_k == sizes.block_q % sizes.diagonal_block == 0
    unit = sizes.block_q if has_diagonal else sizes.block_k
    max_chunk = max(sizes.resident_bytes // (max(width, LANES) * itemsize), unit)
    num_chunks = -(-round_up(k_len, unit) // max_chunk)
    return FlashLayout(
        q_len=q_len,
        k_len=k_len,
        sizes=sizes,
        chunk=round_up(-(-k_len // num_chunks), unit),
        has_diagonal=has_diagonal,
        window=mask.window,
        traced_window=mask.layer_window is not None,
        traced_start=mask.q_start is not None,
        has_segments=mask.q_segments is not None,
    )


def padded_width(width: int) -> int:
    """Returns the head dimension that the kernels compute with: 64 or a multiple of the lanes."""
    return 64 if width <= 64 else round_up(width, LANES)


def heads_first(x: jax.Array, length: int) -> jax.Array:
    """Transposes [B, S, K, H] to [B, K, length, padded_width(H)], padded with zeros.

    B batch rows, S tokens, K heads, H head dimension.
    """
    x = x.swapaxes(1, 2)
    padding = (length - x.shape[2], padded_width(x.shape[3]) - x.shape[3])
    return jnp.pad(x, ((0, 0), (0, 0), (0, padding[0]), (0, padding[1])))


def segment_rows(mask: Mask, layout: FlashLayout) -> tuple[jax.Array, jax.Array]:
    """Returns segment ids of queries and keys in which equal ids mean visible.

    Padding queries get id -1 and padding keys id 0.

    Returns:
      (int32 [B, 1, padded_q_len], int32 [B, 1, padded_k_len]) for B batch rows.
    """
    assert mask.q_segments is not None and mask.k_segments is not None
    q = jnp.where(mask.q_segments > 0, mask.q_segments, -1)
    k = jnp.maximum(mask.k_segments, 0)
    q = jnp.pad(q, ((0, 0), (0, layout.padded_q_len - layout.q_len)), constant_values=-1)
    k = jnp.pad(k, ((0, 0), (0, layout.padded_k_len - layout.k_len)))
    return q[:, None], k[:, None]


def key_ranges(mask: Mask, layout: FlashLayout, batch: int) -> jax.Array:
    """Returns which key blocks each block of queries needs, relative to the static bounds.

    The static bounds are 0 and the end: the first key block on the diagonal, or the number of key
    blocks where there is no diagonal.

    Args:
      mask: the attention mask.
      layout: the layout of the call.
      batch: number of batch rows.

    Returns:
      int32 [batch · num_q_blocks · 4], for each batch row and block of queries: low, full_low,
      end - full_high, end - high (see the module docstring).
    """
    sizes = layout.sizes
    dims = (layout.q_len, layout.k_len, sizes.block_q, sizes.block_k)
    live, full = live_blocks(mask, *dims), full_blocks(mask, *dims)
    num_blocks = live.shape[-1]
    block = jnp.arange(num_blocks, dtype=jnp.int32)
    end = jnp.full((layout.num_q_blocks,), num_blocks, jnp.int32)
    if layout.has_diagonal:
        ratio = sizes.block_q // sizes.block_k
        q_blocks = jnp.arange(layout.num_q_blocks, dtype=jnp.int32)
        end = jnp.minimum(q_blocks * ratio, num_blocks)
    live &= block < end[:, None]
    low = jnp.min(jnp.where(live, block, num_blocks), axis=-1)
    high = jnp.max(jnp.where(live, block + 1, 0), axis=-1)
    low = jnp.minimum(low, high)
    full &= live
    full_low = jnp.min(jnp.where(full, block, num_blocks), axis=-1)
    # The first run of full blocks; if segment ids ascend there is no other.
    after = ~full & (block > full_low[..., None])
    full_high = jnp.minimum(jnp.min(jnp.where(after, block, num_blocks), axis=-1), high)
    none = full_low >= full_high
    full_low, full_high = jnp.where(none, low, full_low), jnp.where(none, low, full_high)
    ranges = jnp.stack([low, full_low, end - full_high, end - high], axis=-1)
    return jnp.broadcast_to(ranges, (batch, layout.num_q_blocks, 4)).astype(jnp.int32).reshape(-1)


def scalar_operands(mask: Mask, layout: FlashLayout, batch: int) -> dict[str, jax.Array]:
    """Returns the scalar-prefetch operands of the kernels by parameter name, in their order.

    Args:
      mask: the attention mask.
      layout: the layout of the call.
      batch: number of batch rows.

    Returns:
      Some of: "key_ranges" (see `key_ranges`); "slot_scalars", int32, the slot of the first query
      of each batch row if that is traced, then the window if that is traced.
    """
    scalars = {}
    if layout.has_key_ranges:
        scalars["key_ranges"] = key_ranges(mask, layout, batch)
    slots = []
    if layout.traced_start:
        assert mask.q_start is not None
        slots.append(mask.q_start.astype(jnp.int32))
    if layout.traced_window:
        assert mask.layer_window is not None
        slots.append(jnp.reshape(mask.layer_window, (1,)).astype(jnp.int32))
    if layout.has_slot_scalars:
        scalars["slot_scalars"] = jnp.concatenate(slots)
    return scalars


@dataclasses.dataclass(frozen=True)
class GridStep:
    """Position of one grid step, and the scalars of the call, in scalar memory.

    Attributes:
      layout: the layout of the call.
      row: batch row, int32 scalar.
      q_block: index of the block of queries, int32 scalar.
      chunk: index of the chunk of keys, int or int32 scalar.
      key_ranges: see `key_ranges`; None if the layout has none.
      slot_scalars: see `scalar_operands`; None if the layout has none.
    """

    layout: FlashLayout
    row: jax.Array
    q_block: jax.Array
    chunk: jax.Array | int
    key_ranges: Ref | None
    slot_scalars: Ref | None

    def first_slot(self) -> jax.Array:
        """Returns the slot of the block's first query."""
        first = self.q_block * self.layout.sizes.block_q
        if not self.layout.traced_start:
            return first
        assert self.slot_scalars is not None
        return first + self.slot_scalars[self.row]

    def window(self) -> jax.Array | int | None:
        """Returns the window, static or traced, or None if there is none."""
        layout = self.layout
        if not layout.traced_window:
            return layout.window
        assert self.slot_scalars is not None and self.key_ranges is not None
        batch = self.key_ranges.shape[0] // (4 * layout.num_q_blocks)
        return self.slot_scalars[layout.traced_start * batch]

    def block_ranges(self) -> tuple[jax.Array | int, ...]:
        """Returns (low, full_low, full_high, high): the key blocks to visit within the chunk.

        Blocks on the diagonal are not included. Blocks full_low to full_high - 1 need no mask.
        """
        layout, sizes = self.layout, self.layout.sizes
        end: jax.Array | int
        if layout.has_diagonal:
            end = self.q_block * (sizes.block_q // sizes.block_k)
        else:
            end = -(-layout.k_len // sizes.block_k)
        low: jax.Array | int = 0
        full_low: jax.Array | int = 0
        full_high, high = end, end
        if layout.has_key_ranges:
            assert self.key_ranges is not None
            index = (self.row * layout.num_q_blocks + self.q_block) * 4
            low, full_low = self.key_ranges[index], self.key_ranges[index + 1]
            full_high = end - self.key_ranges[index + 2]
            high = end - self.key_ranges[index + 3]
        ranges = (low, full_low, full_high, high)
        if layout.num_chunks == 1:
            return ranges
        first = self.chunk * layout.blocks_per_chunk
        return tuple(jnp.clip(x - first, 0, layout.blocks_per_chunk) for x in ranges)

    def chunk_has_diagonal(self) -> jax.Array | None:
        """Returns whether the chunk holds the keys of the queries' own slots, a bool scalar.

        None if there is a single chunk, which always does.
        """
        layout = self.layout
        if layout.num_chunks == 1:
            return None
        first_slot = self.q_block * layout.sizes.block_q - self.chunk * layout.chunk
        return (first_slot >= 0) & (first_slot < layout.chunk)


def when_chunked(
    layout: FlashLayout, condition: jax.Array | bool | None, body: Callable[[], None]
) -> None:
    """Runs `body` if `condition` holds; unconditionally where there is a single chunk of keys."""
    if layout.num_chunks == 1:
        body()
    else:
        assert condition is not None
        pl.when(condition)(body)


def loop_over_blocks(step: GridStep, attend: Callable[[jax.Array, bool], None]) -> None:
    """Calls attend(key block, whether it needs the mask) for each key block of a grid step.

    Key blocks are counted within the chunk; those on the diagonal are not visited.
    """
    low, full_low, full_high, high = step.block_ranges()
    jax.lax.fori_loop(full_low, full_high, lambda block, _: attend(block, False), None)
    if step.layout.has_key_ranges:
        jax.lax.fori_loop(low, full_low, lambda block, _: attend(block, True), None)
        jax.lax.fori_loop(full_high, high, lambda block, _: attend(block, True), None)
