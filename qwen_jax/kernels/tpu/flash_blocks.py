"""How operands are cut for the TPU kernels, and which blocks a grid step loops over.

Shared by the forward and the backward pass. Queries are the grid's, keys the inner loop's: block i
of queries needs key blocks [low, high), of which [full_low, full_high) are seen whole by all of it
and skip the mask. Everything known when compiling (causal) is arithmetic on program ids; what
segments, windows and a traced q_start leave out comes as scalars, *distances from* that arithmetic,
so that 0 means "work".
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from qwen_jax.kernels.mask import Mask, full_blocks, live_blocks
from qwen_jax.kernels.tpu.block_sizes import LANES, MIB, Tiles

# Scores of unseen keys lie below the running maximum's start, so their weight is 0 even in a row
# that has seen nothing yet.
UNSEEN = -2e30

# Blocks of scores, weights and their gradients, their spills, and a grid step's own operands. With
# the chunk's keys the compiler asks for at most 20 MiB at 4,096 tokens (v6e) and 18 MiB at 32,768.
WORKING = 24 * MIB


def round_up(x: int, multiple: int) -> int:
    """The smallest multiple that is at least x."""
    return -(-x // multiple) * multiple


def _fit(block: int, length: int) -> int:
    """The block size, this or halves of it, at which the padded length costs least.

    A block of n costs about as much as n + 512 tokens would at the rate of endless ones: fitted to
    cycle estimates of blocks of 512, 1,024 and 2,048.
    """
    sizes = [block]
    while sizes[-1] > LANES:
        sizes.append(sizes[-1] // 2)
    return min(sizes, key=lambda n: round_up(length, n) * (n + 512) / n)


def fit(tiles: Tiles, q_len: int, k_len: int, diagonal: bool, packed: bool) -> Tiles:
    """Tiles for these lengths; off the diagonal, queries and keys are cut independently."""
    block_q = _fit(min(tiles.block_q, tiles.packed_q) if packed else tiles.block_q, q_len)
    block_k = min(tiles.block_k, block_q) if diagonal else _fit(tiles.block_k, k_len)
    cut = min(tiles.diagonal, block_q)
    return dataclasses.replace(tiles, block_q=block_q, block_k=block_k, diagonal=cut)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Static description of one call.

    Attributes:
      q_len, k_len: T and S as given; rows, columns: padded to whole blocks.
      chunk: keys that lie in VMEM at a time; a multiple of block_k that divides columns.
      diagonal: queries and keys start in the same slot and end in the same slot: which blocks are
        causal is known when compiling, and one block of block_q² lies on the diagonal.
      limited: key blocks to leave out are given as scalars.
      window: static window; traced_window: it comes as a scalar; traced_start: so does q_start.
      segments: segment ids are given.
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
        """T padded to whole blocks."""
        return round_up(self.q_len, self.tiles.block_q)

    @property
    def columns(self) -> int:
        """S padded to whole chunks."""
        return round_up(self.k_len, self.chunk)

    @property
    def limited(self) -> bool:
        """Whether key blocks are left out by scalars, besides what causality leaves out."""
        return (
            not self.diagonal
            or self.segments
            or self.traced_window
            or (self.window is not None and self.window < self.k_len)
        )

    @property
    def q_blocks(self) -> int:
        """Blocks of queries."""
        return self.rows // self.tiles.block_q

    @property
    def chunks(self) -> int:
        """Chunks of keys."""
        return self.columns // self.chunk

    @property
    def chunk_blocks(self) -> int:
        """Key blocks a chunk."""
        return self.chunk // self.tiles.block_k

    def vmem(self, bytes_per_key: int, most: int) -> int:
        """Vector memory to ask for: what a chunk holds, and room for blocks of scores and spills.

        Asking for less than there is leaves the rest to the operations around the kernel.
        """
        return min(self.chunk * bytes_per_key + WORKING, most)

    def pairs(self) -> int:
        """Query-key pairs the mask leaves of one row and head, as far as known when compiling."""
        if self.traced_start:
            return self.q_len * self.k_len
        most = self.k_len if self.window is None else min(self.window, self.k_len)
        ramp = min(self.q_len, most)
        return ramp * (ramp + 1) // 2 + (self.q_len - ramp) * most


def make_layout(q_len: int, k_len: int, width: int, itemsize: int, mask: Mask, tiles: Tiles):
    """The layout of a call with these lengths, head width and bytes an element."""
    diagonal = mask.q_start is None and q_len == k_len
    packed = mask.q_segments is not None or mask.any_window() is not None
    # Float32 takes six products for one and wide heads take several: smaller blocks keep the code
    # that is unrolled for one iteration, and what it spills, the same.
    shrink = max(width // LANES, 1) * (4 if itemsize == 4 else 1)
    block_q, block_k = (max(x // shrink, LANES) for x in (tiles.block_q, tiles.block_k))
    tiles = dataclasses.replace(tiles, block_q=block_q, block_k=block_k)
    tiles = fit(tiles, q_len, k_len, diagonal, packed)
    assert not diagonal or tiles.block_q % tiles.block_k == tiles.block_q % tiles.diagonal == 0
    unit = tiles.block_q if diagonal else tiles.block_k
    most = max(tiles.resident // (max(width, LANES) * itemsize), unit)
    chunks = -(-round_up(k_len, unit) // most)
    chunk = round_up(-(-k_len // chunks), unit)
    return Layout(
        *(q_len, k_len, tiles, chunk),
        diagonal=diagonal,
        window=mask.window,
        traced_window=mask.layer_window is not None,
        traced_start=mask.q_start is not None,
        segments=mask.q_segments is not None,
    )


def key_ranges(mask: Mask, layout: Layout, batch: int) -> jax.Array:
    """Distances from the static ranges: int32 [B·q_blocks·4].

    For row b and block i of queries, at (b·q_blocks + i)·4: low, full_low, and by how much high and
    full_high fall short of the static end: the diagonal's first block, or the number of blocks.
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
    # The first run of full blocks; ids that ascend have no other.
    after = ~full & (j > full_low[..., None])
    full_high = jnp.minimum(jnp.min(jnp.where(after, j, n_k), axis=-1), high)
    none = full_low >= full_high
    full_low, full_high = jnp.where(none, low, full_low), jnp.where(none, low, full_high)
    ranges = jnp.stack([low, full_low, end - full_high, end - high], axis=-1)
    return jnp.broadcast_to(ranges, (batch, layout.q_blocks, 4)).astype(jnp.int32).reshape(-1)


@dataclasses.dataclass(frozen=True)
class Step:
    """One grid step's view of the scalars: block i of queries of row b, and chunk c of keys."""

    layout: Layout
    b: jax.Array
    i: jax.Array
    c: jax.Array | int
    ranges: object
    slots: object

    def start(self):
        """Slot of the block's first query."""
        first = self.i * self.layout.tiles.block_q
        return first + self.slots[self.b] if self.layout.traced_start else first

    def window(self):
        """The window, from wherever it comes."""
        layout = self.layout
        if layout.traced_window:
            return self.slots[layout.traced_start * self.batch()]
        return layout.window

    def batch(self):
        """Rows of the batch."""
        return self.ranges.shape[0] // (4 * self.layout.q_blocks)

    def loops(self):
        """(low, full_low, full_high, high) of the inner loop, as block numbers within the chunk."""
        layout, tiles = self.layout, self.layout.tiles
        if layout.diagonal:
            end = self.i * (tiles.block_q // tiles.block_k)
        else:
            end = -(-layout.k_len // tiles.block_k)
        low, full_low, full_high, high = 0, 0, end, end
        if layout.limited:
            at = (self.b * layout.q_blocks + self.i) * 4
            low, full_low = self.ranges[at], self.ranges[at + 1]
            full_high, high = end - self.ranges[at + 2], end - self.ranges[at + 3]
        if layout.chunks == 1:
            return low, full_low, full_high, high
        first = self.c * layout.chunk_blocks

        def clip(x):
            return jnp.clip(x - first, 0, layout.chunk_blocks)

        return clip(low), clip(full_low), clip(full_high), clip(high)

    def on_diagonal(self):
        """Whether the chunk holds the keys of the block's own slots; None where that is always."""
        layout = self.layout
        if layout.chunks == 1:
            return None
        first_slot = self.i * layout.tiles.block_q - self.c * layout.chunk
        return (first_slot >= 0) & (first_slot < layout.chunk)


def when_chunk(layout: Layout, condition, body):
    """Runs the body where the condition holds; with a single chunk it always does."""
    if layout.chunks == 1:
        body()
    else:
        pl.when(condition)(body)


def loop(step: Step, block):
    """Runs block(j, masked) on the key blocks of a grid step, the diagonal's left out."""
    low, full_low, full_high, high = step.loops()
    jax.lax.fori_loop(full_low, full_high, lambda j, _: block(j, False), None)
    if step.layout.limited:
        jax.lax.fori_loop(low, full_low, lambda j, _: block(j, True), None)
        jax.lax.fori_loop(full_high, high, lambda j, _: block(j, True), None)
