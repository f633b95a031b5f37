"""Pipeline shared by the flash-attention kernels: persistent work loop, copy rings, masking.

A CTA has three warpgroups: two compute, on 64 rows of a tile each, and one only copies operands
from global to shared memory.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.gpu import mosaic
from qwen_jax.kernels.gpu.flash_schedule import TILE_FIELDS, RowMask, WorkQueue
from qwen_jax.kernels.gpu.mosaic import MemoryType
from qwen_jax.kernels.refs import Ref, bind_by_name

COMPUTE_WARPGROUPS = 2
"""Warpgroups that compute; a third loads."""
WARPGROUP_ROWS = 64
"""Queries (or keys, in the kernel for dk and dv) of a warpgroup: the M of a wgmma instruction."""
TILE_ROWS = COMPUTE_WARPGROUPS * WARPGROUP_ROWS
"""Queries (or keys) of a work item."""


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """Size of a pipeline step and number of steps in flight.

    Attributes:
      block: keys per step (or queries per step, in the kernel for dk and dv).
      stages: steps whose operands are in shared memory at one time.
    """

    block: int
    stages: int


@dataclasses.dataclass(frozen=True)
class BlockSchedule:
    """Order in which one work item visits its blocks: masked ones first, each run from its end.

    Attributes:
      low: first block of the item; int32 scalar, like the others.
      full_low: first block that needs no mask.
      full_high: block after the last one that needs no mask.
      high: block after the last one of the item.
    """

    low: jax.Array
    full_low: jax.Array
    full_high: jax.Array
    high: jax.Array

    @property
    def masked_steps(self) -> jax.Array:
        """Returns the number of steps that need the mask, which are the first ones of the item."""
        return self.full_low - self.low + self.high - self.full_high

    @property
    def steps(self) -> jax.Array:
        """Returns the number of steps of the item, one block each."""
        return self.high - self.low

    def masked_block(self, step: jax.Array) -> jax.Array:
        """Returns the block of a step that needs the mask (step < masked_steps), int32 scalar."""
        end = self.high - self.full_high
        return jnp.where(step < end, self.high - 1 - step, self.full_low - 1 - (step - end))

    def full_block(self, step: jax.Array) -> jax.Array:
        """Returns the block of a step that needs no mask (step ≥ masked_steps), int32 scalar."""
        return self.full_high - 1 - (step - self.masked_steps)

    def block(self, step: jax.Array) -> jax.Array:
        """Returns the block of any step of the item, int32 scalar."""
        masked = step < self.masked_steps
        return jnp.where(masked, self.masked_block(step), self.full_block(step))


@dataclasses.dataclass(frozen=True)
class WorkItem:
    """One tile of one head, to be computed by one CTA.

    Attributes:
      batch: batch row, int32 scalar.
      tile: index of the tile along queries (or keys).
      head: index of the head, as the work queue counts heads.
      schedule: blocks to visit.
    """

    batch: jax.Array
    tile: jax.Array
    head: jax.Array
    schedule: BlockSchedule


class WarpSpecialisedKernel(Protocol):
    """A kernel body in two parts, one for each role of a warpgroup."""

    def load(self) -> None:
        """Copies the operands of this CTA's work items to shared memory; runs in one warpgroup."""

    def compute(self) -> None:
        """Computes this CTA's work items from shared memory; runs in two warpgroups."""


def launch_kernel(
    name: str,
    body: Callable[..., None],
    *,
    inputs: Mapping[str, Any],
    outputs: Mapping[str, jax.ShapeDtypeStruct],
    scratch: Mapping[str, MemoryType],
    ctas: int,
) -> dict[str, jax.Array]:
    """Runs a kernel on a grid of CTAs (axis "cta") and returns its outputs by name.

    Args:
      name: of the kernel, and of the named scope around it. Programs are searched for the scope,
        because jax names a kernel that modifies an operand differently.
      body: called in every warpgroup (axis "wg") with the references of inputs, outputs and
        scratch as keyword arguments.
      inputs: arrays, or pytrees of arrays, by parameter name; a `jax.Ref` may be modified in place.
      outputs: types of the results by parameter name.
      scratch: types of shared memory and barriers, or pytrees of them, by parameter name.
      ctas: number of CTAs.
    """
    operands, tree = jax.tree.flatten(list(inputs.values()))

    def kernel_body(*refs: Ref) -> None:
        input_refs = jax.tree.unflatten(tree, refs[: len(operands)])
        named = dict(zip(inputs, input_refs, strict=True))
        named |= dict(zip(outputs, refs[len(operands) :], strict=True))
        with_scratch = bind_by_name(functools.partial(body, **named), list(scratch))
        pl.run_scoped(with_scratch, *scratch.values(), collective_axes="wg")

    mesh = plgpu.Mesh(
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="wg",
        kernel_name=name,
    )
    kernel = pl.kernel(
        kernel_body,
        out_type=tuple(outputs.values()),
        mesh=mesh,
        compiler_params=mosaic.COMPILER_PARAMS,
        name=name,
    )
    results = jax.named_scope(name)(kernel)(*operands)
    return dict(zip(outputs, results, strict=True))


def run_warp_specialised(kernel: WarpSpecialisedKernel) -> None:
    """Runs kernel.load in the last warpgroup and kernel.compute in the others.

    A computing warpgroup gets 240 registers a thread and the loading one 24: for 128 threads each
    that is within the 65,536 registers of a multiprocessor.
    """

    def compute():
        plgpu.set_max_registers(240, action="increase")
        kernel.compute()

    def load():
        plgpu.set_max_registers(24, action="decrease")
        kernel.load()

    computes = lax.axis_index("wg") < COMPUTE_WARPGROUPS
    pl.when(computes)(compute)
    pl.when(jnp.logical_not(computes))(load)


def persistent_loop(
    queue: WorkQueue,
    ctas: int,
    table_ref: Ref,
    body: Callable[[jax.Array, WorkItem, jax.Array], jax.Array],
    *,
    prefetch: bool,
) -> jax.Array:
    """Runs `body` on each work item of this CTA in turn and returns the last carry.

    Args:
      queue: order of all items.
      ctas: number of CTAs that share the queue.
      table_ref: int32 [tiles, 6], see `flash_schedule.make_tile_table`.
      body: takes (n, item, carry), where n counts the items of this CTA, and returns the next
        carry; the carry is an int32 scalar that starts at 0.
      prefetch: read the table row of the next item while this one is computed, which hides the
        latency and costs registers.
    """
    cta = lax.axis_index("cta")
    num_items = lax.div(jnp.int32(queue.items + ctas - 1) - cta, jnp.int32(ctas))

    def read(n):
        row, head = queue.locate(jnp.minimum(cta + n * ctas, queue.items - 1))
        return head, *(table_ref[row, i] for i in range(len(TILE_FIELDS)))

    def item(head, batch, tile, *ranges):
        return WorkItem(batch, tile, head, BlockSchedule(*ranges))

    if not prefetch:
        return lax.fori_loop(
            0, num_items, lambda n, carry: body(n, item(*read(n)), carry), jnp.int32(0)
        )

    def body_and_prefetch(n, state):
        carry, fields = state
        next_fields = read(n + 1)
        return body(n, item(*fields), carry), next_fields

    return lax.fori_loop(0, num_items, body_and_prefetch, (jnp.int32(0), read(0)))[0]


def select_batch(array_ref: Ref, batch: jax.Array) -> Ref:
    """Returns row `batch` of an array, or its only row where the array has one for all of them."""
    return array_ref.at[0 if array_ref.shape[0] == 1 else batch]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CopyRing:
    """Barriers of a ring of shared-memory buffers, filled by asynchronous copies step by step.

    One warpgroup starts copies (`start_copies`), the computing ones wait for them (`wait_filled`)
    and give the buffers back (`release`). Steps are counted over all work items of the CTA, and
    step s uses the buffers at index `slot(s)`.

    Attributes:
      filled: barriers [stages], completed when the copies of a step have arrived.
      free: barriers [stages], completed when each computing warpgroup has released a step.
      stages: number of buffers.
    """

    filled: Ref
    free: Ref
    stages: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def scratch(cls, stages: int, copies_per_step: int = 1) -> CopyRing:
        """Returns the scratch types of a ring; a kernel receives them as a `CopyRing`."""
        return cls(
            filled=plgpu.Barrier(num_arrivals=copies_per_step, num_barriers=stages),
            free=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages),
            stages=stages,
        )

    def slot(self, step: jax.Array) -> jax.Array:
        """Returns the index of the buffer that a step uses, int32 scalar."""
        return lax.rem(step, jnp.int32(self.stages))

    def start_copies(self, step: jax.Array, *copies: tuple[Ref, Ref]) -> None:
        """Waits until the buffers of a step are free and starts filling them.

        Args:
          step: int32 scalar.
          *copies: pairs (source in global memory, buffers [stages, …] in shared memory), as many
            as the ring was allocated for.
        """
        slot = self.slot(step)
        pl.when(step >= self.stages)(lambda: plgpu.barrier_wait(self.free.at[slot]))
        for source, buffers in copies:
            plgpu.copy_gmem_to_smem(source, buffers.at[slot], self.filled.at[slot])

    def drain(self, steps: jax.Array) -> None:
        """Waits at the end of the kernel until all buffers are released.

        steps: how many steps there were in all, int32 scalar.
        """
        for slot in range(self.stages):
            wait = functools.partial(plgpu.barrier_wait, self.free.at[slot])
            pl.when(steps > slot)(wait)

    def wait_filled(self, step: jax.Array) -> None:
        """Waits until the copies of a step have arrived."""
        plgpu.barrier_wait(self.filled.at[self.slot(step)])

    def release(self, step: jax.Array) -> None:
        """Signals that this warpgroup has finished reading the buffers of a step."""
        plgpu.barrier_arrive(self.free.at[self.slot(step)])


@dataclasses.dataclass(frozen=True)
class RowBounds:
    """Attention mask (`RowMask`) of the 64 rows of a warpgroup, in registers.

    Attributes:
      low: int32 [64], first visible column of each row, or None.
      high: int32 [64], column after the last visible one, or None.
      ids: int32 [64], segment id of each row, or None.
    """

    low: jax.Array | None
    high: jax.Array | None
    ids: jax.Array | None


def load_row_bounds(row_mask: RowMask, batch: jax.Array, start: jax.Array) -> RowBounds:
    """Loads the mask of 64 rows, from row `start` on, into registers.

    Args:
      row_mask: references to the mask in global memory.
      batch: batch row, int32 scalar.
      start: first of the 64 rows, int32 scalar.
    """
    slots = pl.ds(start, WARPGROUP_ROWS)

    def read(array_ref):
        if array_ref is None:
            return None
        return mosaic.load(select_batch(array_ref, batch).at[slots], mosaic.PER_ROW)

    return RowBounds(low=read(row_mask.low), high=read(row_mask.high), ids=read(row_mask.ids))


def apply_mask(
    row_mask: RowMask, bounds: RowBounds, batch: jax.Array, start: jax.Array, scores: jax.Array
) -> jax.Array:
    """Returns scores with -inf where the mask hides them.

    Uses two one-sided comparisons and never an absolute difference, which compilers have
    miscompiled.

    Args:
      row_mask: references to global memory; the ids of the columns are read from it.
      bounds: mask of the 64 rows.
      batch: batch row.
      start: column number of the first score.
      scores: float32 [64, columns], in registers.
    """
    num_columns = scores.shape[1]
    slots, visible = mosaic.iota((WARPGROUP_ROWS, num_columns), 1), []
    if bounds.low is not None:
        visible.append(slots >= mosaic.broadcast_rows(bounds.low - start, num_columns))
    if bounds.high is not None:
        visible.append(slots < mosaic.broadcast_rows(bounds.high - start, num_columns))
    if bounds.ids is not None:
        ids = select_batch(row_mask.column_ids, batch).at[pl.ds(start, num_columns)]
        ids = mosaic.broadcast_columns(mosaic.load(ids, mosaic.PER_COLUMN), WARPGROUP_ROWS)
        visible.append(mosaic.broadcast_rows(bounds.ids, num_columns) == ids)
    return jnp.where(functools.reduce(jnp.logical_and, visible), scores, -jnp.inf)
