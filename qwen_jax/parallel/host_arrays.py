"""Conversion of host rows to global device arrays."""

from __future__ import annotations

import jax
import numpy as np

from qwen_jax.parallel.rules import named_sharding

_AXES = ("batch", "sequence")  # Logical axes of the arrays of a batch.


def local_rows(mesh: jax.sharding.Mesh, global_batch: int) -> tuple[int, int]:
    """Returns (first row, number of rows) of the global batch that this process's devices hold.

    Processes whose devices differ only along context or tensor hold the same rows.

    Args:
      mesh: the device mesh.
      global_batch: rows of the global batch.
    """
    sharding = named_sharding(mesh, "batch")
    indices = sharding.addressable_devices_indices_map((global_batch,)).values()
    bounds = [index[0].indices(global_batch)[:2] for index in indices if index is not None]
    first = min(start for start, _ in bounds)
    return first, max(stop for _, stop in bounds) - first


def to_global(
    batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh, first: int, global_batch: int
) -> dict[str, jax.Array]:
    """Assembles global arrays from the rows that each process has read.

    All processes must call it, each with at least the rows of its own devices (see `local_rows`).
    Only the parts that belong to this process's devices are copied to them.

    Args:
      batch: name -> rows [first, first + b) of the global batch, [b] or [b, T] (T tokens per row).
      mesh: the device mesh; the first axis is sharded as the batch, the second as the sequence.
      first: index in the global batch of the first given row.
      global_batch: rows of the global batch.
    """

    def make_global(rows: np.ndarray) -> jax.Array:
        """Returns the global array whose rows [first, first + b) are `rows`."""
        shape = (global_batch, *rows.shape[1:])

        def shard_rows(index: tuple[slice, ...] | None) -> np.ndarray:
            """Returns the part of the global array at `index`, the shard of one device."""
            assert index is not None
            start, stop, _ = index[0].indices(global_batch)
            return rows[(slice(start - first, stop - first), *index[1:])]

        return jax.make_array_from_callback(
            shape, named_sharding(mesh, *_AXES[: rows.ndim]), shard_rows
        )

    return {name: make_global(rows) for name, rows in batch.items()}
