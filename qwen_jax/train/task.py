"""What one training stage brings to the loop: its step, batches, evaluation and fingerprint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Generic, Protocol, TypeVar

import jax

from qwen_jax.train.state import Batch, Metrics


class StageState(Protocol):
    """A pytree of arrays that a stage trains; `TrainState` is the one with a single network.

    A stage with several networks (policy and value, a frozen reference) has a pytree of its own,
    such as a dataclass of two `TrainState`s, and a step that updates it. All leaves are saved in
    checkpoints.
    """

    @property
    def step(self) -> jax.Array:
        """Number of batches consumed, an int32 scalar."""
        ...


class Evaluation(Protocol):
    """Result of an evaluation on one data set."""

    def metrics(self) -> Mapping[str, float]:
        """Returns the numbers to log, by name."""
        ...


S = TypeVar("S", bound=StageState)
E = TypeVar("E", bound=Evaluation)

BatchFunction = Callable[[int, S], Batch]
"""`(step, state) -> batch`: global arrays of 0-based `step`.

Supervised stages ignore the state; for stages that generate their batches (rollouts), it has the
current parameters. Called once for each step, in order.
"""


@dataclasses.dataclass(frozen=True)
class Task(Generic[S, E]):
    """One training stage, as `loop.train` runs it. S: type of its state, E: of its evaluations.

    Making a task checks everything that can be wrong with its settings and data; it neither trains
    nor writes.

    Attributes:
      mesh: mesh of the run; the loop calls everything below under it.
      step: pure function `(state, batch) -> (next state, metrics)`, traced once, with donated
        state. Its metrics must include `skipped_in_a_row`, the number of consecutive steps up to
        this one that were skipped because of non-finite numbers.
      abstract_state: shapes, dtypes and shardings of the state, for tracing and for restoring
        checkpoints.
      init_state: returns the state of a new run, at step 0; not called when a checkpoint is
        restored.
      example_batch: a batch, or `ShapeDtypeStruct`s like one, to trace the step with.
      open_batches: returns a context manager that gives the batches from a 0-based step on. On a
        resume it is called with another first step and must give the same batches.
      fingerprint: JSON-able description of everything that the numbers of the run depend on; saved
        with every checkpoint, which only a run with an equal fingerprint restores.
      description: one line about the stage, logged at the start.
      tokens_per_step: input tokens of one step over all devices, for throughput.
      flops_per_token: model FLOPs of training per input token, for MFU.
      checkpoint_info: returns what else a checkpoint after so many steps records; JSON-able.
      evaluate: returns the evaluation of a state by data set; None evaluates nothing. Every entry
        is logged as `eval/<data set>/<metric>`.
    """

    mesh: jax.sharding.Mesh
    step: Callable[[S, Batch], tuple[S, Metrics]]
    abstract_state: S
    init_state: Callable[[], S]
    example_batch: Batch
    open_batches: Callable[[int], AbstractContextManager[BatchFunction[S]]]
    fingerprint: Mapping[str, Any]
    description: str
    tokens_per_step: int
    flops_per_token: float
    checkpoint_info: Callable[[int], Mapping[str, Any]] = lambda step: {}
    evaluate: Callable[[S], Mapping[str, E]] | None = None
