"""The mesh: sizes filled in or refused, and slices crossed by `data` alone."""

import dataclasses

import jax
import numpy as np
import pytest

from qwen_jax.errors import UserError
from qwen_jax.parallel import MeshConfig, make_mesh


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (1, 8, 1, 1)),
        (MeshConfig(data=2, tensor=2), (2, 2, 1, 2)),
        (MeshConfig(data=-1, fsdp=1, context=4), (2, 1, 4, 1)),
        (MeshConfig(fsdp=2, context=2, tensor=2), (1, 2, 2, 2)),
    ],
)
def test_axis_of_minus_one_takes_the_remaining_devices(config, shape):
    mesh = make_mesh(config)
    assert tuple(mesh.shape.values()) == shape
    assert {d.id for d in mesh.devices.flat} == set(range(8))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (MeshConfig(fsdp=3), "fsdp=3.*needs 3 devices but there are 8"),
        (MeshConfig(tensor=3), "needs a multiple of 3 devices but there are 8"),
        (MeshConfig(data=-1), "-1 on more than one axis"),
        (MeshConfig(tensor=0), "mesh.tensor is 0"),
    ],
)
def test_sizes_that_do_not_match_the_devices_are_refused(config, said):
    with pytest.raises(UserError, match=said):
        make_mesh(config)


@dataclasses.dataclass(frozen=True, order=True)
class Device:
    """What the layout of a mesh looks at."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "cpu"


def test_only_the_data_axis_crosses_slices():
    devices = [Device(i, slice_index=i % 2) for i in range(16)]  # interleaved on purpose
    mesh = make_mesh(MeshConfig(data=4, fsdp=2, tensor=2), devices)
    slices = np.vectorize(lambda d: d.slice_index)(mesh.devices)
    for row in slices.reshape(4, -1):
        assert len(set(row)) == 1
    assert set(slices.reshape(4, -1)[:, 0]) == {0, 1}
    with pytest.raises(UserError, match=r"mesh.data=1 is not a multiple of the 2 slices"):
        make_mesh(MeshConfig(fsdp=16), devices)


def test_mesh_is_independent_of_the_order_of_devices():
    mesh = make_mesh(MeshConfig(), list(reversed(jax.devices())))
    assert mesh.size == 8
