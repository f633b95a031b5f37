"""Options of a forward pass: what is recomputed, stage by stage, and refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from qwen_jax.errors import UserError
from qwen_jax.model import ForwardOptions, hidden_states, init_params
from tests import toy

MODEL = dataclasses.replace(toy.STEP.model, n_layers=4)
TOKENS = jnp.zeros((1, 16), jnp.int32)


def kept_bytes(remat: str) -> int:
    """Bytes that differentiating four layers keeps, weights included."""
    options = ForwardOptions(dtype="float32", remat=remat, attention="reference")
    params = jax.eval_shape(lambda: init_params(MODEL, jax.random.key(0)))
    backward = jax.eval_shape(
        lambda p: jax.vjp(lambda p: hidden_states(p, TOKENS, MODEL, options)[0], p)[1], params
    )
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(backward))


def test_remat_stages_save_what_their_policies_name():
    full = kept_bytes("full")
    # The result of attention, float32, for each head and token.
    per_layer = TOKENS.size * MODEL.n_heads * MODEL.head_dim * 4
    assert kept_bytes("out") == full + MODEL.n_layers * per_layer
    for first in (1, 3):
        assert kept_bytes(f"full:{first},out") == full + (MODEL.n_layers - first) * per_layer


@pytest.mark.parametrize(
    ("remat", "sentence"),
    [
        ("ful", "options.remat is 'ful' (did you mean 'full'?)"),
        ("full:1,oot", "options.remat is 'oot'"),
        ("full,out", "options.remat='full,out' gives no number of layers for 'full'"),
        ("full:0,out", "gives no number of layers for 'full'"),
        ("full:two,out", "write NAME:LAYERS for all but the last"),
    ],
)
def test_invalid_remat_stages_are_refused(remat, sentence):
    with pytest.raises(UserError) as refused:
        ForwardOptions(remat=remat)
    assert sentence in str(refused.value)


@pytest.mark.parametrize("first", [4, 5])
def test_remat_stages_of_too_many_layers_are_refused(first):
    with pytest.raises(UserError) as refused:
        kept_bytes(f"full:{first},out")
    assert f"'full:{first},out' leaves no layer of 4 for" in str(refused.value)
