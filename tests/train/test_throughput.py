"""Throughput, remaining time and memory in closed-form cases."""

from __future__ import annotations

import pathlib
import re

import pytest

from qwen_jax.progress import format_count, format_duration
from qwen_jax.train.throughput import (
    Eta,
    Throughput,
    memory_stats,
)


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_throughput_excludes_compilation_and_is_a_moving_average():
    clock = Clock()
    pace = Throughput(window=4, clock=clock)
    clock.now = 100.0  # compilation
    pace.add(1000)
    assert pace.per_second() is None
    for seconds, expected in ((1, 1000.0), (1, 1000.0), (2, 750.0)):
        clock.now += seconds
        pace.add(1000)
        assert pace.per_second() == pytest.approx(expected)
    for _ in range(4):  # the window of 4 steps now holds only these
        clock.now += 0.5
        pace.add(1000)
    assert pace.per_second() == pytest.approx(2000.0)


def test_throughput_excludes_time_before_a_restart():
    clock = Clock()
    pace = Throughput(clock=clock)
    pace.restart()
    for _ in range(3):
        clock.now += 1
        pace.add(10)
    clock.now += 500
    pace.restart()
    assert pace.per_second() is None
    clock.now += 2
    pace.add(10)
    assert pace.per_second() == pytest.approx(5.0)


def test_eta_excludes_compilation_and_steps_before_a_resume():
    clock = Clock()
    eta = Eta(1000, clock=clock)
    clock.now = 60.0
    assert eta.seconds_left(500) is None  # resumed at 499, first step compiled
    clock.now += 20
    assert eta.seconds_left(510) == pytest.approx(2.0 * 490)
    clock.now += 980
    assert eta.seconds_left(1000) == 0.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m 00s"), (200, "3m 20s"), (18_420, "5h 07m"),
     (187_200, "2d 04h")],
)  # fmt: skip
def test_durations_are_formatted_like_a_clock(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(950, "950"), (9_999, "9999"), (12_345, "12.3k"), (990_000, "990k"), (4_560_000, "4.56M"),
     (7_890_000_000, "7.89B"), (3e12, "3.00T"), (0.5, "0.5"), (-12_345, "-12.3k")],
)  # fmt: skip
def test_counts_are_short(value, text):
    assert format_count(value) == text


def test_host_memory_equals_that_of_the_operating_system():
    status = pathlib.Path("/proc/self/status").read_text()
    kernel = int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) / 1024**2
    assert memory_stats()["memory/host_peak_gib"] == pytest.approx(kernel, rel=0.1)


def test_device_memory_is_the_largest_of_the_devices(monkeypatch):
    import jax

    class Device:
        def __init__(self, peak):
            self.peak = peak

        def memory_stats(self):
            return {"peak_bytes_in_use": self.peak * 2**30, "bytes_limit": 16 * 2**30}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device(3), Device(5)])
    stats = memory_stats()
    assert stats["memory/device_peak_gib"] == 5.0
    assert stats["memory/device_limit_gib"] == 16.0
    assert "memory/device_used_gib" not in stats
