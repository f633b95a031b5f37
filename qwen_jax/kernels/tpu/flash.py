"""The TPU kernel as a `FlashKernel`, and when it can't serve."""

from __future__ import annotations

import functools

import jax.numpy as jnp

from qwen_jax.errors import UserError
from qwen_jax.kernels.flash import FlashKernel
from qwen_jax.kernels.tpu import flash_backward, flash_forward
from qwen_jax.kernels.tpu.block_sizes import CHIPS, Chip, chip_of
from qwen_jax.parallel import platform

DTYPES = ("bfloat16", "float32")
WIDEST = 256
"""Head width up to which the blocks fit into vector memory."""


def unsupported_reason(*, head_dim: int, dtype, device_kind: str) -> str | None:
    """One clause saying why this kernel can't serve a request on a device, or None when it can."""
    if chip_of(device_kind) is None:
        return f"it runs on TPU {', '.join(CHIPS)} and this device is {device_kind!r}"
    return _unsupported_shapes(head_dim, dtype)


def _unsupported_shapes(head_dim: int, dtype) -> str | None:
    if jnp.dtype(dtype).name not in DTYPES:
        return f"it computes in {' or '.join(DTYPES)} and the operands are {jnp.dtype(dtype).name}"
    if head_dim > WIDEST:
        return f"it takes heads up to {WIDEST} wide and head_dim is {head_dim}"
    return None


def _chip(chip: str | None, q) -> Chip:
    """The chip to compile for: as given, or that of the device."""
    chip = chip or chip_of(platform()[1])
    reason = _unsupported_shapes(q.shape[-1], q.dtype)
    if chip is None:
        reason = unsupported_reason(head_dim=q.shape[-1], dtype=q.dtype, device_kind=platform()[1])
    if reason:
        raise UserError(
            f"attention kernel 'pallas_tpu' can't serve this request: {reason}; choose another "
            "attention implementation"
        )
    return CHIPS[chip]


@functools.cache
def tpu_kernel(chip: str | None = None, interpret: bool = False) -> FlashKernel:
    """The kernel, for a chip of `tiles.CHIPS` by name, or None: whichever the code is traced for.

    interpret: run Pallas' interpreter (any platform, slow, for tests); needs `chip`. The same
    without this flag: name the chip and call under `pltpu.force_tpu_interpret_mode`.

    Its functions raise UserError where the request can't be served (`unsupported_reason`).
    """

    def run_forward(q, k, v, mask, scale):
        return flash_forward.flash_forward(
            q, k, v, mask, scale, chip=_chip(chip, q), interpret=interpret
        )

    def run_backward(q, k, v, mask, scale, lse, d_out, delta, grad_dtype):
        operands = (q, k, v, mask, scale, lse, d_out, delta, grad_dtype)
        return flash_backward.flash_backward(*operands, chip=_chip(chip, q), interpret=interpret)

    return FlashKernel("pallas_tpu", run_forward, run_backward)


KERNEL = tpu_kernel()
"""What `dispatch` calls."""
