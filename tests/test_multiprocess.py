"""The multi-process test helper joins processes and fails on errors and timeouts."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import multiprocess


def _sum_over_all_devices(scale: float) -> dict:
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    values = np.arange(jax.device_count(), dtype=np.float32) * scale
    array = jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])
    with jax.set_mesh(mesh):
        total = jax.jit(lambda x: jnp.sum(x))(array)
    return {
        "process": jax.process_index(),
        "local": jax.local_device_count(),
        "total": float(total),
    }


def _fail_in_the_second() -> None:
    if jax.process_index() == 1:
        raise RuntimeError("the second one fails on purpose")
    time.sleep(60)


def _sleep_forever() -> None:
    print("asleep")
    time.sleep(600)


def test_two_processes_compute_one_sum():
    results = multiprocess.run(_sum_over_all_devices, processes=2, devices=4, scale=0.5)
    assert results == [
        {"process": 0, "local": 4, "total": 14.0},
        {"process": 1, "local": 4, "total": 14.0},
    ]


def test_failing_process_fails_the_run_at_once_with_its_output():
    begin = time.monotonic()
    with pytest.raises(multiprocess.ProcessFailed, match="the second one fails on purpose"):
        multiprocess.run(_fail_in_the_second, processes=2, devices=1)
    assert time.monotonic() - begin < 30


def test_process_that_never_ends_is_killed_at_the_timeout():
    with multiprocess.start(_sleep_forever, processes=1, devices=1) as group:
        group.wait_for_output(0, "asleep")
        with pytest.raises(multiprocess.ProcessFailed, match=r"no end after 0 s"):
            group.wait(timeout=0.1)
    assert group.processes[0].poll() == -9
