"""The TPU kernel as a `FlashKernel`, and when it can't serve."""

from __future__ import annotations

import functools

import jax.numpy as jnp

from qwen_jax.errors import UserError
from qwen_jax.kernels.flash import FlashKernel
from qwen_jax.kernels.tpu import backward, forward
from qwen_jax.kernels.tpu.tiles import CHIPS, Chip, chip_of, device_kind

DTYPES = ("bfloat16", "float32")
WIDEST = 256
"""Head width up to which the blocks fit into vector memory."""


def why_not(*, head_dim: int, dtype) -> str | None:
    """One clause saying why this kernel can't serve a request, or None when it can.

    Judged for the device that code traced now will run on: that of the mesh (a mesh of a topology
    description counts), else the first one of the process.
    """
    if chip_of(device_kind()) is None:
        return f"it runs on TPU {', '.join(CHIPS)} and this device is {device_kind()!r}"
    return _why_not_shapes(head_dim, dtype)


def _why_not_shapes(head_dim: int, dtype) -> str | None:
    if jnp.dtype(dtype).name not in DTYPES:
        return f"it computes in {' or '.join(DTYPES)} and the operands are {jnp.dtype(dtype).name}"
    if head_dim > WIDEST:
        return f"it takes heads up to {WIDEST} wide and head_dim is {head_dim}"
    return None


def _chip(chip: str | None, q) -> Chip:
    """The chip to compile for: as given, or that of the device."""
    width, dtype = q.shape[-1], q.dtype
    reason = why_not(head_dim=width, dtype=dtype) if chip is None else _why_not_shapes(width, dtype)
    if reason:
        raise UserError(
            f"attention kernel 'pallas_tpu' can't serve this request: {reason}; choose another "
            "attention implementation"
        )
    return CHIPS[chip or chip_of(device_kind())]


@functools.cache
def tpu_kernel(chip: str | None = None, interpret: bool = False) -> FlashKernel:
    """The kernel, for a chip of `tiles.CHIPS` by name, or None: whichever the code is traced for.

    interpret: run Pallas' interpreter (any platform, slow, for tests); needs `chip`. The same
    without this flag: name the chip and call under `pltpu.force_tpu_interpret_mode`.

    Its functions raise UserError where the request can't be served (`why_not`).
    """

    def run_forward(q, k, v, mask, scale):
        return forward.forward(q, k, v, mask, scale, chip=_chip(chip, q), interpret=interpret)

    def run_backward(q, k, v, mask, scale, lse, d_out, delta, grad_dtype):
        operands = (q, k, v, mask, scale, lse, d_out, delta, grad_dtype)
        return backward.backward(*operands, chip=_chip(chip, q), interpret=interpret)

    return FlashKernel("pallas_tpu", run_forward, run_backward)


KERNEL = tpu_kernel()
"""What `dispatch` calls."""
