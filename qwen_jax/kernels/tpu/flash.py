"""The TPU flash-attention kernels as a `FlashKernel`, and the calls they support."""

from __future__ import annotations

import functools

import jax.numpy as jnp

from qwen_jax.errors import UserError
from qwen_jax.kernels.flash import FlashKernel
from qwen_jax.kernels.tpu import flash_backward, flash_forward
from qwen_jax.kernels.tpu.block_sizes import CHIPS, ChipTiles, chip_name
from qwen_jax.parallel import platform

DTYPES = ("bfloat16", "float32")
WIDEST = 256
"""Largest head dimension for which the blocks fit into vector memory."""


def unsupported_reason(*, head_dim: int, dtype, device_kind: str) -> str | None:
    """Returns why this kernel does not support a call on a device, as a clause; None if it does."""
    if chip_name(device_kind) is None:
        return f"it runs on TPU {', '.join(CHIPS)} and this device is {device_kind!r}"
    return _unsupported_shapes(head_dim, dtype)


def _unsupported_shapes(head_dim: int, dtype) -> str | None:
    """Returns why this kernel does not support a head dimension and dtype; None if it does."""
    if jnp.dtype(dtype).name not in DTYPES:
        return f"it computes in {' or '.join(DTYPES)} and the operands are {jnp.dtype(dtype).name}"
    if head_dim > WIDEST:
        return f"it takes heads up to {WIDEST} wide and head_dim is {head_dim}"
    return None


def _chip_tiles(chip: str | None, q) -> ChipTiles:
    """Returns the block sizes for a chip, by default that of the device.

    Args:
      chip: key of `CHIPS`, or None.
      q: queries.

    Raises:
      UserError: the kernel does not support the device, or the queries' shape or dtype.
    """
    chip = chip or chip_name(platform()[1])
    reason = _unsupported_shapes(q.shape[-1], q.dtype)
    if chip is None:
        reason = unsupported_reason(head_dim=q.shape[-1], dtype=q.dtype, device_kind=platform()[1])
    if reason:
        raise UserError(
            f"attention kernel 'pallas_tpu' does not support this call: {reason}; choose another "
            "attention implementation"
        )
    assert chip is not None
    return CHIPS[chip]


@functools.cache
def tpu_kernel(chip: str | None = None, interpret: bool = False) -> FlashKernel:
    """Returns the flash-attention kernels for TPU.

    Their functions raise UserError for unsupported calls (`unsupported_reason`).

    Args:
      chip: key of `block_sizes.CHIPS` to compile for; None: the device that the code is traced for.
      interpret: whether to run in Pallas' interpreter (on any platform, slow, for tests); needs
        `chip`. To interpret TPU semantics in more detail, leave it False, give `chip` and call
        under `pltpu.force_tpu_interpret_mode`.
    """

    def run_forward(q, k, v, mask, scale):
        return flash_forward.flash_forward(
            q, k, v, mask, scale, chip=_chip_tiles(chip, q), interpret=interpret
        )

    def run_backward(q, k, v, mask, scale, lse, d_out, delta, grad_dtype):
        operands = (q, k, v, mask, scale, lse, d_out, delta, grad_dtype)
        return flash_backward.flash_backward(
            *operands, chip=_chip_tiles(chip, q), interpret=interpret
        )

    return FlashKernel("pallas_tpu", run_forward, run_backward)


KERNEL = tpu_kernel()
"""The kernel for the device that the code is traced for."""
