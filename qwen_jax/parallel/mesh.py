"""Device mesh with axes data × fsdp × context × tensor, in JAX's explicit-sharding mode."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType

from qwen_jax.errors import UserError

AXES = ("data", "fsdp", "context", "tensor")
"""Mesh axes, outermost first.

data: replicas of the model, whose gradients are summed (the only axis that may cross slices); fsdp:
parameters and optimizer state are sharded, weights gathered layer by layer; context: sequences are
sharded; tensor: heads, FFN width and vocabulary are sharded.
"""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each mesh axis; one of them may be -1 for all remaining devices.

    Attributes:
      data: size of the `data` axis.
      fsdp: size of the `fsdp` axis.
      context: size of the `context` axis.
      tensor: size of the `tensor` axis.
    """

    data: int = 1
    fsdp: int = -1
    context: int = 1
    tensor: int = 1


def mesh_sizes(config: MeshConfig, n_devices: int, slices: int = 1) -> tuple[int, ...]:
    """Returns the number of devices along each of `AXES`, with -1 resolved.

    Args:
      config: sizes of the axes.
      n_devices: number of devices.
      slices: number of TPU slices that the devices belong to.

    Raises:
      UserError: the product of the sizes is not the number of devices, or `data` is not a multiple
        of the number of slices.
    """
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
            f"{'a multiple of ' if -1 in sizes else ''}{known} devices but there are {n_devices}; "
            "change one axis, or set one to -1 for the rest"
        )
    sizes = tuple(n_devices // known if s == -1 else s for s in sizes)
    if sizes[0] % slices:
        raise UserError(
            f"mesh.data={sizes[0]} is not a multiple of the {slices} slices; only data crosses "
            "slices, so give it a multiple of their number"
        )
    return sizes


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Returns the device mesh; enter it with `jax.set_mesh(mesh)`.

    Axes are explicit: every array's type carries its sharding, and an operation whose result
    sharding is ambiguous must state it. Within a slice, devices are ordered along the interconnect;
    with several slices, `data` is the outermost axis and the only one that crosses the data-center
    network.

    Args:
      config: sizes of the axes.
      devices: devices of the mesh; by default all devices of all processes.

    Raises:
      UserError: as `mesh_sizes`.
    """
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    sizes = mesh_sizes(config, len(devices), slices)
    # Without split physical axes, tensor=4 on a 16×16 torus has no assignment.
    if slices > 1:
        inner = (sizes[0] // slices, *sizes[1:])
        layout = mesh_utils.create_hybrid_device_mesh(
            inner, (slices, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    else:
        layout = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(layout, AXES, axis_types=(AxisType.Explicit,) * len(AXES))
