"""Compiles the Hopper kernels to machine code for an H200 and counts registers and spills.

    python -m benchmarks.gpu_spills                     # table; fails above the limits below
    python -m benchmarks.gpu_spills --width 128 --json spills.json

Needs no GPU. It needs the CUDA plugin of the installed jax and NVIDIA's programs:

    pip install -r requirements/aot-gpu.txt nvidia-cuda-nvdisasm nvidia-cuda-cuobjdump

What it proves: the kernels build, and how many bytes their threads keep in local memory. It says
nothing about results or speed.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import re
import sys
import tempfile

from qwen_jax.errors import UserError

LIMITS = {
    "flash_forward": 16,
    "flash_backward": 280,
    "flash_backward_dkdv": 64,
    "flash_backward_dq": 96,
}
"""Bytes of spill stores allowed: flash_backward's are addresses, the others' outside the loops."""

_NAMES = {"new_body": "flash_backward"}
"""What jax calls a kernel that changes one of its operands."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One set of options to compile for."""

    width: int
    segments: bool
    window: bool
    grad_dtype: str | None = None
    reproducible: bool = False  # the backward kernels that give the same bits each time


@dataclasses.dataclass(frozen=True)
class Report:
    """What the assembler said of one kernel; bytes are per thread."""

    kernel: str
    case: Case
    registers: int
    spill_stores: int
    spill_loads: int
    wgmma: int
    warnings: tuple[str, ...]


def _compile(case: Case, mesh) -> None:
    import jax
    import jax.numpy as jnp

    from qwen_jax.kernels.gpu.flash import KERNEL
    from qwen_jax.kernels.mask import make_mask

    place = jax.sharding.NamedSharding(mesh, jax.P())

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    q, k = array(2, 4096, 8, case.width), array(2, 4096, 4, case.width)
    numbers, ids = array(2, 8, 4096, dtype=jnp.float32), array(2, 4096, dtype=jnp.int32)

    def run(q, k, v, lse, d_out, delta, ids):
        ids = ids if case.segments else None
        mask = make_mask(None, ids, ids, 1024 if case.window else None)
        scale = case.width**-0.5
        gradients = KERNEL.backward(q, k, v, mask, scale, lse, d_out, delta, case.grad_dtype)
        return gradients if case.reproducible else (KERNEL.forward(q, k, v, mask, scale), gradients)

    os.environ["XLA_FLAGS"] = "--xla_gpu_deterministic_ops=true" if case.reproducible else ""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        jax.jit(run).lower(q, k, k, numbers, q, numbers, ids).compile()


def _read(folder: pathlib.Path, case: Case) -> list[Report]:
    reports = []
    for path in sorted(folder.rglob("*.ptxas")):
        text, kernel = path.read_text(), path.stem.rsplit("_", 1)[0]
        kernel = _NAMES.get(kernel, kernel)
        stores, loads = re.search(
            r"(\d+) bytes spill stores, (\d+) bytes spill loads", text
        ).groups()
        registers = int(re.search(r"Used (\d+) registers", text).group(1))
        code = path.with_suffix(".sass_ctrl")
        wgmma = len(re.findall("HGMMA", code.read_text())) if code.exists() else 0
        # Spills are counted; anything else (products one after another, registers not given over)
        # is a finding. ptxas calls the former information.
        warnings = re.findall(r".*(?:warning|Performance Loss).*", text)
        warnings = [x for x in warnings if "spilled" not in x]
        reports.append(
            Report(kernel, case, registers, int(stores), int(loads), wgmma, tuple(warnings))
        )
    for path in folder.rglob("*"):
        if path.is_file():
            path.unlink()
    return reports


def measure(cases: list[Case]) -> list[Report]:
    """Compiles each case; one report a kernel. Raises UserError without the CUDA plugin."""
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
        reports += _read(folder, case)
    return reports


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, choices=(64, 128), help="one head dimension only")
    parser.add_argument("--json", type=pathlib.Path, help="write the reports here")
    arguments = parser.parse_args()
    widths = (arguments.width,) if arguments.width else (128, 64)
    cases = [
        Case(width, *options)
        for width in widths
        for options in (
            (False, False),
            (True, False),
            (True, True, "float32"),
            (False, False, None, True),
            (True, True, "float32", True),
        )
    ]
    try:
        reports = measure(cases)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    import jax

    print(f"jax {jax.__version__}, {datetime.date.today()}, sm_90a, no GPU involved")
    print(f"{'kernel':24}{'H':>4} segments window  registers  spill B (stores/loads)  wgmma")
    failed = False
    for r in reports:
        over = r.spill_stores > LIMITS[r.kernel] or bool(r.warnings)
        failed |= over
        print(
            f"{r.kernel:24}{r.case.width:4} {r.case.segments!s:8} {r.case.window!s:7}"
            f"{r.registers:9}{r.spill_stores:12}/{r.spill_loads}{r.wgmma:17}"
            f"{'  ABOVE THE LIMIT' if over else ''}{' '.join(r.warnings)}"
        )
    if arguments.json:
        records = [dataclasses.asdict(r) for r in reports]
        arguments.json.write_text(
            json.dumps({"jax": jax.__version__, "reports": records}, indent=1)
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
