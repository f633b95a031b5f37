"""Estimated cycles of the TPU attention kernels beside jax's splash attention, without a TPU.

    python -m benchmarks.attention_cycles [--chips=v6e,v5e,v5p] [--length=4096] [--width=128]
        [--out=FILE.json] [--jobs=1]

Needs libtpu (requirements/tpu.txt) and no accelerator. The compiler for TPUs writes, for each
kernel, the cycles its final instructions take when it walks them with their loop counts: a static
estimate, not a timing, deterministic for one version of libtpu, blind to memory bandwidth. It ranks
kernels that compute more than they read. One head, causal, bfloat16. Each case is a process of its
own, because the flag is read once and an unsupported instruction ends the process.

The profile reads scalars prefetched at run time as 0, which makes splash look empty; for the
estimate alone its choice of blocks is replaced by the same choice computed from program ids, and
for splash the best of a few block sizes is taken. Ours are those of `kernels/tpu/tiles.py`.

The second table counts, exactly, what packing documents into a row leaves to do: pairs of query
and key in the blocks each implementation computes, and bytes of keys and values loaded, relative to
causal attention over the whole row. Splash skips blocks by its static mask alone.
"""

from __future__ import annotations

import concurrent.futures
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import cycle_profile
from qwen_jax.kernels.mask import Mask
from qwen_jax.kernels.tpu.block_sizes import CHIPS
from qwen_jax.kernels.tpu.flash_blocks import key_ranges, make_layout

_CHIPS = flags.DEFINE_list("chips", list(CHIPS), "Chips to compile for.")
_LENGTH = flags.DEFINE_integer("length", 4096, "Tokens in the row.")
_WIDTH = flags.DEFINE_integer("width", 128, "Head width.")
_JOBS = flags.DEFINE_integer("jobs", 1, "Cases compiled at a time.")
_OUT = flags.DEFINE_string("out", "", "Also write the JSON here.")
_CASE = flags.DEFINE_string("case", "", "Internal: what a child process measures.")

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
# block_q, block_kv, block_kv_compute.
SPLASH = [(1024, 1024, 512), (1024, 1024, 1024), (512, 512, 512), (2048, 1024, 512)]


def cases(length: int, chips) -> list[dict]:
    out = []
    for chip in chips:
        for phase in ("forward", "backward"):
            out.append({"chip": chip, "phase": phase, "kernel": "ours"})
            out += [
                {"chip": chip, "phase": phase, "kernel": "splash", "blocks": blocks}
                for blocks in SPLASH
                if blocks[0] <= length
            ]
        # On v5e and v5p its fused backward pass has instructions the profile can't walk.
        out += [
            {"chip": chip, "phase": "fused backward", "kernel": "splash", "blocks": blocks}
            for blocks in SPLASH
            if blocks[0] <= length and chip == "v6e"
        ]
    return out


def splash(case, length):
    """(kernel, its abstract form) of splash attention with the case's blocks."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    q, kv, compute = case["blocks"]
    fused = case["phase"] == "fused backward"

    def by_program_id(h, i, j, data_next, block_mask, mask_next, next_i=False):
        near = (jnp.maximum if next_i else jnp.minimum)(i, j) if q == kv else (i if next_i else j)
        return near, None, j * kv < (i + 1) * q, True

    kernel._next_nonzero = by_program_id
    sizes = kernel.BlockSizes(
        *(q, kv, compute, q, kv, compute),
        block_q_dq=None if fused else q,
        block_kv_dq=None if fused else kv,
        use_fused_bwd_kernel=fused,
    )
    mask = masks.MultiHeadMask([masks.CausalMask((length, length))])
    return kernel.make_splash_mha_single_device(mask, block_sizes=sizes)


def measure(case: dict) -> dict:
    """Cycles of each kernel in the case, by name. Runs in a process of its own."""
    from jax.experimental import topologies

    from qwen_jax.kernels.tpu.flash import KERNEL

    length, width = case["length"], case["width"]
    chips = topologies.get_topology_desc(
        platform="tpu", topology_name=TOPOLOGIES[case["chip"]]
    ).devices
    mesh = jax.sharding.Mesh(np.array(chips[:1]), ("data",))
    place = jax.sharding.NamedSharding(mesh, jax.P())

    def arg(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    if case["kernel"] == "ours":
        x, row = arg(1, length, 1, width), arg(1, 1, length, dtype=jnp.float32)
        args = (x, x, x) if case["phase"] == "forward" else (x, x, x, row, x, row)

        def run(q, k, v, *rest):
            if not rest:
                return KERNEL.forward(q, k, v, Mask(), width**-0.5)
            lse, d_out, delta = rest
            return KERNEL.backward(q, k, v, Mask(), width**-0.5, lse, d_out, delta, None)
    else:
        made = splash(case, length)
        made = jax.tree.map(lambda x: arg(*x.shape, dtype=x.dtype), made)
        x = arg(1, length, width)
        args = (made, x, x, x)

        def run(kernel, q, k, v):
            if case["phase"] == "forward":
                return kernel(q, k, v)
            return jax.grad(lambda *qkv: kernel(*qkv).astype(jnp.float32).sum(), (0, 1, 2))(q, k, v)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        jax.jit(run).lower(*args).compile()
    wanted = "forward|fwd" if case["phase"] == "forward" else "backward|dq|dkv"
    found = cycle_profile.cycles(case["dump"])
    return {name: count for name, count in found if re.search(wanted, name)}


def child(case: dict) -> dict:
    """The case with its result, from a process of its own."""
    case = case | {"length": _LENGTH.value, "width": _WIDTH.value}
    kernels = cycle_profile.child("benchmarks.attention_cycles", case)
    if "error" in kernels:
        return case | kernels
    return case | {"kernels": kernels, "cycles": sum(kernels.values())}


def packing(length: int, width: int, chip: str, documents: int) -> dict:
    """Work left in a row of documents of equal length, as a share of the causal row's."""
    ids = (1 + np.arange(length) * documents // length).astype(np.int32)[None]
    mask = Mask(q_segments=jnp.asarray(ids), k_segments=jnp.asarray(ids))
    tiles = CHIPS[chip].forward
    pairs, keys = [], []
    for case in (mask, Mask()):
        layout = make_layout(length, length, width, 2, case, tiles)
        low, _, _, short = np.asarray(key_ranges(case, layout, 1)).reshape(-1, 4).T
        q, k, cut = layout.tiles.block_q, layout.tiles.block_k, layout.tiles.diagonal
        blocks = np.arange(layout.q_blocks) * (q // k) - short - low
        pairs.append(blocks.sum() * q * k + layout.q_blocks * q * (q + cut) // 2)
        keys.append(blocks.sum() * k + layout.rows)
    needed = sum(n * (n + 1) // 2 for n in np.bincount(ids[0])[1:])
    whole = length * (length + 1) // 2
    return {
        "chip": chip,
        "documents": documents,
        "needed": needed / whole,
        "ours": float(pairs[0] / pairs[1]),
        "splash": 1.0,
    }


def main(_):
    if _CASE.value:
        print(json.dumps(measure(json.loads(_CASE.value))))
        return
    jax.config.update("jax_platforms", "cpu")
    todo = cases(_LENGTH.value, _CHIPS.value)
    with concurrent.futures.ThreadPoolExecutor(_JOBS.value) as pool:
        results = list(pool.map(child, todo))
    print(f"Estimated cycles, {_LENGTH.value} tokens, one head of {_WIDTH.value}, causal, bfloat16")
    for r in results:
        label = "x".join(map(str, r.get("blocks", ())))
        value = f"{r['cycles']:>8,}" if "cycles" in r else f"   failed: {r['error']}"
        print(f"{r['chip']:5}{r['phase']:16}{r['kernel']:8}{label:18}{value}")
    summary = []
    for chip in _CHIPS.value:
        for phase in ("forward", "backward"):
            mine = [r for r in results if r["chip"] == chip and phase in r["phase"]]
            mine = [r for r in mine if "cycles" in r]
            best = {
                name: min((r["cycles"] for r in mine if r["kernel"] == name), default=None)
                for name in ("ours", "splash")
            }
            ratio = best["ours"] / best["splash"] if all(best.values()) else None
            summary.append({"chip": chip, "phase": phase, **best, "ratio": ratio})
            print(
                f"{chip:5}{phase:10} ours {best['ours']}  splash's best {best['splash']}  {ratio}"
            )
    packed = [
        packing(_LENGTH.value, _WIDTH.value, chip, n) for chip in _CHIPS.value for n in (2, 4, 8)
    ]
    print("Pairs computed in a packed row, as a share of the causal row (counted, not estimated)")
    for r in packed:
        print(
            f"{r['chip']:5}{r['documents']} documents: ours {r['ours']:.2f}, "
            f"needed {r['needed']:.2f}, splash {r['splash']:.2f}"
        )
    report = {"results": results, "summary": summary, "packed": packed, "jax": jax.__version__}
    if _OUT.value:
        pathlib.Path(_OUT.value).write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(summary))


if __name__ == "__main__":
    app.run(main)
