"""Signals stop a run after the current step, on all processes at the same step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.train.preemption import Preemption
from tests import multiprocess
from tests.train.states import make_mesh


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_the_flag_and_previous_handlers_are_restored(number):
    seen = []
    before = signal.signal(number, lambda *_: seen.append("before"))
    try:
        with Preemption() as preemption:
            assert not preemption.should_stop(1)
            os.kill(os.getpid(), number)
            assert preemption.should_stop(2)
            assert preemption.should_stop(2)
        assert seen == []
        os.kill(os.getpid(), number)
        assert seen == ["before"]
    finally:
        signal.signal(number, before)


def test_a_second_ctrl_c_interrupts_at_once():
    with Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert preemption.should_stop(1)


def test_a_second_sigterm_does_not_interrupt():
    with Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.should_stop(1)


def test_outside_the_main_thread_only_request_works():
    answers = []

    def work():
        with Preemption() as preemption:
            answers.append(preemption.should_stop(1))
            preemption.request("enough")
            answers.append(preemption.should_stop(2))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert answers == [False, True]


def _train(limit: int) -> dict:
    """Runs a loop with collectives; returns when it stopped."""
    mesh = make_mesh(1, jax.device_count(), 1, 1)
    values = np.arange(jax.device_count(), dtype=np.float32)
    x = jax.make_array_from_callback(
        values.shape, jax.NamedSharding(mesh, jax.P("fsdp")), lambda index: values[index]
    )
    step_function = jax.jit(lambda x: x + jnp.sum(x) * 0)
    with jax.set_mesh(mesh), Preemption() as preemption:
        for step in range(1, limit + 1):
            x = step_function(x)
            time.sleep(0.002 * (1 + jax.process_index()))  # so that the hosts are not in lockstep
            if step == 5:
                print("running", flush=True)
            if preemption.should_stop(step):
                break
    return {"step": step, "value": float(jnp.sum(x).addressable_data(0))}


def test_sigterm_ends_a_separate_process_cleanly():
    with multiprocess.start(_train, processes=1, devices=1, limit=100_000) as group:
        group.wait_for_output(0, "running")
        group.send_signal(0, signal.SIGTERM)
        (result,) = group.wait(timeout=30)
        assert 5 <= result["step"] < 100_000
        assert "SIGTERM: stopping after this step" in group.output(0)


@pytest.mark.parametrize("victim", [0, 1])
def test_sigterm_on_one_of_two_processes_stops_both_at_the_same_step(victim):
    with multiprocess.start(_train, processes=2, devices=2, limit=100_000) as group:
        group.wait_for_output(0, "running")
        group.wait_for_output(1, "running")
        group.send_signal(victim, signal.SIGTERM)
        first, second = group.wait(timeout=60)
    assert first == second
    assert 5 <= first["step"] < 100_000


def test_two_ctrl_c_end_a_busy_program():
    code = (
        "import time\n"
        "from qwen_jax.train.preemption import Preemption\n"
        "with Preemption() as p:\n"
        "    print('ready', flush=True)\n"
        "    while True: time.sleep(0.01)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=multiprocess.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert (
            "press again to stop at once" in process.stderr.readline() + process.stderr.readline()
        )
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=10)
    finally:
        process.kill()
    assert "KeyboardInterrupt" in errors
    assert process.returncode != 0
