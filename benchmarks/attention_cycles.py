"""Estimated cycles of our TPU attention kernels beside jax's splash attention, without a TPU.

    python -m benchmarks.attention_cycles [--chips=v6e,v5e,v5p] [--length=4096] [--width=128]
        [--out=FILE.json] [--jobs=1]

Needs libtpu (requirements/tpu.txt) and no accelerator. The TPU compiler writes, for each kernel,
the cycles of its final instructions multiplied by their loop counts: a static estimate, not a
timing, deterministic for one version of libtpu, blind to memory bandwidth. It ranks kernels that
compute more than they read. One head, causal, bfloat16. Each case runs in a child process, because
the flag is read once and an unsupported instruction ends the process.

The profile reads scalars prefetched at run time as 0, which makes splash look empty; for the
estimate alone, its choice of blocks is replaced by the same choice computed from program ids. For
splash the best of a few block sizes is taken; ours are those of `kernels/tpu/block_sizes.py`.

The second table counts exactly how much work packing documents into a row leaves: query-key pairs
in the blocks that each implementation computes, relative to causal attention over the whole row.
Splash skips blocks by its static mask alone.

Prints both tables and, as its last line, one JSON object, which --out saves.
"""

from __future__ import annotations

import concurrent.futures
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import cycle_profile
from benchmarks.report import emit
from qwen_jax.kernels.mask import Mask
from qwen_jax.kernels.tpu.block_sizes import FLASH_CONFIGS
from qwen_jax.kernels.tpu.flash_blocks import key_ranges, make_flash_layout

_CHIPS = flags.DEFINE_list("chips", list(FLASH_CONFIGS), "TPU chips to compile for.")
_LENGTH = flags.DEFINE_integer("length", 4096, "Tokens per row.")
_WIDTH = flags.DEFINE_integer("width", 128, "Head dimension.")
_JOBS = flags.DEFINE_integer("jobs", 1, "Cases compiled at the same time.")
_OUT = flags.DEFINE_string("out", "", "Also write the JSON to this file.")
_CASE = flags.DEFINE_string("case", "", "Internal: the case that a child process measures.")

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
SPLASH_BLOCKS = [(1024, 1024, 512), (1024, 1024, 1024), (512, 512, 512), (2048, 1024, 512)]
"""(block_q, block_kv, block_kv_compute) tried for splash attention."""


def make_cases(length: int, chips: list[str]) -> list[dict[str, Any]]:
    """Returns the cases to estimate: each kernel, phase and block size on each chip."""
    cases = []
    for chip in chips:
        for phase in ("forward", "backward"):
            cases.append({"chip": chip, "phase": phase, "kernel": "ours"})
            cases += [
                {"chip": chip, "phase": phase, "kernel": "splash", "blocks": blocks}
                for blocks in SPLASH_BLOCKS
                if blocks[0] <= length
            ]
        # On v5e and v5p the profile cannot walk its fused backward kernel.
        cases += [
            {"chip": chip, "phase": "fused backward", "kernel": "splash", "blocks": blocks}
            for blocks in SPLASH_BLOCKS
            if blocks[0] <= length and chip == "v6e"
        ]
    return cases


def make_splash(case: dict[str, Any], length: int):
    """Returns the splash attention kernel of one head with the block sizes of a case.

    Replaces jax's choice of the next block by an equal one computed from program ids, in this
    process.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    q, kv, compute = case["blocks"]
    fused = case["phase"] == "fused backward"

    def next_block_by_program_id(h, i, j, data_next, block_mask, mask_next, next_i=False):
        near = (jnp.maximum if next_i else jnp.minimum)(i, j) if q == kv else (i if next_i else j)
        return near, None, j * kv < (i + 1) * q, True

    kernel._next_nonzero = next_block_by_program_id
    sizes = kernel.BlockSizes(
        block_q=q,
        block_kv=kv,
        block_kv_compute=compute,
        block_q_dkv=q,
        block_kv_dkv=kv,
        block_kv_dkv_compute=compute,
        block_q_dq=None if fused else q,
        block_kv_dq=None if fused else kv,
        use_fused_bwd_kernel=fused,
    )
    mask = masks.MultiHeadMask([masks.CausalMask((length, length))])
    return kernel.make_splash_mha_single_device(mask, block_sizes=sizes)


def measure(case: dict[str, Any]) -> dict[str, int]:
    """Compiles a case and returns the estimated cycles of its kernels by name.

    Runs in a child process of `cycle_profile.run_case`.
    """
    from jax.experimental import topologies

    from qwen_jax.kernels.tpu.flash import KERNEL

    length, width = case["length"], case["width"]
    chips = topologies.get_topology_desc(
        platform="tpu", topology_name=TOPOLOGIES[case["chip"]]
    ).devices
    mesh = jax.sharding.Mesh(np.array(chips[:1]), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.P())

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    args: tuple[Any, ...]
    if case["kernel"] == "ours":
        x, row = array(1, length, 1, width), array(1, 1, length, dtype=jnp.float32)
        args = (x, x, x) if case["phase"] == "forward" else (x, x, x, row, x, row)

        def run(q, k, v, *rest):
            if not rest:
                return KERNEL.forward(q, k, v, Mask(), width**-0.5)
            lse, d_out, delta = rest
            return KERNEL.backward(q, k, v, Mask(), width**-0.5, lse, d_out, delta, None)
    else:
        splash = make_splash(case, length)
        splash = jax.tree.map(lambda x: array(*x.shape, dtype=x.dtype), splash)
        x = array(1, length, width)
        args = (splash, x, x, x)

        def run(kernel, q, k, v):
            if case["phase"] == "forward":
                return kernel(q, k, v)
            return jax.grad(lambda *qkv: kernel(*qkv).astype(jnp.float32).sum(), (0, 1, 2))(q, k, v)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        jax.jit(run).lower(*args).compile()
    wanted = "forward|fwd" if case["phase"] == "forward" else "backward|dq|dkv"
    profile = cycle_profile.read_profile(case["dump"])
    return {name: count for name, count in profile if re.search(wanted, name)}


def measure_in_child(case: dict[str, Any]) -> dict[str, Any]:
    """Returns a case with "kernels" and "cycles", or with an "error", from a child process."""
    case = case | {"length": _LENGTH.value, "width": _WIDTH.value}
    kernels = cycle_profile.run_case("benchmarks.attention_cycles", case)
    if "error" in kernels:
        return case | kernels
    return case | {"kernels": kernels, "cycles": sum(kernels.values())}


def packed_work(length: int, width: int, chip: str, documents: int) -> dict[str, Any]:
    """Counts the query-key pairs computed for a row of documents of equal length.

    Args:
      length: tokens per row.
      width: head dimension.
      chip: TPU chip, which decides the block sizes.
      documents: number of documents.

    Returns:
      pairs as shares of those of the causal row: "needed" by the mask, computed by "ours" and by
      "splash".
    """
    ids = (1 + np.arange(length) * documents // length).astype(np.int32)[None]
    packed = Mask(q_segments=jnp.asarray(ids), k_segments=jnp.asarray(ids))
    sizes = FLASH_CONFIGS[chip].forward
    pairs = []
    for mask in (packed, Mask()):
        layout = make_flash_layout(length, length, width, 2, mask, sizes)
        low, _, _, short = np.asarray(key_ranges(mask, layout, 1)).reshape(-1, 4).T
        q, k, cut = layout.sizes.block_q, layout.sizes.block_k, layout.sizes.diagonal_block
        blocks = np.arange(layout.num_q_blocks) * (q // k) - short - low
        pairs.append(blocks.sum() * q * k + layout.num_q_blocks * q * (q + cut) // 2)
    needed = sum(n * (n + 1) // 2 for n in np.bincount(ids[0])[1:])
    causal = length * (length + 1) // 2
    return {
        "chip": chip,
        "documents": documents,
        "needed": float(needed / causal),
        "ours": float(pairs[0] / pairs[1]),
        "splash": 1.0,
    }


def summarise(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns, for each chip and phase, our cycles, splash's fewest, and their ratio."""
    summary = []
    for chip in _CHIPS.value:
        for phase in ("forward", "backward"):
            measured = [
                r for r in results if r["chip"] == chip and phase in r["phase"] and "cycles" in r
            ]
            best = {
                name: min((r["cycles"] for r in measured if r["kernel"] == name), default=None)
                for name in ("ours", "splash")
            }
            ratio = best["ours"] / best["splash"] if all(best.values()) else None
            summary.append({"chip": chip, "phase": phase, **best, "ratio": ratio})
    return summary


def print_tables(
    results: list[dict[str, Any]], summary: list[dict[str, Any]], packed: list[dict[str, Any]]
) -> None:
    """Prints the estimates, their summary and the counts for packed rows."""
    print(f"Estimated cycles, {_LENGTH.value} tokens, one head of {_WIDTH.value}, causal, bfloat16")
    for r in results:
        label = "x".join(map(str, r.get("blocks", ())))
        value = f"{r['cycles']:>8,}" if "cycles" in r else f"   failed: {r['error']}"
        print(f"{r['chip']:5}{r['phase']:16}{r['kernel']:8}{label:18}{value}")
    for r in summary:
        print(
            f"{r['chip']:5}{r['phase']:10} ours {r['ours']}  best of splash {r['splash']}  "
            f"ratio {r['ratio']}"
        )
    print("Pairs computed in a packed row, as a share of the causal row (counted, not estimated)")
    for r in packed:
        print(
            f"{r['chip']:5}{r['documents']} documents: ours {r['ours']:.2f}, "
            f"needed {r['needed']:.2f}, splash {r['splash']:.2f}"
        )


def main(_):
    """Estimates all cases, or in a child process the one of --case."""
    if _CASE.value:
        print(json.dumps(measure(json.loads(_CASE.value))))
        return
    jax.config.update("jax_platforms", "cpu")
    with concurrent.futures.ThreadPoolExecutor(_JOBS.value) as pool:
        results = list(pool.map(measure_in_child, make_cases(_LENGTH.value, _CHIPS.value)))
    summary = summarise(results)
    packed = [
        packed_work(_LENGTH.value, _WIDTH.value, chip, n)
        for chip in _CHIPS.value
        for n in (2, 4, 8)
    ]
    print_tables(results, summary, packed)
    report = {"results": results, "summary": summary, "packed": packed, "jax": jax.__version__}
    emit(report, _OUT.value)


if __name__ == "__main__":
    app.run(main)
