"""Start-up of several processes: who is missing is named, in time; nothing hangs."""

from __future__ import annotations

import socket
import threading
import time

import jax
import pytest

from qwen_jax.errors import UserError
from qwen_jax.parallel import distributed
from tests import multiprocess

NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for name in (*NAMES, *distributed._CLUSTERS):
        monkeypatch.delenv(name, raising=False)


def _meet_all(reports: list[tuple[int, int]], timeout_s: float = 10.0, before=None) -> list[str]:
    """Runs `meet` for (index, count) pairs in threads; returns what each one raised, or ""."""
    address = f"127.0.0.1:{multiprocess.free_port()}"
    messages = ["?"] * len(reports)

    def one(place: int, index: int, count: int) -> None:
        try:
            distributed.meet(address, count, index, timeout_s=timeout_s)
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


def test_one_process_needs_no_start_up():
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
        (("10.0.0.2:1234", "two", 0), "JAX_NUM_PROCESSES='two' must be a whole number"),
    ],
)
def test_malformed_settings_are_refused_by_name(monkeypatch, arguments, message):
    with pytest.raises(UserError, match=message):
        distributed.initialize(*arguments)
    for name, value in zip(NAMES, arguments, strict=True):
        if value is not None:
            monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match=message):
        distributed.initialize()


def test_all_present_meet_in_any_order_and_among_strangers():
    def strangers(address: str) -> None:
        host, port = address.split(":")
        for data in (b"", b"GET / HTTP/1.1\r\n\r\n some browser"):
            for _ in range(50):
                try:
                    with socket.create_connection((host, int(port))) as line:
                        line.sendall(data)
                    break
                except OSError:
                    time.sleep(0.01)

    assert _meet_all([(2, 3), (0, 3), (1, 3)], before=strangers) == ["", "", ""]


def test_a_missing_process_is_named_to_all_the_others():
    begin = time.monotonic()
    messages = _meet_all([(0, 4), (2, 4)], timeout_s=1.0)
    wanted = (
        "After 1 s at ADDRESS, 2 of 4 processes had not reported: 1, 3; see whether they started "
        "and reach this address."
    )
    assert messages == [wanted, wanted]
    assert time.monotonic() - begin < 10


def test_a_missing_coordinator_is_named():
    (message,) = _meet_all([(1, 2)], timeout_s=0.5)
    assert message.startswith("Process 1 did not reach process 0 at ADDRESS within 0.5 s (")


@pytest.mark.parametrize(
    ("reports", "message"),
    [
        ([(0, 3), (1, 2)], "Process 1 expects 2 processes and process 0 expects 3"),
        ([(0, 3), (1, 3), (1, 3)], "Process id 1 was used twice at ADDRESS"),
    ],
)
def test_processes_that_disagree_are_told_at_once(reports, message):
    begin = time.monotonic()
    messages = _meet_all(reports, timeout_s=20.0)
    assert all(message in text for text in messages), messages
    assert time.monotonic() - begin < 10


def test_a_port_in_use_is_named():
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as taken:
        address = f"localhost:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match=f"Process 0 cannot listen at {address}"):
            distributed.meet(address, 2, 0, timeout_s=1.0)


def _start_from_the_environment() -> int:
    distributed.initialize(timeout_s=60)
    distributed.initialize()  # again: nothing
    values = distributed.from_all_processes(f"process {jax.process_index()}")
    assert values == ["process 0", "process 1"]
    assert distributed.on_first_process(lambda: {"by": jax.process_index()}) == {"by": 0}
    with pytest.raises(UserError, match="only here"):
        distributed.on_first_process(_raise_user_error)
    with pytest.raises((ZeroDivisionError, RuntimeError), match="division by zero"):
        distributed.on_first_process(lambda: 1 / 0)
    if jax.process_index() == 1:
        raise RuntimeError("dies of its own")
    time.sleep(100)
    return 0


def _exit_alone() -> None:
    if jax.process_index() == 1:
        distributed.end_process(2)
    time.sleep(100)


def _raise_user_error() -> None:
    raise UserError("only here" if jax.process_index() == 0 else "nowhere")


def test_two_processes_join_from_the_environment_and_end_together(monkeypatch):
    """One dies of an exception while the other works: the job is over in seconds, not minutes."""
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", f"127.0.0.1:{multiprocess.free_port()}")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    begin = time.monotonic()
    with (
        multiprocess.start(
            _start_from_the_environment, processes=2, devices=1, distributed=False, numbered=True
        ) as group,
        pytest.raises(multiprocess.ProcessFailed, match="dies of its own"),
    ):
        group.wait(timeout=60)
    assert time.monotonic() - begin < 60


def test_a_process_that_exits_alone_does_not_wait_for_the_others():
    begin = time.monotonic()
    with (
        multiprocess.start(_exit_alone, processes=2, devices=1) as group,
        pytest.raises(multiprocess.ProcessFailed, match=r"exit statuses \[.*, 2\]"),
    ):
        group.wait(timeout=60)
    assert time.monotonic() - begin < 60


def test_one_process_exits_as_usual():
    with pytest.raises(SystemExit) as caught:
        distributed.end_process(2)
    assert caught.value.code == 2
