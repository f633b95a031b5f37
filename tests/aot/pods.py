"""Pods with made-up devices, for tests that need coordinates but not libtpu."""

import dataclasses
import itertools
import types

import numpy as np

from qwen_jax.aot.topology import Pod, parse


@dataclasses.dataclass(frozen=True)
class Device:
    coords: tuple[int, ...]


def pod(name: str) -> Pod:
    """The pod of this name; its devices' first coordinate varies slowest."""
    chip, shape = parse(name)
    devices = [Device((*c, 0)) for c in itertools.product(*(range(n) for n in shape))]
    return Pod(name, chip, shape, devices)


def mesh(pod: Pod):
    """What the cost model reads of a mesh: its devices in order."""
    return types.SimpleNamespace(devices=np.array(pod.devices, dtype=object))
