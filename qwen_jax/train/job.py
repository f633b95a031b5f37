"""What a pretraining job is: the frozen form of a recipe in `configs/pretrain.py`."""

from __future__ import annotations

import dataclasses

from qwen_jax.data import DataConfig
from qwen_jax.errors import UserError
from qwen_jax.model import ForwardOptions, ModelConfig
from qwen_jax.parallel import MeshConfig
from qwen_jax.tokenizer import Tokenizer
from qwen_jax.train.optimizer import OptimizerConfig
from qwen_jax.train.profiling import parse_steps
from qwen_jax.train.step import LossConfig, StepConfig


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How long a job runs and what it writes.

    Attributes:
      steps: optimizer steps in all. microbatches: pieces a batch is split into to save memory.
      seed: of the initial weights and of dropout (the order of the data has its own).
      log_every, eval_every, checkpoint_every: steps between log lines, evaluations, checkpoints;
        an evaluation and a checkpoint are also made at the end. eval_every 0: at the end only.
      keep_last: newest checkpoints that stay; keep_every: steps divisible by it stay too (0: none).
      max_skipped: non-finite steps in a row after which the run stops.
      tensorboard: also write TensorBoard files. wandb_project: also log to this project ("": no).
      profile_steps: FIRST,LAST: steps to trace for XProf and Perfetto, both included ("": none).
    """

    steps: int
    microbatches: int = 1
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    checkpoint_every: int = 1000
    keep_last: int = 3
    keep_every: int = 0
    max_skipped: int = 20
    tensorboard: bool = True
    wandb_project: str = ""
    profile_steps: str = ""

    def __post_init__(self):
        may_be_zero = ("seed", "eval_every", "keep_every")
        for name, value in dataclasses.asdict(self).items():
            least = 0 if name in may_be_zero else 1
            if isinstance(value, int) and not isinstance(value, bool) and value < least:
                raise UserError(f"train.{name} is {value}; it must be at least {least}")
        profiled = parse_steps(self.profile_steps)
        if profiled and profiled[0] > self.steps:
            raise UserError(
                f"train.profile_steps is {self.profile_steps!r} but the run ends with step "
                f"{self.steps} (train.steps); choose earlier steps"
            )


@dataclasses.dataclass(frozen=True)
class PretrainJob:
    """A whole pretraining job; field names are the groups of keys on the command line.

    Attributes:
      tokenizer: vocabulary file, or a folder that has one.
      eval: held-out shards to evaluate on, `name=FOLDER,name=FOLDER` ("": none).
      model, data, train, options, mesh, optimizer, loss: see their classes.
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
                f"data.seq_len={seq_len} is not model.trained_length={model.trained_length}, past "
                "which NTK and LogN stretch positions at inference; change both together"
            )

    @property
    def step_config(self) -> StepConfig:
        """The part the jitted step is made of."""
        return StepConfig(
            self.model, self.options, self.optimizer, self.loss, self.train.microbatches
        )


def check_vocabulary(job: PretrainJob, tokenizer: Tokenizer) -> None:
    """Refuses a model with fewer embedding rows than the tokenizer has ids."""
    if tokenizer.vocab_size > job.model.vocab_size:
        raise UserError(
            f"the tokenizer {job.tokenizer} has {tokenizer.vocab_size} ids but model.vocab_size is "
            f"{job.model.vocab_size}; raise model.vocab_size or use the tokenizer of this model"
        )


def identity(job: PretrainJob, tokenizer: Tokenizer, data: dict) -> dict:
    """What a checkpoint belongs to: the run may only go on with exactly these.

    Left out on purpose: mesh, options, microbatches, logging and the number of steps, all of which
    may change between two runs of one job.
    """
    return {
        "model": dataclasses.asdict(job.model),
        "tokenizer_sha256": tokenizer.sha256,
        "data": data,
        "optimizer": dataclasses.asdict(job.optimizer),
        "loss": {"z_loss": job.loss.z_loss},
        "seed": job.train.seed,
    }
