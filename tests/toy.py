"""A toy model, meshes and batches that several test files share."""

import contextlib

import jax
import numpy as np

from qwen_jax.model import ForwardOptions, ModelConfig
from qwen_jax.parallel import MeshConfig, make_mesh, named_sharding
from qwen_jax.train.config import LossConfig, StepConfig
from qwen_jax.train.optimizer import OptimizerConfig

# Every dimension divides by 8, so that any axis may take all devices.
MODEL = ModelConfig(
    family="qwen",
    vocab_size=128,
    d_model=64,
    n_layers=2,
    n_heads=8,
    n_kv_heads=8,
    head_dim=16,
    d_ff=96,
    max_length=64,
)

MESHES = {
    "8 fsdp": MeshConfig(data=1, fsdp=8),
    "4 data × 2 fsdp": MeshConfig(data=4, fsdp=2),
    "4 fsdp × 2 tensor": MeshConfig(fsdp=4, tensor=2),
    "2 × 2 × 2 fsdp, context, tensor": MeshConfig(fsdp=2, context=2, tensor=2),
    "2 × 2 × 2 data, fsdp, tensor": MeshConfig(data=2, fsdp=2, tensor=2),
    "8 tensor": MeshConfig(fsdp=1, tensor=8),
}

STEP = StepConfig(
    model=MODEL,
    options=ForwardOptions(dtype="float32"),
    optimizer=OptimizerConfig(peak_lr=1e-2, warmup_steps=2, decay_steps=20),
    loss=LossConfig(chunk=24),
)


def batch(seed=0, rows=8, length=32, vocab=128):
    """Random tokens: two documents and some padding per row, some targets without loss."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, (rows, length + 1)).astype(np.int32)
    cut = rng.integers(4, length - 8, rows)
    slot = np.arange(length)
    segments = np.where(slot < cut[:, None], 1, 2)
    segments = np.where(slot >= length - rng.integers(0, 4, rows)[:, None], 0, segments)
    positions = np.where(slot < cut[:, None], slot, slot - cut[:, None])
    mask = (segments > 0) & (rng.random((rows, length)) > 0.1)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": segments.astype(np.int32),
        "positions": positions.astype(np.int32),
        "loss_mask": mask.astype(np.float32),
        "n_bytes": (3.0 * mask.sum(1)).astype(np.float32),
    }


def place(batch, mesh):
    """The batch as global arrays on `mesh` (as it is without one)."""
    if mesh is None:
        return jax.device_put(batch)
    axes = ("batch", "sequence")
    return {
        k: jax.device_put(v, named_sharding(mesh, *axes[: np.ndim(v)])) for k, v in batch.items()
    }


@contextlib.contextmanager
def use(name):
    """Enters the mesh of this name; "none" is plain single-device JAX."""
    if name == "none":
        yield None
        return
    mesh = make_mesh(MESHES[name])
    with jax.set_mesh(mesh):
        yield mesh


def close(actual, expected, rtol=1e-5):
    """Whole-array relative error, the measure the tests of equality across meshes use."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    error = np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-12)
    assert error < rtol, f"relative error {error:.2e} is not below {rtol:.0e}"
