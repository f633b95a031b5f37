"""MaxText's pod recipes beside ours, compiled for the same chips and priced by the same model.

    python -m benchmarks.maxtext_pods --checkout=DIR --python=PYTHON --work=DIR
        [--only=v5e-256,…] [--out=FILE.json]
    python -m benchmarks.maxtext_pods --splash    # measures SPLASH_CYCLES again, takes minutes

Needs libtpu and no TPU. PYTHON is an interpreter that can import MaxText (its sources are in
DIR/src) with the same versions of jax and libtpu as this one, so that one compiler compiles both.
Each program takes minutes. Finished compilations are kept in the --work folder and reused, so the
command can be interrupted and run again; use one folder per MaxText checkout. Nothing is executed:
MFU and tokens/s are predictions of `qwen_jax.aot`.

MaxText's settings and XLA flags are read from its `benchmarks/`; of its Llama-2-7B recipes only the
topology is changed. It lists none for Qwen3-8B, so that of Llama-2-7B is used with the remat
policies named. Flags that this libtpu rejects on chips other than v5e (async collective fusion) are
left out there; a second variant uses MaxText's own flags for SparseCores.

MaxText's attention is jax's splash kernel, which declares no cost. Its products are counted from
the call's shapes, causal half: 2 forward, 3 for dq, 4 for dkv (scores and their gradients are
computed twice). Their time is that of libtpu's static cycle profile at the recipe's own block sizes
(SPLASH_CYCLES). "At our kernels' share" prices them as if they reached the share of peak FLOP/s
that our kernels do.

"Cycles alone" is a cruder estimate, for both sides alike: the compiler's estimated cycles,
attention at the chip's peak, transfers free.

Prints a table and, as its last line, one JSON object, which --out saves.
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
from benchmarks.maxtext_programs import PodProgram, make_programs
from benchmarks.report import emit
from qwen_jax.aot import hlo, timeline, topology, work
from qwen_jax.artifact import write_text
from qwen_jax.errors import UserError
from qwen_jax.train.flops import train_flops_per_token

SPLASH_CYCLES = {
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
"""Cycles of splash attention by (chip, phase, block_q, block_kv), at the block sizes of MaxText.

For one causal head of 128 over 4,096 tokens by libtpu 0.0.51's static profile (`--splash`,
2026-11-21); estimates. Those of v5p are of one of its two cores.
"""
SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
"""Matrix products per query-key pair in each phase of splash attention."""
CORES = {"v5e": 1, "v5p": 2, "v6e": 1}
"""Cores per chip."""


@dataclasses.dataclass(frozen=True)
class MaxText:
    """MaxText installation to compile with.

    Attributes:
      checkout: its repository.
      python: interpreter that can import it.
    """

    checkout: pathlib.Path
    python: str


def splash_costs(chip: topology.TpuChip, *, own_speed: bool) -> timeline.KernelCosts:
    """Returns a function that prices calls of splash attention on a chip.

    Args:
      chip: the chip.
      own_speed: price them at the share of peak that splash reaches by `SPLASH_CYCLES`, instead of
        the share that our kernels reach.

    Returns:
      function of an HLO instruction; None for other instructions.
    """

    def cost(call: hlo.Instruction) -> timeline.KernelCost | None:
        kernel = re.match(r"splash_m[hq]a_(fwd|dq|dkv)", call.name)
        if not kernel:
            return None
        phase = kernel[1]
        operands = re.search(r"operand_layout_constraints=\{(.*?\})\}", call.attributes)
        assert operands, f"{call.name} has no operand layouts"
        # Block masks come first, then queries, keys and values.
        queries = next(s for s in hlo.parse_shapes(operands[1]) if s.dtype == "bf16")
        rows, heads, length, width = queries.dims
        flops = SPLASH_PRODUCTS[phase] * 2 * rows * heads * length**2 / 2 * width
        if not own_speed:
            return timeline.KernelCost(flops, chip.kernel_efficiency)
        suffix = "" if phase == "fwd" else f"_{phase}"

        def block_size(name):
            found = re.search(rf'block_{name}{suffix}\\*": (\d+)', call.attributes)
            assert found, f"{call.name} has no block_{name}{suffix}"
            return int(found[1])

        profiled_flops = SPLASH_PRODUCTS[phase] * 2 * 4096**2 / 2 * 128
        cycles = SPLASH_CYCLES[chip.name, phase, block_size("q"), block_size("kv")]
        seconds = cycles / chip.clock / CORES[chip.name]
        return timeline.KernelCost(flops, profiled_flops / seconds / chip.peak_flops)

    return cost


def seconds_of_cycles(
    module: hlo.HloModule, chip: topology.TpuChip, kernels: timeline.KernelCosts
) -> float:
    """Returns the "cycles alone" estimate of a step in seconds.

    Cycles as the compiler estimates them, kernels at the chip's peak, no waiting for transfers.

    Args:
      module: the scheduled program.
      chip: the chip.
      kernels: FLOPs of kernels that declare none; returns None for others.
    """

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
    """Profiles splash attention again; yields a line per entry of `SPLASH_CYCLES` to compare."""
    for (chip, phase, block_q, block_kv), listed in SPLASH_CYCLES.items():
        case = {
            "chip": chip,
            "kernel": "splash",
            "blocks": (block_q, block_kv, 512),
            "length": 4096,
            "width": 128,
            "phase": "forward" if phase == "fwd" else "backward",
        }
        found = cycle_profile.run_case("benchmarks.attention_cycles", case)
        cycles = [n for name, n in found.items() if f"_{phase}_" in name] or [found]
        yield f"{chip} {phase} {[block_q, block_kv]}: {cycles[0]}, listed {listed}"


def table_figures(
    program: PodProgram, peak_bytes: int, seconds: float, executed_flops: float
) -> dict[str, Any]:
    """Returns the table's figures of a program.

    Args:
      program: the program.
      peak_bytes: peak memory of a chip.
      seconds: predicted time of a step.
      executed_flops: FLOPs that a chip executes in a step.
    """
    chip, _ = topology.parse(program.topology)
    tokens = program.rows * program.length
    model_flops = train_flops_per_token(program.model, program.length) * tokens
    return {
        "peak_gib": peak_bytes / 2**30,
        "executed_over_model": executed_flops / model_flops,
        "step_seconds": seconds,
        "tokens_per_second_per_chip": tokens / seconds,
        "model_flops_per_second_per_chip": model_flops / seconds,
        "mfu": model_flops / seconds / chip.peak_flops,
    }


def price_theirs(program: PodProgram, text: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Predicts the figures of a MaxText program from its compiled schedule.

    Args:
      program: the program.
      text: its scheduled HLO.
      facts: the JSON that `maxtext_child` has written.

    Returns:
      the figures of `table_figures`, MFU by the other ways of counting, and details by name.

    Raises:
      UserError: the program calls kernels of unknown cost.
    """
    chip, shape = topology.parse(program.topology)
    pod = topology.Pod(program.topology, chip, shape, ())
    devices = np.empty(len(facts["coordinates"]), dtype=object)
    devices[:] = [types.SimpleNamespace(coords=tuple(c)) for c in facts["coordinates"]]
    mesh = types.SimpleNamespace(devices=devices)
    module = hlo.parse(text)
    costs = splash_costs(chip, own_speed=True)
    own = timeline.predict(module, pod, mesh, costs)
    if own.unpriced_kernels:
        raise UserError(
            f"{program.name} calls {own.unpriced_kernels} kernels that neither declare their FLOPs "
            "nor are splash attention; add their costs to benchmarks/maxtext_pods.py"
        )
    at_our_speed = timeline.predict(module, pod, mesh, splash_costs(chip, own_speed=False))
    figures = table_figures(program, facts["peak_bytes"], own.seconds, own.flops)
    alone = seconds_of_cycles(module, chip, costs)
    return figures | {
        "mfu_at_our_kernels_share": figures["mfu"] * own.seconds / at_our_speed.seconds,
        "mfu_of_cycles_alone": figures["mfu"] * own.seconds / alone,
        "waiting_seconds": dict(own.waiting),
        "collective_bytes": dict(own.bytes),
        "compile_seconds": facts["compile_seconds"],
        "versions": facts["versions"],
        "xla_flags": facts["flags"],
        "remat": facts["settings"]["remat_policy"],
    }


def price_ours(program: PodProgram, text: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Returns the figures of our program from its compiled schedule.

    Args:
      program: the program.
      text: its scheduled HLO.
      facts: the report of `launch.aot`.

    Returns:
      the figures of `table_figures`, MFU by cycles alone, and details by name.
    """
    chip, _ = topology.parse(program.topology)
    prediction = facts["prediction"]
    executed_flops = facts["flops"]["executed"] / facts["devices"]
    peak_bytes, seconds = facts["memory"]["peak_bytes"], prediction["step_seconds"]
    figures = table_figures(program, peak_bytes, seconds, executed_flops)
    alone = seconds_of_cycles(hlo.parse(text), chip, lambda call: None)
    return figures | {
        "mfu_of_cycles_alone": figures["mfu"] * seconds / alone,
        "waiting_seconds": prediction["waiting_seconds"],
        "collective_bytes": {kind: c["bytes"] for kind, c in facts["collectives"].items()},
        "compile_seconds": facts["compile_seconds"],
        "versions": facts["versions"],
        "xla_flags": facts["xla_options"],
        "remat": facts["remat"],
    }


def _run_compiler(name: str, command: list[str], **options: Any) -> str:
    """Runs a command for a program and returns its output.

    Args:
      name: of the program, for the error.
      command: the command.
      **options: for `subprocess.run`.

    Raises:
      UserError: it failed; has the last line of its error output.
    """
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | topology.ENVIRONMENT
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, **options
    )
    if done.returncode:
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise UserError(f"{name} was not compiled: {reason[:300]}")
    return done.stdout


def compile_theirs(program: PodProgram, stem: pathlib.Path, maxtext: MaxText) -> None:
    """Compiles a MaxText recipe with MaxText's own ahead-of-time compiler.

    Args:
      program: the program.
      stem: path without suffix of the files to write, `stem`.hlo and `stem`.json.
      maxtext: the installation.
    """
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
    _run_compiler(program.name, command, cwd=stem.parent)


def file_name(program: PodProgram) -> str:
    """Returns the name of a program's files: its name and a digest of its inputs and compiler."""
    inputs = [program.topology, program.length, program.rows, program.theirs, program.ours]
    for package in ("jax", "libtpu"):
        found = importlib.util.find_spec(package)
        inputs.append(importlib.metadata.version(package) if found else None)
    digest = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:8]
    return re.sub(r"[^\w.-]+", "_", f"{program.name}-{digest}")


def measure(program: PodProgram, folder: pathlib.Path, maxtext: MaxText) -> dict[str, Any]:
    """Returns the figures of a program, compiling it unless its files exist.

    Args:
      program: the program.
      folder: of finished compilations.
      maxtext: the installation.
    """
    stem = folder / file_name(program)
    facts, text = (stem.with_name(stem.name + end) for end in (".json", ".hlo"))
    if not facts.exists():
        logging.info("compiling %s", program.name)
        if program.theirs:
            compile_theirs(program, stem, maxtext)
        else:
            command = [sys.executable, "-m", "launch.aot", *program.ours, f"--dump_hlo={text}"]
            write_text(str(facts), _run_compiler(program.name, command))
    price = price_theirs if program.theirs else price_ours
    return price(program, text.read_text(), json.loads(facts.read_text()))


def format_table(results: dict[str, dict[str, Any]]) -> str:
    """Returns a Markdown table of figures by program; an "error" is shown instead of figures."""
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
    """Measures all programs, or with --splash profiles splash attention."""
    given = flags.FLAGS
    if given.splash:
        for line in profile_splash():
            print(line, flush=True)
        return
    if not (given.checkout and given.work):
        raise app.UsageError("give --checkout=DIR (MaxText's repository) and --work=DIR")
    folder = pathlib.Path(given.work)
    (folder / "scratch").mkdir(parents=True, exist_ok=True)
    maxtext = MaxText(pathlib.Path(given.checkout), given.python)
    results: dict[str, dict[str, Any]] = {}
    for program in make_programs():
        if given.only and not {program.name, program.slice} & set(given.only):
            continue
        try:
            results[program.name] = measure(program, folder, maxtext)
        except UserError as error:  # the other programs are still measured
            results[program.name] = {"error": str(error)}
    print(format_table(results))
    emit(results, given.out)


if __name__ == "__main__":
    flags.DEFINE_string("checkout", "", "Folder of MaxText's repository.")
    flags.DEFINE_string("python", sys.executable, "Interpreter that can import MaxText.")
    flags.DEFINE_string("work", "", "Folder in which finished compilations are kept.")
    flags.DEFINE_list("only", [], "Slices or names of programs to measure, instead of all.")
    flags.DEFINE_bool("splash", False, "Only profile splash attention's kernels again.")
    flags.DEFINE_string("out", "", "Also write the JSON to this file.")
    app.run(main)
