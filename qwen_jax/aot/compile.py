"""Compilation of the real train step of a job for a pod that is not attached."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from qwen_jax.aot.nodes import DEVICELESS_OPTIONS, Nodes
from qwen_jax.aot.topology import Pod
from qwen_jax.errors import UserError
from qwen_jax.parallel import make_mesh, named_sharding
from qwen_jax.progress import format_duration
from qwen_jax.train.compiling import lower_step, xla_options
from qwen_jax.train.config import check_mesh
from qwen_jax.train.job import PretrainJob
from qwen_jax.train.pretrain import pretraining_step
from qwen_jax.train.state import abstract_state

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory of one device, in bytes.

    Attributes:
      arguments: state and batch.
      temporaries: temporary buffers.
      peak: peak of both together.
      host: temporary buffers in host memory.
    """

    arguments: int
    temporaries: int
    peak: int
    host: int


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A step that fits into memory.

    Attributes:
      hlo: text of the scheduled HLO.
      memory: memory of one device.
      seconds: time to compile.
      mesh: mesh that it was compiled for.
      options: compiler options.
    """

    hlo: str
    memory: Memory
    seconds: float
    mesh: jax.sharding.Mesh
    options: dict[str, str | bool]


@dataclasses.dataclass(frozen=True)
class OutOfMemory:
    """Result of compiling a step that does not fit into HBM.

    Attributes:
      needed: bytes needed according to the compiler; None if its message has no number.
      message: first line of the compiler's message.
      seconds: time to compile.
      mesh: mesh that it was compiled for.
      options: compiler options.
    """

    needed: int | None
    message: str
    seconds: float
    mesh: jax.sharding.Mesh
    options: dict[str, str | bool]


def abstract_batch(job: PretrainJob, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the global batch of `data.Batches` as shapes with shardings."""
    rows, length = job.data.global_batch, job.data.seq_len

    def shape_struct(dtype, *axes):
        """Returns the shape of one array of the batch, given its dtype and logical axes."""
        shape = (rows, length)[: len(axes)]
        return jax.ShapeDtypeStruct(shape, dtype, sharding=named_sharding(mesh, *axes))

    tokens = ("batch", "sequence")
    ids = ("tokens", "targets", "segment_ids", "positions")
    batch = {name: shape_struct(jnp.int32, *tokens) for name in ids}
    return batch | {
        "loss_mask": shape_struct(jnp.float32, *tokens),
        "n_bytes": shape_struct(jnp.float32, "batch"),
    }


@contextlib.contextmanager
def _print_elapsed(label: str) -> Iterator[None]:
    """Context manager that prints to stderr, every ten seconds, the time since its start."""
    done, start = threading.Event(), time.monotonic()

    def print_elapsed():
        """Prints the elapsed time until `done` is set."""
        while not done.wait(10):
            print(f"{label}: {format_duration(time.monotonic() - start)}", file=sys.stderr)  # noqa: T201

    thread = threading.Thread(target=print_elapsed, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def needed_bytes(message: str) -> int | None:
    """Returns the bytes of HBM needed according to an out-of-memory error of the compiler.

    None if the message has no number.
    """
    for pattern in (r"Used ([\d.]+)([KMGT]?) of", r"required[^()]*\(([\d.]+)([KMGT]?)\) exceeds"):
        if match := re.search(pattern, message):
            return int(float(match[1]) * _UNITS[match[2]])
    return None


def _scheduled_hlo(folder: str, compiled: jax.stages.Compiled) -> str:
    """Returns the text of the scheduled HLO that libtpu dumped, else jaxlib's.

    libtpu's dump is preferred, since a jaxlib older than libtpu can't print every instruction; with
    a compilation cache there is none.

    Args:
      folder: folder of the dump.
      compiled: the compiled step.
    """
    for stage in ("after_codegen", "after_optimizations"):
        files = sorted(pathlib.Path(folder).glob(f"*jit_train_step*.{stage}.txt"))
        if files:
            return files[-1].read_text(errors="replace")
    return compiled.as_text() or ""


def compile_for(
    job: PretrainJob, pod: Pod | Nodes, extra_options: dict[str, str | bool] | None = None
) -> CompiledStep | OutOfMemory:
    """Traces and compiles the train step of a job for a pod; takes minutes for hundreds of chips.

    Args:
      job: the job.
      pod: TPU slice or GPU nodes.
      extra_options: compiler options added to those of the chip in `train.compiling`.

    Raises:
      UserError: mesh, batch and model don't fit together, or compilation fails for another reason
        than memory.
    """
    mesh = make_mesh(job.mesh, pod.devices)
    check_mesh(
        job.model,
        mesh,
        global_batch=job.data.global_batch,
        microbatches=job.train.microbatches,
        seq_len=job.data.seq_len,
    )
    on_gpu = isinstance(pod, Nodes)
    options = xla_options(pod.chip.kind) | (DEVICELESS_OPTIONS if on_gpu else {})
    options |= extra_options or {}
    abstract = abstract_state(job.step_config, mesh)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        dump: dict[str, str | bool] = {}
        if not on_gpu:
            dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            with jax.set_mesh(mesh), _print_elapsed(f"compiling for {pod.name}"):
                lowered = lower_step(pretraining_step(job), abstract, abstract_batch(job, mesh))
                compiled = lowered.compile(compiler_options=options | dump)
        except jax.errors.JaxRuntimeError as error:
            seconds = time.monotonic() - start
            first = str(error).splitlines()[0]
            if "CompileTimeHbmOom" not in str(error) and "memory space hbm" not in str(error):
                raise UserError(f"the step does not compile for {pod.name}: {first}") from error
            return OutOfMemory(needed_bytes(str(error)), first, seconds, mesh, options)
        seconds = time.monotonic() - start
        hlo = _scheduled_hlo(folder, compiled)
    m = compiled.memory_analysis()
    assert m is not None, f"{pod.name}: the compiler reports no memory"
    return CompiledStep(
        hlo=hlo,
        memory=Memory(
            arguments=m.argument_size_in_bytes,
            temporaries=m.temp_size_in_bytes,
            peak=m.peak_memory_in_bytes,
            host=m.host_temp_size_in_bytes,
        ),
        seconds=seconds,
        mesh=mesh,
        options=options,
    )
