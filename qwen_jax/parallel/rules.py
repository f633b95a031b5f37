"""One table from the names of tensor axes to mesh axes, and the verbs that use it.

Every weight and activation axis has a logical name; the table alone decides where it lives. Without
a mesh (a notebook on one device) every verb here does nothing.
"""

from __future__ import annotations

import math

import jax
from jax.ad_checkpoint import checkpoint_name

RULES: dict[str | None, str | tuple[str, ...] | None] = {
    None: None,
    # Activations. Residual-stream channels stay whole: norms then need no communication.
    "batch": ("data", "fsdp"),
    "sequence": "context",
    "channels": None,
    # Weights. `embed` is the D side of every matrix, sharded at rest and gathered to be used.
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "ffn": "tensor",
    "vocab": "tensor",
    "norm": None,
    # The input table is looked up by row, so rows stay together and channels are spread over both
    # axes: a lookup then moves activations (tokens × D), never the table (V × D, 18 times more at
    # 7B with 8k tokens per device).
    "table_rows": None,
    "table_batch": "data",
    "table_channels": ("fsdp", "tensor"),
}

GATHERED = "gathered_weight"
"""Name under which gathered weights are known to remat policies: they are never saved."""


def current_mesh() -> jax.sharding.AbstractMesh:
    """The mesh in force; `.empty` when there is none."""
    return jax.sharding.get_abstract_mesh()


def on_mesh() -> bool:
    """Whether a mesh is in force."""
    return not current_mesh().empty


def platform() -> tuple[str, str]:
    """("cpu", "gpu" or "tpu", the kind of device): the mesh's, else that of the first device.

    Taken from the mesh, so that a program can be compiled for devices that are not there.
    """
    device = current_mesh().abstract_device if on_mesh() else None
    device = device or jax.devices()[0]
    return device.platform, device.device_kind


def spec(*axes: str | None) -> jax.P | None:
    """PartitionSpec of a tensor with these logical axes; None without a mesh.

    Meant for `out_sharding=`: None then leaves single-device code as it is.
    """
    return jax.P(*(RULES[axis] for axis in axes)) if on_mesh() else None


def named_sharding(mesh: jax.sharding.Mesh, *axes: str | None) -> jax.NamedSharding:
    """NamedSharding on a concrete mesh of a tensor with these logical axes."""
    return jax.NamedSharding(mesh, jax.P(*(RULES[axis] for axis in axes)))


def reshard(x: jax.Array, *axes: str | None) -> jax.Array:
    """Moves `x` to the sharding of these logical axes (a collective where it differs)."""
    return jax.reshard(x, spec(*axes)) if on_mesh() else x


def gather_weight(weight: jax.Array, axes: tuple[str | None, ...], dtype) -> jax.Array:
    """Casts a weight to the compute dtype, then collects its `fsdp` shards for use.

    Casting first halves the bytes moved in bf16. The transpose reduces the gradient in the compute
    dtype back to the shards. This is FSDP in one line: parameters live sharded, are whole only
    while a layer uses them, and remat policies never save the whole copy.
    """
    weight = weight.astype(dtype)
    if on_mesh():
        kept = (None if RULES[axis] == "fsdp" else RULES[axis] for axis in axes)
        weight = jax.reshard(weight, jax.P(*kept))
    return checkpoint_name(weight, GATHERED)


def batch_devices(mesh) -> int:
    """Number of mesh positions the global batch is split over."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])
