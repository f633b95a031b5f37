"""The decoding benchmark: both sides answer alike, and what is timed is what it says."""

import numpy as np
import pytest

from benchmarks import generate_cpu as benchmark


class Clock:
    """A side whose answer of n tokens takes 5 + n·speed seconds."""

    def __init__(self, now, speed):
        self.now, self.speed = now, speed

    def generate(self, prompts, new):
        self.now[0] += 5 + new * self.speed
        return np.zeros((len(prompts), new), int)


def test_speed_is_that_of_the_steps_after_the_first(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(benchmark.time, "process_time", lambda: now[0] / 2)
    sides = {"qwen_jax": Clock(now, 0.1), "transformers": Clock(now, 0.3)}
    found = benchmark.measure(sides, np.zeros((8, 4), int), new=11, rounds=3)
    assert found["qwen_jax"]["tokens_per_second"] == pytest.approx(80)
    assert found["qwen_jax"]["tokens_per_cpu_second"] == pytest.approx(160)
    assert found["speed_ratio"] == pytest.approx(3) and found["cpu_ratio"] == pytest.approx(3)
    assert found["equal_ids"] == 1


@pytest.mark.slow
def test_both_sides_give_the_same_ids(tmp_path):
    benchmark.make_folder(str(tmp_path / "model"), vocab=320)
    prompts = np.random.default_rng(0).integers(0, 320, (1, benchmark.PROMPT))
    ours = benchmark.Ours.load(str(tmp_path / "model"), 5)
    theirs = benchmark.Theirs.load(str(tmp_path / "model"))
    np.testing.assert_array_equal(ours.generate(prompts, 5), theirs.generate(prompts, 5))
