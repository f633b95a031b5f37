"""Padding and tiling of operands for the TPU kernels, and the range of key blocks per grid step.

Shared by the forward and the backward pass. Grid steps iterate over blocks of queries, the inner
loop over blocks of keys: block i of queries needs key blocks [low, high), of which [full_low,
full_high) are visible to all of its queries and skip the mask. Ranges that are known at compile
time (causal) follow from program ids; what segments, windows and a traced q_start exclude is passed
as scalars, as *distances from* those ranges, so that 0 means "not excluded".
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from qwen_jax.kernels.mask import Mask, full_blocks, live_blocks
from qwen_jax.kernels.tpu.block_sizes import LANES, MIB, Tiles

# Scores of masked keys are below the initial running maximum, so their weight is 0 even in a row
# without any visible key so far.
UNSEEN = -2e30

# Blocks of scores, weights and their gradients, their spills, and the operands of a grid step. With
# the keys of a chunk, the compiler needs at most 20 MiB at 4,096 tokens (v6e), 18 MiB at 32,768.
WORKING_BYTES = 24 * MIB


def round_up(x: int, multiple: int) -> int:
    """Returns the smallest multiple of `multiple` that is at least x."""
    return -(-x // multiple) * multiple


def _fit_block(block: int, length: int) -> int:
    """Returns `block`, or a power-of-two fraction of it, with the lowest estimated cost.

    A block of n tokens costs about as much as n + 512 tokens at the rate of an infinitely long
    block: fitted to cycle estimates of blocks of 512, 1,024 and 2,048.

    Args:
      block: largest block size.
      length: number of tokens to divide into blocks.
    """
    sizes = [block]
    while sizes[-1] > LANES:
        sizes.append(sizes[-1] // 2)
    return min(sizes, key=lambda n: round_up(length, n) * (n + 512) / n)


def fit_tiles(tiles: Tiles, q_len: int, k_len: int, diagonal: bool, packed: bool) -> Tiles:
    """Returns block sizes adapted to a call.

    Args:
      tiles: block sizes of the chip.
      q_len: number of queries.
      k_len: number of keys.
      diagonal: whether queries and keys are the same slots; if not, their blocks are independent.
      packed: whether segments or a window limit the visible keys.
    """
    block_q = _fit_block(min(tiles.block_q, tiles.packed_q) if packed else tiles.block_q, q_len)
    block_k = min(tiles.block_k, block_q) if diagonal else _fit_block(tiles.block_k, k_len)
    cut = min(tiles.diagonal, block_q)
    return dataclasses.replace(tiles, block_q=block_q, block_k=block_k, diagonal=cut)


@dataclasses.dataclass(frozen=True)
class FlashLayout:
    """Static description of one call.

    Attributes:
      q_len: number of queries T.
      k_len: number of keys S.
      tiles: block sizes.
      chunk: keys in VMEM at a time; a multiple of block_k that divides `columns`.
      diagonal: whether queries and keys are the same slots: causal blocks are then known at compile
        time, and one block of block_q² is on the diagonal.
      window: static window, or None.
      traced_window: whether the window is passed as a scalar.
      traced_start: whether q_start is passed as a scalar.
      segments: whether segment ids are given.
    """

    q_len: int
    k_len: int
    tiles: Tiles
    chunk: int
    diagonal: bool
    window: int | None
    traced_window: bool
    traced_start: bool
    segments: bool

    @property
    def rows(self) -> int:
        """Returns T padded to complete blocks."""
        return round_up(self.q_len, self.tiles.block_q)

    @property
    def columns(self) -> int:
        """Returns S padded to complete chunks."""
        return round_up(self.k_len, self.chunk)

    @property
    def limited(self) -> bool:
        """Returns whether scalars exclude key blocks, in addition to causality."""
        return (
            not self.diagonal
            or self.segments
            or self.traced_window
            or (self.window is not None and self.window < self.k_len)
        )

    @property
    def q_blocks(self) -> int:
        """Returns the number of blocks of queries."""
        return self.rows // self.tiles.block_q

    @property
    def chunks(self) -> int:
        """Returns the number of chunks of keys."""
        return self.columns // self.chunk

    @property
    def chunk_blocks(self) -> int:
        """Returns the number of key blocks per chunk."""
        return self.chunk // self.tiles.block_k

    def vmem(self, bytes_per_key: int, limit: int) -> int:
        """Returns the bytes of vector memory to request: a chunk, blocks of scores and spills.

        Requesting less than the chip has leaves the rest to operations around the kernel.

        Args:
          bytes_per_key: bytes in VMEM per key of a chunk.
          limit: largest request.
        """
        return min(self.chunk * bytes_per_key + WORKING_BYTES, limit)

    def pairs(self) -> int:
        """Returns the number of visible query-key pairs per row and head, as far as known
        statically.
        """
        if self.traced_start:
            return self.q_len * self.k_len
        limit = self.k_len if self.window is None else min(self.window, self.k_len)
        ramp = min(self.q_len, limit)
        return ramp * (ramp + 1) // 2 + (self.q_len - ramp) * limit


def make_flash_layout(q_len: int, k_len: int, width: int, itemsize: int, mask: Mask, tiles: Tiles):
    """Returns the layout of a call.

    Args:
      q_len: number of queries.
      k_len: number of keys.
      width: padded head dimension.
      itemsize: bytes per element of q, k and v.
      mask: the mask.
      tiles: block sizes of the chip.
    """
    diagonal = mask.q_start is None and q_len == k_len
    packed = mask.q_segments is not None or mask.any_window() is not None
    # A float32 product takes six bfloat16 products, and wide heads take several: smaller blocks
    # keep the unrolled code of an iteration, and its spills, the same.
    shrink = max(width // LANES, 1) * (4 if itemsize == 4 else 1)
    block_q, block_k = (max(x // shrink, LANES) for x in (tiles.block_q, tiles.block_k))
    tiles = dataclasses.replace(tiles, block_q=block_q, block_k=block_k)
    tiles = fit_tiles(tiles, q_len, k_len, diagonal, packed)
    assert not diagonal or tiles.block_q % tiles.block_k == tiles.block_q % tiles.diagonal == 0
    unit = tiles.block_q if diagonal else tiles.block_k
    limit = max(tiles.resident // (max(width, LANES) * itemsize), unit)
    chunks = -(-round_up(k_len, unit) // limit)
    chunk = round_up(-(-k_len // chunks), unit)
    return FlashLayout(
        q_len=q_len,
        k_len=k_len,
        tiles=tiles,
        chunk=chunk,
        diagonal=diagonal,
        window=mask.window,
        traced_window=mask.layer_window is not None,
        traced_start=mask.q_start is not None,
        segments=mask.q_segments is not None,
    )


def key_ranges(mask: Mask, layout: FlashLayout, batch: int) -> jax.Array:
    """Returns how much of each static range of key blocks the mask excludes, int32 [B·q_blocks·4].

    For row b and block i of queries, the four numbers at (b·q_blocks + i)·4 are low, full_low, and
    by how much full_high and high are below the static end, which is the first block of the
    diagonal, or the number of blocks.

    Args:
      mask: the mask.
      layout: layout of the call.
      batch: number of rows B.
    """
    tiles = layout.tiles
    sizes = (layout.q_len, layout.k_len, tiles.block_q, tiles.block_k)
    live, full = live_blocks(mask, *sizes), full_blocks(mask, *sizes)
    n_k = live.shape[-1]
    j = jnp.arange(n_k, dtype=jnp.int32)
    end = jnp.full((layout.q_blocks,), n_k, jnp.int32)
    if layout.diagonal:
        ratio = tiles.block_q // tiles.block_k
        end = jnp.minimum(jnp.arange(layout.q_blocks, dtype=jnp.int32) * ratio, n_k)
    live &= j < end[:, None]
    low = jnp.min(jnp.where(live, j, n_k), axis=-1)
    high = jnp.max(jnp.where(live, j + 1, 0), axis=-1)
    low = jnp.minimum(low, high)
    full &= live
    full_low = jnp.min(jnp.where(full, j, n_k), axis=-1)
    # The first run of full blocks; with ascending ids it is the only one.
    after = ~full & (j > full_low[..., None])
    full_high = jnp.minimum(jnp.min(jnp.where(after, j, n_k), axis=-1), high)
    none = full_low >= full_high
    full_low, full_high = jnp.where(none, low, full_low), jnp.where(none, low, full_high)
    ranges = jnp.stack([low, full_low, end - full_high, end - high], axis=-1)
    return jnp.broadcast_to(ranges, (batch, layout.q_blocks, 4)).astype(jnp.int32).reshape(-1)


@dataclasses.dataclass(frozen=True)
class GridStep:
    """Position of a grid step and its scalars.

    Attributes:
      layout: layout of the call.
      b: row of the batch.
      i: block of queries.
      c: chunk of keys.
      ranges: scalar reference to `key_ranges`, or None.
      slots: scalar reference to traced q_start and window, or None.
    """

    layout: FlashLayout
    b: jax.Array
    i: jax.Array
    c: jax.Array | int
    ranges: Any
    slots: Any

    def start(self):
        """Returns the slot of the block's first query."""
        first = self.i * self.layout.tiles.block_q
        return first + self.slots[self.b] if self.layout.traced_start else first

    def window(self):
        """Returns the window, static or traced; None if there is none."""
        layout = self.layout
        if layout.traced_window:
            return self.slots[layout.traced_start * self.batch()]
        return layout.window

    def batch(self):
        """Returns the number of rows of the batch."""
        return self.ranges.shape[0] // (4 * self.layout.q_blocks)

    def loops(self):
        """Returns (low, full_low, full_high, high) of the inner loop, in blocks of the chunk."""
        layout, tiles = self.layout, self.layout.tiles
        end: jax.Array | int = -(-layout.k_len // tiles.block_k)
        if layout.diagonal:
            end = self.i * (tiles.block_q // tiles.block_k)
        low, full_low, full_high, high = 0, 0, end, end
        if layout.limited:
            at = (self.b * layout.q_blocks + self.i) * 4
            low, full_low = self.ranges[at], self.ranges[at + 1]
            full_high, high = end - self.ranges[at + 2], end - self.ranges[at + 3]
        if layout.chunks == 1:
            return low, full_low, full_high, high
        first = self.c * layout.chunk_blocks

        def clip(x):
            """Converts a block number of the sequence to one within the chunk."""
            return jnp.clip(x - first, 0, layout.chunk_blocks)

        return clip(low), clip(full_low), clip(full_high), clip(high)

    def on_diagonal(self):
        """Returns whether the chunk has the keys of the block's slots; None if it always has."""
        layout = self.layout
        if layout.chunks == 1:
            return None
        first_slot = self.i * layout.tiles.block_q - self.c * layout.chunk
        return (first_slot >= 0) & (first_slot < layout.chunk)


def when_chunked(layout: FlashLayout, condition, body):
    """Runs `body` if `condition` holds; always, if there is a single chunk."""
    if layout.chunks == 1:
        body()
    else:
        pl.when(condition)(body)


def for_each_key_block(step: GridStep, block):
    """Runs block(j, masked) for the key blocks of a grid step, except the one on the diagonal."""
    low, full_low, full_high, high = step.loops()
    jax.lax.fori_loop(full_low, full_high, lambda j, _: block(j, False), None)
    if step.layout.limited:
        jax.lax.fori_loop(low, full_low, lambda j, _: block(j, True), None)
        jax.lax.fori_loop(full_high, high, lambda j, _: block(j, True), None)
