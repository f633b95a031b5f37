"""Rules that map logical array axes to mesh axes, and the sharding functions that use them.

Every axis of a weight or activation has a logical name; this table alone determines its mesh axes.
Without a mesh (a notebook on one device) the functions change nothing.
"""

from __future__ import annotations

import math

import jax
from jax.ad_checkpoint import checkpoint_name

RULES: dict[str | None, str | tuple[str, ...] | None] = {
    None: None,
    # Activations. Residual-stream channels are not sharded, so norms need no communication.
    "batch": ("data", "fsdp"),
    "sequence": "context",
    "channels": None,
    # Weights. `embed` is the d_model axis of every matrix: stored sharded, gathered for use.
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "ffn": "tensor",
    "vocab": "tensor",
    "norm": None,
    # The input embedding table is looked up by row, so rows are not sharded and channels are
    # sharded over both axes: a lookup then moves activations (tokens × D), never the table (V × D,
    # 18 times more at 7B with 8k tokens per device).
    "table_rows": None,
    "table_batch": "data",
    "table_channels": ("fsdp", "tensor"),
}

GATHERED = "gathered_weight"
"""Name given to gathered weights (`checkpoint_name`), so that remat policies never save them."""


def mesh_axes(axis: str | None) -> tuple[str, ...]:
    """Returns the names of the mesh axes that a logical axis is sharded over, () if none."""
    names = RULES[axis]
    return () if names is None else (names,) if isinstance(names, str) else names


def mesh_axis(axis: str) -> str:
    """Returns the name of the only mesh axis that a logical axis is sharded over."""
    (name,) = mesh_axes(axis)
    return name


def current_mesh() -> jax.sharding.AbstractMesh:
    """Returns the mesh set by `jax.set_mesh`; an empty one (`.empty`) if none is set."""
    return jax.sharding.get_abstract_mesh()


def on_mesh() -> bool:
    """Returns whether a mesh is set."""
    return not current_mesh().empty


def platform() -> tuple[str, str]:
    """Returns the platform and device kind of the mesh, or of the first device without a mesh.

    The mesh takes precedence, so that a program can be compiled for devices that are not attached.

    Returns:
      ("cpu", "gpu" or "tpu", device kind such as "TPU v5 lite").
    """
    device = current_mesh().abstract_device if on_mesh() else None
    device = device or jax.devices()[0]
    name = {"cuda": "gpu", "rocm": "gpu"}.get(device.platform, device.platform)
    return name, device.device_kind


def spec(*axes: str | None) -> jax.P | None:
    """Returns the PartitionSpec of an array with these logical axes; None without a mesh.

    Meant for `out_sharding=`, where None has no effect.
    """
    return jax.P(*(RULES[axis] for axis in axes)) if on_mesh() else None


def named_sharding(mesh: jax.sharding.Mesh, *axes: str | None) -> jax.NamedSharding:
    """Returns the NamedSharding, on a concrete mesh, of an array with these logical axes."""
    return jax.NamedSharding(mesh, jax.P(*(RULES[axis] for axis in axes)))


def reshard(x: jax.Array, *axes: str | None) -> jax.Array:
    """Reshards `x` to the sharding of these logical axes; returns it unchanged without a mesh."""
    return jax.reshard(x, spec(*axes)) if on_mesh() else x


def gather_weight(weight: jax.Array, axes: tuple[str | None, ...], dtype) -> jax.Array:
    """Casts a weight to the compute dtype, then all-gathers its `fsdp` shards for use.

    Casting first halves the bytes moved in bf16. The transpose reduces the gradient, in the compute
    dtype, back to the shards. This is all of FSDP: parameters are stored sharded and gathered only
    while a layer uses them, and remat policies never save the gathered copy.

    Args:
      weight: the stored weight, sharded by `axes`.
      axes: logical names of its axes.
      dtype: compute dtype.
    """
    weight = weight.astype(dtype)
    if on_mesh():
        kept = (None if RULES[axis] == "fsdp" else RULES[axis] for axis in axes)
        weight = jax.reshard(weight, jax.P(*kept))
    return checkpoint_name(weight, GATHERED)


def batch_devices(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> int:
    """Returns the number of shards that the global batch is split into on this mesh."""
    return math.prod(mesh.shape[axis] for axis in mesh_axes("batch"))
