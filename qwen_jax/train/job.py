"""Configuration of a pretraining job: the frozen form of a recipe in `configs/pretrain.py`."""

from __future__ import annotations

import dataclasses
from typing import Any

from qwen_jax.data import DataConfig
from qwen_jax.errors import UserError
from qwen_jax.model import ForwardOptions, ModelConfig
from qwen_jax.parallel import MeshConfig
from qwen_jax.tokenizer import Tokenizer
from qwen_jax.train.config import LossConfig, RunConfig, StepConfig
from qwen_jax.train.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class PretrainJob:
    """Settings of a pretraining job; field names are the groups of keys on the command line.

    Attributes:
      model: architecture.
      data: packed sources, their weights, sequence length and batch size.
      train: number of steps and what is logged and saved.
      tokenizer: vocabulary file, or a folder that has one.
      options: compute dtype, remat policy and attention implementation.
      mesh: number of devices along each mesh axis.
      optimizer: AdamW and its schedule; `decay_steps=-1` is replaced by `train.steps`.
      loss: how the loss over the vocabulary is computed.
      eval: held-out shards to evaluate on, "name=FOLDER,name=FOLDER"; "" evaluates on none.

    Raises:
      UserError: the sequence length does not fit the model.
    """

    model: ModelConfig
    data: DataConfig
    train: RunConfig
    tokenizer: str
    options: ForwardOptions = ForwardOptions()
    mesh: MeshConfig = MeshConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    eval: str = ""

    def __post_init__(self):
        if self.optimizer.decay_steps == -1:
            filled = dataclasses.replace(self.optimizer, decay_steps=self.train.steps)
            object.__setattr__(self, "optimizer", filled)
        model, seq_len = self.model, self.data.seq_len
        if seq_len > model.max_length:
            raise UserError(
                f"data.seq_len={seq_len} is longer than model.max_length={model.max_length}; raise "
                "model.max_length too"
            )
        if (model.dynamic_ntk or model.logn) and seq_len != model.trained_length:
            raise UserError(
                f"data.seq_len={seq_len} is not model.trained_length={model.trained_length}, "
                "beyond which NTK and LogN apply at inference; change both together"
            )

    @property
    def step_config(self) -> StepConfig:
        """Settings of the jitted training step."""
        return StepConfig(
            self.model, self.options, self.optimizer, self.loss, self.train.microbatches
        )


def check_vocabulary(job: PretrainJob, tokenizer: Tokenizer) -> None:
    """Checks that a job's model has an embedding row for every id of its tokenizer.

    Raises:
      UserError: it has fewer.
    """
    if tokenizer.vocab_size > job.model.vocab_size:
        raise UserError(
            f"the tokenizer {job.tokenizer} has {tokenizer.vocab_size} ids but model.vocab_size is "
            f"{job.model.vocab_size}; raise model.vocab_size or use the tokenizer of this model"
        )


def run_fingerprint(job: PretrainJob, tokenizer: Tokenizer, data: dict[str, Any]) -> dict[str, Any]:
    """Returns what the numbers of a run depend on, in JSON types; stored with its checkpoints.

    A run resumes from a checkpoint only if their fingerprints are equal. Mesh, forward options,
    microbatches, logging and the number of steps are left out: they may change between two starts
    of one job.

    Args:
      job: the job.
      tokenizer: the tokenizer of the job.
      data: `data_fingerprint` of `job.data`.
    """
    return {
        "model": dataclasses.asdict(job.model),
        "tokenizer_sha256": tokenizer.sha256,
        "data": data,
        "optimizer": dataclasses.asdict(job.optimizer),
        "loss": {"z_loss": job.loss.z_loss},
        "seed": job.train.seed,
    }
