"""Tracing and compiling of training steps, with XLA options per kind of device.

The training loop and ahead-of-time compilation (`qwen_jax.aot`) both use these functions, so the
program that is analysed is the program that runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import jax

from qwen_jax.train.state import Batch, Metrics

S = TypeVar("S")
"""Type of the state of a training stage."""

# Collectives run on the SparseCores, concurrently with the TensorCores' matrix products. v5e has no
# SparseCores; there the compiler overlaps all-gathers with products without options. Effects below
# are predictions of `launch.aot` for the layers of 7B with rows of 4,096 tokens (libtpu 0.0.51,
# 2026-11-21). Numerics on real chips are not verified: axlearn (compiler_options.py) reports that
# SparseCore all-reduces changed training on v6e under jax 0.6.2.
_OFFLOAD = "xla_tpu_enable_sparse_core_collective_offload"
_SPARSE_CORES: dict[str, str | bool] = {
    # Time waiting for the interconnect: v5p:4x4x4 from 37 ms of 730 to 1.5; v6e:16x16 from 42 ms of
    # 550 to 24.
    f"{_OFFLOAD}_all_gather": "true",
    f"{_OFFLOAD}_reduce_scatter": "true",
    f"{_OFFLOAD}_all_reduce": "true",
}
_V6E: dict[str, str | bool] = {
    **_SPARSE_CORES,
    # Offloads all-gathers over both axes of a torus too. v6e:16x16, 7B, 12 rows of 4,096: the
    # layers wait for no collective, instead of 72 ms of 4,768; products take as long as before.
    f"{_OFFLOAD}_2d_all_gather": "true",
    # Vector memory that one operation may use, of 128 MiB in all. Tiles become larger: the matrix
    # products of those layers take 424 ms, with the default of 32 MiB 505.
    "xla_tpu_scoped_vmem_limit_kib": "98304",
}

_HOPPER: dict[str, str | bool] = {
    # The gradient of each matrix is reduce-scattered as soon as it is computed, concurrently with
    # the next matrix product. By default XLA combines gradients into pieces of 30 MB, so that a
    # layer waits for all of them at its end: 0.4 ms of 10.6 per layer of 7B with 4 rows on h100:8,
    # now 0.1 (roofline of `launch.aot`, jax 0.10.2). XLA's pipelining of collectives over loop
    # iterations and its unrolling by two made the schedule longer.
    "xla_gpu_reduce_scatter_combine_threshold_bytes": "1",
    # jax 0.11 fuses matrix products and kernels with the update of the stacked layers that their
    # result is written to, and recomputes them for every other reader: 1.20 × the model's FLOPs
    # instead of 1.01 in that step. jax 0.10 compiles the same program with or without this option.
    "xla_gpu_enable_dynamic_slice_fusion": False,
}

# Compiler options by `device_kind`.
XLA_OPTIONS: dict[str, dict[str, str | bool]] = {
    "TPU v5": _SPARSE_CORES,  # v5p; the device kind of v5e is "TPU v5 lite"
    "TPU v5p": _SPARSE_CORES,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "NVIDIA H100 80GB HBM3": _HOPPER,
    "NVIDIA H200": _HOPPER,
}


def xla_options(device_kind: str) -> dict[str, str | bool]:
    """Returns a new dict of compiler options for a `device_kind`; empty if none are known."""
    return dict(XLA_OPTIONS.get(device_kind, {}))


def lower_step(
    step: Callable[[S, Batch], tuple[S, Metrics]],
    abstract: S,
    batch: Mapping[str, jax.Array | jax.ShapeDtypeStruct],
) -> jax.stages.Lowered:
    """Traces a training step with donated state under the current mesh.

    Combinations that the step's options do not support are refused here, before compilation.

    Args:
      step: pure function of (state, batch).
      abstract: shapes, dtypes and shardings of the state.
      batch: arrays, or `ShapeDtypeStruct`s like them.

    Raises:
      UserError: the options of the forward pass cannot be combined.
    """
    shardings = jax.tree.map(lambda a: a.sharding, abstract)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    return jitted.lower(abstract, batch)


def compile_step(lowered: jax.stages.Lowered, device_kind: str) -> jax.stages.Compiled:
    """Compiles a traced step with the compiler options for devices of `device_kind`."""
    return lowered.compile(compiler_options=xla_options(device_kind))
