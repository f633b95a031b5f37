"""Products with quantised weights: timed on this device, or estimated for TPUs without one.

    python -m benchmarks.quantised [--rows=1,8,64] [--inputs=4096] [--outputs=11008] [--repeats=20]
    python -m benchmarks.quantised --chips=v5e,v6e [--rows=8,64] [--out=FILE.json]

The first form times one matrix as dense (in x's dtype), int8 and int4 per output channel, and int4
in groups of 128, in turns, and reports the median of each with its ratio to the dense time. x is
bfloat16 on accelerators and float32 on a CPU.

The second needs libtpu (requirements/tpu.txt) and no accelerator: it compiles the group kernel for
each chip and reports the compiler's static cycle estimate in microseconds, beside the time that
loading the packed and the bf16 weights takes at the chip's memory bandwidth, and temporary memory.
These are estimates, not measurements; expect at best the larger of estimate and bandwidth time.

Prints one JSON object as its last line, which --out saves.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import cycle_profile
from benchmarks.report import emit
from qwen_jax.kernels.quantised import GroupWeight, group_matmul
from qwen_jax.model.quantised import QuantFormat, quantise_leaf, quantised_einsum

_ROWS = flags.DEFINE_list("rows", ["1", "8", "64"], "Rows of x.")
_INPUTS = flags.DEFINE_integer("inputs", 4096, "Inputs of the matrix.")
_OUTPUTS = flags.DEFINE_integer("outputs", 11008, "Outputs of the matrix.")
_REPEATS = flags.DEFINE_integer("repeats", 20, "Timed products with each kind of weight.")
_CHIPS = flags.DEFINE_list("chips", [], "Estimate for these TPU chips instead of timing.")
_OUT = flags.DEFINE_string("out", "", "Also write the JSON to this file.")
_CASE = flags.DEFINE_string("case", "", "Internal: the case that a child process estimates.")

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
CLOCK = {"v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}
"""Hz, as the compiler's profile assumes."""
BANDWIDTH = {"v5e": 0.819e12, "v5p": 2.765e12, "v6e": 1.64e12}
"""Bytes per second, by the chips' data sheets."""


def measure(rows: int, inputs: int, outputs: int, repeats: int) -> dict[str, Any]:
    """Times x · w for each kind of weight, in turns.

    Args:
      rows: of x.
      inputs: of w.
      outputs: of w.
      repeats: timed products with each kind.

    Returns:
      median "milliseconds" by kind, and "of_dense", their ratios to the dense time.
    """
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    w = jax.random.normal(jax.random.key(0), (inputs, outputs), jnp.float32)
    x = jax.random.normal(jax.random.key(1), (rows, inputs), dtype)
    formats = {
        "int8": QuantFormat(8, None),
        "int4": QuantFormat(4, None),
        "int4-g128": QuantFormat(4, 128),
    }
    weights = {"dense": w.astype(dtype)}
    weights |= {name: quantise_leaf(w, fmt, 1) for name, fmt in formats.items()}

    @jax.jit
    def run(x, weight):
        if isinstance(weight, jax.Array):
            return x @ weight
        return quantised_einsum("MK,KO->MO", x, weight, (inputs, outputs), ("embed", "ffn"))

    times: dict[str, list[float]] = {name: [] for name in weights}
    for turn in range(repeats + 1):
        for name, weight in weights.items():
            start = time.perf_counter()
            run(x, weight).block_until_ready()
            if turn:  # the first turn compiles
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "rows": rows,
        "milliseconds": {name: 1e3 * value for name, value in medians.items()},
        "of_dense": {name: value / medians["dense"] for name, value in medians.items()},
    }


def estimate(case: dict[str, Any]) -> dict[str, float]:
    """Compiles the group kernel for a chip and returns its estimates in microseconds and bytes.

    Runs in a child process of `cycle_profile.run_case`.
    """
    from jax.experimental import topologies

    from qwen_jax.kernels import quantised

    inputs, outputs, layers = case["inputs"], case["outputs"], 4
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[case["chip"]])
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.P())

    def array(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    codes = array(layers, inputs * case["bits"] // 32, outputs)
    scales = array(layers, inputs // 128, 1, outputs, dtype=jnp.float32)
    weight = GroupWeight(codes, scales, layer=array(), bits=case["bits"])
    quantised.platform = lambda: ("tpu", case["chip"])
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        run = jax.jit(lambda x, w: group_matmul(x, w, implementation="pallas_tpu"))
        compiled = run.lower(array(case["rows"], inputs, dtype=jnp.bfloat16), weight).compile()
    cycles = sum(count for _, count in cycle_profile.read_profile(case["dump"]))
    packed_bytes = (codes.size * 4 + scales.size * 4) / layers
    return {
        "estimated_us": 1e6 * cycles / CLOCK[case["chip"]],
        "packed_at_bandwidth_us": 1e6 * packed_bytes / BANDWIDTH[case["chip"]],
        "bf16_at_bandwidth_us": 2e6 * inputs * outputs / BANDWIDTH[case["chip"]],
        "extra_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


def main(_):
    """Times or estimates all cases, or in a child process the one of --case."""
    if _CASE.value:
        print(json.dumps(estimate(json.loads(_CASE.value))))
        return
    rows = [int(n) for n in _ROWS.value]
    sizes = {"inputs": _INPUTS.value, "outputs": _OUTPUTS.value}
    if _CHIPS.value:
        cases = [
            {"chip": chip, "bits": bits, "rows": n, **sizes}
            for chip in _CHIPS.value
            for bits in (4, 8)
            for n in rows
        ]
        found = [case | cycle_profile.run_case("benchmarks.quantised", case) for case in cases]
        emit({"estimates": found}, _OUT.value)
        return
    found = [measure(n, repeats=_REPEATS.value, **sizes) for n in rows]
    emit({"device": jax.devices()[0].device_kind, **sizes, "measured": found}, _OUT.value)


if __name__ == "__main__":
    app.run(main)
