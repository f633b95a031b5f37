"""How a network runs: dtypes, what is recomputed, which attention. Changes speed, not the model."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from qwen_jax.errors import UserError, nearest
from qwen_jax.kernels.dispatch import IMPLEMENTATIONS
from qwen_jax.parallel.rules import GATHERED

_policies = jax.checkpoint_policies

REMAT = {
    # Everything is kept but the gathered copies of sharded weights. Fastest when memory allows.
    "none": _policies.save_anything_except_these_names(GATHERED),
    # Results of weight matmuls are kept; attention and elementwise work are done again.
    "dots": _policies.dots_with_no_batch_dims_saveable,
    # q, k, v and the attention output: scores and FFN are done again. On CPUs the fastest of all,
    # since memory traffic costs more there than arithmetic.
    "qkv_out": _policies.save_only_these_names(
        *("query", "key", "value", "attention", "attention_lse")
    ),
    # Only the residual stream between layers is kept: one more forward pass, least memory.
    "full": _policies.nothing_saveable,
}
"""Remat policies by name, from fastest to leanest."""

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


@dataclasses.dataclass(frozen=True)
class ForwardOptions:
    """Options of a forward pass.

    Attributes:
      dtype: compute dtype of matmuls and activations. Norm statistics, softmax, RoPE angles and the
        loss are float32 whatever it is.
      remat: what the backward pass recomputes, a name in `REMAT`.
      attention: implementation, a name in `kernels.dispatch.IMPLEMENTATIONS`.
    """

    dtype: str = "bfloat16"
    remat: str = "none"
    attention: str = "auto"

    def __post_init__(self):
        choices = (
            ("dtype", self.dtype, DTYPES),
            ("remat", self.remat, REMAT),
            ("attention", self.attention, IMPLEMENTATIONS),
        )
        for name, value, known in choices:
            if value not in known:
                raise UserError(
                    f"options.{name} is {value!r}{nearest(value, known)}; "
                    f"choose one of {', '.join(known)}"
                )

    @property
    def compute_dtype(self) -> jnp.dtype:
        """`dtype` as a JAX dtype."""
        return DTYPES[self.dtype]
