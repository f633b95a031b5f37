"""A training state for checkpoint tests, with known values at every step and on any mesh."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

AXES = ("data", "fsdp", "context", "tensor")
FINGERPRINT = {
    "model": {"num_layers": 2, "hidden_size": 32, "rope": {"theta": 10000.0}},
    "tokenizer": {"sha256": "ab12"},
    "optimizer": {"betas": (0.9, 0.95), "mu_dtype": "bfloat16"},
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    step: jax.Array
    params: dict
    opt_state: Any


def make_mesh(*shape: int) -> jax.sharding.Mesh:
    """Makes a mesh with explicit axes over the first devices, e.g. make_mesh(1, 4, 1, 2)."""
    return jax.make_mesh(shape, AXES, devices=jax.devices()[: int(np.prod(shape))])


def abstract(mesh: jax.sharding.Mesh, width: int = 32) -> State:
    """Returns abstract leaves: stacked layers, float32 weights, bfloat16 first moments."""

    def init() -> State:
        params = {
            "embed": {"weight": jnp.zeros((64, width))},
            "layers": {
                "attention": {"qkv": jnp.zeros((2, width, 3 * width)), "bias": jnp.zeros((2, 8))},
                "norm": {"scale": jnp.zeros((2, width))},
            },
        }
        optimizer = optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(1e-3, mu_dtype=jnp.bfloat16)
        )
        return State(jnp.int32(0), params, optimizer.init(params))

    def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = {0: jax.P(), 2: jax.P(None, "tensor"), 3: jax.P(None, "fsdp", "tensor")}
        sharding = jax.NamedSharding(mesh, spec[leaf.ndim])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, jax.eval_shape(init))


def expected(step: int, like: Any) -> list[np.ndarray]:
    """Returns the values of every leaf at `step` as host arrays."""
    rng = np.random.default_rng(step)

    def value(leaf: Any) -> np.ndarray:
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return np.full(leaf.shape, step, leaf.dtype)
        return rng.standard_normal(leaf.shape, np.float32).astype(leaf.dtype)

    return [value(leaf) for leaf in jax.tree.leaves(like)]


def state_at(step: int, mesh: jax.sharding.Mesh, width: int = 32) -> State:
    """Returns the state at `step`; every process makes its own shards."""
    like = abstract(mesh, width)
    leaves = [
        jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda i, v=value: v[i])
        for leaf, value in zip(jax.tree.leaves(like), expected(step, like), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def assert_state(state: State, step: int, mesh: jax.sharding.Mesh, width: int = 32) -> None:
    """Asserts that `state` is bit for bit that of `step`, with the shardings of `mesh`."""
    like = abstract(mesh, width)
    assert jax.tree.structure(state) == jax.tree.structure(like)
    leaves = zip(jax.tree.leaves(state), jax.tree.leaves(like), expected(step, like), strict=True)
    for leaf, wanted, value in leaves:
        assert leaf.dtype == wanted.dtype
        assert leaf.sharding == wanted.sharding
        for shard in leaf.addressable_shards:
            # Bytes, so that -0.0 and 0.0 differ and bfloat16 needs no tolerance.
            assert np.asarray(shard.data).tobytes() == value[shard.index].tobytes()
