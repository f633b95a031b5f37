"""Device mesh, axis rules and multi-host start-up."""

from qwen_jax.parallel.mesh import AXES, MeshConfig, make_mesh
from qwen_jax.parallel.rules import (
    RULES,
    batch_devices,
    current_mesh,
    gather_weight,
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
    "named_sharding",
    "on_mesh",
    "platform",
    "reshard",
    "spec",
    "to_zigzag",
    "zigzag_slots",
]
