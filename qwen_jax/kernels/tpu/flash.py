"""Flash attention on TPUs as a `FlashKernel`, and the requests that it cannot serve."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qwen_jax.errors import UserError
from qwen_jax.kernels.flash import FlashKernel
from qwen_jax.kernels.mask import Mask
from qwen_jax.kernels.tpu import flash_backward, flash_forward
from qwen_jax.kernels.tpu.block_sizes import FLASH_CONFIGS, FlashConfig, chip_name
from qwen_jax.parallel import platform

DTYPES = ("bfloat16", "float32")
"""Dtypes that the kernels compute in."""
MAX_HEAD_DIM = 256
"""Largest head dimension for which the blocks fit into vector memory."""


def unsupported_reason(*, head_dim: int, dtype: DTypeLike, device_kind: str) -> str | None:
    """Returns one clause saying why the kernel cannot serve a request, or None if it can.

    Args:
      head_dim: dimension of a head.
      dtype: of queries, keys and values.
      device_kind: kind of the device as jax spells it, such as "TPU v5 lite".
    """
    if chip_name(device_kind) is None:
        return f"it runs on TPU {', '.join(FLASH_CONFIGS)} and this device is {device_kind!r}"
    return _unsupported_shape_reason(head_dim, dtype)


def _unsupported_shape_reason(head_dim: int, dtype: DTypeLike) -> str | None:
    """Returns why no chip can serve this head dimension and dtype, or None if all can."""
    if jnp.dtype(dtype).name not in DTYPES:
        return f"it computes in {' or '.join(DTYPES)} and the operands are {jnp.dtype(dtype).name}"
    if head_dim > MAX_HEAD_DIM:
        return f"it takes heads up to {MAX_HEAD_DIM} wide and head_dim is {head_dim}"
    return None


def _flash_config(chip: str | None, q: jax.Array) -> FlashConfig:
    """Returns the settings to compile with.

    Args:
      chip: name in `FLASH_CONFIGS`; None: the chip of the device that the code is traced for.
      q: queries [B, T, N, H]; only head dimension and dtype are used.

    Raises:
      UserError: the kernel cannot serve these operands, or the device is not a supported TPU.
    """
    chip = chip or chip_name(platform()[1])
    reason = _unsupported_shape_reason(q.shape[-1], q.dtype)
    if chip is None:
        reason = unsupported_reason(head_dim=q.shape[-1], dtype=q.dtype, device_kind=platform()[1])
    if reason:
        raise UserError(
            f"attention kernel 'pallas_tpu' can't serve this request: {reason}; choose another "
            "attention implementation"
        )
    assert chip is not None
    return FLASH_CONFIGS[chip]


@functools.cache
def tpu_kernel(chip: str | None = None, interpret: bool = False) -> FlashKernel:
    """Returns the kernel for a chip.

    Its functions raise UserError for requests that they cannot serve (`unsupported_reason`).

    Args:
      chip: name in `FLASH_CONFIGS`; None: the chip of the device that the code is traced for.
      interpret: run Pallas' interpreter, on any platform, slowly; for tests, and needs `chip`. An
        alternative is to give `chip` and call under `pltpu.force_tpu_interpret_mode`.
    """

    def forward(
        q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: float
    ) -> tuple[jax.Array, jax.Array]:
        """Computes attention and its log-sum-exp: the contract of `FlashKernel.forward`."""
        config = _flash_config(chip, q)
        return flash_forward.flash_forward(q, k, v, mask, scale, config=config, interpret=interpret)

    def backward(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        mask: Mask,
        scale: float,
        lse: jax.Array,
        d_out: jax.Array,
        delta: jax.Array,
        grad_dtype: DTypeLike | None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Computes the gradients of q, k and v: the contract of `FlashKernel.backward`."""
        config = _flash_config(chip, q)
        return flash_backward.flash_backward(
            q,
            k,
            v,
            mask,
            scale,
            lse,
            d_out,
            delta,
            grad_dtype,
            config=config,
            interpret=interpret,
        )

    return FlashKernel("pallas_tpu", forward, backward)


KERNEL = tpu_kernel()
"""Attention on TPUs, as `dispatch` calls it."""
