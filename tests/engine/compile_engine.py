"""Compiles the engine's programs for a TPU topology named on the command line; prints JSON."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from qwen_jax.engine.programs import CompiledPrograms
from qwen_jax.engine.steps import EngineShapes
from qwen_jax.model import ForwardOptions, abstract_params
from qwen_jax.model.presets import PRESETS
from qwen_jax.parallel import MeshConfig, make_mesh

SHAPES = EngineShapes(
    max_rows=8,
    max_pages_per_request=16,
    page_size=128,
    num_pages=144,
    max_prompts=4,
    prefill_tokens=(512,),
    cached_pages=(0, 16),
    decode_rows=(8,),
    max_decode_steps=16,
)


def compile_one(devices, model, key, kv_dtype, tensor):
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=tensor), devices[:tensor])
    config = dataclasses.replace(PRESETS[model], n_layers=8, windows=())
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding),
        abstract_params(config, mesh),
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        run = CompiledPrograms(
            params, config, ForwardOptions(), SHAPES, vocab_size=151_851, kv_dtype=kv_dtype
        )
        compiled = run.lower(key, auto=key[0] == "decode").compile()
        state = run.abstract_state()
    memory = compiled.memory_analysis()
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.cache)) // tensor
    return {
        "what": f"{' '.join(map(str, key))} {model} {np.dtype(kv_dtype).name} /{tensor}",
        "cache": size,
        "temp": memory.temp_size_in_bytes,
        "alias": memory.alias_size_in_bytes,
    }


def main(topology: str) -> None:
    jax.config.update("jax_remove_size_one_mesh_axis_from_type", True)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    results = [
        compile_one(devices, "qwen-7b", ("decode", 8), jnp.bfloat16, 1),
        compile_one(devices, "qwen-7b", ("decode", 8), jnp.uint8, 4),
        compile_one(devices, "qwen-7b", ("prefill", 512, 16), jnp.bfloat16, 1),
        compile_one(devices, "qwen-7b", ("copy_pages_in",), jnp.bfloat16, 1),
    ]
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
