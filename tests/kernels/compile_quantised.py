"""Compiles quantised layers for a TPU topology named on the command line; prints what they take."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from qwen_jax.model import ForwardOptions, abstract_params, hidden_states
from qwen_jax.model.presets import preset
from qwen_jax.model.quantised import QuantFormat, abstract_quantised, weight_bytes
from qwen_jax.parallel import named_sharding

LAYERS = 4


def compile_one(devices, shards, fmt, rows):
    """Layers of Qwen-7B's widths over `rows` sequences of one token."""
    config = dataclasses.replace(preset("qwen-7b"), n_layers=LAYERS, d_ff=10_240, vocab_size=1024)
    options = ForwardOptions(attention="reference")
    mesh = jax.sharding.Mesh(
        np.array(devices[:shards]).reshape(1, 1, 1, shards),
        ("data", "fsdp", "context", "tensor"),
        axis_types=(jax.sharding.AxisType.Explicit,) * 4,
    )
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding),
        abstract_params(config, mesh),
    )
    params = abstract_quantised(params, fmt)
    tokens = jax.ShapeDtypeStruct(
        (rows, 1), jnp.int32, sharding=named_sharding(mesh, "batch", "sequence")
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        run = jax.jit(lambda params, tokens: hidden_states(params, tokens, config, options)[0])
        compiled = run.lower(params, tokens).compile()
    memory = compiled.memory_analysis()
    return {
        "what": f"{fmt.name} {rows} rows /{shards}",
        "layer": weight_bytes(params["layers"]) // LAYERS // shards,
        "temp": memory.temp_size_in_bytes,
        "kernels": compiled.as_text().count("tpu_custom_call"),
        "wanted_kernels": 7 if fmt.group else 0,
    }


def main(topology: str) -> None:
    jax.config.update("jax_remove_size_one_mesh_axis_from_type", True)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    results = [
        compile_one(devices, 1, QuantFormat(4, 128), 8),
        compile_one(devices, 4, QuantFormat(4, 128), 64),
        compile_one(devices, 1, QuantFormat(4, 128), 128),
        compile_one(devices, 1, QuantFormat(8, 128), 8),
        compile_one(devices, 1, QuantFormat(8, None), 8),
        compile_one(devices, 1, QuantFormat(4, None), 8),
    ]
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
