"""A small pretraining job for tests, and readers of what a run leaves on disk."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from unittest import mock

import jax
import numpy as np

from qwen_jax.corpus import Document, PackConfig, pack
from qwen_jax.data import DataConfig
from qwen_jax.model import ForwardOptions, ModelConfig
from qwen_jax.parallel import MeshConfig, make_mesh
from qwen_jax.tokenizer import Tokenizer
from qwen_jax.tokenizer.huggingface import byte_order
from qwen_jax.train import compiling, loop
from qwen_jax.train.checkpoint import Checkpoints, read_header
from qwen_jax.train.config import LossConfig, RunConfig
from qwen_jax.train.job import PretrainJob
from qwen_jax.train.loop import Outcome, train
from qwen_jax.train.metrics import read_metrics
from qwen_jax.train.optimizer import OptimizerConfig
from qwen_jax.train.pretrain import pretrain, pretraining_task
from qwen_jax.train.state import abstract_state

SEQ_LEN = 16
STEPS = 9
_WORDS = ("red", "green", "blue", "sky", "sea", "天空", "大海")

# Grouped queries, windows, masked packing and two sources: no feature in its trivial form.
MODEL = ModelConfig(
    family="qwen",
    vocab_size=464,  # the 256 bytes and the 208 control tokens
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    d_ff=48,
    max_length=SEQ_LEN,
    windows=(None, 6),
)


def write_data(
    folder: pathlib.Path, order: list[int] | None = None, seq_len: int = SEQ_LEN
) -> pathlib.Path:
    """Writes a byte tokenizer, sources `a` and `b` and held-out `h` into `folder`.

    Args:
      folder: an existing folder.
      order: of the bytes in the vocabulary; the released one by default.
      seq_len: tokens per packed window.
    """
    tokenizer = Tokenizer(tuple(bytes([i]) for i in order or byte_order()))
    tokenizer.save(folder / "bytes.tiktoken")
    rng = np.random.default_rng(0)
    for name, count in (("a", 120), ("b", 60), ("h", 15)):
        documents = [
            Document(f"{name}{i}", " ".join(rng.choice(_WORDS, rng.integers(1, 9))))
            for i in range(count)
        ]
        pack(documents, folder / name, tokenizer, PackConfig(seq_len))
    return folder


def make(folder: str | os.PathLike, *, mesh: MeshConfig = MeshConfig(fsdp=8), **groups):
    """Returns a job on the data of `write_data`; `train={"steps": 3}` changes single settings."""
    job = PretrainJob(
        model=MODEL,
        tokenizer=f"{folder}/bytes.tiktoken",
        data=DataConfig(f"{folder}/a=2,{folder}/b=1", SEQ_LEN, 8, packing="masked"),
        eval=f"h={folder}/h",
        options=ForwardOptions(dtype="float32"),
        mesh=mesh,
        optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=2, decay_steps=STEPS),
        loss=LossConfig(z_loss=1e-4, chunk=24),
        train=RunConfig(
            steps=STEPS, log_every=1, checkpoint_every=3, keep_last=2, tensorboard=False
        ),
    )
    for name, changes in groups.items():
        if isinstance(changes, dict):
            changes = dataclasses.replace(getattr(job, name), **changes)
        job = dataclasses.replace(job, **{name: changes})
    return job


@contextlib.contextmanager
def compile_once():
    """Context manager in which the loop compiles equal steps for equal devices only once."""
    compiled: dict[tuple, jax.stages.Compiled] = {}

    def compile_step(lowered, device_kind):
        devices = tuple(device.id for device in jax.sharding.get_mesh().devices.flat)
        key = (lowered.as_text(), device_kind, devices)
        if key not in compiled:
            compiled[key] = compiling.compile_step(lowered, device_kind)
        return compiled[key]

    with mock.patch.object(loop, "compile_step", compile_step):
        yield


@dataclasses.dataclass(frozen=True)
class RunResult:
    """Newest checkpoint of a run, as leaves on the host, and the rows of its metrics."""

    step: int
    leaves: dict[str, np.ndarray]
    rows: list[dict[str, float]]

    def series(self, name: str) -> list[tuple[int, float]]:
        return [(row["step"], row[name]) for row in self.rows if name in row]


def read(job: PretrainJob, workdir: str | os.PathLike) -> RunResult:
    """Reads the newest checkpoint (through all devices of this process) and metrics.jsonl."""
    mesh = make_mesh(MeshConfig(fsdp=-1))
    folder = f"{workdir}/checkpoints"
    header = read_header(folder)
    with (
        jax.set_mesh(mesh),
        Checkpoints(folder, keep_last=9, keep_every=None, fingerprint=header.fingerprint) as found,
    ):
        state, _ = found.restore(abstract_state(job.step_config, mesh))
    leaves = {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
    }
    return RunResult(header.step, leaves, read_metrics(f"{workdir}/metrics.jsonl"))


def run(job: PretrainJob, workdir: str | os.PathLike) -> RunResult:
    """Runs the job in this process to its last step."""
    outcome = pretrain(job, str(workdir))
    assert outcome.finished and outcome.step == job.train.steps
    return read(job, workdir)


def run_on(job: PretrainJob, workdir: str | os.PathLike, devices: int) -> Outcome:
    """Runs the job on the first `devices` devices of this process, from its newest checkpoint."""
    mesh = make_mesh(job.mesh, jax.devices()[:devices])
    return train(job.train, pretraining_task(job, mesh), str(workdir))


MEASURED = ("loss", "grad_norm", "param_norm", "update_norm", "lr", "tokens", "bits_per_byte")


def assert_identical(result: RunResult, expected: RunResult) -> None:
    """Asserts the same bits in every leaf and every metric that is not a measurement of time."""
    assert result.step == expected.step
    for name, value in expected.leaves.items():
        assert result.leaves[name].tobytes() == value.tobytes(), name
    for name in (*MEASURED, "eval/h/loss", "eval/h/bits_per_byte"):
        assert result.series(name) == expected.series(name), name


def assert_close(result: RunResult, expected: RunResult, rtol: float = 1e-4) -> None:
    """Asserts equality up to the order of sums: error of whole leaves, of each metric.

    Adam divides by the size of gradients that are themselves rounding, such as those of k_bias.
    """
    assert result.step == expected.step
    errors = {}
    for name, value in expected.leaves.items():
        value = value.astype(np.float64)
        difference = np.linalg.norm(result.leaves[name] - value)
        errors[name] = difference / max(np.linalg.norm(value), 1e-12)
    worst = max(errors, key=errors.get)
    assert errors[worst] < rtol, f"{worst}: relative error {errors[worst]:.1e}"
    for name in (*MEASURED, "eval/h/loss", "eval/h/bits_per_byte"):
        steps, values = zip(*result.series(name), strict=True)
        expected_steps, expected_values = zip(*expected.series(name), strict=True)
        assert steps == expected_steps
        np.testing.assert_allclose(values, expected_values, rtol=rtol / 10, err_msg=name)
