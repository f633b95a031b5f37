"""The device mesh: data × fsdp × context × tensor, in JAX's explicit-sharding mode."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType

from qwen_jax.errors import UserError

AXES = ("data", "fsdp", "context", "tensor")
"""Mesh axes, outermost first.

data: replicas of the whole model, gradients summed across (the only axis that may cross slices);
fsdp: parameters and optimizer state sharded, gathered layer by layer; context: the sequence;
tensor: heads, FFN width and vocabulary.
"""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one axis may be -1, meaning all the devices that are left."""

    data: int = 1
    fsdp: int = -1
    context: int = 1
    tensor: int = 1


def _sizes(config: MeshConfig, n_devices: int) -> tuple[int, ...]:
    sizes = dataclasses.astuple(config)
    for axis, size in zip(AXES, sizes, strict=True):
        if size < 1 and size != -1:
            raise UserError(f"mesh.{axis} is {size}; give a positive number, or -1 for the rest")
    if sizes.count(-1) > 1:
        raise UserError(f"mesh has -1 on more than one axis ({config}); give all but one a number")
    known = math.prod(s for s in sizes if s != -1)
    if n_devices % known or (-1 not in sizes and known != n_devices):
        raise UserError(
            f"mesh {'×'.join(f'{a}={s}' for a, s in zip(AXES, sizes, strict=True))} needs "
            f"{'a multiple of ' if -1 in sizes else ''}{known} devices but {n_devices} are there; "
            "change one axis, or set one to -1 for the rest"
        )
    return tuple(n_devices // known if s == -1 else s for s in sizes)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Makes the mesh; enter it with `jax.set_mesh(mesh)`.

    Axes are explicit: every array's type carries its sharding, and an operation whose result
    sharding is ambiguous must say it. `devices` defaults to all devices of all processes.

    Raises:
      UserError: the sizes don't multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = _sizes(config, len(devices))
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Explicit,) * len(AXES), devices=devices)
