"""Start-up of several processes: errors name missing processes in time, and nothing hangs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time

import jax
import pytest

from qwen_jax.errors import UserError
from qwen_jax.parallel import distributed, launchers
from qwen_jax.parallel.rendezvous import wait_for_all
from tests import multiprocess

NAMES = launchers.VARIABLES


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for name in os.environ:
        if name.startswith(("JAX_COORD", "JAX_NUM_P", "JAX_PROC", "SLURM", "OMPI", "MEGASCALE")):
            monkeypatch.delenv(name)


def _run_barrier(
    reports: list[tuple[int, int]], timeout_s: float = 10.0, before=None, hosts=()
) -> list[str]:
    """Runs `wait_for_all` for (index, count) pairs in threads; returns their errors, or ""."""
    address = f"127.0.0.1:{multiprocess.free_port()}"
    messages = ["?"] * len(reports)

    def one(place: int, index: int, count: int) -> None:
        try:
            wait_for_all(address, count, index, timeout_s=timeout_s, hosts=hosts)
            messages[place] = ""
        except UserError as error:
            messages[place] = str(error).replace(address, "ADDRESS")

    threads = [
        threading.Thread(target=one, args=(place, *report)) for place, report in enumerate(reports)
    ]
    for thread in threads:
        thread.start()
    if before:
        before(address)
    for thread in threads:
        thread.join(timeout_s + 15)
    return messages


def test_initialize_does_nothing_for_one_process():
    distributed.initialize()
    distributed.initialize("127.0.0.1:1", 1, 0)
    assert not jax.distributed.is_initialized()
    assert jax.process_count() == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("10.0.0.2:1234", 2, None), "JAX_PROCESS_ID is not set, but one of"),
        ((None, None, 1), "JAX_COORDINATOR_ADDRESS is not set"),
        (("10.0.0.2", 2, 0), r"Coordinator address '10.0.0.2' must be host:port"),
        (("10.0.0.2:http", 2, 0), "must be host:port"),
        (("10.0.0.2:1234", 2, 2), "Process id 2 of 2 processes must be from 0 to 1"),
        (("10.0.0.2:1234", "two", 0), "JAX_NUM_PROCESSES='two' must be an integer"),
    ],
)
def test_malformed_settings_are_refused_with_their_name(monkeypatch, arguments, message):
    with pytest.raises(UserError, match=message):
        distributed.initialize(*arguments)
    for name, value in zip(NAMES, arguments, strict=True):
        if value is not None:
            monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match=message):
        distributed.initialize()


def test_barrier_passes_in_any_order_and_ignores_foreign_connections():
    def connect_foreign_clients(address: str) -> None:
        host, port = address.split(":")
        for data in (b"", b"GET / HTTP/1.1\r\n\r\n from a browser"):
            for _ in range(50):
                try:
                    with socket.create_connection((host, int(port))) as line:
                        line.sendall(data)
                    break
                except OSError:
                    time.sleep(0.01)

    assert _run_barrier([(2, 3), (0, 3), (1, 3)], before=connect_foreign_clients) == ["", "", ""]


def test_all_processes_receive_the_indices_of_missing_ones():
    begin = time.monotonic()
    messages = _run_barrier([(0, 4), (2, 4)], timeout_s=1.0)
    wanted = (
        "After 1 s at ADDRESS, 2 of 4 processes had not connected: 1, 3; check that they started "
        "and can reach this address."
    )
    assert messages == [wanted, wanted]
    assert time.monotonic() - begin < 10


def test_error_names_the_hosts_of_missing_processes():
    (message,) = _run_barrier([(0, 3)], timeout_s=0.3, hosts=("node1", "node2", "node3"))
    assert "2 of 3 processes had not connected: 1 (host node2), 2 (host node3); check" in message


def test_error_names_an_unreachable_process_0():
    (message,) = _run_barrier([(1, 2)], timeout_s=0.5)
    assert message.startswith("Process 1 did not reach process 0 at ADDRESS within 0.5 s (")


@pytest.mark.parametrize(
    ("reports", "message"),
    [
        ([(0, 3), (1, 2)], "Process 1 expects 2 processes and process 0 expects 3"),
        ([(0, 3), (1, 3), (1, 3)], "Process id 1 was used twice at ADDRESS"),
    ],
)
def test_inconsistent_numbers_of_processes_fail_at_once(reports, message):
    begin = time.monotonic()
    messages = _run_barrier(reports, timeout_s=20.0)
    assert all(message in text for text in messages), messages
    assert time.monotonic() - begin < 10


def test_error_names_a_port_in_use():
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as taken:
        address = f"localhost:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match=f"Process 0 cannot listen at {address}"):
            wait_for_all(address, 2, 0, timeout_s=1.0)


def _start_from_the_environment() -> int:
    distributed.initialize(timeout_s=60)
    distributed.initialize()  # again: nothing
    values = distributed.all_gather_text(f"process {jax.process_index()}")
    assert values == ["process 0", "process 1"]
    assert distributed.on_first_process(lambda: {"by": jax.process_index()}) == {"by": 0}
    with pytest.raises(UserError, match="only here"):
        distributed.on_first_process(_raise_user_error)
    with pytest.raises((ZeroDivisionError, RuntimeError), match="division by zero"):
        distributed.on_first_process(lambda: 1 / 0)
    if jax.process_index() == 1:
        raise RuntimeError("raised on process 1 only")
    time.sleep(100)
    return 0


def _exit_alone() -> None:
    if jax.process_index() == 1:
        distributed.end_process(2)
    time.sleep(100)


def _raise_user_error() -> None:
    raise UserError("only here" if jax.process_index() == 0 else "nowhere")


def test_two_processes_start_from_the_environment_and_end_together(monkeypatch):
    """An exception in one process ends the job within seconds while the other still works."""
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", f"127.0.0.1:{multiprocess.free_port()}")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    begin = time.monotonic()
    with (
        multiprocess.start(
            _start_from_the_environment, processes=2, devices=1, distributed=False, numbered=True
        ) as group,
        pytest.raises(multiprocess.ProcessFailed, match="raised on process 1 only"),
    ):
        group.wait(timeout=60)
    assert time.monotonic() - begin < 60


def test_process_that_exits_alone_does_not_wait_for_others():
    begin = time.monotonic()
    with (
        multiprocess.start(_exit_alone, processes=2, devices=1) as group,
        pytest.raises(multiprocess.ProcessFailed, match=r"exit statuses \[.*, 2\]"),
    ):
        group.wait(timeout=60)
    assert time.monotonic() - begin < 60


def test_end_process_of_a_single_process_exits_normally():
    with pytest.raises(SystemExit) as caught:
        distributed.end_process(2)
    assert caught.value.code == 2


_SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "localhost,node[02-03]",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "1(x3)",
}
_TPU = {"TPU_WORKER_HOSTNAMES": "localhost,pod-slice-0-1.pod,pod-slice-0-2.pod"}


def _command(environment: dict[str, str]) -> subprocess.Popen:
    """Starts a program that calls `launch.program.run` with a start-up timeout of 3 s."""
    program = (
        "import jax; jax.config.update('jax_platforms', 'cpu')\n"
        "from absl import flags\n"
        "from launch import program\n"
        "program.run(lambda: print('joined', jax.process_count()))\n"
    )
    clean = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    return subprocess.Popen(
        [sys.executable, "-c", program, "--start_timeout=3"],
        cwd=multiprocess.ROOT,
        env={**clean, "PYTHONPATH": str(multiprocess.ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shared", "number", "missing"),
    [
        (_SLURM, "SLURM_PROCID", "1 (host node02)"),
        (_TPU, "TPU_WORKER_ID", "1 (host pod-slice-0-1.pod)"),
    ],
    ids=["SLURM", "TPU pod"],
)
def test_two_of_three_processes_exit_naming_the_host_of_the_third(shared, number, missing):
    shared = {**shared, "JAX_COORDINATOR_PORT": str(multiprocess.free_port())}
    begin = time.monotonic()
    running = [_command({**shared, number: index}) for index in ("0", "2")]
    try:
        ends = [(p.communicate(timeout=60), p.returncode) for p in running]
    finally:
        for process in running:
            process.kill()
    assert time.monotonic() - begin < 60
    for (out, err), status in ends:
        assert status == 69 and "joined" not in out, err
        last = err.strip().splitlines()[-1]
        assert last.startswith("error: After 3 s at localhost:"), last
        assert f"1 of 3 processes had not connected: {missing}; check that they started" in last
        assert "Traceback" not in err
