"""Static cycle profiles of TPU programs by libtpu, each made in a child process.

libtpu reads where to write a profile once, when it is loaded, so each case needs its own process.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

from qwen_jax.aot.topology import ENVIRONMENT

_ROW = re.compile(r'hlo_op_name: "([^"]*)"\s+estimated_cycles: (\d+)\s+num_equivalent_hlos: (\d+)')


def run_case(module: str, case: dict[str, Any]) -> dict[str, Any]:
    """Runs a case of a benchmark in a child process that writes a cycle profile.

    Args:
      module: benchmark module; `python -m module --case=JSON` must print its result as one line of
        JSON, the last one.
      case: JSON values, with a "chip". The child gets it with "dump", the folder of the profile,
        which `read_profile` takes.

    Returns:
      the child's result, or {"error": reason} if it failed.
    """
    with tempfile.TemporaryDirectory() as dump:
        # On v5e the profile cannot walk prefetched scalars that are in VMEM.
        no_vmem_scalars = "--xla_vf_vmem_memory_space_assignment=false"
        environment = (
            os.environ
            | ENVIRONMENT
            | {
                "JAX_PLATFORMS": "cpu",
                "LIBTPU_INIT_ARGS": f"--xla_jf_dump_static_llo_profile_to={dump} "
                + (no_vmem_scalars if case["chip"] == "v5e" else ""),
            }
        )
        command = [sys.executable, "-m", module, f"--case={json.dumps(case | {'dump': dump})}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        reasons = re.findall(r"Check failed.*|\w*Error: .*", done.stderr)
        return {"error": (reasons or ["no reason given"])[0][:120]}
    return json.loads(done.stdout.splitlines()[-1])


def read_profile(dump: str) -> list[tuple[str, int]]:
    """Returns (name, estimated cycles over all its executions) of each operation of a profile."""
    return [
        (name, int(each) * int(times))
        for path in pathlib.Path(dump).glob("*.textproto")
        for name, each, times in _ROW.findall(path.read_text(errors="replace"))
    ]
