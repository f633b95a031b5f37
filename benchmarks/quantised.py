"""Products by quantised weights: timed on this device, and estimated for TPUs without one.

    python -m benchmarks.quantised [--rows=1,8,64] [--inputs=4096] [--outputs=11008] [--repeats=20]
    python -m benchmarks.quantised --chips=v5e,v6e [--rows=8,64] [--out=FILE.json]

The first times one matrix as dense (in x's dtype), int8 and int4 per output channel and int4 in
groups of 128, in turns, and prints the median of each with its share of the dense time. x is
bfloat16 on accelerators and float32 on a CPU.

The second needs libtpu (requirements/tpu.txt) and no accelerator: it compiles the group kernel for
each chip and prints the compiler's static cycle estimate as microseconds, beside the time the
packed and the bf16 weights take at the chip's memory bandwidth, and extra memory. Estimates, not
measurements; the larger of estimate and bandwidth time is what to expect at best.
"""

from __future__ import annotations

import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import cycle_profile
from benchmarks.report import emit
from qwen_jax.kernels.quantised import GroupWeight, group_matmul
from qwen_jax.model.quantised import Format, quantise_leaf, quantised_product

_ROWS = flags.DEFINE_list("rows", ["1", "8", "64"], "Rows of x.")
_INPUTS = flags.DEFINE_integer("inputs", 4096, "K.")
_OUTPUTS = flags.DEFINE_integer("outputs", 11008, "O.")
_REPEATS = flags.DEFINE_integer("repeats", 20, "Turns of each.")
_CHIPS = flags.DEFINE_list("chips", [], "Estimate for these chips instead of timing.")
_OUT = flags.DEFINE_string("out", "", "Also write the JSON here.")
_CASE = flags.DEFINE_string("case", "", "Internal: what a child process estimates.")

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
CLOCK = {"v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}
BANDWIDTH = {"v5e": 0.819e12, "v5p": 2.765e12, "v6e": 1.64e12}
"""Hz as the compiler's profile assumes, and bytes a second of the chips' data sheets."""


def measure(rows: int, inputs: int, outputs: int, repeats: int) -> dict:
    """Median seconds of each kind of weight, taken in turns."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    w = jax.random.normal(jax.random.key(0), (inputs, outputs), jnp.float32)
    x = jax.random.normal(jax.random.key(1), (rows, inputs), dtype)
    formats = {"int8": Format(8, None), "int4": Format(4, None), "int4-g128": Format(4, 128)}
    weights = {"dense": w.astype(dtype)}
    weights |= {name: quantise_leaf(w, fmt, 1) for name, fmt in formats.items()}

    @jax.jit
    def run(x, weight):
        if isinstance(weight, jax.Array):
            return x @ weight
        return quantised_product("MK,KO->MO", x, weight, (inputs, outputs), ("embed", "ffn"))

    times: dict[str, list[float]] = {name: [] for name in weights}
    for turn in range(repeats + 1):
        for name, weight in weights.items():
            start = time.perf_counter()
            run(x, weight).block_until_ready()
            if turn:  # the first turn compiles
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(found) for name, found in times.items()}
    return {
        "rows": rows,
        "milliseconds": {name: 1e3 * value for name, value in medians.items()},
        "of_dense": {name: value / medians["dense"] for name, value in medians.items()},
    }


def estimate(case: dict) -> dict:
    """Compiles the kernel for a chip. Runs in a process of its own."""
    from jax.experimental import topologies

    from qwen_jax.kernels import quantised

    inputs, outputs, layers = case["inputs"], case["outputs"], 4
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[case["chip"]])
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("data",))
    place = jax.sharding.NamedSharding(mesh, jax.P())

    def arg(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    codes = arg(layers, inputs * case["bits"] // 32, outputs)
    scales = arg(layers, inputs // 128, 1, outputs, dtype=jnp.float32)
    weight = GroupWeight(codes, scales, layer=arg(), bits=case["bits"])
    quantised.platform = lambda: ("tpu", case["chip"])
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        run = jax.jit(lambda x, w: group_matmul(x, w, implementation="pallas_tpu"))
        compiled = run.lower(arg(case["rows"], inputs, dtype=jnp.bfloat16), weight).compile()
    cycles = sum(count for _, count in cycle_profile.cycles(case["dump"]))
    packed = (codes.size * 4 + scales.size * 4) / layers
    return {
        "estimated_us": 1e6 * cycles / CLOCK[case["chip"]],
        "packed_at_bandwidth_us": 1e6 * packed / BANDWIDTH[case["chip"]],
        "bf16_at_bandwidth_us": 2e6 * inputs * outputs / BANDWIDTH[case["chip"]],
        "extra_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


def main(_):
    if _CASE.value:
        print(json.dumps(estimate(json.loads(_CASE.value))))
        return
    rows, sizes = (
        [int(n) for n in _ROWS.value],
        {"inputs": _INPUTS.value, "outputs": _OUTPUTS.value},
    )
    if _CHIPS.value:
        cases = [
            {"chip": chip, "bits": bits, "rows": n, **sizes}
            for chip in _CHIPS.value
            for bits in (4, 8)
            for n in rows
        ]
        found = [case | cycle_profile.child("benchmarks.quantised", case) for case in cases]
        emit({"estimates": found}, _OUT.value)
        return
    found = [measure(n, repeats=_REPEATS.value, **sizes) for n in rows]
    emit({"device": jax.devices()[0].device_kind, **sizes, "measured": found}, _OUT.value)


if __name__ == "__main__":
    app.run(main)
