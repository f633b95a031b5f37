"""Device mesh, sharding rules and multi-host start-up."""

from qwen_jax.parallel.mesh import AXES, MeshConfig, make_mesh, mesh_sizes
from qwen_jax.parallel.rules import (
    RULES,
    batch_devices,
    current_mesh,
    gather_weight,
    mesh_axes,
    mesh_axis,
    named_sharding,
    on_mesh,
    platform,
    reshard,
    spec,
)
from qwen_jax.parallel.zigzag import context_size, from_zigzag, to_zigzag, zigzag_slots

__all__ = [
    "AXES",
    "RULES",
    "MeshConfig",
    "batch_devices",
    "context_size",
    "current_mesh",
    "from_zigzag",
    "gather_weight",
    "make_mesh",
    "mesh_axes",
    "mesh_axis",
    "mesh_sizes",
    "named_sharding",
    "on_mesh",
    "platform",
    "reshard",
    "spec",
    "to_zigzag",
    "zigzag_slots",
]
