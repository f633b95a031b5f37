"""The training loop of all stages: logging, evaluation, checkpoints, preemption and profiles.

What is trained comes as a `Task`; everything that computes is a pure jitted function of it. Metrics
of a step are fetched while the next step runs, so the host never delays the device.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import time
from collections.abc import Mapping
from typing import Generic

import jax
from absl import logging

from qwen_jax.errors import UserError
from qwen_jax.progress import format_duration
from qwen_jax.train.checkpoint import Checkpoints
from qwen_jax.train.compiling import compile_step, lower_step
from qwen_jax.train.config import RunConfig
from qwen_jax.train.flops import peak_flops
from qwen_jax.train.metrics import MultiWriter, make_writer, read_metrics
from qwen_jax.train.preemption import Preemption
from qwen_jax.train.profiling import Profiler, parse_steps
from qwen_jax.train.state import Metrics
from qwen_jax.train.task import E, S, Task
from qwen_jax.train.throughput import Throughput, memory_stats


class TrainingDiverged(UserError):
    """Error of a run that had too many consecutive steps with non-finite numbers."""


@dataclasses.dataclass(frozen=True)
class Outcome(Generic[E]):
    """How a call of `train` ended.

    Attributes:
      step: number of batches consumed so far.
      finished: whether all steps of the run are done; False when it was asked to stop.
      evaluations: results of the last evaluation by data set; empty if there was none.
    """

    step: int
    finished: bool
    evaluations: Mapping[str, E]


def train(
    run: RunConfig, task: Task[S, E], workdir: str, checkpoint_dir: str | None = None
) -> Outcome[E]:
    """Trains a task until `run.steps`, starting from the newest checkpoint if there is one.

    Interrupted at any time and called again with the same task, it continues with the same batches
    and, on the same mesh, computes the same bits.

    Args:
      run: length of the run and what it logs and saves.
      task: the training stage.
      workdir: local folder for metrics, TensorBoard files and profiles.
      checkpoint_dir: folder that every host sees, gs:// too; `workdir/checkpoints` by default.

    Returns:
      The last step, whether the run is complete, and the last evaluation.

    Raises:
      UserError: the step cannot be traced (before anything on disk is touched), or the checkpoints
        are of another run.
      TrainingDiverged: `run.max_skipped` non-finite steps in a row.
    """
    with jax.set_mesh(task.mesh):
        lowered = lower_step(task.step, task.abstract_state, task.example_batch)
    peak = peak_flops(jax.local_devices()[0])
    folder = checkpoint_dir or os.path.join(workdir, "checkpoints")
    keep_every = run.keep_every or None
    with (
        jax.set_mesh(task.mesh),
        Checkpoints(
            folder, keep_last=run.keep_last, keep_every=keep_every, fingerprint=task.fingerprint
        ) as checkpoints,
        Preemption() as preemption,
    ):
        state = _restore_or_init(checkpoints, task)
        start = int(state.step)
        _log_start(run, task, start)
        with make_writer(
            workdir,
            total_steps=run.steps,
            resume_step=start,
            names=_writer_names(run),
            wandb_project=run.wandb_project or "qwen_jax",
            config=task.fingerprint,
        ) as writer:
            mfu_per_rate = task.flops_per_token / (peak * task.mesh.size)
            recorder = _Recorder(run, task, checkpoints, writer, workdir, start, mfu_per_rate)
            try:
                state = _run_steps(run, task, state, lowered, recorder, preemption)
            finally:
                recorder.profiler.stop()
            finished = int(state.step) >= run.steps
            recorder.finish(state, evaluate=finished)
    return Outcome(int(state.step), finished, recorder.evaluations)


def _run_steps(
    run: RunConfig,
    task: Task[S, E],
    state: S,
    lowered: jax.stages.Lowered,
    recorder: _Recorder[S, E],
    preemption: Preemption,
) -> S:
    """Runs steps from that of `state` until the last one or a request to stop.

    Args:
      run: length of the run.
      task: the source of the batches.
      state: the state to start from; its buffers are donated.
      lowered: the traced step, compiled here.
      recorder: is given the metrics and the state of every step.
      preemption: is asked after every step whether to stop.

    Returns:
      The state after the last step that was run.
    """
    start = int(state.step)
    if start >= run.steps:
        return state
    compiled = _compile(lowered)
    with task.open_batches(start) as next_batch:
        for step in range(start, run.steps):
            with recorder.profiler.step(step + 1):
                state, metrics = compiled(state, next_batch(step, state))
            recorder.add(step + 1, metrics)
            recorder.after_step(step + 1, state)
            if preemption.should_stop(step + 1):
                break
        recorder.flush()
    return state


class _Recorder(Generic[S, E]):
    """What one call of `train` does between steps: metrics, evaluations, checkpoints, profile.

    Attributes:
      profiler: traces the steps that `run.profile_steps` names.
      evaluations: results of the last evaluation by data set.
    """

    def __init__(
        self,
        run: RunConfig,
        task: Task[S, E],
        checkpoints: Checkpoints,
        writer: MultiWriter,
        workdir: str,
        start: int,
        mfu_per_rate: float,
    ):
        """Prepares to record the steps after `start`.

        Args:
          run: when to log, evaluate and save.
          task: the stage, for its evaluation and numbers.
          checkpoints: where states are saved.
          writer: where metrics are written.
          workdir: folder of metrics.jsonl and profiles.
          start: number of steps done before this call.
          mfu_per_rate: share of all devices' peak FLOP/s that one token per second amounts to.
        """
        self._config, self._task, self._start = run, task, start
        self._checkpoints, self._writer, self._workdir = checkpoints, writer, workdir
        self._mfu_per_rate = mfu_per_rate
        self.evaluations: Mapping[str, E] = {}
        self._pending: collections.deque[tuple[int, Metrics]] = collections.deque()
        self._throughput = Throughput()
        self._evaluated = self._saved = -1
        profiled = parse_steps(run.profile_steps)
        self.profiler = Profiler(profiled, os.path.join(workdir, "profile"), done=start)

    def add(self, step: int, metrics: Metrics) -> None:
        """Keeps the metrics of 1-based `step` on the device and handles those of the step before.

        Raises:
          TrainingDiverged: too many non-finite steps in a row.
        """
        self._pending.append((step, metrics))
        while len(self._pending) > 1:
            self._handle(*self._pending.popleft())

    def flush(self) -> None:
        """Handles the metrics that are still on the device; waits for their steps to end."""
        while self._pending:
            self._handle(*self._pending.popleft())

    def _handle(self, step: int, metrics: Metrics) -> None:
        """Fetches the metrics of one step, checks for divergence, and logs them if due."""
        values = {name: float(x) for name, x in jax.device_get(metrics).items()}
        tokens = self._task.tokens_per_step
        self._throughput.add(tokens)
        in_a_row = int(values.pop("skipped_in_a_row"))
        if in_a_row:
            logging.warning("step %d: loss, gradient or update is not finite, step skipped", step)
        if in_a_row >= self._config.max_skipped:
            raise TrainingDiverged(
                f"training stopped at step {step}: the last {in_a_row} steps had a non-finite "
                "loss, gradient or update (train.max_skipped); go back to an earlier checkpoint "
                "with a lower optimizer.peak_lr, or look at the data around this step"
            )
        if step % self._config.log_every and step != self._config.steps:
            return
        rate = self._throughput.per_second()
        if rate is not None:
            values["tokens_per_second"] = rate
            values["mfu"] = rate * self._mfu_per_rate
        self._writer.write(step, values | memory_stats())

    def after_step(self, step: int, state: S) -> None:
        """Ends the profile, evaluates and saves where they are due after 1-based `step`."""
        if self.profiler.ends_with(step):
            self.flush()  # waits for the last traced step
            self.profiler.stop()
            self._throughput.restart()
        every = self._config.eval_every
        if every and step % every == 0 and step != self._config.steps:
            self._evaluate(step, state)
        if step % self._config.checkpoint_every == 0:
            self._save(step, state)

    def finish(self, state: S, *, evaluate: bool) -> None:
        """Saves the last state, evaluates it if `evaluate`, and waits for the save to complete."""
        step = int(state.step)
        self._save(step, state)
        if evaluate:
            self._evaluate(step, state)
        self._checkpoints.wait()

    def _save(self, step: int, state: S) -> None:
        """Starts to save the state after `step`, unless that has been done."""
        if self._saved == step:
            return
        self._saved = step
        self.flush()  # so that a kill after this checkpoint leaves no gap in the metrics
        info = {"data_position": step, "tokens_seen": step * self._task.tokens_per_step}
        self._checkpoints.save(step, state, info | dict(self._task.checkpoint_info(step)))

    def _evaluate(self, step: int, state: S) -> None:
        """Evaluates the state after `step` and logs the results, unless that has been done."""
        if self._task.evaluate is None or self._evaluated == step:
            return
        self.flush()
        self._evaluated = step
        self.evaluations = self._task.evaluate(state)
        scalars = {
            f"eval/{name}/{metric}": value
            for name, result in self.evaluations.items()
            for metric, value in result.metrics().items()
        }
        # A complete run that is started again evaluates again, but its line is in the file already.
        if step > self._start or not _has_line(self._workdir, step, scalars):
            self._writer.write(step, scalars)
        self._throughput.restart()


def _has_line(workdir: str, step: int, scalars: Mapping[str, float]) -> bool:
    """Returns whether metrics.jsonl in `workdir` has a line of `step` with all these names."""
    path = os.path.join(workdir, "metrics.jsonl")
    rows = read_metrics(path) if os.path.exists(path) else []
    return any(row["step"] == step and scalars.keys() <= row.keys() for row in rows)


def _restore_or_init(checkpoints: Checkpoints, task: Task[S, E]) -> S:
    """Returns the state of the newest checkpoint, or the task's initial state without one.

    Raises:
      UserError: the checkpoint is of another run.
    """
    restored = checkpoints.restore(task.abstract_state)
    if restored is None:
        return task.init_state()
    state, info = restored
    assert info["data_position"] == int(state.step), "data position and step are one number"
    return state


def _compile(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles the traced step before the first batch, so that the first step takes no longer."""
    started = time.monotonic()
    compiled = compile_step(lowered, jax.local_devices()[0].device_kind)
    logging.info("step compiled in %s", format_duration(time.monotonic() - started))
    return compiled


def _writer_names(run: RunConfig) -> tuple[str, ...]:
    """Returns the names of the metrics writers that a run uses, for `make_writer`."""
    names = ["console", "jsonl"]
    if run.tensorboard:
        names.append("tensorboard")
    if run.wandb_project:
        names.append("wandb")
    return tuple(names)


def _log_start(run: RunConfig, task: Task[S, E], start: int) -> None:
    """Logs three lines about the run: the task, the devices, and the step it starts from."""
    logging.info("%s", task.description)
    logging.info(
        "%d × %s in %d process(es), mesh %s",
        jax.device_count(),
        jax.devices()[0].device_kind,
        jax.process_count(),
        " × ".join(f"{axis} {size}" for axis, size in task.mesh.shape.items()),
    )
    logging.info("step %d of %d", start, run.steps)
