"""Conversion of host rows to global device arrays."""

from __future__ import annotations

import jax
import numpy as np

from qwen_jax.parallel.rules import named_sharding

_AXES = ("batch", "sequence")


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
    """Returns global arrays made from this process's rows.

    Only the parts that belong to this process's devices are copied.

    Args:
      batch: name -> rows [first, first + b) of the global batch, [b] or [b, T] (T tokens per row).
      mesh: the device mesh; the first axis is sharded as the batch, the second as the sequence.
      first: index in the global batch of the first given row.
      global_batch: rows of the global batch.
    """

    def globalise(rows: np.ndarray) -> jax.Array:
        """Returns one array of the batch as a global array."""
        shape = (global_batch, *rows.shape[1:])

        def shard_rows(index):
            """Returns the part at `index` of the global array, which belongs to one device."""
            start, stop, _ = index[0].indices(global_batch)
            return rows[(slice(start - first, stop - first), *index[1:])]

        return jax.make_array_from_callback(
            shape, named_sharding(mesh, *_AXES[: rows.ndim]), shard_rows
        )

    return {name: globalise(rows) for name, rows in batch.items()}
