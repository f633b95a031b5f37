"""Compiles ring attention for a TPU slice and prints, for each exchange, the kernels it spans.

For a process of its own, with the environment of `tests.tpu`.
"""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from qwen_jax.kernels import attention
from qwen_jax.parallel import AXES, spec


def spanned(hlo: str) -> dict[str, list[int]]:
    """For each computation with exchanges, the kernels between start and done of each of them."""
    found: dict[str, list[int]] = {}
    computation, under_way = "", {}
    for line in hlo.splitlines():
        if header := re.match(r"(?:ENTRY )?%([\w.\-]+) .*\{$", line):
            computation, under_way = header[1], {}
        elif start := re.search(r"%(\S+) = .*collective-permute-start\(", line):
            under_way[start[1]] = 0
        elif done := re.search(r"collective-permute-done\(%([\w.\-]+)\)", line):
            found.setdefault(computation, []).append(under_way.pop(done[1]))
        elif 'custom_call_target="tpu_custom_call"' in line:
            under_way = {name: n + 1 for name, n in under_way.items()}
    return found


def main() -> None:
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = jax.sharding.Mesh(
        np.array(devices).reshape(1, 1, 4, 1),
        AXES,
        axis_types=(jax.sharding.AxisType.Explicit,) * len(AXES),
    )
    with jax.set_mesh(mesh):
        sharding = jax.NamedSharding(mesh, spec("batch", "sequence", "heads", None))
        x = jax.ShapeDtypeStruct((1, 8192, 2, 128), jnp.bfloat16, sharding=sharding)

        def forward(q, k, v):
            return attention(q, k, v, implementation="pallas_tpu")

        def total(q, k, v):
            return forward(q, k, v).astype(jnp.float32).sum()

        program = forward if sys.argv[1] == "forward" else jax.grad(total, (0, 1, 2))
        compiled = jax.jit(program).lower(x, x, x).compile()
    print(json.dumps(spanned(compiled.as_text())))


if __name__ == "__main__":
    main()
