"""Block sizes of the TPU flash-attention kernels for each chip."""

from __future__ import annotations

import dataclasses

MIB = 2**20
LANES = 128


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Block sizes of one kernel on one chip; all are 128 times a power of two.

    Attributes:
      block_q: queries per grid step.
      block_k: keys per iteration of the inner loop. Divides block_q.
      diagonal: edge of the squares into which the block on the diagonal is divided. Divides
        block_q.
      packed_q: block_q if segments or a window limit the visible keys. Divides block_q.
      resident: bytes of K (or V) of one head that may be in VMEM at a time; longer sequences are
        divided into chunks of keys of this size.
    """

    block_q: int
    block_k: int
    diagonal: int
    packed_q: int
    resident: int = 2 * MIB


@dataclasses.dataclass(frozen=True)
class ChipTiles:
    """Block sizes of the kernels on one chip.

    Attributes:
      forward: block sizes of the forward kernel.
      backward: block sizes of the backward kernel.
      vmem: bytes of vector memory that a kernel may request: the chip's, less the compiler's
        reserve.
    """

    forward: Tiles
    backward: Tiles
    vmem: int


# Chosen by the compiler's static cycle estimates (4,096 tokens, one head of 128, causal, bfloat16:
# benchmarks/attention_cycles.py) and, where they differ by a few per cent, by code size. In brief:
# - block_q: products overlap with exponentials within an iteration, and draining the pipeline at
#   its end is lost time, so long iterations are better: 512 queries cost 30 % more on v6e than
#   1,024, and those 11 % more than 2,048. On v5e and v5p, 2,048 gain 5 % for 2.5 times the code.
# - block_k: v6e's matrix units are 256 × 256, twice as wide as the others', and need 1,024 keys to
#   stay busy; elsewhere 512 keys spill fewer scores.
# - backward: with five products per block, v5e's matrix units are used by 86 % of all instructions
#   at 1,024 queries; v6e would gain 6 % from 2,048, for more than twice the code.
# - diagonal: small squares save products, large ones overlap better.
# - packed_q: with documents of about a thousand tokens, larger blocks compute more masked scores
#   than they gain.
# - resident: 8,192 keys of 128 in bfloat16; K and V with their gradients then take about 24 MiB.
CHIPS = {
    "v5e": ChipTiles(Tiles(1024, 512, 512, 1024), Tiles(1024, 512, 256, 1024), 120 * MIB),
    "v5p": ChipTiles(Tiles(1024, 512, 512, 1024), Tiles(1024, 512, 256, 1024), 60 * MIB),
    "v6e": ChipTiles(Tiles(2048, 1024, 512, 1024), Tiles(1024, 1024, 256, 1024), 120 * MIB),
}

# JAX's device kinds.
_KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}


def chip_name(kind: str) -> str | None:
    """Returns the key in `CHIPS` of a JAX device kind, or None."""
    return _KINDS.get(kind)
