"""Training objectives: the differentiated loss of a stage, as sums, and the metrics it reports."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from qwen_jax.model import Params, hidden_states, output_kernel
from qwen_jax.train.config import StepConfig
from qwen_jax.train.losses import next_token_loss
from qwen_jax.train.state import Batch, Metrics


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossSums:
    """Sums over a batch or a part of it; add those of all parts, then divide once by `weight`.

    Attributes:
      objective: float32 scalar, the sum that is differentiated.
      weight: float32 scalar, what sum and gradient are divided by, such as the number of tokens
        that carry loss; not differentiated.
      sums: further float32 scalars by name, from which the objective makes its metrics; not
        differentiated.
    """

    objective: jax.Array
    weight: jax.Array
    sums: dict[str, jax.Array]


class Objective(Protocol):
    """What a training stage minimises. Implementations are hashable: frozen dataclasses."""

    def __call__(
        self, params: Params, batch: Batch, config: StepConfig, key: jax.Array | None
    ) -> LossSums:
        """Computes the loss sums of one batch, or of one microbatch of it.

        Args:
          params: weights to differentiate with respect to.
          batch: arrays of this stage.
          config: model, forward options and loss settings.
          key: PRNG key of this step and microbatch; None runs without randomness (no dropout).

        Returns:
          Sums over the whole (micro)batch on all devices.
        """
        ...

    def metrics(self, sums: LossSums) -> Metrics:
        """Computes the named scalars to log from the sums over all microbatches of a step."""
        ...


@dataclasses.dataclass(frozen=True)
class NextToken:
    """Next-token prediction: cross-entropy of the targets, weighted by a loss mask.

    Batches have tokens, targets, segment_ids, positions int32 [B, T] (batch, sequence), loss_mask
    float32 [B, T] and n_bytes float32 [B], the UTF-8 bytes of text that the row's loss stands for;
    see `qwen_jax.data.batches`.
    """

    def __call__(
        self, params: Params, batch: Batch, config: StepConfig, key: jax.Array | None
    ) -> LossSums:
        """Computes the summed loss in nats; `sums` has nll, without z-loss, and n_bytes."""
        hidden, kernel = run_network(params, batch, config, key)
        with jax.named_scope("loss"):
            loss = next_token_loss(
                hidden,
                kernel,
                batch["targets"],
                batch["loss_mask"],
                config.loss.z_loss,
                config.loss.chunk,
                config.loss.vocab_parts,
            )
        sums = {"nll": loss.nll, "n_bytes": batch["n_bytes"].sum()}
        return LossSums(loss.objective, loss.weight, sums)

    def metrics(self, sums: LossSums) -> Metrics:
        """Returns loss (nats per token), bits_per_byte and tokens (number that carry loss)."""
        nll, n_bytes = sums.sums["nll"], sums.sums["n_bytes"]
        return {
            "loss": nll / jnp.maximum(sums.weight, 1.0),
            "bits_per_byte": nll / jnp.log(2.0) / jnp.maximum(n_bytes, 1.0),
            "tokens": sums.weight,
        }


def run_network(
    params: Params, batch: Batch, config: StepConfig, key: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Runs the network without its output projection, which losses apply chunk by chunk.

    Args:
      params: weights of `config.model`.
      batch: tokens, segment_ids, positions int32 [B, T] (batch, sequence); segment 0 is padding.
      config: model and forward options.
      key: PRNG key of dropout; None runs without dropout.

    Returns:
      Hidden states [B, T, D] (D: hidden size) in the compute dtype, and the output projection
      float32 [D, V] (V: vocabulary size): the arguments of the functions in `losses`.
    """
    hidden, _ = hidden_states(
        params,
        batch["tokens"],
        config.model,
        config.options,
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
        dropout_key=key,
    )
    return hidden, output_kernel(params, config.model)
