"""Host rows to global device arrays, and back."""

from __future__ import annotations

import jax
import numpy as np

from qwen_jax.parallel.rules import named_sharding

_AXES = ("batch", "sequence")


def local_rows(mesh: jax.sharding.Mesh, global_batch: int) -> tuple[int, int]:
    """(first row, number of rows) of the global batch that this process's devices hold.

    Several processes may hold the same rows: those that share a row along context or tensor.
    """
    sharding = named_sharding(mesh, "batch")
    slices = sharding.addressable_devices_indices_map((global_batch,)).values()
    bounds = [s.indices(global_batch)[:2] for (s,) in slices]
    first = min(start for start, _ in bounds)
    return first, max(stop for _, stop in bounds) - first


def to_global(
    batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh, first: int, global_batch: int
) -> dict[str, jax.Array]:
    """Global arrays from the rows [first, …) this process has read; copies only its devices' part.

    Arrays are [b] or [b,T]; the first axis is the batch, the second the sequence.
    """

    def globalise(rows: np.ndarray) -> jax.Array:
        shape = (global_batch, *rows.shape[1:])

        def piece(index):
            start, stop, _ = index[0].indices(global_batch)
            return rows[(slice(start - first, stop - first), *index[1:])]

        return jax.make_array_from_callback(shape, named_sharding(mesh, *_AXES[: rows.ndim]), piece)

    return {name: globalise(rows) for name, rows in batch.items()}
