"""AdamW and its learning-rate schedule, as in the Qwen report (§2.4)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qwen_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay, gradient clipping and a warm-up + cosine schedule.

    Defaults are the report's (§2.4: betas, epsilon, peak, floor) and, where it gives none, those of
    the technical memo of the first Qwen-7B (warm-up, decay, clip).

    Attributes:
      peak_lr: highest learning rate.
      final_lr_ratio: learning rate at the end of the cosine, as a share of `peak_lr`.
      warmup_steps: number of steps over which the rate rises linearly from 0 to the peak.
      decay_steps: step at which the cosine reaches its end, after which the rate is constant; 0
        keeps the peak after warm-up (constant schedule), -1 is the last step of the job
        (`train.steps`), which `PretrainJob` fills in.
      b1: decay rate of Adam's first moment.
      b2: decay rate of Adam's second moment.
      eps: Adam's epsilon, added to the root of the second moment.
      weight_decay: decoupled weight decay, applied to matrices and embeddings only.
      clip_norm: global gradient norm above which gradients are scaled down to it.

    Raises:
      UserError: a number is out of range, or the decay ends before the warm-up.
    """

    peak_lr: float = 3e-4
    final_lr_ratio: float = 0.1
    warmup_steps: int = 2000
    decay_steps: int = 0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self):
        # Negated comparisons, so that NaN fails too.
        for name in ("peak_lr", "clip_norm", "eps"):
            if not getattr(self, name) > 0:
                raise UserError(f"optimizer.{name} is {getattr(self, name)}; it must be above 0")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optimizer.{name} is {getattr(self, name)}; it must be in [0, 1)")
        if not 0 <= self.final_lr_ratio <= 1:
            raise UserError(
                f"optimizer.final_lr_ratio is {self.final_lr_ratio}; it must be in [0, 1]"
            )
        if not self.weight_decay >= 0 or self.warmup_steps < 0 or self.decay_steps < -1:
            raise UserError(
                f"optimizer.weight_decay={self.weight_decay} and warmup_steps={self.warmup_steps} "
                f"must be at least 0, decay_steps={self.decay_steps} at least -1"
            )
        if 0 < self.decay_steps <= self.warmup_steps:
            raise UserError(
                f"optimizer.decay_steps={self.decay_steps} is not past "
                f"optimizer.warmup_steps={self.warmup_steps}; raise it or shorten the warm-up"
            )


def learning_rate(config: OptimizerConfig, step: jax.Array) -> jax.Array:
    """Computes the float32 learning rate of a step.

    Args:
      config: the schedule, with `decay_steps` filled in.
      step: integer scalar, 0-based; step 0 already uses peak/warmup_steps.
    """
    assert config.decay_steps >= 0, "decay_steps=-1 must be filled in by the job"
    step = step.astype(jnp.float32) + 1.0
    warmup = jnp.minimum(step / max(config.warmup_steps, 1), 1.0)
    if not config.decay_steps:
        return config.peak_lr * warmup
    span = config.decay_steps - config.warmup_steps
    done = jnp.clip((step - config.warmup_steps) / span, 0.0, 1.0)
    floor = config.final_lr_ratio
    cosine = floor + (1.0 - floor) * 0.5 * (1.0 + jnp.cos(jnp.pi * done))
    return config.peak_lr * warmup * cosine


def adamw(config: OptimizerConfig, decay_mask: Any) -> optax.GradientTransformation:
    """Returns Adam followed by decoupled weight decay, without clipping and learning rate.

    The training step applies those two, as it needs norm and rate for its metrics anyway. Moments
    are float32, sharded as the parameters.

    Args:
      config: Adam's settings and the weight decay.
      decay_mask: pytree of bool with the structure of the parameters: which of them decay.
    """
    return optax.chain(
        optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=jnp.float32),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
    )
