"""Registers and spills of the Hopper attention kernels, compiled for an H200 without a GPU.

    python -m benchmarks.gpu_spills                     # table; fails above the limits below
    python -m benchmarks.gpu_spills --width 128 --out spills.json

Needs the CUDA plugin of the installed jax and NVIDIA's programs:

    pip install -r requirements/aot-gpu.txt nvidia-cuda-nvdisasm nvidia-cuda-cuobjdump

Proves that the kernels compile to machine code, and how many bytes their threads keep in local
memory. It says nothing about results or speed. The exit status is 1 if a kernel exceeds its limit
or the assembler warns, 2 if the plugin is missing.

Prints a table and, as its last line, one JSON object, which --out saves.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import pathlib
import re
import sys
import tempfile
from typing import Any

from qwen_jax.errors import UserError

LIMITS = {
    "flash_forward": 16,
    "flash_backward": 280,
    "flash_backward_dkdv": 64,
    "flash_backward_dq": 96,
}
"""Bytes of spill stores allowed: flash_backward spills addresses, the others outside the loops."""

_KERNEL_NAMES = {"new_body": "flash_backward"}
"""Kernels by the name that jax gives them when they modify one of their operands."""


@dataclasses.dataclass(frozen=True)
class CompileCase:
    """Options to compile the attention kernels for.

    Attributes:
      width: head dimension.
      segments: whether there are segment ids.
      window: whether there is a window.
      grad_dtype: dtype of the gradients; None: that of the operands.
      reproducible: compile the backward kernels with bitwise reproducible results.
    """

    width: int
    segments: bool
    window: bool
    grad_dtype: str | None = None
    reproducible: bool = False


@dataclasses.dataclass(frozen=True)
class SpillReport:
    """What the assembler reports of one kernel; bytes are per thread.

    Attributes:
      kernel: name of the kernel.
      case: what it was compiled for.
      registers: registers per thread at launch.
      spill_stores: bytes stored to local memory.
      spill_loads: bytes loaded from local memory.
      wgmma: number of wgmma instructions.
      warnings: warnings of the assembler other than spills.
    """

    kernel: str
    case: CompileCase
    registers: int
    spill_stores: int
    spill_loads: int
    wgmma: int
    warnings: tuple[str, ...]

    @property
    def exceeds_limit(self) -> bool:
        """Returns whether the kernel spills more than `LIMITS` allows, or has warnings."""
        return self.spill_stores > LIMITS[self.kernel] or bool(self.warnings)


def _compile(case: CompileCase, mesh: Any) -> None:
    """Compiles the kernels of a case for the device of a mesh; the assembler dumps its output."""
    import jax
    import jax.numpy as jnp

    from qwen_jax.kernels.gpu.flash import KERNEL
    from qwen_jax.kernels.mask import make_mask

    sharding = jax.sharding.NamedSharding(mesh, jax.P())

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    q, k = array(2, 4096, 8, case.width), array(2, 4096, 4, case.width)
    statistics, ids = array(2, 8, 4096, dtype=jnp.float32), array(2, 4096, dtype=jnp.int32)

    def run(q, k, v, lse, d_out, delta, ids):
        ids = ids if case.segments else None
        mask = make_mask(None, ids, ids, 1024 if case.window else None)
        scale = case.width**-0.5
        gradients = KERNEL.backward(q, k, v, mask, scale, lse, d_out, delta, case.grad_dtype)
        return gradients if case.reproducible else (KERNEL.forward(q, k, v, mask, scale), gradients)

    os.environ["XLA_FLAGS"] = "--xla_gpu_deterministic_ops=true" if case.reproducible else ""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        jax.jit(run).lower(q, k, k, statistics, q, statistics, ids).compile()


def _read_dumps(folder: pathlib.Path, case: CompileCase) -> list[SpillReport]:
    """Returns a report for each kernel dumped in a folder, and deletes the dumps."""
    reports = []
    for path in sorted(folder.rglob("*.ptxas")):
        text, kernel = path.read_text(), path.stem.rsplit("_", 1)[0]
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
        registers = re.search(r"Used (\d+) registers", text)
        assert spills and registers, f"{path} is no output of ptxas"
        code = path.with_suffix(".sass_ctrl")
        wgmma = len(re.findall("HGMMA", code.read_text())) if code.exists() else 0
        # Spills are counted. Anything else (products that wait for one another, registers that are
        # not reassigned) is a finding; ptxas prints the former as information.
        warnings = re.findall(r".*(?:warning|Performance Loss).*", text)
        reports.append(
            SpillReport(
                kernel=_KERNEL_NAMES.get(kernel, kernel),
                case=case,
                registers=int(registers[1]),
                spill_stores=int(spills[1]),
                spill_loads=int(spills[2]),
                wgmma=wgmma,
                warnings=tuple(x for x in warnings if "spilled" not in x),
            )
        )
    for path in folder.rglob("*"):
        if path.is_file():
            path.unlink()
    return reports


def measure(cases: list[CompileCase]) -> list[SpillReport]:
    """Compiles each case and returns a report per kernel.

    Raises:
      UserError: the CUDA plugin is not installed.
    """
    folder = pathlib.Path(tempfile.mkdtemp(prefix="gpu_spills_"))
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["MOSAIC_GPU_DUMP_TO"] = str(folder)
    import jax
    import numpy as np

    from qwen_jax.aot.nodes import describe

    mesh = jax.sharding.Mesh(np.array(describe("h200:1").devices), ("x",))
    reports = []
    for case in cases:
        _compile(case, mesh)
        reports += _read_dumps(folder, case)
    return reports


def make_cases(widths: tuple[int, ...]) -> list[CompileCase]:
    """Returns the cases to compile for each head dimension."""
    return [
        case
        for width in widths
        for case in (
            CompileCase(width, segments=False, window=False),
            CompileCase(width, segments=True, window=False),
            CompileCase(width, segments=True, window=True, grad_dtype="float32"),
            CompileCase(width, segments=False, window=False, reproducible=True),
            CompileCase(width, segments=True, window=True, grad_dtype="float32", reproducible=True),
        )
    ]


def print_table(reports: list[SpillReport]) -> None:
    """Prints a line per kernel and case."""
    print(f"{'kernel':24}{'H':>4} segments window  registers  spill B (stores/loads)  wgmma")
    for r in reports:
        print(
            f"{r.kernel:24}{r.case.width:4} {r.case.segments!s:8} {r.case.window!s:7}"
            f"{r.registers:9}{r.spill_stores:12}/{r.spill_loads}{r.wgmma:17}"
            f"{'  ABOVE THE LIMIT' if r.exceeds_limit else ''}{' '.join(r.warnings)}"
        )


def main() -> int:
    """Compiles all cases and prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, choices=(64, 128), help="one head dimension only")
    parser.add_argument(
        "--out",
        "--json",
        dest="out",
        type=pathlib.Path,
        help="also write the JSON to this file",
    )
    arguments = parser.parse_args()
    widths = (arguments.width,) if arguments.width else (128, 64)
    try:
        reports = measure(make_cases(widths))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    import jax

    from benchmarks.report import emit

    print(f"jax {jax.__version__}, {datetime.date.today()}, sm_90a, no GPU involved")
    print_table(reports)
    records = [dataclasses.asdict(r) for r in reports]
    emit({"jax": jax.__version__, "reports": records}, str(arguments.out or ""))
    return int(any(r.exceeds_limit for r in reports))


if __name__ == "__main__":
    sys.exit(main())
