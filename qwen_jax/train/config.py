"""Settings that all training stages share: the step, the loss over the vocabulary, the run."""

from __future__ import annotations

import dataclasses

import jax

from qwen_jax.errors import UserError
from qwen_jax.model import ForwardOptions, ModelConfig
from qwen_jax.parallel import batch_devices
from qwen_jax.train.optimizer import OptimizerConfig
from qwen_jax.train.profiling import parse_steps


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """How the loss over the vocabulary is computed; see `losses.next_token_loss`.

    Attributes:
      z_loss: factor of the squared log-normaliser of the softmax that is added to the loss; 0 adds
        none.
      chunk: number of tokens whose logits exist at one time.
      vocab_parts: number of neighbouring devices along the mesh axis `fsdp` that split the
        vocabulary among them; more parts use less memory on each device. 0 selects the number that
        moves the fewest bytes.

    Raises:
      UserError: a number is out of range.
    """

    z_loss: float = 0.0
    chunk: int = 1024
    vocab_parts: int = 0

    def __post_init__(self):
        if not self.z_loss >= 0 or self.chunk < 1 or self.vocab_parts < 0:
            raise UserError(
                f"loss.z_loss={self.z_loss} and loss.vocab_parts={self.vocab_parts} must be at "
                f"least 0, loss.chunk={self.chunk} at least 1"
            )


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """Static settings of a training step.

    Attributes:
      model: architecture of the network.
      options: compute dtype, remat policy and attention implementation of the forward pass.
      optimizer: AdamW, learning-rate schedule and gradient clipping.
      loss: how losses over the vocabulary are computed.
      microbatches: number of equal pieces of a batch that run one after another, their gradients
        added up, to save activation memory.
    """

    model: ModelConfig
    options: ForwardOptions
    optimizer: OptimizerConfig
    loss: LossConfig = LossConfig()
    microbatches: int = 1


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Length of a run and what it logs and saves, for any training stage.

    Attributes:
      steps: total number of optimizer steps.
      microbatches: number of pieces a batch is split into to save activation memory.
      seed: seed of the initial weights and of dropout; the order of the data has its own seed.
      log_every: steps between log lines.
      eval_every: steps between evaluations; 0 evaluates after the last step only.
      checkpoint_every: steps between checkpoints; the last step is always saved too.
      keep_last: number of newest checkpoints that are kept.
      keep_every: checkpoints of steps divisible by this number are kept as well; 0 keeps no others.
      max_skipped: the run stops after this many consecutive steps with non-finite numbers.
      tensorboard: whether TensorBoard files are written.
      wandb_project: Weights & Biases project to log to; "" logs to none.
      profile_steps: "FIRST,LAST", the steps, both included, to trace for XProf and Perfetto; ""
        traces none.

    Raises:
      UserError: a number is out of range, or `profile_steps` is malformed or after the last step.
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


def check_mesh(
    model: ModelConfig,
    mesh: jax.sharding.Mesh,
    *,
    global_batch: int,
    microbatches: int,
    seq_len: int,
) -> None:
    """Checks that the mesh axes divide the model and the batch, before anything is compiled.

    Args:
      model: architecture whose dimensions are sharded.
      mesh: mesh with the axes `data`, `fsdp`, `context`, `tensor`.
      global_batch: rows per optimizer step over all devices.
      microbatches: number of pieces a batch is split into.
      seq_len: tokens per row.

    Raises:
      UserError: an axis does not divide a dimension; names both, and what to change.
    """
    shape = mesh.shape
    rows, tensor, fsdp = batch_devices(mesh), shape["tensor"], shape["fsdp"]
    if global_batch % (rows * microbatches):
        raise UserError(
            f"data.global_batch={global_batch} is not a multiple of data×fsdp×microbatches = "
            f"{shape['data']}×{fsdp}×{microbatches} = {rows * microbatches}; change the batch, "
            "train.microbatches or the mesh"
        )
    divided = [
        ("tensor", tensor, "model.n_heads", model.n_heads),
        ("tensor", tensor, "model.n_kv_heads", model.n_kv_heads),
        ("tensor", tensor, "model.d_ff", model.d_ff),
        ("tensor", tensor, "model.vocab_size", model.vocab_size),
        ("fsdp×tensor", fsdp * tensor, "model.d_model", model.d_model),
    ]
    if shape["context"] > 1:  # zigzag order: two chunks for each device of the ring
        divided.append(("context×2", 2 * shape["context"], "data.seq_len", seq_len))
    for axis, size, name, dim in divided:
        if dim % size:
            raise UserError(
                f"mesh.{axis}={size} does not divide {name}={dim}; choose a mesh size that does"
            )
