"""Block sizes of the TPU flash-attention kernels for each chip, and the chips' names in jax."""

from __future__ import annotations

import dataclasses

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Block sizes of one flash-attention kernel on one chip, each 128 times a power of two.

    Attributes:
      block_q: queries per grid step.
      block_k: keys per iteration of the kernel's inner loop; divides block_q.
      diagonal_block: edge of the squares into which the block on the diagonal is divided, so that
        those above the diagonal are not computed; divides block_q.
      packed_block_q: largest block_q where segments or a window restrict what a query sees; divides
        block_q.
      resident_bytes: largest size of the keys (or of the values) of one head that are in VMEM at
        one time; the keys of longer sequences are processed in chunks of this size.
    """

    block_q: int
    block_k: int
    diagonal_block: int
    packed_block_q: int
    resident_bytes: int = 2 * MIB


@dataclasses.dataclass(frozen=True)
class FlashConfig:
    """Settings of the flash-attention kernels on one chip.

    Attributes:
      forward: block sizes of the forward kernel.
      backward: block sizes of the backward kernel.
      vmem_bytes: vector memory (VMEM) that a kernel may request: the chip's, less what the compiler
        reserves.
    """

    forward: BlockSizes
    backward: BlockSizes
    vmem_bytes: int


# Chosen by the compiler's static cycle estimates (4,096 tokens, one head of 128, causal, bfloat16:
# benchmarks/attention_cycles.py) and, where they differ by a few per cent, by code size. In brief:
# - block_q: an iteration's products overlap with its exponentials, except at its end, so long
#   iterations are faster: 512 queries cost 30 % more on the v6e than 1,024, and those 11 % more
#   than 2,048. On v5e and v5p 2,048 gain 5 % for two and a half times the code.
# - block_k: the v6e's matrix units are 256 × 256, twice as wide as the others', and need 1,024 keys
#   to stay busy; elsewhere 512 leave fewer scores to spill.
# - backward: with five products per block the matrix units of the v5e fill 86 % of all instructions
#   at 1,024 queries; the v6e would gain 6 % from 2,048, for more than twice the code.
# - diagonal_block: small squares compute fewer masked pairs, large ones overlap better.
# - packed_block_q: with documents of about a thousand tokens, the masked pairs that larger blocks
#   compute cost more than the blocks gain.
# - resident_bytes: 8,192 keys of 128 in bfloat16; with their gradients K and V then take about
#   24 MiB.
FLASH_CONFIGS = {
    "v5e": FlashConfig(
        forward=BlockSizes(1024, 512, 512, 1024),
        backward=BlockSizes(1024, 512, 256, 1024),
        vmem_bytes=120 * MIB,
    ),
    "v5p": FlashConfig(
        forward=BlockSizes(1024, 512, 512, 1024),
        backward=BlockSizes(1024, 512, 256, 1024),
        vmem_bytes=60 * MIB,
    ),
    "v6e": FlashConfig(
        forward=BlockSizes(2048, 1024, 512, 1024),
        backward=BlockSizes(1024, 1024, 256, 1024),
        vmem_bytes=120 * MIB,
    ),
}
"""Settings by the chip's name."""

_CHIP_NAMES = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}
"""Name in `FLASH_CONFIGS` of each device kind that jax reports."""


def chip_name(device_kind: str) -> str | None:
    """Returns the name in `FLASH_CONFIGS` of a device kind as jax spells it, or None."""
    return _CHIP_NAMES.get(device_kind)
