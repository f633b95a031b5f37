"""Memory and time of the loss over the vocabulary, beside the plain form that keeps all logits.

    python -m benchmarks.vocab_loss [--topologies=v5e:4x4,v6e:4x4] [--out=FILE.json]

Two parts. *Compiled*: value and gradients at the shapes of Qwen-7B are compiled for TPU slices,
which needs libtpu but no TPU. Temporaries are what the compiler reserves; time is predicted from
the cycles that it estimates for each fusion, loop bodies times their trip counts. The prediction
leaves out collectives and is no measurement. *Measured*: the same forms at small shapes on the
devices of this machine.

Prints both tables and, as its last line, one JSON object, which --out saves.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.hlo_cycles import predicted_cycles
from benchmarks.report import emit
from qwen_jax.aot.topology import ENVIRONMENT
from qwen_jax.parallel import (
    MeshConfig,
    gather_weight,
    make_mesh,
    named_sharding,
    on_mesh,
)
from qwen_jax.train.losses import NextTokenSums, next_token_loss

CHIPS = {"v5e": (197e12, 1.5e9), "v5p": (459e12, 1.75e9), "v6e": (918e12, 1.75e9)}
"""(bf16 FLOP/s, clock in Hz) per chip.

FLOP/s by the vendor's public tables, clocks as the TPU compiler's cycle estimates assume them.
"""

_TOPOLOGIES = flags.DEFINE_list(
    "topologies", ["v5e:4x4", "v6e:4x4", "v5p:2x2x4"], "TPU topologies to compile for."
)
_TOKENS = flags.DEFINE_integer("tokens", 8192, "Tokens per device in the compiled part.")
_D_MODEL = flags.DEFINE_integer("d_model", 4096, "Hidden size in the compiled part.")
_VOCAB = flags.DEFINE_integer("vocab", 151_936, "Vocabulary size in the compiled part.")
_CHUNK = flags.DEFINE_integer("chunk", 2048, "Tokens whose logits exist at one time.")
_SMALL = flags.DEFINE_list(
    "small",
    ["1024", "512", "32768"],
    "Tokens per device, hidden size and vocabulary size in the measured part.",
)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed calls of each form, which take turns.")
_OUT = flags.DEFINE_string("out", "", "Also write the JSON to this file.")
_WORKER = flags.DEFINE_string("worker", "", "Internal: the topology that a child compiles for.")


def plain_loss(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array
) -> NextTokenSums:
    """Computes the next-token loss with all logits at once, to be differentiated by autodiff.

    Args:
      hidden: [B, T, D] (batch, sequence, hidden size), compute dtype.
      kernel: output projection [D, V] (V vocabulary size), float32.
      targets: int32 [B, T].
      weights: float32 [B, T], loss weight of each token.
    """
    kernel = gather_weight(kernel, ("embed", "vocab"), hidden.dtype)
    logits = jnp.einsum("BTD,DV->BTV", hidden, kernel, preferred_element_type=jnp.float32)
    is_target = targets[..., None] == jnp.arange(logits.shape[-1], dtype=jnp.int32)
    nll = jax.nn.logsumexp(logits, axis=-1) - jnp.where(is_target, logits, 0.0).sum(-1)
    total = jnp.sum(weights * nll)
    return NextTokenSums(total, total, weights.sum())


def loss_forms(chunk: int) -> dict[str, Callable[..., NextTokenSums]]:
    """Returns the loss functions to compare by name, with the arguments of `plain_loss`.

    Splitting the vocabulary over devices is included on a mesh only.

    chunk: tokens whose logits exist at one time.
    """
    split = {"chunked, vocabulary divided": functools.partial(next_token_loss, chunk=chunk)}
    chunked = functools.partial(next_token_loss, chunk=chunk, vocab_parts=1)
    return {"plain": plain_loss, "chunked": chunked} | (split if on_mesh() else {})


def value_and_gradients(loss: Callable[..., NextTokenSums]) -> Callable[..., Any]:
    """Returns a function that computes the mean loss and the gradients of hidden and kernel."""

    def objective(hidden, kernel, targets, weights):
        sums = loss(hidden, kernel, targets, weights)
        return sums.objective / sums.weight

    return jax.value_and_grad(objective, (0, 1))


def abstract_arguments(
    mesh: jax.sharding.Mesh | None, tokens: int, d_model: int, vocab: int
) -> list[jax.ShapeDtypeStruct]:
    """Returns abstract arguments of `plain_loss`, sharded over a mesh.

    Args:
      mesh: device mesh, or None for one device.
      tokens: tokens per device, in rows of at most 2,048.
      d_model: hidden size.
      vocab: vocabulary size.
    """
    length = min(tokens, 2048)
    rows = tokens // length * (mesh.devices.size if mesh else 1)
    batch = ("batch", "sequence")
    table = [
        ((rows, length, d_model), jnp.bfloat16, (*batch, "channels")),
        ((d_model, vocab), jnp.float32, ("embed", "vocab")),
        ((rows, length), jnp.int32, batch),
        ((rows, length), jnp.float32, batch),
    ]
    sharding = functools.partial(named_sharding, mesh) if mesh else lambda *axes: None
    return [jax.ShapeDtypeStruct(s, t, sharding=sharding(*axes)) for s, t, axes in table]


def compile_for(topology: str) -> list[dict[str, Any]]:
    """Compiles each form for a TPU topology such as "v5e:4x4".

    Returns:
      a row per form: bytes of temporaries, predicted cycles and milliseconds, and the milliseconds
      that its three products take at the chip's peak; "temp_bytes" is None and "why" the reason
      where it does not fit the chip's memory.
    """
    from jax.experimental import topologies

    chip = topology.split(":")[0]
    peak, clock = CHIPS[chip]
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(MeshConfig(fsdp=len(devices)), devices)
    sizes = (_TOKENS.value, _D_MODEL.value, _VOCAB.value)
    rows = []
    with jax.set_mesh(mesh):
        for name, loss in loss_forms(_CHUNK.value).items():
            row = {"topology": topology, "form": name}
            arguments = abstract_arguments(mesh, *sizes)
            lowered = jax.jit(value_and_gradients(loss)).lower(*arguments)
            try:
                compiled = lowered.compile()
            except jax.errors.JaxRuntimeError as error:
                if "memory" not in str(error):
                    raise
                rows.append(row | {"temp_bytes": None, "why": "does not fit the chip's memory"})
                continue
            cycles = predicted_cycles(compiled.as_text())
            rows.append(
                row
                | {
                    "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
                    "predicted_cycles": cycles,
                    "predicted_ms": 1e3 * cycles / clock,
                    "products_at_peak_ms": 1e3 * 6 * np.prod(sizes, dtype=float) / peak,
                }
            )
    return rows


def measure() -> list[dict[str, Any]]:
    """Returns a row per form: median seconds, loss and temporaries on this machine's devices."""
    mesh = make_mesh(MeshConfig()) if jax.device_count() > 1 else None
    if mesh is None:
        return _measure_forms(None)
    with jax.set_mesh(mesh):
        return _measure_forms(mesh)


def _measure_forms(mesh: jax.sharding.Mesh | None) -> list[dict[str, Any]]:
    """Returns the rows of `measure`, with the forms taking turns on a mesh or one device."""
    tokens, d_model, vocab = map(int, _SMALL.value)
    chunk = min(_CHUNK.value, tokens // 2)
    rng = np.random.default_rng(0)
    structs = abstract_arguments(mesh, tokens, d_model, vocab)

    def random_array(struct):
        if struct.dtype == jnp.int32:
            x = rng.integers(0, vocab, struct.shape)
        else:
            x = rng.standard_normal(struct.shape) * 0.05
        return jax.device_put(np.asarray(x, struct.dtype), struct.sharding)

    args = [random_array(struct) for struct in structs]
    args[3] = jnp.ones_like(args[3])
    steps = {
        name: jax.jit(value_and_gradients(loss)).lower(*structs).compile()
        for name, loss in loss_forms(chunk).items()
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    losses = {}
    for round_ in range(_ROUNDS.value + 1):  # the first one warms up
        for name, step in steps.items():
            start = time.perf_counter()
            value, _ = jax.block_until_ready(step(*args))
            losses[name] = float(value)
            if round_:
                times[name].append(time.perf_counter() - start)
    return [
        {
            "form": name,
            "seconds": statistics.median(times[name]),
            "loss": losses[name],
            "temp_bytes": steps[name].memory_analysis().temp_size_in_bytes,
        }
        for name in steps
    ]


def compile_in_child(topology: str) -> list[dict[str, Any]]:
    """Returns the result of `compile_for`, run in a child process with the same flags."""
    command = [sys.executable, "-m", "benchmarks.vocab_loss", f"--worker={topology}"]
    command += [f"--{f.name}={f.value}" for f in (_TOKENS, _D_MODEL, _VOCAB, _CHUNK)]
    environment = os.environ | ENVIRONMENT | {"JAX_PLATFORMS": "cpu"}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout
    return json.loads(output.splitlines()[-1])


def print_tables(compiled: list[dict[str, Any]], measured: list[dict[str, Any]]) -> None:
    """Prints the rows of `compile_for` and of `measure`."""
    sizes = f"{_TOKENS.value} tokens per device, D={_D_MODEL.value}, V={_VOCAB.value}"
    print(f"Compiled, {sizes} (predictions, not measurements)")
    print(f"{'topology':12} {'form':30} {'temporaries':>12} {'predicted':>10} {'products':>9}")
    for r in compiled:
        line = f"{r['topology']:12} {r['form']:30} "
        if r["temp_bytes"] is None:
            print(line + r["why"])
            continue
        line += f"{r['temp_bytes'] / 1e9:9.2f} GB {r['predicted_ms']:7.1f} ms"
        print(f"{line} {r['products_at_peak_ms']:6.1f} ms")
    device = jax.devices()[0].device_kind
    tokens, d_model, vocab = _SMALL.value
    print(f"Measured, {jax.device_count()} × {device}, {tokens} tokens, D={d_model}, V={vocab}")
    for r in measured:
        temp = f"{r['temp_bytes'] / 1e9:9.2f} GB"
        print(f"{'':12} {r['form']:30} {temp} {1e3 * r['seconds']:7.1f} ms  loss {r['loss']:.6f}")


def main(_):
    """Compiles and measures all forms, or in a child process compiles for --worker."""
    if _WORKER.value:
        print(json.dumps(compile_for(_WORKER.value)))
        return
    compiled = [row for topology in _TOPOLOGIES.value for row in compile_in_child(topology)]
    measured = measure()
    print_tables(compiled, measured)
    report = {
        "benchmark": "vocab_loss",
        "date": time.strftime("%Y-%m-%d"),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "shapes": {"tokens": _TOKENS.value, "d_model": _D_MODEL.value, "vocab": _VOCAB.value},
        "chunk": _CHUNK.value,
        "measured_shapes": dict(zip(("tokens", "d_model", "vocab"), _SMALL.value, strict=True)),
        "compiled": compiled,
        "measured": measured,
    }
    emit(report, _OUT.value)


if __name__ == "__main__":
    # Size-1 mesh axes carry no information; launch programs set the same.
    jax.config.update("jax_remove_size_one_mesh_axis_from_type", True)
    app.run(main)
