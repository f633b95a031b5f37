"""TPU slices by name: topology, hosts, and their names on GKE and Cloud TPU.

A name is GENERATION-NUMBER as on Google's price list. The number counts chips for v5e and v6e, and
TensorCores, two per chip, for v4, v5p and tpu7x: v5p-128 has 64 chips.

Sources: https://cloud.google.com/tpu/docs (pages v4, v5e, v5p, v6e, tpu7x and runtimes),
https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus (labels, machine types), and the
same table in https://github.com/AI-Hypercomputer/xpk (system_characteristics.py, June 2026).
"""

from __future__ import annotations

import dataclasses
import math

from qwen_jax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class TpuGeneration:
    """Properties shared by the slices of a TPU generation.

    Attributes:
      label: value of the GKE node label cloud.google.com/gke-tpu-accelerator.
      machine: GKE machine type of a host with four chips.
      accelerator: prefix of the Cloud TPU API's accelerator types ("": available on GKE only).
      runtime: software version that the Cloud TPU API installs on a TPU VM for JAX.
      per_chip: by how much a chip counts in a slice's name.
      devices_per_chip: JAX devices per chip; v4 and v5p show a chip's two cores as one.
      topologies: chips along each axis of the interconnect, smallest first.
    """

    label: str
    machine: str
    accelerator: str
    runtime: str
    per_chip: int
    devices_per_chip: int
    topologies: tuple[str, ...]


_FLAT = ("2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
# One three-dimensional shape per size: the one closest to a cube.
_CUBES = (
    "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16",
    "16x16x16",
)  # fmt: skip

GENERATIONS = {
    "v4": TpuGeneration(
        "tpu-v4-podslice", "ct4p-hightpu-4t", "v4", "tpu-ubuntu2204-base", 2, 1, _CUBES
    ),
    "v5e": TpuGeneration(
        "tpu-v5-lite-podslice", "ct5lp-hightpu-4t", "v5litepod", "v2-alpha-tpuv5-lite", 1, 1, _FLAT
    ),
    "v5p": TpuGeneration(
        "tpu-v5p-slice", "ct5p-hightpu-4t", "v5p", "v2-alpha-tpuv5", 2, 1,
        (*_CUBES, "16x16x24"),
    ),
    "v6e": TpuGeneration(
        "tpu-v6e-slice", "ct6e-standard-4t", "v6e", "v2-alpha-tpuv6e", 1, 1, ("2x2", *_FLAT)
    ),
    "tpu7x": TpuGeneration("tpu7x", "tpu7x-standard-4t", "", "", 2, 2, _CUBES),
}  # fmt: skip

CHIPS_PER_HOST = 4  # of all machine types above


@dataclasses.dataclass(frozen=True)
class TpuSlice:
    """A TPU slice.

    Attributes:
      name: its name, as `find_slice` accepts it.
      generation: properties of its generation.
      topology: chips along each axis of the interconnect, such as "16x16".
    """

    name: str
    generation: TpuGeneration
    topology: str

    @property
    def chips(self) -> int:
        """Returns the number of chips."""
        return math.prod(map(int, self.topology.split("x")))

    @property
    def hosts(self) -> int:
        """Returns the number of virtual machines on GKE, each of which runs one process."""
        return self.chips // CHIPS_PER_HOST

    @property
    def devices(self) -> int:
        """Returns the number of JAX devices."""
        return self.chips * self.generation.devices_per_chip

    @property
    def accelerator(self) -> str:
        """Returns the name for the Cloud TPU API and xpk, such as v5litepod-256."""
        prefix = self.generation.accelerator or self.name.partition("-")[0]
        return f"{prefix}-{self.name.partition('-')[2]}"


def slices() -> dict[str, TpuSlice]:
    """Returns all supported slices by name."""
    by_name = {}
    for prefix, generation in GENERATIONS.items():
        for topology in generation.topologies:
            chips = math.prod(map(int, topology.split("x")))
            name = f"{prefix}-{chips * generation.per_chip}"
            by_name[name] = TpuSlice(name, generation, topology)
    return by_name


def find_slice(name: str) -> TpuSlice:
    """Returns the slice of a name; xpk's and the Cloud TPU API's v5litepod-256 is v5e-256.

    Raises:
      UserError: it is unknown; the message suggests the nearest and lists the sizes of its
        generation.
    """
    known = slices()
    name = name.replace("v5litepod-", "v5e-")
    if name in known:
        return known[name]
    generation = name.partition("-")[0]
    same = [other for other in known if other.startswith(f"{generation}-")]
    if same:  # suggest the nearest number; similarity of the text would be misleading
        size = name.partition("-")[2]
        if size.isdecimal():
            close = min(same, key=lambda other: abs(int(other.partition("-")[2]) - int(size)))
            hint = f" (did you mean {close!r}?)"
        else:
            hint = ""
        raise UserError(f"--slice={name} is unknown{hint}; {generation} has {', '.join(same)}")
    raise UserError(
        f"--slice={name} is unknown{nearest(name, known)}; "
        f"choose a size of {', '.join(GENERATIONS)}, such as v5e-256"
    )
