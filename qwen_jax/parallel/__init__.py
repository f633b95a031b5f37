"""Device mesh, axis rules and multi-host start-up."""

from qwen_jax.parallel.mesh import AXES, MeshConfig, make_mesh
from qwen_jax.parallel.rules import (
    RULES,
    batch_devices,
    current_mesh,
    gather_weight,
    named_sharding,
    on_mesh,
    reshard,
    spec,
)

__all__ = [
    "AXES",
    "RULES",
    "MeshConfig",
    "batch_devices",
    "current_mesh",
    "gather_weight",
    "make_mesh",
    "named_sharding",
    "on_mesh",
    "reshard",
    "spec",
]
