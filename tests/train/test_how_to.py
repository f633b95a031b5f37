"""The code of docs/how-to-add-an-objective.md, extracted and run."""

import dataclasses
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.model import ForwardOptions, forward
from qwen_jax.train.metrics import read_metrics
from qwen_jax.train.state import abstract_state, init_state
from qwen_jax.train.step import summed_gradients
from tests import toy
from tests.train import jobs

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "how-to-add-an-objective.md"


@pytest.fixture(scope="module")
def blocks():
    return re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def page(blocks):
    """The names that the page's code defines."""
    names = {"__name__": "how_to"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    return names


@pytest.fixture(scope="module", autouse=True)
def shared_compilation():
    with jobs.compile_once():
        yield


def test_objective_and_task_take_less_than_sixty_lines(blocks):
    assert len(blocks) == 3
    assert sum(bool(line.strip()) for block in blocks[:2] for line in block.splitlines()) < 60


@pytest.mark.slow
def test_the_pages_run_prefers_the_chosen_answers_and_resumes(page, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert page["run"](str(whole)).finished
    assert page["run"](str(parts), steps=3).step == 3
    assert page["run"](str(parts)).step == 8
    rows = read_metrics(whole / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert rows[-1]["loss"] < rows[0]["loss"] and rows[-1]["accuracy"] == 1
    kept = ("step", "loss", "margin", "accuracy", "grad_norm")
    numbers = [
        [{name: row[name] for name in kept} for row in read_metrics(folder / "metrics.jsonl")]
        for folder in (whole, parts)
    ]
    assert numbers[0] == numbers[1]


def plain_loss(params, batch, config, beta):
    """DPO by all logits and autodiff, on one device."""
    logits, _ = forward(
        params,
        batch["tokens"],
        config.model,
        ForwardOptions(dtype="float32", attention="reference"),
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
    )
    logprobs = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(logprobs, batch["targets"][..., None], -1)[..., 0]
    margin = beta * (batch["preference"] * (picked - batch["reference_logprobs"])).sum(-1)
    return -jax.nn.log_sigmoid(margin).sum()


@pytest.mark.parametrize(("name", "microbatches"), [("none", 1), ("4 fsdp × 2 tensor", 2)])
def test_the_pages_dpo_gradient_is_that_of_the_plain_formula(page, name, microbatches):
    pairs = page["toy_pairs"](0, length=32)
    pairs = pairs | {k: pairs[k] % toy.MODEL.vocab_size for k in ("tokens", "targets")}
    noise = np.random.default_rng(0).normal(-5, 1, pairs["tokens"].shape)
    pairs["reference_logprobs"] = noise.astype(np.float32)
    config = dataclasses.replace(toy.STEP, microbatches=microbatches)
    with jax.default_matmul_precision("highest"):
        params = jax.jit(lambda: init_state(config, jax.random.key(1)).params)()
        plain = jax.value_and_grad(lambda p: plain_loss(p, pairs, config, 0.5))
        expected_loss, expected = jax.device_get(jax.jit(plain)(params))
        with toy.use(name) as mesh:
            if mesh is not None:
                params = jax.device_put(
                    params,
                    jax.tree.map(lambda a: a.sharding, abstract_state(config, mesh).params),
                )
            gradients = jax.jit(lambda p, b: summed_gradients(p, b, config, page["DPO"](0.5), None))
            grads, sums = gradients(params, toy.place(pairs, mesh))
    np.testing.assert_allclose(sums.objective, expected_loss, rtol=1e-5)
    assert float(sums.weight) == 8
    jax.tree.map(lambda a, b: toy.close(a, b, rtol=2e-5), jax.device_get(grads), expected)
