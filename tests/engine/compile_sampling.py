"""Compiles sampling for a TPU topology named on the command line; prints its costs as JSON.

The loop only when the name is followed by `loop`, else single steps of 8 and 64 rows as well.
"""

import json
import re
import sys
import time

import jax
import jax.numpy as jnp

from qwen_jax.aot import topology
from qwen_jax.engine.sampling import (
    SamplingRows,
    count_tokens,
    init_counts,
    sample_rows,
    stack_sampling_params,
)
from qwen_jax.parallel import MeshConfig, make_mesh, named_sharding

VOCAB = 151_936


def step(logits, rows: SamplingRows, positions, seen, vocab: int = VOCAB):
    """Samples one token per row and counts it."""
    drawn = sample_rows(logits, rows, positions, seen, vocab)
    return drawn, count_tokens(seen, drawn.tokens, drawn.tokens != 0)


def sampling_loop(logits, rows, positions, seen, vocab: int = VOCAB):
    """Samples eight tokens per row in a loop on the device and returns their sum."""

    def one(state):
        i, total, positions, seen = state
        drawn, seen = step(logits + i, rows, positions, seen, vocab)
        return i + 1, total + drawn.tokens + drawn.top_ids[:, 0], positions + 1, seen

    start = (jnp.int32(0), jnp.zeros_like(positions), positions, seen)
    return jax.lax.while_loop(lambda state: state[0] < 8, one, start)[1:]


def compile_one(pod, tensor: int, count: int, run) -> dict:
    mesh = make_mesh(MeshConfig(fsdp=1, tensor=tensor), pod.devices[:tensor])

    def shape(x, *axes):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=named_sharding(mesh, *axes))

    rows = jax.tree.map(shape, stack_sampling_params([None] * count))
    logits = shape(jax.ShapeDtypeStruct((count, VOCAB), jnp.float32), None, "vocab")
    positions = shape(jax.ShapeDtypeStruct((count,), jnp.int32))
    seen = jax.eval_shape(lambda: init_counts(count, VOCAB))
    seen = jax.tree.map(lambda x: shape(x, None, "vocab"), seen)
    with jax.set_mesh(mesh):
        start = time.monotonic()
        lowered = jax.jit(run, donate_argnums=3).lower(logits, rows, positions, seen)
        compiled = lowered.compile()
        seconds = time.monotonic() - start
    text = compiled.as_text()
    memory = compiled.memory_analysis()
    part = VOCAB // tensor
    return {
        "what": f"{run.__name__} {count} rows /{tensor}",
        "seconds": round(seconds, 1),
        "temp": memory.temp_size_in_bytes,
        "alias": memory.alias_size_in_bytes,
        "counts": count * part * 2,
        "conditionals": text.count(" conditional("),
        "sorts": len(re.findall(r" (?:sort|topk)\(|TopK|PartialReduce", text)),
        "count_copies": len(re.findall(rf"= s16\[{count},{part}\]\S* copy\(", text)),
    }


def main(name: str, which: str = "all") -> None:
    """Prints one JSON list."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_remove_size_one_mesh_axis_from_type", True)
    pod = topology.describe(name)
    cases = [(1, 8, sampling_loop), (4, 8, sampling_loop)]
    cases += [(1, 8, step), (1, 64, step)] if which == "all" else []
    print(json.dumps([compile_one(pod, *case) for case in cases]))


if __name__ == "__main__":
    main(*sys.argv[1:])
