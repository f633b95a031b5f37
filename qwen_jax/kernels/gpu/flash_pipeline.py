"""How a CTA walks through its work: items, steps of an item, stages in flight, the mask of a block.

A CTA has two warpgroups that compute, on 64 rows each, and one that only moves data.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.gpu import mosaic
from qwen_jax.kernels.gpu.flash_schedule import FIELDS, Queue, Rows

WARPGROUPS = 2
"""Warpgroups that compute; one more loads."""
ROWS = 64
"""Queries (or keys, for their gradients) of a warpgroup: the M of a wgmma instruction."""
TILE = WARPGROUPS * ROWS


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Keys (or queries, for the gradients of keys) a step, and how many steps are in flight."""

    block: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Step:
    """Which block the t-th step of an item takes: masked ones first, the last of them first."""

    low: jax.Array
    full_low: jax.Array
    full_high: jax.Array
    high: jax.Array

    @property
    def masked(self):
        """Number of steps that need the mask."""
        return self.full_low - self.low + self.high - self.full_high

    @property
    def steps(self):
        """Number of steps."""
        return self.high - self.low

    def masked_block(self, t):
        """Block of step t < masked."""
        end = self.high - self.full_high
        return jnp.where(t < end, self.high - 1 - t, self.full_low - 1 - (t - end))

    def full_block(self, t):
        """Block of step t >= masked."""
        return self.full_high - 1 - (t - self.masked)

    def block(self, t):
        """Block of step t."""
        return jnp.where(t < self.masked, self.masked_block(t), self.full_block(t))


@dataclasses.dataclass(frozen=True)
class Item:
    """One tile of one head."""

    batch: jax.Array
    tile: jax.Array
    head: jax.Array
    steps: Step


def launch(name: str, body, out_type: tuple, scratch: list, ctas: int):
    """A kernel of `ctas` thread blocks; body(*inputs, *outputs, *scratch).

    Inputs that are a `jax.Ref` may be changed; jax calls such a kernel by another name, so programs
    find it by the scope.
    """

    def scoped(*refs):
        pl.run_scoped(functools.partial(body, *refs), *scratch, collective_axes="wg")

    mesh = plgpu.Mesh(
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        kernel_name=name,
    )
    kernel = pl.kernel(
        scoped, out_type=out_type, mesh=mesh, compiler_params=mosaic.PARAMS, name=name
    )
    return jax.named_scope(name)(kernel)


def run(unit) -> None:
    """Sends the warpgroups to unit.compute, and the last, with few registers, to unit.load.

    Two with 240 and one with 24 for each of 128 threads fit the 65,536 of a multiprocessor.
    """

    def compute():
        plgpu.set_max_registers(240, action="increase")
        unit.compute()

    def load():
        plgpu.set_max_registers(24, action="decrease")
        unit.load()

    computes = lax.axis_index("wg") < WARPGROUPS
    pl.when(computes)(compute)
    pl.when(jnp.logical_not(computes))(load)


def for_my_items(queue: Queue, ctas: int, table_ref, body, *, ahead: bool) -> jax.Array:
    """Folds body(n, item, carry) over the items of this CTA; the int32 carry starts at 0.

    n counts this CTA's items. ahead: an item's row of the table is read while the one before is
    worked on, which hides a latency and costs registers.
    """
    cta = lax.axis_index("cta")
    mine = lax.div(jnp.int32(queue.items + ctas - 1) - cta, jnp.int32(ctas))

    def read(n):
        row, head = queue.locate(jnp.minimum(cta + n * ctas, queue.items - 1))
        return head, *(table_ref[row, i] for i in range(len(FIELDS)))

    def item(head, batch, tile, *ranges):
        return Item(batch, tile, head, Step(*ranges))

    if not ahead:
        return lax.fori_loop(0, mine, lambda n, c: body(n, item(*read(n)), c), jnp.int32(0))

    def one(n, carry):
        done, place = carry
        following = read(n + 1)
        return body(n, item(*place), done), following

    return lax.fori_loop(0, mine, one, (jnp.int32(0), read(0)))[0]


def of_batch(array_ref, batch):
    """Row of the batch in an array that may have one row for all."""
    return array_ref.at[0 if array_ref.shape[0] == 1 else batch]


@dataclasses.dataclass(frozen=True)
class Stream:
    """Copies into a ring of buffers in shared memory, step after step over all items.

    Attributes:
      ready, consumed: barriers, one a stage; `ready` takes one arrival a copy.
      stages: how many there are.
    """

    ready: jax.Array
    consumed: jax.Array
    stages: int

    def slot(self, step):
        """Buffer of the step-th step, counted over all items of the CTA."""
        return lax.rem(step, jnp.int32(self.stages))

    def put(self, step, *copies) -> None:
        """Starts copies (source, buffers) once the buffer of this step is free."""
        slot = self.slot(step)
        pl.when(step >= self.stages)(lambda: plgpu.barrier_wait(self.consumed.at[slot]))
        for source, buffers in copies:
            plgpu.copy_gmem_to_smem(source, buffers.at[slot], self.ready.at[slot])

    def drain(self, steps) -> None:
        """Waits for the steps still in use after the last: each phase is waited for once."""
        for slot in range(self.stages):
            wait = functools.partial(plgpu.barrier_wait, self.consumed.at[slot])
            pl.when(steps > slot)(wait)

    def wait(self, step) -> None:
        """Until the data of a step is there."""
        plgpu.barrier_wait(self.ready.at[self.slot(step)])

    def release(self, step) -> None:
        """This warpgroup needs a step's data no more."""
        plgpu.barrier_arrive(self.consumed.at[self.slot(step)])


def stream_barriers(stages: int, copies: int = 1) -> tuple:
    """Barrier types (ready, consumed) of a `Stream`."""
    return (
        plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
    )


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The mask of a warpgroup's 64 rows, in registers."""

    low: jax.Array | None
    high: jax.Array | None
    ids: jax.Array | None


def load_bounds(rows: Rows, batch, start) -> Bounds:
    """Bounds of the rows from `start` on. rows: references."""
    slots = pl.ds(start, ROWS)
    each = (rows.low, rows.high, rows.ids)
    return Bounds(
        *(
            None if x is None else mosaic.load(of_batch(x, batch).at[slots], mosaic.PER_ROW)
            for x in each
        )
    )


def hide(rows: Rows, bounds: Bounds, batch, start, scores) -> jax.Array:
    """Scores [64, columns from `start` on] with -inf where the mask has nothing. rows: references.

    Two one-sided bounds, never an absolute difference: compilers have got that wrong.
    """
    columns = scores.shape[1]
    slots, seen = mosaic.iota(scores.shape, 1), []
    if bounds.low is not None:
        seen.append(slots >= mosaic.rows(bounds.low - start, columns))
    if bounds.high is not None:
        seen.append(slots < mosaic.rows(bounds.high - start, columns))
    if bounds.ids is not None:
        ids = of_batch(rows.column_ids, batch).at[pl.ds(start, columns)]
        ids = mosaic.columns(mosaic.load(ids, mosaic.PER_COLUMN), ROWS)
        seen.append(mosaic.rows(bounds.ids, columns) == ids)
    return jnp.where(functools.reduce(jnp.logical_and, seen), scores, -jnp.inf)
