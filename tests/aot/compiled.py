"""Compiles small programs of known cost for a v5e:2x2 and prints what the cost model finds.

A process of its own: libtpu reads its environment once, and the tests' process has CPU devices.
"""

import json

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import AxisType

from qwen_jax.aot import hlo, timeline, topology

LAYERS, INNER, ROWS, WIDTH = 5, 3, 512, 256


def _nested(x, weights):
    """LAYERS × INNER products [ROWS,WIDTH]·[WIDTH,WIDTH], weights gathered over the mesh."""

    def layer(x, w):
        w = jax.reshard(w, jax.P(None, None))
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=INNER)[0], None

    return jax.lax.scan(layer, x, weights)[0]


def _kernel(x):
    def double(x_ref, out_ref):
        out_ref[...] = x_ref[...] * 2

    estimate = pl.CostEstimate(flops=10**6, bytes_accessed=10**5, transcendentals=0)
    call = pl.pallas_call(double, out_shape=x, cost_estimate=estimate)
    return jax.lax.scan(lambda x, _: (call(x), None), x, None, length=7)[0]


def _found(mesh, pod, function, *shapes):
    with jax.set_mesh(mesh):
        compiled = jax.jit(function).lower(*shapes).compile()
    cost = timeline.predict(hlo.parse(compiled.as_text()), pod, mesh)
    return {
        "flops": cost.flops,
        "kernel_flops": cost.kernel_flops,
        "counts": cost.counts,
        "bytes": cost.bytes,
        "seconds": cost.seconds,
        "busy": cost.busy,
    }


def main() -> None:
    """Prints one JSON object."""
    jax.config.update("jax_platforms", "cpu")
    pod = topology.describe("v5e:2x2")
    mesh = jax.make_mesh((4,), ("x",), (AxisType.Explicit,), devices=pod.devices)

    def array(shape, *axes):
        sharding = jax.NamedSharding(mesh, jax.P(*axes))
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

    rows = array((4 * ROWS, WIDTH), "x", None)
    weights = array((LAYERS, WIDTH, WIDTH), None, "x", None)
    one = jax.make_mesh((1,), ("x",), (AxisType.Explicit,), devices=pod.devices[:1])
    block = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=jax.NamedSharding(one, jax.P()))
    print(
        json.dumps(
            {
                "nested": _found(mesh, pod, _nested, rows, weights),
                "kernel": _found(one, pod, _kernel, block),
            }
        )
    )


if __name__ == "__main__":
    main()
