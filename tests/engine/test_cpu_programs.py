"""Decoding on a CPU reads weights and cache where they lie."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.engine.programs import Programs
from qwen_jax.engine.steps import Shapes
from qwen_jax.model import forward
from qwen_jax.model.transformer import unstack_layers
from tests import toy
from tests.model.families import FLOAT32, MODELS, params

SHAPES = Shapes(
    rows=2, table=40, page_size=8, pages=80, prompts=1, prefill_tokens=(8,), past_pages=(0,),
    decode_rows=(2,), burst=4,
)  # fmt: skip


def copies(compiled) -> tuple[int, int]:
    """How often a decoding program copies the cache, and how often an FFN weight of a layer."""
    text, c = compiled.as_text(), toy.MODEL
    cache = f"{c.n_layers},{SHAPES.pages},{c.n_kv_heads},{SHAPES.page_size},{2 * c.head_dim}"
    weight = rf"(?:{c.d_model},{c.d_ff}|{c.d_ff},{c.d_model})"
    moves = r"\S* (?:copy|fusion|dynamic-slice|slice)\("
    return (
        len(re.findall(rf"= f32\[{cache}\]\S* copy\(", text)),
        len(re.findall(rf"= f32\[{weight}\]{moves}", text)),
    )


@pytest.mark.slow
def test_decoding_copies_neither_weights_nor_cache():
    how = {"vocab_size": toy.MODEL.vocab_size, "kv_dtype": jnp.float32}
    programs = Programs(params(toy.MODEL), toy.MODEL, FLOAT32, SHAPES, **how)
    key = ("decode", 2)
    stacked = programs.lower(key).compile()
    assert copies(stacked)[1] >= 3, "a stack is copied from: the test would see it"
    assert copies(programs._get(key)) == (0, 0)


@pytest.mark.parametrize("name", ["v1: NTK, LogN", "2: windows"])
def test_layers_one_by_one_compute_what_the_stack_does(name):
    config = MODELS[name]
    weights = params(config)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 19))
    run = jax.jit(lambda weights: forward(weights, tokens, config, FLOAT32)[0])
    np.testing.assert_allclose(run(unstack_layers(weights)), run(weights), rtol=1e-5, atol=1e-5)
