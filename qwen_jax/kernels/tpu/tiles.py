"""Block sizes of the TPU kernels, chip by chip, and which chip the kernel is compiled for."""

from __future__ import annotations

import dataclasses

import jax

MIB = 2**20
LANES = 128


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Block sizes of one kernel on one chip.

    Attributes:
      block_q: queries a grid step works on. A multiple of block_k.
      block_k: keys an iteration of the inner loop works on.
      diagonal: edge of the squares into which the block on the diagonal is cut. Divides block_q.
      resident: bytes of K (or V) of one head that may lie in VMEM at a time; longer sequences are
        cut into chunks of keys of this size.
    """

    block_q: int
    block_k: int
    diagonal: int
    resident: int

    def __post_init__(self):
        assert self.block_q % self.block_k == 0 and self.block_q % self.diagonal == 0
        assert self.block_k % LANES == 0 and self.diagonal % LANES == 0


@dataclasses.dataclass(frozen=True)
class Chip:
    """What the kernels need to know of a chip.

    Attributes:
      vmem: bytes of vector memory a kernel may ask for (physical, less what the compiler keeps).
    """

    forward: Tiles
    backward: Tiles
    vmem: int


CHIPS = {
    "v5e": Chip(Tiles(512, 512, 256, 2 * MIB), Tiles(512, 512, 256, 2 * MIB), 120 * MIB),
    "v5p": Chip(Tiles(512, 512, 256, 2 * MIB), Tiles(512, 512, 256, 2 * MIB), 60 * MIB),
    "v6e": Chip(Tiles(1024, 1024, 256, 2 * MIB), Tiles(512, 512, 256, 2 * MIB), 120 * MIB),
}

# How jax spells them.
_KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}


def device_kind() -> str:
    """Kind of the device that code traced now will run on: of the mesh, else of the first device.

    A mesh of a topology description names its chip on a host without any.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device is not None else jax.devices()[0].device_kind


def chip_of(kind: str) -> str | None:
    """Name in `CHIPS` of a device kind as jax spells it, or None."""
    return _KINDS.get(kind)
