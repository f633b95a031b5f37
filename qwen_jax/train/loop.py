"""The pretraining program, top to bottom: mesh, data, state, step, loop.

The loop owns logging, evaluation, checkpoints, preemption and profiling; everything that computes
is a pure jitted function from elsewhere. Metrics of a step are fetched while the next one runs, so
the host never holds the device up.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Mapping

import jax
from absl import logging

from qwen_jax.data import Batch, Batches, data_fingerprint, epochs_at
from qwen_jax.errors import UserError
from qwen_jax.model import count_params
from qwen_jax.parallel import make_mesh
from qwen_jax.parallel.host_arrays import local_rows, to_global
from qwen_jax.progress import format_count, format_duration
from qwen_jax.tokenizer import load_tokenizer
from qwen_jax.train.checkpoint import Checkpoints
from qwen_jax.train.compiling import compile_step, lower_step
from qwen_jax.train.evaluation import HeldOut, check_sources, evaluate, parse_eval_sources
from qwen_jax.train.flops import peak_flops, train_flops_per_token
from qwen_jax.train.job import PretrainJob, check_vocabulary, identity
from qwen_jax.train.metrics import MultiWriter, make_writer, read_metrics
from qwen_jax.train.preemption import Preemption
from qwen_jax.train.profiling import Profiler, parse_steps
from qwen_jax.train.step import TrainState, abstract_state, check_mesh, init_state
from qwen_jax.train.throughput import Throughput, memory_stats


class TrainingDiverged(UserError):
    """Too many non-finite steps in a row."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a call of `pretrain` ended.

    step: batches consumed so far; finished: all steps are done (else it was asked to stop);
    held_out: the last evaluation, by source.
    """

    step: int
    finished: bool
    held_out: dict[str, HeldOut]


def pretrain(job: PretrainJob, workdir: str, checkpoint_dir: str | None = None) -> Outcome:
    """Trains until `job.train.steps`, from wherever the newest checkpoint is.

    Killed at any moment and called again with the same job, it goes on with the same batches and,
    on the same mesh, the same bits.

    Args:
      workdir: local folder for metrics, TensorBoard files and profiles.
      checkpoint_dir: folder every host sees, gs:// too; `workdir/checkpoints` by default.

    Raises:
      UserError: anything in the job, the data or the checkpoints that does not fit together; before
        any training, and but for the checkpoints before anything on disk is touched.
      TrainingDiverged: `train.max_skipped` non-finite steps in a row.
    """
    mesh = make_mesh(job.mesh)
    inputs = _open(job, mesh)
    folder = checkpoint_dir or os.path.join(workdir, "checkpoints")
    keep = {"keep_last": job.train.keep_last, "keep_every": job.train.keep_every or None}
    with (
        jax.set_mesh(mesh),
        Checkpoints(folder, identity=inputs.identity, **keep) as checkpoints,
        Preemption() as preemption,
    ):
        state = _restore_or_init(checkpoints, inputs.abstract, job)
        start = int(state.step)
        _announce(job, mesh, start)
        with make_writer(
            workdir,
            total_steps=job.train.steps,
            resume_step=start,
            names=_writers(job),
            wandb_project=job.train.wandb_project or "qwen_jax",
            config=inputs.identity,
        ) as writer:
            run = _Run(job, mesh, inputs, checkpoints, writer, workdir, start)
            try:
                state = _train(run, state, preemption)
            finally:
                run.profiler.stop()
            finished = int(state.step) >= job.train.steps
            run.finish(state, evaluate_too=finished)
    return Outcome(int(state.step), finished, run.held_out)


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """What a job has opened: the data, and the step traced for this mesh but not yet compiled.

    first, count: the rows of a global batch that this process reads. mfu_per_rate: share of the
    devices' peak that one token per second is.
    """

    tokenizer_sha256: str
    batches: Batches
    held_out: dict[str, str]
    identity: dict
    abstract: TrainState
    traced: jax.stages.Lowered
    first: int
    count: int
    feed: Callable[[Batch], dict[str, jax.Array]]
    mfu_per_rate: float


def _open(job: PretrainJob, mesh: jax.sharding.Mesh) -> _Inputs:
    """Everything that can be wrong in a job, checked before anything is computed or written."""
    check_mesh(
        job.model,
        mesh,
        global_batch=job.data.global_batch,
        microbatches=job.train.microbatches,
        seq_len=job.data.seq_len,
    )
    tokenizer = load_tokenizer(job.tokenizer)
    check_vocabulary(job, tokenizer)
    batches = Batches(job.data, tokenizer.sha256)
    held_out = parse_eval_sources(job.eval)
    check_sources(held_out, **_shape_of_data(job, tokenizer.sha256))
    first, count = local_rows(mesh, job.data.global_batch)
    feed = functools.partial(to_global, mesh=mesh, first=first, global_batch=job.data.global_batch)
    abstract = abstract_state(job.step_config, mesh)
    with jax.set_mesh(mesh):
        traced = lower_step(job, abstract, feed(batches.rows(0, first, count)))
    peak = peak_flops(jax.local_devices()[0])
    return _Inputs(
        tokenizer_sha256=tokenizer.sha256,
        batches=batches,
        held_out=held_out,
        identity=identity(job, tokenizer, data_fingerprint(job.data)),
        abstract=abstract,
        traced=traced,
        first=first,
        count=count,
        feed=feed,
        mfu_per_rate=train_flops_per_token(job.model, job.data.seq_len) / (peak * mesh.size),
    )


def _shape_of_data(job: PretrainJob, tokenizer_sha256: str) -> dict:
    return {
        "packing": job.data.packing,
        "seq_len": job.data.seq_len,
        "tokenizer_sha256": tokenizer_sha256,
    }


def _train(run: _Run, state: TrainState, preemption: Preemption) -> TrainState:
    """Steps from where `state` is until the last one or a request to stop."""
    inputs, last, start = run.inputs, run.job.train.steps, run.start
    if start >= last:
        return state
    step_fn = _compile(inputs.traced)
    with inputs.batches.iterate(start, inputs.first, inputs.count) as reader:
        for step, rows in reader:
            with run.profiler.step(step + 1):
                state, metrics = step_fn(state, inputs.feed(rows))
            run.note(step + 1, metrics)
            run.after(step + 1, state)
            if preemption.should_stop(step + 1) or step + 1 >= last:
                break
        run.flush()
    return state


class _Run:
    """Host-side bookkeeping of one call of `pretrain`: what happens around the steps."""

    def __init__(
        self,
        job: PretrainJob,
        mesh: jax.sharding.Mesh,
        inputs: _Inputs,
        checkpoints: Checkpoints,
        writer: MultiWriter,
        workdir: str,
        start: int,
    ):
        self.job, self.mesh, self.inputs, self.start = job, mesh, inputs, start
        self.checkpoints, self.writer, self.workdir = checkpoints, writer, workdir
        self.held_out: dict[str, HeldOut] = {}
        self._pending: collections.deque = collections.deque()
        self._speed = Throughput()
        self._tokens = job.data.global_batch * job.data.seq_len
        self._evaluated = self._saved = -1
        profiled = parse_steps(job.train.profile_steps)
        self.profiler = Profiler(profiled, os.path.join(workdir, "profile"), done=start)

    def note(self, step: int, metrics) -> None:
        """Keeps this step's metrics on the device and handles the step before it."""
        self._pending.append((step, metrics))
        while len(self._pending) > 1:
            self._handle(*self._pending.popleft())

    def flush(self) -> None:
        """Handles the metrics that are still on the device."""
        while self._pending:
            self._handle(*self._pending.popleft())

    def _handle(self, step: int, metrics) -> None:
        values = {name: float(x) for name, x in jax.device_get(metrics).items()}
        self._speed.add(self._tokens)
        in_a_row = int(values.pop("skipped_in_a_row"))
        if in_a_row:
            logging.warning("step %d: loss, gradient or update is not finite, step skipped", step)
        if in_a_row >= self.job.train.max_skipped:
            raise TrainingDiverged(
                f"training stopped at step {step}: the last {in_a_row} steps had a non-finite "
                "loss, gradient or update (train.max_skipped); go back to an earlier checkpoint "
                "with a lower optimizer.peak_lr, or look at the data around this step"
            )
        if step % self.job.train.log_every and step != self.job.train.steps:
            return
        rate = self._speed.per_second()
        if rate is not None:
            values["tokens_per_second"] = rate
            values["mfu"] = rate * self.inputs.mfu_per_rate
        self.writer.write(step, values | memory_stats())

    def after(self, step: int, state: TrainState) -> None:
        """The end of a profile, evaluation and checkpoint where they are due."""
        if self.profiler.ends_with(step):
            self.flush()  # waits for the last traced step
            self.profiler.stop()
            self._speed.restart()
        every = self.job.train.eval_every
        if every and step % every == 0 and step != self.job.train.steps:
            self._evaluate(step, state)
        if step % self.job.train.checkpoint_every == 0:
            self._save(step, state)

    def finish(self, state: TrainState, *, evaluate_too: bool) -> None:
        """Saves the last state and waits for it; evaluates it when the run is complete."""
        step = int(state.step)
        self._save(step, state)
        if evaluate_too:
            self._evaluate(step, state)
        self.checkpoints.wait()

    def _save(self, step: int, state: TrainState) -> None:
        if self._saved == step:
            return
        self._saved = step
        self.flush()  # so that a kill after this checkpoint leaves no gap in the metrics
        epochs = epochs_at(self.job.data, step)
        info = {"data_position": step, "tokens_seen": step * self._tokens, "epochs": epochs}
        self.checkpoints.save(step, state, info)

    def _evaluate(self, step: int, state: TrainState) -> None:
        sources = self.inputs.held_out
        if not sources or self._evaluated == step:
            return
        self.flush()
        self._evaluated = step
        self.held_out = evaluate(
            state.params,
            sources,
            self.job.step_config,
            self.mesh,
            batch_size=self.job.data.global_batch // self.job.train.microbatches,
            **_shape_of_data(self.job, self.inputs.tokenizer_sha256),
        )
        scalars = {}
        for name, result in self.held_out.items():
            scalars[f"eval/{name}/loss"] = result.loss
            scalars[f"eval/{name}/bits_per_byte"] = result.bits_per_byte
        # A finished run that is called again evaluates again, but its line is there already.
        if step > self.start or not _has_line(self.workdir, step, scalars):
            self.writer.write(step, scalars)
        self._speed.restart()


def _has_line(workdir: str, step: int, scalars: Mapping[str, float]) -> bool:
    """Whether metrics.jsonl has a line of `step` with these names."""
    path = os.path.join(workdir, "metrics.jsonl")
    rows = read_metrics(path) if os.path.exists(path) else []
    return any(row["step"] == step and scalars.keys() <= row.keys() for row in rows)


def _restore_or_init(
    checkpoints: Checkpoints, abstract: TrainState, job: PretrainJob
) -> TrainState:
    """The state of the newest checkpoint, or without one a fresh state, born sharded."""
    restored = checkpoints.restore(abstract)
    if restored is None:
        born = functools.partial(init_state, job.step_config)
        shardings = jax.tree.map(lambda a: a.sharding, abstract)
        return jax.jit(born, out_shardings=shardings)(jax.random.key(job.train.seed))
    state, info = restored
    assert info["data_position"] == int(state.step), "data position and step are one number"
    return state


def _compile(traced: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles ahead, so that the first step takes as long as the rest."""
    started = time.monotonic()
    compiled = compile_step(traced, jax.local_devices()[0].device_kind)
    logging.info("step compiled in %s", format_duration(time.monotonic() - started))
    return compiled


def _writers(job: PretrainJob) -> tuple[str, ...]:
    names = ["console", "jsonl"]
    if job.train.tensorboard:
        names.append("tensorboard")
    if job.train.wandb_project:
        names.append("wandb")
    return tuple(names)


def _announce(job: PretrainJob, mesh: jax.sharding.Mesh, start: int) -> None:
    """The run in three lines: what, where, from which step."""
    device = jax.devices()[0]
    tokens = job.data.global_batch * job.data.seq_len
    logging.info(
        "%s parameters, %s tokens per step, %s tokens in all",
        format_count(count_params(job.model)),
        format_count(tokens),
        format_count(tokens * job.train.steps),
    )
    shape = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    logging.info(
        "%d × %s in %d process(es), mesh %s",
        jax.device_count(), device.device_kind, jax.process_count(), shape,
    )  # fmt: skip
    logging.info("step %d of %d", start, job.train.steps)
