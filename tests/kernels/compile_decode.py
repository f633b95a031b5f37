"""Compiles decoding for a TPU topology named on the command line; prints what it takes as JSON."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from qwen_jax.kernels.cache import init_paged_cache
from qwen_jax.kernels.paged import append, paged_attention

LAYERS, REQUESTS, COLUMNS = 8, 16, 64


def decode_step(cache, x, table, lengths):
    """All layers attend, then all new tokens are written at once."""

    def layer(x, i):
        k = x[:, :, :: x.shape[2] // cache.pages.shape[2]]
        out, _ = paged_attention(x, cache, table, lengths, layer=i, k_new=k, v_new=2 * k)
        return out, (k, 2 * k)

    x, (k, v) = jax.lax.scan(layer, x, jnp.arange(LAYERS))
    return append(cache, k, v, table, lengths), x, table, lengths + 1


def decode_loop(*state):
    """Ten steps without going back to the host."""
    return jax.lax.fori_loop(0, 10, lambda _, state: decode_step(*state), state)


def attend(cache, x, table, lengths):
    """One layer alone."""
    return paged_attention(x, cache, table, lengths, layer=3, window=jnp.int32(4096))


def compile_one(devices, shards, run, *, kv_heads, groups, width, dtype, q_len=1):
    mesh = jax.sharding.Mesh(
        np.array(devices[:shards]).reshape(1, 1, 1, shards),
        ("data", "fsdp", "context", "tensor"),
        axis_types=(jax.sharding.AxisType.Explicit,) * 4,
    )

    def shape(size, dtype, *spec):
        return jax.ShapeDtypeStruct(size, dtype, sharding=jax.NamedSharding(mesh, jax.P(*spec)))

    cache = jax.eval_shape(lambda: init_paged_cache(LAYERS, 512, kv_heads, width, dtype=dtype))
    operands = (
        jax.tree.map(lambda x: shape(x.shape, x.dtype, None, None, "tensor"), cache),
        shape((REQUESTS, q_len, kv_heads * groups, width), jnp.bfloat16, None, None, "tensor"),
        shape((REQUESTS, COLUMNS), jnp.int32),
        shape((REQUESTS,), jnp.int32),
    )
    donate = () if run is attend else (0,)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(run, donate_argnums=donate).lower(*operands).compile()
    memory = compiled.memory_analysis()
    return {
        "what": f"{run.__name__} {kv_heads}x{groups}x{width} {jnp.dtype(dtype).name} /{shards}",
        "cache": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)) // shards,
        "temp": memory.temp_size_in_bytes,
        "alias": memory.alias_size_in_bytes,
        "kernels": compiled.as_text().count("tpu_custom_call"),
    }


def main(topology: str) -> None:
    jax.config.update("jax_remove_size_one_mesh_axis_from_type", True)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    grouped = {"kv_heads": 8, "groups": 4, "width": 128}
    small = {"kv_heads": 2, "groups": 7, "width": 64}
    results = [
        compile_one(devices, 1, attend, **grouped, dtype=jnp.bfloat16),
        compile_one(devices, 1, attend, **grouped, dtype=jnp.uint8),
        compile_one(devices, 1, attend, **grouped, dtype=jnp.bfloat16, q_len=8),
        compile_one(devices, 1, attend, **small, dtype=jnp.uint8),
        compile_one(devices, 1, attend, kv_heads=40, groups=1, width=128, dtype=jnp.bfloat16),
        compile_one(devices, 1, decode_loop, **grouped, dtype=jnp.bfloat16),
        compile_one(devices, 1, decode_loop, **small, dtype=jnp.bfloat16),
        compile_one(devices, 4, decode_loop, **grouped, dtype=jnp.bfloat16),
        compile_one(devices, 4, decode_loop, **grouped, dtype=jnp.uint8),
    ]
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
