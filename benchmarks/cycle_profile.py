"""libtpu's static cycle profile of a program, made in a process of its own for each case.

libtpu reads where to write it once, when it is loaded.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

from qwen_jax.aot.topology import ENVIRONMENT

_ROW = re.compile(r'hlo_op_name: "([^"]*)"\s+estimated_cycles: (\d+)\s+num_equivalent_hlos: (\d+)')


def child(module: str, case: dict) -> dict:
    """What `python -m module --case=…` prints last as JSON, or {"error": the reason}.

    The case has its `chip`; the child gets it with `dump`, the folder of the profile, for `cycles`.
    """
    with tempfile.TemporaryDirectory() as dump:
        environment = (
            os.environ
            | ENVIRONMENT
            | {
                "JAX_PLATFORMS": "cpu",
                # On v5e the profile can't walk prefetched scalars that lie in VMEM.
                "LIBTPU_INIT_ARGS": f"--xla_jf_dump_static_llo_profile_to={dump} "
                + ("--xla_vf_vmem_memory_space_assignment=false" if case["chip"] == "v5e" else ""),
            }
        )
        command = [sys.executable, "-m", module, f"--case={json.dumps(case | {'dump': dump})}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        reasons = re.findall(r"Check failed.*|\w*Error: .*", done.stderr)
        return {"error": (reasons or ["no reason given"])[0][:120]}
    return json.loads(done.stdout.splitlines()[-1])


def cycles(dump: str) -> list[tuple[str, int]]:
    """Operations of the compiled program and the cycles they are estimated to take in all."""
    return [
        (name, int(each) * int(times))
        for path in pathlib.Path(dump).glob("*.textproto")
        for name, each, times in _ROW.findall(path.read_text(errors="replace"))
    ]
