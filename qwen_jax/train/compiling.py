"""Tracing and compiling the training step, with the compiler options of each chip.

The loop and the ahead-of-time compiler go through here, so what is predicted is what runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax

from qwen_jax.train.state import Batch, Metrics

S = TypeVar("S")
"""Type of the state of a training stage."""

# Collectives run on the SparseCores, beside the TensorCores' products, instead of between them.
# v5e has none; there the compiler weaves gathers into products by itself and refuses to elsewhere.
# Effects are predictions of `launch.aot` for 7B's layers with rows of 4,096 (libtpu 0.0.51,
# 2026-11-21). Numerics on real chips are not ours to promise: axlearn (compiler_options.py) has
# seen training change with SparseCore all-reduces on v6e under jax 0.6.2.
_OFFLOAD = "xla_tpu_enable_sparse_core_collective_offload"
_SPARSE_CORES = {
    # v5p:4x4x4: 37 ms of 730 that waited for the interconnect become 1.5; v6e:16x16: of 550, 42
    # become 24.
    f"{_OFFLOAD}_all_gather": "true",
    f"{_OFFLOAD}_reduce_scatter": "true",
    f"{_OFFLOAD}_all_reduce": "true",
}
_V6E = {
    **_SPARSE_CORES,
    # Gathers over both axes of a torus are offloaded only by this. v6e:16x16, 7B, 12 rows of 4,096:
    # the layers wait for nothing, where 72 ms of 4,768 were waited for; products take as long.
    f"{_OFFLOAD}_2d_all_gather": "true",
    # Vector memory that one operation may use, of 128 MiB there are: larger tiles, and the products
    # of those layers take 424 ms where the default of 32 MiB takes 505.
    "xla_tpu_scoped_vmem_limit_kib": "98304",
}

_HOPPER = {
    # Each matrix's gradient is scattered as soon as it is there, beside the product of the next.
    # Gathered into pieces of 30 MB first, as is the default, all of a layer's are waited for at its
    # end: 0.4 ms of 10.6 a layer of 7B with 4 rows on h100:8, of which 0.1 is left (roofline of
    # `launch.aot`, jax 0.10.2). Pipelining collectives over the loop's trips and unrolling it by
    # two, which XLA also offers, made the schedule longer.
    "xla_gpu_reduce_scatter_combine_threshold_bytes": "1",
    # Under jax 0.11 products and kernels are fused with the slice of the stack of layers that their
    # result goes to, and done again for every other reader: 1.20 × the model's FLOPs in place of
    # 1.01 in that step. jax 0.10 makes the same program either way.
    "xla_gpu_enable_dynamic_slice_fusion": False,
}

# Options of XLA's compiler, by `device_kind`.
XLA_OPTIONS: dict[str, dict[str, str | bool]] = {
    "TPU v5": _SPARSE_CORES,  # v5p; v5e calls itself "TPU v5 lite"
    "TPU v5p": _SPARSE_CORES,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "NVIDIA H100 80GB HBM3": _HOPPER,
    "NVIDIA H200": _HOPPER,
}


def xla_options(device_kind: str) -> dict[str, str | bool]:
    """Compiler options for devices of this kind; none where nothing is known to help."""
    return dict(XLA_OPTIONS.get(device_kind, {}))


def lower_step(
    step: Callable[[S, Batch], tuple[S, Metrics]], abstract: S, batch: Batch
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
    """Compiles the traced step with the options of its devices."""
    return lowered.compile(compiler_options=xla_options(device_kind))
