"""Run options of the network: dtype, remat policy, attention. They change speed, not the model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax.errors import UserError, nearest
from qwen_jax.kernels.dispatch import IMPLEMENTATIONS
from qwen_jax.parallel.rules import GATHERED

_policies = jax.checkpoint_policies

_INPUTS = ("query", "key", "value")  # of the attention kernel, rotated
_OUTPUT = ("attention", "attention_lse")  # with both, the kernel never runs again
_keep = _policies.save_only_these_names


def _offloaded(*names: str) -> Callable[..., Any]:
    """Returns a remat policy that offloads the named values to host memory."""
    return _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(names),
        offload_src="device",
        offload_dst="pinned_host",
    )


# Bytes are those of a layer and token in bf16 at multi-head D = N·H = 4096, F = 11008 (7B), beside
# the residual stream's 8 KB; projections that a policy does not keep are computed again. A kilobyte
# saves about as many FLOPs whichever name it is spent on: 2·D² per 2·D bytes.
REMAT = {
    # Keeps everything but the gathered copies of sharded weights. Fastest when memory allows.
    "none": _policies.save_anything_except_these_names(GATHERED),
    # Keeps results of weight matmuls; attention and elementwise work are recomputed.
    "dots": _policies.dots_with_no_batch_dims_saveable,
    # Recomputes no projection and no attention, only norms, rotations and SwiGLU: 84 KB.
    "products": _keep(*_INPUTS, *_OUTPUT, "residual_mid", "gate", "up"),
    # Recomputes one of the two FFN projections as well: 62 KB.
    "gate": _keep(*_INPUTS, *_OUTPUT, "residual_mid", "gate"),
    # Recomputes both, but nothing of attention: 40 KB.
    "attention": _keep(*_INPUTS, *_OUTPUT, "residual_mid"),
    # Keeps q, k, v and the attention output; recomputes the FFN: 32 KB. The fastest policy on CPUs,
    # where memory traffic costs more than arithmetic.
    "qkv_out": _keep(*_INPUTS, *_OUTPUT),
    # Keeps attention's results only: its kernel runs once, projections twice: 16 KB.
    "out_mid": _keep(*_OUTPUT, "residual_mid"),
    "out": _keep(*_OUTPUT),
    # Uses device memory as "full" does: what "qkv_out" keeps is offloaded to host memory.
    "qkv_out_host": _offloaded(*_INPUTS, *_OUTPUT),
    # Keeps only the residual stream between layers: one more forward pass, least memory.
    "full": _policies.nothing_saveable,
}
"""Remat policies by name, from the fastest to the most memory-saving."""

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


@dataclasses.dataclass(frozen=True)
class ForwardOptions:
    """Options of a forward pass.

    Attributes:
      dtype: compute dtype of matmuls and activations, a name in `DTYPES`. Norm statistics, softmax,
        RoPE angles and the loss are float32 in any case.
      remat: what the backward pass recomputes, a name in `REMAT`; or stages of layers, each with a
        policy: "full:15,out" uses "full" for the first 15 layers and "out" for the rest.
      attention: attention implementation, a name in `kernels.dispatch.IMPLEMENTATIONS`.
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
        """Stages of `remat` from the first layer on: (name in `REMAT`, number of layers or None).

        None, in the last stage only, means all remaining layers.
        """
        *firsts, last = self.remat.split(",")
        stages: list[tuple[str, int | None]] = []
        for stage in firsts:
            name, _, count = stage.partition(":")
            if not re.fullmatch("[1-9][0-9]*", count):
                raise UserError(
                    f"options.remat={self.remat!r} gives no number of layers for {name!r}; "
                    'write NAME:LAYERS for all but the last, such as "full:15,out"'
                )
            stages.append((name, int(count)))
        return (*stages, (last, None))

    @property
    def compute_dtype(self) -> Any:
        """The compute dtype as a JAX dtype."""
        return DTYPES[self.dtype]
