"""Two processes of four devices train like one of eight: batches, gradients, runs and stops."""

import dataclasses
import functools
import os
import signal

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from qwen_jax.data import Batches
from qwen_jax.parallel import MeshConfig, make_mesh
from qwen_jax.parallel.host_arrays import local_rows, to_global
from qwen_jax.train import loop
from qwen_jax.train.objective import NextToken
from qwen_jax.train.pretrain import pretrain
from qwen_jax.train.state import abstract_state, init_state
from qwen_jax.train.step import train_step
from tests import multiprocess
from tests.train import jobs

# Name -> axis sizes, and whether each process must read all rows of the batch because an axis
# other than those of the batch spans both.
MESHES = {
    "2 data × 4 tensor": ({"data": 2, "fsdp": 1, "tensor": 4}, False),
    "8 tensor": ({"fsdp": 1, "tensor": 8}, True),
    "8 context": ({"fsdp": 1, "context": 8}, True),
}

SEED = 5


def job_of(folder):
    """A job with eight heads, so that `tensor` may be 8, without clipping of gradients."""
    model = {"n_heads": 8, "n_kv_heads": 8, "n_layers": 1, "windows": ()}
    return jobs.make(folder, model=model, optimizer={"clip_norm": 1e9})


def two_steps(job, state, feed, batches, first, count):
    """Runs two training steps; returns their metrics and Adam's first moments."""
    step = jax.jit(functools.partial(train_step, config=job.step_config, objective=NextToken()))
    metrics = []
    for i in range(2):
        state, values = step(state, feed(batches.rows(i, first, count)))
        metrics.append({name: float(value) for name, value in values.items()})
    return metrics, state.opt_state[0].mu


def _two_steps_on_each_mesh(folder: str, sizes: dict, out: str) -> list:
    jax.config.update("jax_default_matmul_precision", "highest")
    job, results = job_of(folder), []
    initial = jax.device_get(
        jax.jit(functools.partial(init_state, job.step_config))(jax.random.key(SEED))
    )
    for number, axes in enumerate(sizes):
        mesh = make_mesh(MeshConfig(**axes))
        first, count = local_rows(mesh, 8)
        feed = functools.partial(to_global, mesh=mesh, first=first, global_batch=8)
        with jax.set_mesh(mesh):
            state = jax.tree.map(
                lambda x, a: jax.make_array_from_callback(x.shape, a.sharding, lambda i: x[i]),
                initial,
                abstract_state(job.step_config, mesh),
            )
            metrics, mu = two_steps(job, state, feed, Batches(job.data), first, count)
        mu = multihost_utils.process_allgather(mu, tiled=True)
        if jax.process_index() == 0:
            named = jax.tree_util.tree_flatten_with_path(mu)[0]
            np.savez(f"{out}/{number}.npz", **{jax.tree_util.keystr(p): x for p, x in named})
        results.append({"rows": [first, count], "metrics": metrics})
    return results


@pytest.fixture(scope="module", autouse=True)
def shared_compilation():
    with jobs.compile_once():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return jobs.write_data(tmp_path_factory.mktemp("data"))


@pytest.mark.slow
def test_batches_losses_and_gradients_equal_those_of_one_device(data, tmp_path):
    sizes = [axes for axes, _ in MESHES.values()]
    results = multiprocess.run(
        _two_steps_on_each_mesh, folder=str(data), sizes=sizes, out=str(tmp_path), timeout=300
    )
    job = job_of(data)
    with jax.default_matmul_precision("highest"):
        state = jax.jit(functools.partial(init_state, job.step_config))(jax.random.key(SEED))
        metrics, mu = two_steps(job, state, jax.device_put, Batches(job.data), 0, 8)
    expected = {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_flatten_with_path(mu)[0]}
    for number, (name, (_, all_rows)) in enumerate(MESHES.items()):
        rows = [process[number]["rows"] for process in results]
        assert rows == ([[0, 8], [0, 8]] if all_rows else [[0, 4], [4, 4]]), name
        for process in results:
            for found_values, expected_values in zip(
                process[number]["metrics"], metrics, strict=True
            ):
                assert found_values == pytest.approx(expected_values, rel=1e-5), name
        found = np.load(tmp_path / f"{number}.npz")
        for leaf, value in expected.items():
            error = np.linalg.norm(found[leaf] - value) / np.linalg.norm(value)
            assert error < 3e-5, f"{name}: {leaf} differs by {error:.1e}"


def _pretrain(folder: str, workdir: str, axes: dict, steps: int, sigterm_at: int = 0) -> dict:
    job = jobs.make(folder, mesh=MeshConfig(**axes), train={"steps": steps})
    if steps < jobs.STEPS:
        job = dataclasses.replace(job, eval="")
    original = loop._Recorder.after_step

    def after(self, step, state):
        original(self, step, state)
        if step == sigterm_at and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    loop._Recorder.after_step = after
    try:
        return dataclasses.asdict(pretrain(job, workdir))
    finally:
        loop._Recorder.after_step = original


@pytest.mark.slow
def test_a_run_may_resume_on_one_or_two_processes(data, tmp_path):
    """One process, then two (only the second of which gets SIGTERM), then one again."""
    uninterrupted = jobs.run(jobs.make(data), tmp_path / "uninterrupted")
    workdir = str(tmp_path / "moving")
    common = {"folder": str(data), "workdir": workdir}
    assert _pretrain(**common, axes={"fsdp": 8}, steps=3)["step"] == 3
    first, second = multiprocess.run(
        _pretrain,
        **common,
        axes={"data": 2, "fsdp": 2, "context": 2},
        steps=jobs.STEPS,
        sigterm_at=5,
        timeout=300,
    )
    # Both stop at the same step: flags of a step are combined after it and read after the next.
    assert first == second == {"step": 6, "finished": False, "evaluations": {}}
    assert _pretrain(**common, axes={"fsdp": 8}, steps=jobs.STEPS)["finished"]
    jobs.assert_close(jobs.read(jobs.make(data), workdir), uninterrupted)
