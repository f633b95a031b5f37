"""How a network runs: dtypes, what is recomputed, which attention. Changes speed, not the model."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp

from qwen_jax.errors import UserError, nearest
from qwen_jax.kernels.dispatch import IMPLEMENTATIONS
from qwen_jax.parallel.rules import GATHERED

_policies = jax.checkpoint_policies

_INPUTS = ("query", "key", "value")  # of the attention kernel, rotated
_OUTPUT = ("attention", "attention_lse")  # with both, the kernel never runs again
_keep = _policies.save_only_these_names


def _on_host(*names: str):
    """Keeps these in the host's memory; they come back over PCIe while the layer above runs."""
    return _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(names),
        offload_src="device",
        offload_dst="pinned_host",
    )


# Bytes are those of a layer and token in bf16 at multi-head D = N·H = 4096, F = 11008 (7B), beside
# the residual stream's 8 KB; what a rung doesn't keep of the projections is multiplied again. Kept
# or not, a kilobyte saves about as many FLOPs whichever name it is spent on: 2·D² per 2·D bytes.
REMAT = {
    # Everything is kept but the gathered copies of sharded weights. Fastest when memory allows.
    "none": _policies.save_anything_except_these_names(GATHERED),
    # Results of weight matmuls are kept; attention and elementwise work are done again.
    "dots": _policies.dots_with_no_batch_dims_saveable,
    # No projection and no attention is done again, only norms, rotations and SwiGLU: 84 KB.
    "products": _keep(*_INPUTS, *_OUTPUT, "residual_mid", "gate", "up"),
    # One of the two wide projections is done again: 62 KB.
    "gate": _keep(*_INPUTS, *_OUTPUT, "residual_mid", "gate"),
    # Both, but nothing of attention: 40 KB.
    "attention": _keep(*_INPUTS, *_OUTPUT, "residual_mid"),
    # q, k, v and the attention output: scores and FFN are done again: 32 KB. On CPUs the fastest
    # of all, since memory traffic costs more there than arithmetic.
    "qkv_out": _keep(*_INPUTS, *_OUTPUT),
    # Attention's results alone: the kernel runs once, projections twice: 16 KB.
    "out_mid": _keep(*_OUTPUT, "residual_mid"),
    "out": _keep(*_OUTPUT),
    # As "qkv_out" and "full" in device memory, but what qkv_out keeps lies in the host's memory.
    "qkv_out_host": _on_host(*_INPUTS, *_OUTPUT),
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
      remat: what the backward pass recomputes, a name in `REMAT`; or several for one layer after
        another, "full:15,out": the first 15 by one, those that are left by the other.
      attention: implementation, a name in `kernels.dispatch.IMPLEMENTATIONS`.
    """

    dtype: str = "bfloat16"
    remat: str = "none"
    attention: str = "auto"

    def __post_init__(self):
        choices = (
            ("dtype", self.dtype, DTYPES),
            *(("remat", name, REMAT) for name, _ in self.remat_stages),
            ("attention", self.attention, IMPLEMENTATIONS),
        )
        for name, value, known in choices:
            if value not in known:
                raise UserError(
                    f"options.{name} is {value!r}{nearest(value, known)}; "
                    f"choose one of {', '.join(known)}"
                )

    @property
    def remat_stages(self) -> tuple[tuple[str, int | None], ...]:
        """(name in `REMAT`, number of layers) from the first layer on; None: all that are left."""
        *firsts, last = self.remat.split(",")
        stages = []
        for stage in firsts:
            name, _, count = stage.partition(":")
            if not re.fullmatch("[1-9][0-9]*", count):
                raise UserError(
                    f"options.remat={self.remat!r} doesn't say for how many layers {name!r} holds; "
                    'write NAME:LAYERS for all but the last, such as "full:15,out"'
                )
            stages.append((name, int(count)))
        return (*stages, (last, None))

    @property
    def compute_dtype(self) -> jnp.dtype:
        """`dtype` as a JAX dtype."""
        return DTYPES[self.dtype]
