"""The CPU decoding benchmark times decode steps only, and both sides generate the same ids."""

import numpy as np
import pytest

from benchmarks import generate_cpu as benchmark


class FakeGenerator:
    """A side whose output of n tokens takes 5 + n · seconds_per_step of a fake clock."""

    def __init__(self, clock, seconds_per_step):
        self.clock, self.seconds_per_step = clock, seconds_per_step

    def generate(self, prompts, new_tokens):
        self.clock[0] += 5 + new_tokens * self.seconds_per_step
        return np.zeros((len(prompts), new_tokens), int)


def test_decoding_speed_leaves_out_prefill_and_the_first_token(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(benchmark.time, "process_time", lambda: clock[0] / 2)
    sides = {"qwen_jax": FakeGenerator(clock, 0.1), "transformers": FakeGenerator(clock, 0.3)}
    found = benchmark.measure(sides, np.zeros((8, 4), int), new_tokens=11, rounds=3)
    assert found["qwen_jax"]["tokens_per_second"] == pytest.approx(80)
    assert found["qwen_jax"]["tokens_per_cpu_second"] == pytest.approx(160)
    assert found["speed_ratio"] == pytest.approx(3) and found["cpu_ratio"] == pytest.approx(3)
    assert found["equal_ids"] == 1


@pytest.mark.slow
def test_both_sides_generate_the_same_ids(tmp_path):
    benchmark.make_model_folder(str(tmp_path / "model"), vocab_size=320)
    prompts = np.random.default_rng(0).integers(0, 320, (1, benchmark.PROMPT_TOKENS))
    ours = benchmark.EngineGenerator.load(str(tmp_path / "model"), 5)
    theirs = benchmark.TransformersGenerator.load(str(tmp_path / "model"))
    np.testing.assert_array_equal(ours.generate(prompts, 5), theirs.generate(prompts, 5))
