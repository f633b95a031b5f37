"""Block sizes of the TPU kernels, chip by chip, and how jax names the chips."""

from __future__ import annotations

import dataclasses

MIB = 2**20
LANES = 128


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Block sizes of one kernel on one chip; all are 128 times a power of two.

    Attributes:
      block_q: queries a grid step works on.
      block_k: keys an iteration of the inner loop works on. Divides block_q.
      diagonal: edge of the squares into which the block on the diagonal is cut. Divides block_q.
      packed_q: block_q where segments or a window cut rows short. Divides block_q.
      resident: bytes of K (or V) of one head that may lie in VMEM at a time; longer sequences are
        cut into chunks of keys of this size.
    """

    block_q: int
    block_k: int
    diagonal: int
    packed_q: int
    resident: int = 2 * MIB


@dataclasses.dataclass(frozen=True)
class Chip:
    """What the kernels need to know of a chip.

    Attributes:
      vmem: bytes of vector memory a kernel may ask for: the chip's, less what the compiler keeps.
    """

    forward: Tiles
    backward: Tiles
    vmem: int


# Chosen by the compiler's static cycle estimates (4,096 tokens, one head of 128, causal, bfloat16:
# benchmarks/attention_cycles.py) and, where they differ by a few per cent, by code size. In brief:
# - block_q: an iteration's products run while its exponentials are computed, and what drains at its
#   end is lost, so long iterations win: 512 queries cost 30 % more on the v6e than 1,024, and those
#   11 % more than 2,048. On v5e and v5p 2,048 gain 5 % for two and a half times the code.
# - block_k: the v6e's matrix units are 256 × 256, twice as wide as the others', and want 1,024 keys
#   to be kept fed; elsewhere 512 leave fewer scores to spill.
# - backward: with five products a block the matrix units of the v5e fill 86 % of all instructions
#   at 1,024 queries; the v6e would gain 6 % from 2,048, for more than twice the code.
# - diagonal: small squares save products, large ones overlap better.
# - packed_q: with documents of about a thousand tokens, what larger blocks compute in vain costs
#   more than they gain.
# - resident: 8,192 keys of 128 in bfloat16; with their gradients K and V then take some 24 MiB.
CHIPS = {
    "v5e": Chip(Tiles(1024, 512, 512, 1024), Tiles(1024, 512, 256, 1024), 120 * MIB),
    "v5p": Chip(Tiles(1024, 512, 512, 1024), Tiles(1024, 512, 256, 1024), 60 * MIB),
    "v6e": Chip(Tiles(2048, 1024, 512, 1024), Tiles(1024, 1024, 256, 1024), 120 * MIB),
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


def chip_of(kind: str) -> str | None:
    """Name in `CHIPS` of a device kind as jax spells it, or None."""
    return _KINDS.get(kind)
