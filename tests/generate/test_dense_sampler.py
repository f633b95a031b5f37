"""Sampling with cache, batch and padding equals uncached sampling of single prompts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.errors import UserError
from qwen_jax.generate.dense_sampler import sample
from qwen_jax.interop import load_params, read_config
from qwen_jax.model import (
    ForwardOptions,
    abstract_params,
    forward,
    init_params,
)
from tests import toy

FLOAT32 = ForwardOptions(dtype="float32")
# A wide initialisation: different contexts have clearly different next tokens.
MODEL = dataclasses.replace(toy.MODEL, init_std=0.3, trained_length=16, dynamic_ntk=True, logn=True)
PROMPTS = [[5, 9, 2], list(range(40, 70)), [127], list(range(1, 61))]


@pytest.fixture(scope="module")
def params():
    return jax.jit(functools.partial(init_params, MODEL))(jax.random.key(3))


@pytest.fixture(scope="module")
def run(params):
    return functools.partial(sample, params, config=MODEL, options=FLOAT32)


def test_greedy_ids_equal_those_of_the_released_code(qwen1_small):
    """Prompts below and past the trained length, all in one padded batch."""
    config = read_config(qwen1_small)
    params = load_params(qwen1_small, config, abstract_params(config))
    with np.load(qwen1_small / "greedy.npz") as stored:
        lengths = (6, 40, 80)
        prompts = [stored[f"prompt_{n}"].tolist() for n in lengths]
        want = [stored[f"greedy_{n}"].tolist() for n in lengths]
    with jax.default_matmul_precision("highest"):
        found = sample(params, prompts, config, FLOAT32, max_new_tokens=len(want[0]))
    assert found == want


def test_greedy_ids_are_the_argmax_of_an_uncached_forward_pass(params):
    """Without dynamic NTK and LogN, whose factors would differ at each length."""
    plain = dataclasses.replace(MODEL, dynamic_ntk=False, logn=False)
    found = sample(params, PROMPTS, plain, FLOAT32, max_new_tokens=8)
    texts = np.zeros((len(PROMPTS), 80), np.int32)  # Later tokens do not change earlier logits.
    for row, prompt, new in zip(texts, PROMPTS, found, strict=True):
        row[: len(prompt) + 8] = prompt + new
    best = forward(params, jnp.asarray(texts), plain, FLOAT32)[0].argmax(-1)
    for row, prompt, new in zip(best, PROMPTS, found, strict=True):
        np.testing.assert_array_equal(row[len(prompt) - 1 : len(prompt) + 7], new)


def test_rows_are_independent_of_the_batch(run):
    together = run(PROMPTS, max_new_tokens=12)
    assert len({tuple(row) for row in together}) == len(PROMPTS)
    for prompt, row in zip(PROMPTS, together, strict=True):
        assert run([prompt], max_new_tokens=12) == [row]
    # Samples too: the key of a row depends on its index.
    draw = functools.partial(run, max_new_tokens=12, temperature=1.0, seed=7)
    assert draw(PROMPTS)[:2] == draw(PROMPTS[:2])


def test_sharded_sampling_equals_single_device(run, params):
    """Three rows on four batch devices."""
    options = {"max_new_tokens": 6, "temperature": 1.0, "top_k": 5}
    want = run(PROMPTS[:3], **options)
    with toy.use("2 × 2 × 2 data, fsdp, tensor") as mesh:
        shardings = jax.tree.map(lambda x: x.sharding, abstract_params(MODEL, mesh))
        sharded = jax.device_put(params, shardings)
        assert sample(sharded, PROMPTS[:3], MODEL, FLOAT32, **options) == want


def test_stop_id_ends_its_row_only_and_is_not_returned(run):
    free = run(PROMPTS, max_new_tokens=12)
    stop = free[1][5]
    want = [row[: row.index(stop)] if stop in row else row for row in free]
    assert len(want[1]) < 12 and max(map(len, want)) == 12, "another seed is needed"
    assert run(PROMPTS, max_new_tokens=12, stop_id=stop) == want


def test_ids_from_vocab_size_on_are_never_sampled(run):
    greedy = run(PROMPTS, max_new_tokens=12)
    rows = max(map(max, greedy))
    found = run(PROMPTS, max_new_tokens=12, vocab_size=rows)
    assert max(map(max, found)) < rows
    found = run([[1]] * 64, max_new_tokens=4, temperature=9.0, vocab_size=64)
    assert max(map(max, found)) < 64


def test_samples_follow_the_tempered_top_k_distribution(run, params):
    """Frequencies in 4,096 rows of one prompt equal the softmax within sampling error."""
    prompt, n, k, temperature = [7, 11], 4096, 5, 2.0
    plain = dataclasses.replace(MODEL, dynamic_ntk=False, logn=False)
    scores = np.asarray(forward(params, jnp.asarray([prompt]), plain, FLOAT32)[0][0, -1])
    top = np.argsort(scores)[-k:]
    p = np.exp(scores[top] / temperature)
    p /= p.sum()
    rows = run([prompt] * n, max_new_tokens=1, temperature=temperature, top_k=k)
    counts = np.bincount([row[0] for row in rows], minlength=128)
    assert counts[top].sum() == n
    np.testing.assert_allclose(counts[top] / n, p, atol=5 * np.sqrt(0.25 / n))


def test_samples_are_determined_by_the_seed(run):
    draws = [run(PROMPTS, max_new_tokens=12, temperature=1.0, seed=s) for s in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_bad_input_is_refused(run):
    for prompts, change, message in [
        ([], {}, "no prompts"),
        ([[1], []], {}, "Prompt 1 has no tokens"),
        ([[1, 128]], {}, "Prompt 0 has ids from 1 to 128"),
        ([[-1]], {}, "ids from -1"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"temperature": -1.0}, "temperature is -1.0"),
        ([[1]], {"temperature": float("nan")}, "temperature is nan"),
        ([[1]], {"top_k": -1}, "top_k is -1"),
        ([[1]], {"vocab_size": 129}, "vocab_size is 129"),
    ]:
        with pytest.raises(UserError, match=message):
            run(prompts, **({"max_new_tokens": 2} | change))
