"""Compiled sampling keeps its branches, and sorts and copies nothing."""

import re

import jax
import jax.numpy as jnp
import pytest

from qwen_jax.engine.sampling import init_counts, stack_sampling_params
from tests.engine.compile_sampling import sampling_loop
from tests.tpu import compiled, needs_libtpu


def test_sampling_loop_on_a_cpu_copies_nothing_and_keeps_its_branches():
    rows, vocab = 4, 5_120
    operands = (
        jnp.zeros((rows, vocab)),
        jax.device_put(stack_sampling_params([None] * rows)),
        jnp.zeros(rows, jnp.int32),
        init_counts(rows, vocab),
    )
    lowered = jax.jit(sampling_loop, static_argnames="vocab", donate_argnums=3).lower(
        *operands, vocab=vocab
    )
    text = lowered.compile().as_text()
    assert len(re.findall(r" conditional\(", text)) >= 6
    assert not re.findall(rf"= \w+\[{rows},{vocab}\]\S* copy\(", text)
    assert not re.findall(r" sort\(|TopK", text)


@pytest.mark.slow
@needs_libtpu
def test_sampling_loop_compiles_for_tpus_without_a_sort():
    """151,936 logits of 8 rows: counts stay in place, temporaries are about one array of logits."""
    for found in compiled("tests.engine.compile_sampling", "v6e:2x2", "loop"):
        assert found["sorts"] == 0 and found["count_copies"] == 0, found
        assert found["conditionals"] >= 6, found
        assert found["alias"] >= found["counts"], found
        assert found["temp"] < found["counts"] * 3, found
