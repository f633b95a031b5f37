"""What sbatch, srun and scontrol do, on one machine: enough to run a job script for real.

`install` puts commands of these names into a folder for PATH. The job has two nodes of one task
each, both this machine. The state of the "cluster" is files in that folder:

  requeued        written by `scontrol requeue`; sbatch runs the script again when it is done
  terminate_after text after which, in the output of task 0, srun sends SIGTERM to all tasks once
"""

from __future__ import annotations

import os
import pathlib
import re
import signal
import stat
import subprocess
import sys
import time

JOB = "4242"
NODES = ("localhost", "node2")


def install(folder: pathlib.Path) -> None:
    """Writes the three commands."""
    for name in ("sbatch", "srun", "scontrol"):
        path = folder / name
        path.write_text(
            f'#!/bin/bash\nexec {sys.executable} {__file__} {name} "$(dirname "$0")" "$@"\n'
        )
        path.chmod(path.stat().st_mode | stat.S_IEXEC)


def sbatch(folder: pathlib.Path, arguments: list[str]) -> int:
    """Runs the script, and again for as long as it was put back in the queue."""
    (script,) = arguments
    restarts = 0
    while True:
        (folder / "requeued").unlink(missing_ok=True)
        environment = {"SLURM_JOB_ID": JOB, "SLURM_NTASKS": "2"}
        if restarts:
            environment["SLURM_RESTART_COUNT"] = str(restarts)
        status = subprocess.run(["bash", script], env=os.environ | environment).returncode
        if not (folder / "requeued").exists():
            return status
        restarts += 1


def scontrol(folder: pathlib.Path, arguments: list[str]) -> int:
    if arguments != ["requeue", JOB]:
        return 1
    (folder / "requeued").write_text("")
    return 0


def srun(folder: pathlib.Path, arguments: list[str]) -> int:
    """Starts the command once per node with what SLURM would tell it; the highest status."""
    options = dict(a[2:].partition("=")[::2] for a in _leading_options(arguments))
    command = arguments[len(options) :]
    tasks, outputs = [], []
    for task in range(len(NODES)):
        known = {"%": "%", "j": JOB, "t": str(task)}
        output = re.sub(r"%(.)", lambda m, known=known: known[m[1]], options["output"])
        outputs.append(pathlib.Path(output))
        environment = {
            "SLURM_STEP_NODELIST": ",".join(NODES),
            "SLURM_STEP_NUM_TASKS": str(len(NODES)),
            "SLURM_STEP_TASKS_PER_NODE": f"1(x{len(NODES)})",
            "SLURM_PROCID": str(task),
            "SLURM_NODEID": str(task),
            "SLURM_LOCALID": "0",
            "SLURMD_NODENAME": NODES[task],
        }
        with open(output, options["open-mode"][0]) as sink:
            tasks.append(
                subprocess.Popen(
                    command, env=os.environ | environment, stdout=sink, stderr=subprocess.STDOUT
                )
            )
    trigger = folder / "terminate_after"
    while any(task.poll() is None for task in tasks):
        time.sleep(0.005)
        if trigger.exists() and re.search(trigger.read_text(), outputs[0].read_text()):
            trigger.unlink()
            for task in tasks:
                task.send_signal(signal.SIGTERM)
    return max(task.returncode if task.returncode >= 0 else 128 for task in tasks)


def _leading_options(arguments: list[str]) -> list[str]:
    end = next(i for i, argument in enumerate(arguments) if not argument.startswith("--"))
    return arguments[:end]


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[1]](pathlib.Path(sys.argv[2]), sys.argv[3:]))
