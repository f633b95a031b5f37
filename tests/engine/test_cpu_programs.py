"""Decoding on a CPU reads weights and cache in place, without copies."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.engine.programs import CompiledPrograms
from qwen_jax.engine.steps import EngineShapes
from qwen_jax.model import forward
from qwen_jax.model.transformer import unstack_layers
from tests import toy
from tests.model.families import FLOAT32, MODELS, params

SHAPES = EngineShapes(
    max_rows=2,
    max_pages_per_request=40,
    page_size=8,
    num_pages=80,
    max_prompts=1,
    prefill_tokens=(8,),
    cached_pages=(0,),
    decode_rows=(2,),
    max_decode_steps=4,
)


def copies(compiled) -> tuple[int, int]:
    """How often a decoding program copies the cache, and how often an FFN weight of a layer."""
    text, c = compiled.as_text(), toy.MODEL
    cache = f"{c.n_layers},{SHAPES.num_pages},{c.n_kv_heads},{SHAPES.page_size},{2 * c.head_dim}"
    weight = rf"(?:{c.d_model},{c.d_ff}|{c.d_ff},{c.d_model})"
    moves = r"\S* (?:copy|fusion|dynamic-slice|slice)\("
    return (
        len(re.findall(rf"= f32\[{cache}\]\S* copy\(", text)),
        len(re.findall(rf"= f32\[{weight}\]{moves}", text)),
    )


@pytest.mark.slow
def test_decoding_copies_neither_weights_nor_cache():
    how = {"vocab_size": toy.MODEL.vocab_size, "kv_dtype": jnp.float32}
    programs = CompiledPrograms(params(toy.MODEL), toy.MODEL, FLOAT32, SHAPES, **how)
    key = ("decode", 2)
    stacked = programs.lower(key).compile()
    assert copies(stacked)[1] >= 3, "a stack is copied from: the test would see it"
    assert copies(programs._get(key)) == (0, 0)


@pytest.mark.parametrize("name", ["v1: NTK, LogN", "2: windows"])
def test_unstacked_layers_compute_what_stacked_layers_do(name):
    config = MODELS[name]
    weights = params(config)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 19))
    run = jax.jit(lambda weights: forward(weights, tokens, config, FLOAT32)[0])
    np.testing.assert_allclose(run(unstack_layers(weights)), run(weights), rtol=1e-5, atol=1e-5)
