"""Pretraining as a task of the training loop: next-token prediction on packed documents."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax

from qwen_jax.data import Batches, data_fingerprint, epochs_at
from qwen_jax.model import count_params
from qwen_jax.parallel import make_mesh
from qwen_jax.parallel.host_arrays import local_rows, to_global
from qwen_jax.progress import format_count
from qwen_jax.tokenizer import load_tokenizer
from qwen_jax.train.config import check_mesh
from qwen_jax.train.evaluation import HeldOut, check_sources, evaluate, parse_eval_sources
from qwen_jax.train.flops import train_flops_per_token
from qwen_jax.train.job import PretrainJob, check_vocabulary, run_fingerprint
from qwen_jax.train.loop import Outcome, train
from qwen_jax.train.objective import NextToken
from qwen_jax.train.state import Batch, Metrics, TrainState, abstract_state, init_state
from qwen_jax.train.step import bind_step
from qwen_jax.train.task import BatchFunction, Task


def pretrain(job: PretrainJob, workdir: str, checkpoint_dir: str | None = None) -> Outcome[HeldOut]:
    """Runs a pretraining job on all devices until `job.train.steps`; see `loop.train`.

    Args:
      job: the recipe.
      workdir: local folder for metrics, TensorBoard files and profiles.
      checkpoint_dir: folder that every host sees, gs:// too; `workdir/checkpoints` by default.

    Returns:
      How the run ended, with the last evaluation of each held-out source.

    Raises:
      UserError: job, data, checkpoints or devices do not fit together.
      TrainingDiverged: `train.max_skipped` non-finite steps in a row.
    """
    return train(job.train, pretraining_task(job, make_mesh(job.mesh)), workdir, checkpoint_dir)


def pretraining_step(
    job: PretrainJob,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns the job's pure step, which the loop runs and `qwen_jax.aot` compiles for pods."""
    return bind_step(job.step_config, NextToken(), seed=job.train.seed + 1)


def pretraining_task(job: PretrainJob, mesh: jax.sharding.Mesh) -> Task[TrainState, HeldOut]:
    """Opens the data of a job and returns its task, after all checks that need no training.

    Args:
      job: the recipe.
      mesh: the devices to train on.

    Raises:
      UserError: mesh, tokenizer, data and model do not fit together.
    """
    global_batch, seq_len = job.data.global_batch, job.data.seq_len
    microbatches = job.train.microbatches
    check_mesh(
        job.model, mesh, global_batch=global_batch, microbatches=microbatches, seq_len=seq_len
    )
    tokenizer = load_tokenizer(job.tokenizer)
    check_vocabulary(job, tokenizer)
    batches = Batches(job.data, tokenizer.sha256)
    held_out = parse_eval_sources(job.eval)
    data_format: dict[str, Any] = {
        "packing": job.data.packing,
        "seq_len": seq_len,
        "tokenizer_sha256": tokenizer.sha256,
    }
    check_sources(held_out, **data_format)
    first, count = local_rows(mesh, global_batch)
    abstract = abstract_state(job.step_config, mesh)

    def init() -> TrainState:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        fresh = functools.partial(init_state, job.step_config)
        return jax.jit(fresh, out_shardings=shardings)(jax.random.key(job.train.seed))

    @contextlib.contextmanager
    def open_batches(start: int) -> Iterator[BatchFunction[TrainState]]:
        with batches.iterate(start, first, count) as reader:

            def batch(step: int, state: TrainState) -> Batch:
                del state
                position, rows = next(reader)
                assert position == step, "the loop asks for one batch per step, in order"
                return to_global(rows, mesh, first, global_batch)

            yield batch

    def evaluate_held_out(state: TrainState) -> dict[str, HeldOut]:
        batch_size = global_batch // microbatches
        return evaluate(
            state.params, held_out, job.step_config, mesh, batch_size=batch_size, **data_format
        )

    tokens = global_batch * seq_len
    return Task(
        mesh=mesh,
        step=pretraining_step(job),
        abstract_state=abstract,
        init_state=init,
        example_batch=to_global(batches.rows(0, first, count), mesh, first, global_batch),
        open_batches=open_batches,
        fingerprint=run_fingerprint(job, tokenizer, data_fingerprint(job.data)),
        description=f"{format_count(count_params(job.model))} parameters, "
        f"{format_count(tokens)} tokens per step, "
        f"{format_count(tokens * job.train.steps)} tokens in all",
        tokens_per_step=tokens,
        flops_per_token=train_flops_per_token(job.model, seq_len),
        checkpoint_info=lambda step: {"epochs": epochs_at(job.data, step)},
        evaluate=evaluate_held_out if held_out else None,
    )
