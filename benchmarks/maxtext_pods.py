"""MaxText's own pod recipes beside ours, compiled for the same chips and costed by the same model.

    python -m benchmarks.maxtext_pods --checkout=DIR --python=PYTHON --work=DIR
        [--only=v5e-256,…] [--out=FILE.json]
    python -m benchmarks.maxtext_pods --splash    # measures the constants SPLASH again, minutes

Needs libtpu and no TPU; PYTHON is an interpreter that can import MaxText (its sources in DIR/src)
with the same versions of jax and libtpu as this one, so that one compiler compiles both. Each
program takes minutes; what is finished is kept in --work, of one checkout, and not compiled again,
so the command may be stopped and started. Nothing is run: MFU and tokens/s are predictions of
`qwen_jax.aot`.

MaxText's settings and XLA flags are read from its `benchmarks/`; of its Llama-2-7B recipes nothing
is changed but the topology. It lists none for Qwen3-8B: that of Llama-2-7B takes its place, with
the remat policies named. Flags that this libtpu refuses off v5e (async collective fusion) are left
out there, and beside that stands MaxText's own set for SparseCores.

Its attention is jax's splash kernel, which declares no cost. Its products are counted from the
call's shapes, causal half: 2 forward, 3 for dq, 4 for dkv (scores and their gradients are made
twice). Their time is that of libtpu's static cycle profile at the recipe's own tiling (SPLASH);
"at our kernels' share" prices them as if they ran at the share of peak that ours do.

"Cycles alone" is a cruder reckoning, on both sides alike: the compiler's estimated cycles,
attention at the chip's peak, transfers free.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import app, flags, logging

from benchmarks import cycle_profile
from benchmarks.report import emit
from qwen_jax.aot import hlo, timeline, topology, work
from qwen_jax.artifact import write_text
from qwen_jax.errors import UserError
from qwen_jax.model import ModelConfig
from qwen_jax.model.presets import preset
from qwen_jax.train.flops import train_flops_per_token

# Cycles of one causal head of 128 over 4,096 tokens by libtpu 0.0.51's static profile, in the tiles
# (block_q, block_kv) of MaxText's recipes: `--splash`, 2026-11-21, estimates.
# Those of v5p are of one of its two cores.
SPLASH = {
    ("v5e", "fwd", 512, 512): 76_663,
    ("v5e", "dq", 512, 512): 88_299,
    ("v5e", "dkv", 512, 512): 102_674,
    ("v5p", "fwd", 512, 512): 72_525,
    ("v5p", "dq", 512, 512): 81_607,
    ("v5p", "dkv", 512, 512): 105_695,
    ("v6e", "fwd", 1024, 512): 48_279,
    ("v6e", "dq", 2048, 512): 47_502,
    ("v6e", "dkv", 2048, 512): 62_038,
}
PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
CORES = {"v5e": 1, "v5p": 2, "v6e": 1}

# Without what libtpu 0.0.51 refuses on v5p and v6e as "might lead to incorrect results".
_NO_FUSION = {"without_flags": ["async_collective_fusion"]}
_OFFLOAD = "ENABLE_SPARSECORE_OFFLOADING_FOR_RS_AG_AR"


@dataclasses.dataclass(frozen=True)
class MaxText:
    """Where MaxText is: its repository, and an interpreter that can import it."""

    checkout: pathlib.Path
    python: str


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of the table.

    Attributes:
      name: of its files. slice: as sold. topology: as libtpu names it. length, rows: tokens per
        row, rows per chip. model: what is trained.
      theirs: module and recipe in MaxText's benchmarks, with `overrides` of its settings and
        changes of its flags (see maxtext_child.recipe). ours: arguments of `launch.aot`.
    """

    name: str
    slice: str
    topology: str
    length: int
    rows: int
    model: ModelConfig
    theirs: dict[str, Any] = dataclasses.field(default_factory=dict)
    ours: tuple[str, ...] = ()


def _group(where, named, length, rows, model, theirs, ours) -> Iterator[Program]:
    """MaxText's variants {label: case}, then ours {label: arguments}."""
    shape = (where, named, length, rows)
    for label, case in theirs.items():
        yield Program(f"maxtext {label} {where}", *shape, model[0], theirs=case)
    for label, arguments in ours.items():
        fixed = (f"--topology={named}", f"--seq_len={length}", f"--per_device_batch={rows}")
        yield Program(
            f"qwen_jax {label} {where}",
            *shape,
            model[1],
            ours=(*arguments, *fixed, "--config.train.microbatches=1"),
        )


def _recipe(module: str, recipe: str, **more: Any) -> dict[str, Any]:
    return {"module": f"benchmarks.{module}", "recipe": recipe} | more


def programs() -> list[Program]:
    """All programs, those to be compared next to each other."""
    qwen = preset("qwen-7b")
    # Llama-2-7B has Qwen-7B's widths and depth, no biases and a vocabulary of 32,000.
    llama = dataclasses.replace(qwen, vocab_size=32_000)
    qwen3 = preset("qwen3-8b")
    small = "--config.model.vocab_size=32000"
    v5e = _recipe("maxtext_v5e_model_configs", "llama2-7b-v5e-256")
    v5p = _recipe("maxtext_v5p_model_configs", "llama2_7b_v5p_128")
    v6e = _recipe("maxtext_trillium_model_configs", "llama2-7b-4096")
    offloaded_v5p = {"flag_groups": ["DATA_PARALLEL_OVERLAP", _OFFLOAD]}
    offloaded_v6e = {"flag_groups": ["DENSE_VMEM_LIMIT_FLAG", _OFFLOAD]}
    ours_v5e = ("--config=configs/pods.py:7b,v5e-256", "--config.options.remat=attention")
    ours_v5p = ("--config=configs/pods.py:7b,v5p-128", "--config.options.remat=products")
    ours_v6e = ("--config=configs/pods.py:7b,v6e-256", "--config.options.remat=full:16,out",
                "--config.loss.chunk=8192")  # fmt: skip
    ours_q3 = ("--config=configs/pretrain.py:qwen3-8b", "--config.options.remat=attention")

    def qwen3_with(remat):
        return v5e | {"overrides": {"model_name": "qwen3-8b", "remat_policy": remat}}

    return [
        *_group("v5e-256", "v5e:16x16", 2048, 4, (llama, qwen), {"llama2-7b": v5e},
                {"qwen-7b": ours_v5e}),
        *_group("v5e-256", "v5e:16x16", 2048, 4, (llama, llama), {},
                {"qwen-7b vocabulary 32000": (*ours_v5e, small)}),
        *_group("v5p-128", "v5p:4x4x4", 4096, 4, (llama, qwen),
                {"llama2-7b": v5p | _NO_FUSION, "llama2-7b SparseCore": v5p | offloaded_v5p},
                {"qwen-7b": ours_v5p}),
        *_group("v6e-256", "v6e:16x16", 4096, 12, (llama, qwen),
                {"llama2-7b": v6e | _NO_FUSION, "llama2-7b SparseCore": v6e | offloaded_v6e},
                {"qwen-7b": ours_v6e}),
        *_group("v5e-256", "v5e:16x16", 2048, 4, (qwen3, qwen3),
                {"qwen3-8b full": qwen3_with("full"),
                 "qwen3-8b save_qkv_proj": qwen3_with("save_qkv_proj")},
                {"qwen3-8b": ours_q3}),
    ]  # fmt: skip


def splash(chip: topology.Chip, *, own: bool) -> timeline.Kernels:
    """Costs of splash attention's calls on this chip: at its own share of peak, or at ours."""

    def cost(call: hlo.Instruction) -> timeline.KernelCost | None:
        phase = re.match(r"splash_m[hq]a_(fwd|dq|dkv)", call.name)
        if not phase:
            return None
        part = phase[1]
        taken = re.search(r"operand_layout_constraints=\{(.*?\})\}", call.attributes)
        # Block masks come first, then queries, keys and values.
        queries = next(s for s in hlo.parse_shapes(taken[1]) if s.dtype == "bf16")
        rows, heads, length, width = queries.dims
        flops = PRODUCTS[part] * 2 * rows * heads * length**2 / 2 * width
        if not own:
            return timeline.KernelCost(flops, chip.kernel_efficiency)
        suffix = "" if part == "fwd" else f"_{part}"
        tile = (
            int(re.search(rf'block_{name}{suffix}\\*": (\d+)', call.attributes)[1])
            for name in ("q", "kv")
        )
        profiled = PRODUCTS[part] * 2 * 4096**2 / 2 * 128
        seconds = SPLASH[chip.name, part, *tile] / chip.clock / CORES[chip.name]
        return timeline.KernelCost(flops, profiled / seconds / chip.peak_flops)

    return cost


def cycles_alone(module: hlo.Module, chip: topology.Chip, kernels: timeline.Kernels) -> float:
    """Seconds of a step: cycles as estimated, kernels at peak, nothing waited for."""

    def total(name: str) -> float:
        scope, seconds = module.computations[name], 0.0
        for i in scope.instructions:
            if i.opcode == "while":
                seconds += hlo.trip_count(module, scope, i) * total(i.called("body"))
            elif i.text("custom_call_target") == "tpu_custom_call":
                known = None if work.kernel_estimate(i) else kernels(i)
                flops = known.flops if known else work.flops(module, scope, i)
                seconds += flops / chip.peak_flops
            elif not i.opcode.endswith(("-start", "-update", "-done")):
                seconds += (i.number("estimated_cycles") or 0) / chip.clock
        return seconds

    return total(module.entry)


def profile_splash() -> Iterator[str]:
    """A line for each of SPLASH: its cycles as they are profiled now, and as they stand there."""
    for (chip, part, *tile), listed in SPLASH.items():
        case = {"chip": chip, "kernel": "splash", "blocks": (*tile, 512), "length": 4096}
        case |= {"width": 128, "phase": "forward" if part == "fwd" else "backward"}
        found = cycle_profile.child("benchmarks.attention_cycles", case)
        cycles = [n for name, n in found.items() if f"_{part}_" in name] or [found]
        yield f"{chip} {part} {tile}: {cycles[0]}, listed {listed}"


def figures(program: Program, peak: int, seconds: float, executed: float) -> dict[str, Any]:
    """What the table says of a program; `executed` and `seconds` of one chip and step."""
    chip, _ = topology.parse(program.topology)
    tokens = program.rows * program.length
    model = train_flops_per_token(program.model, program.length) * tokens
    return {
        "peak_gib": peak / 2**30,
        "executed_over_model": executed / model,
        "step_seconds": seconds,
        "tokens_per_second_per_chip": tokens / seconds,
        "model_flops_per_second_per_chip": model / seconds,
        "mfu": model / seconds / chip.peak_flops,
    }


def cost_theirs(program: Program, text: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Prices MaxText's schedule, on the mesh that MaxText laid.

    Args:
      text: the scheduled HLO. facts: what maxtext_child has written.
    """
    chip, shape = topology.parse(program.topology)
    pod = topology.Pod(program.topology, chip, shape, ())
    devices = np.empty(len(facts["coordinates"]), dtype=object)
    devices[:] = [types.SimpleNamespace(coords=tuple(c)) for c in facts["coordinates"]]
    mesh = types.SimpleNamespace(devices=devices)
    module = hlo.parse(text)
    own = timeline.predict(module, pod, mesh, splash(chip, own=True))
    if own.unpriced_kernels:
        raise UserError(
            f"{program.name} calls {own.unpriced_kernels} kernels that neither declare their FLOPs "
            "nor are splash attention; add their costs to benchmarks/maxtext_pods.py"
        )
    at_ours = timeline.predict(module, pod, mesh, splash(chip, own=False))
    peak = facts["peak_bytes"]
    made = figures(program, peak, own.seconds, own.flops)
    alone = cycles_alone(module, chip, splash(chip, own=True))
    return made | {
        "mfu_at_our_kernels_share": made["mfu"] * own.seconds / at_ours.seconds,
        "mfu_of_cycles_alone": made["mfu"] * own.seconds / alone,
        "waiting_seconds": dict(own.waiting),
        "collective_bytes": dict(own.bytes),
        "compile_seconds": facts["compile_seconds"],
        "versions": facts["versions"],
        "xla_flags": facts["flags"],
        "remat": facts["settings"]["remat_policy"],
    }


def cost_ours(program: Program, text: str, made: dict[str, Any]) -> dict[str, Any]:
    """The same figures from the scheduled HLO and the report of `launch.aot`."""
    chip, _ = topology.parse(program.topology)
    predicted, executed = made["prediction"], made["flops"]["executed"] / made["devices"]
    peak, seconds = made["memory"]["peak_bytes"], predicted["step_seconds"]
    ours = figures(program, peak, seconds, executed)
    alone = cycles_alone(hlo.parse(text), chip, lambda call: None)
    return ours | {
        "mfu_of_cycles_alone": ours["mfu"] * seconds / alone,
        "waiting_seconds": predicted["waiting_seconds"],
        "collective_bytes": {kind: c["bytes"] for kind, c in made["collectives"].items()},
        "compile_seconds": made["compile_seconds"],
        "versions": made["versions"],
        "xla_flags": made["xla_options"],
        "remat": made["remat"],
    }


def _run(name: str, command: list[str], **how: Any) -> str:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | topology.ENVIRONMENT
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, **how
    )
    if done.returncode:
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise UserError(f"{name} was not compiled: {reason[:300]}")
    return done.stdout


def compile_theirs(program: Program, stem: pathlib.Path, maxtext: MaxText) -> None:
    """Writes `stem`.hlo and `stem`.json by MaxText's own ahead-of-time compiler."""
    settings = {
        "compile_topology": program.slice,
        "compile_topology_num_slices": 1,
        "max_target_length": program.length,
        "per_device_batch_size": program.rows,
        "base_output_directory": str(stem.parent / "scratch"),
        "run_name": "aot",
        "jax_cache_dir": "",  # a program from a cache leaves no dump
    }
    case = program.theirs | {
        "checkout": str(maxtext.checkout.resolve()),
        "out": str(stem.resolve()),
        "overrides": settings | program.theirs.get("overrides", {}),
    }
    child = pathlib.Path(__file__).with_name("maxtext_child.py")
    command = [maxtext.python, str(child), json.dumps(case)]
    _run(program.name, command, cwd=stem.parent)


def file_name(program: Program) -> str:
    """Of the program's files: its name, and a digest of what is asked for and by which compiler."""
    asked = [program.topology, program.length, program.rows, program.theirs, program.ours]
    for package in ("jax", "libtpu"):
        found = importlib.util.find_spec(package)
        asked.append(importlib.metadata.version(package) if found else None)
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]
    return re.sub(r"[^\w.-]+", "_", f"{program.name}-{digest}")


def measure(program: Program, folder: pathlib.Path, maxtext: MaxText) -> dict[str, Any]:
    """The program's figures; compiles it where that has not been done."""
    stem = folder / file_name(program)
    facts, text = (stem.with_name(stem.name + end) for end in (".json", ".hlo"))
    if not facts.exists():
        logging.info("compiling %s", program.name)
        if program.theirs:
            compile_theirs(program, stem, maxtext)
        else:
            command = [sys.executable, "-m", "launch.aot", *program.ours, f"--dump_hlo={text}"]
            write_text(str(facts), _run(program.name, command))
    cost = cost_theirs if program.theirs else cost_ours
    return cost(program, text.read_text(), json.loads(facts.read_text()))


def table(results: dict[str, dict[str, Any]]) -> str:
    """Rows of Markdown; an error takes the place of the figures."""
    lines = [
        "| program | peak GiB | executed ÷ model | tokens/s per chip | model TFLOP/s per chip | "
        "predicted MFU | at our kernels' share | cycles alone |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, r in results.items():
        if "error" in r:
            lines.append(f"| {name} | {r['error']} | | | | | | |")
            continue
        other = r.get("mfu_at_our_kernels_share")
        lines.append(
            f"| {name} | {r['peak_gib']:.1f} | {r['executed_over_model']:.2f} | "
            f"{r['tokens_per_second_per_chip']:,.0f} | "
            f"{r['model_flops_per_second_per_chip'] / 1e12:.1f} | {r['mfu']:.3f} | "
            f"{f'{other:.3f}' if other else ''} | {r['mfu_of_cycles_alone']:.3f} |"
        )
    return "\n".join(lines)


def main(_):
    given = flags.FLAGS
    if given.splash:
        for line in profile_splash():
            print(line, flush=True)
        return
    if not (given.checkout and given.work):
        raise app.UsageError("give --checkout=DIR, MaxText's repository, and --work=DIR")
    folder = pathlib.Path(given.work)
    (folder / "scratch").mkdir(parents=True, exist_ok=True)
    maxtext = MaxText(pathlib.Path(given.checkout), given.python)
    results: dict[str, dict[str, Any]] = {}
    for program in programs():
        if given.only and not {program.name, program.slice} & set(given.only):
            continue
        try:
            results[program.name] = measure(program, folder, maxtext)
        except UserError as error:  # the others are still worth having
            results[program.name] = {"error": str(error)}
    print(table(results))
    emit(results, given.out)


if __name__ == "__main__":
    flags.DEFINE_string("checkout", "", "MaxText's repository.")
    flags.DEFINE_string("python", sys.executable, "Interpreter that can import MaxText.")
    flags.DEFINE_string("work", "", "Folder of finished compilations.")
    flags.DEFINE_list("only", [], "Slices or names of programs, instead of all.")
    flags.DEFINE_bool("splash", False, "Profile splash attention's calls instead.")
    flags.DEFINE_string("out", "", "Also write the JSON here.")
    app.run(main)
