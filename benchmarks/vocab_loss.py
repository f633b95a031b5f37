"""Memory and time of the loss over the vocabulary, against the plain form that keeps all logits.

    python -m benchmarks.vocab_loss [--topologies=v5e:4x4,v6e:4x4] [--out=FILE.json]

Two parts. *Compiled*: value and gradients at the shapes of Qwen-7B are compiled for TPU pods, which
needs `libtpu` but no TPU. Temporaries are what the compiler reserves; time is its own prediction,
the cycles it estimates for each fusion, with loop bodies counted as often as they run. It leaves
collectives out and is no measurement. *Measured*: the same forms at small shapes on the devices
that are here.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import time

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

# (bf16 FLOP/s, clock in Hz) per chip, from the vendor's public tables; clocks as the TPU compiler's
# cycle estimates assume them.
CHIPS = {"v5e": (197e12, 1.5e9), "v5p": (459e12, 1.75e9), "v6e": (918e12, 1.75e9)}

_TOPOLOGIES = flags.DEFINE_list(
    "topologies", ["v5e:4x4", "v6e:4x4", "v5p:2x2x4"], "TPU topologies to compile for."
)
_TOKENS = flags.DEFINE_integer("tokens", 8192, "Tokens per device, compiled part.")
_D_MODEL = flags.DEFINE_integer("d_model", 4096, "Hidden size, compiled part.")
_VOCAB = flags.DEFINE_integer("vocab", 151_936, "Vocabulary, compiled part.")
_CHUNK = flags.DEFINE_integer("chunk", 2048, "Tokens whose logits exist at one time.")
_SMALL = flags.DEFINE_list(
    "small", ["1024", "512", "32768"], "Tokens per device, D, V of the measured part."
)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed calls of each form, taking turns.")
_OUT = flags.DEFINE_string("out", "", "Also write the JSON here.")
_WORKER = flags.DEFINE_string("worker", "", "Internal: the topology a child process compiles for.")


def plain_loss(hidden, kernel, targets, weights) -> NextTokenSums:
    """All logits at once, autodiff: what one writes first."""
    kernel = gather_weight(kernel, ("embed", "vocab"), hidden.dtype)
    logits = jnp.einsum("BTD,DV->BTV", hidden, kernel, preferred_element_type=jnp.float32)
    is_target = targets[..., None] == jnp.arange(logits.shape[-1], dtype=jnp.int32)
    nll = jax.nn.logsumexp(logits, axis=-1) - jnp.where(is_target, logits, 0.0).sum(-1)
    total = jnp.sum(weights * nll)
    return NextTokenSums(total, total, weights.sum())


def forms(chunk: int) -> dict:
    """Name -> loss function; on one device there is nobody to divide the vocabulary with."""
    divided = {"chunked, vocabulary divided": functools.partial(next_token_loss, chunk=chunk)}
    whole = functools.partial(next_token_loss, chunk=chunk, vocab_parts=1)
    return {"plain": plain_loss, "chunked": whole} | (divided if on_mesh() else {})


def value_and_gradients(loss):
    def objective(hidden, kernel, targets, weights):
        sums = loss(hidden, kernel, targets, weights)
        return sums.objective / sums.weight

    return jax.value_and_grad(objective, (0, 1))


def shapes(mesh, tokens: int, d_model: int, vocab: int):
    """Abstract arguments: `tokens` per device, in rows of at most 2,048."""
    length = min(tokens, 2048)
    rows = tokens // length * (mesh.devices.size if mesh else 1)
    batch = ("batch", "sequence")
    table = [
        ((rows, length, d_model), jnp.bfloat16, (*batch, "channels")),
        ((d_model, vocab), jnp.float32, ("embed", "vocab")),
        ((rows, length), jnp.int32, batch),
        ((rows, length), jnp.float32, batch),
    ]
    place = functools.partial(named_sharding, mesh) if mesh else lambda *axes: None
    return [jax.ShapeDtypeStruct(s, t, sharding=place(*axes)) for s, t, axes in table]


def compile_for(topology: str) -> list[dict]:
    """One row per form: temporaries, predicted cycles, and the floor of three products."""
    from jax.experimental import topologies

    chip = topology.split(":")[0]
    peak, clock = CHIPS[chip]
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(MeshConfig(fsdp=len(devices)), devices)
    sizes = (_TOKENS.value, _D_MODEL.value, _VOCAB.value)
    rows = []
    with jax.set_mesh(mesh):
        for name, loss in forms(_CHUNK.value).items():
            row = {"topology": topology, "form": name}
            lowered = jax.jit(value_and_gradients(loss)).lower(*shapes(mesh, *sizes))
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


def measure() -> list[dict]:
    """Median seconds of each form on the devices that are here, taking turns."""
    tokens, d_model, vocab = map(int, _SMALL.value)
    chunk = min(_CHUNK.value, tokens // 2)
    mesh = make_mesh(MeshConfig()) if jax.device_count() > 1 else None
    rng = np.random.default_rng(0)

    def run():
        def fill(s):
            draw = rng.standard_normal if s.dtype != jnp.int32 else None
            x = draw(s.shape) * 0.05 if draw else rng.integers(0, vocab, s.shape)
            return jax.device_put(np.asarray(x, s.dtype), s.sharding)

        args = [fill(s) for s in shapes(mesh, tokens, d_model, vocab)]
        args[3] = jnp.ones_like(args[3])
        structs = shapes(mesh, tokens, d_model, vocab)
        steps = {
            name: jax.jit(value_and_gradients(loss)).lower(*structs).compile()
            for name, loss in forms(chunk).items()
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

    if mesh is None:
        return run()
    with jax.set_mesh(mesh):
        return run()


def child(topology: str) -> list[dict]:
    command = [sys.executable, "-m", "benchmarks.vocab_loss", f"--worker={topology}"]
    command += [f"--{f.name}={f.value}" for f in (_TOKENS, _D_MODEL, _VOCAB, _CHUNK)]
    environment = os.environ | ENVIRONMENT | {"JAX_PLATFORMS": "cpu"}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout
    return json.loads(output.splitlines()[-1])


def print_tables(compiled: list[dict], measured: list[dict]):
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
    if _WORKER.value:
        print(json.dumps(compile_for(_WORKER.value)))
        return
    compiled = [row for topology in _TOPOLOGIES.value for row in child(topology)]
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
