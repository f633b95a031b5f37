"""The analytic FLOPs equal XLA's count of the same step, and closed forms."""

import dataclasses

import jax
import numpy as np
import pytest

from qwen_jax.model import ForwardOptions, ModelConfig, count_params
from qwen_jax.model.presets import preset
from qwen_jax.train.config import LossConfig, StepConfig
from qwen_jax.train.flops import matmul_params, train_flops_per_token
from qwen_jax.train.objective import NextToken
from qwen_jax.train.optimizer import OptimizerConfig
from qwen_jax.train.state import init_state
from tests import toy

# One layer: XLA counts the body of a scan once.
MODEL = ModelConfig(
    family="qwen2",
    vocab_size=1024,
    d_model=256,
    n_layers=1,
    n_heads=4,
    n_kv_heads=2,
    head_dim=64,
    d_ff=512,
    max_length=128,
)


def test_flops_equal_those_of_xla_within_three_percent():
    length, rows = 64, 4
    config = StepConfig(
        MODEL, ForwardOptions(dtype="float32"), OptimizerConfig(), LossConfig(chunk=length * rows)
    )
    params = jax.eval_shape(lambda key: init_state(config, key).params, jax.random.key(0))
    batch = toy.batch(rows=rows, length=length, vocab=1024)

    def loss(params):
        return NextToken()(params, batch, config, None).objective

    cost = jax.jit(jax.grad(loss)).lower(params).compile().cost_analysis()
    # XLA computes every score, also the half that is masked.
    hidden = 12 * MODEL.n_heads * MODEL.head_dim * (length - (length + 1) / 2)
    expected = (train_flops_per_token(MODEL, length) + hidden) * length * rows
    assert expected == pytest.approx(cost["flops"], rel=0.03)


@pytest.mark.parametrize("window", [None, 1, 5, 16, 99])
def test_attention_flops_count_the_unmasked_keys(window):
    length = 16
    i, j = np.arange(length)[:, None], np.arange(length)[None]
    keys = ((j <= i) & (i - j < (window or length))).sum() / length
    model = dataclasses.replace(MODEL, windows=(window,))
    attention = train_flops_per_token(model, length) - 6 * matmul_params(model)
    assert attention == pytest.approx(12 * model.n_heads * model.head_dim * keys)


def test_matmul_parameters_exclude_input_embedding_norms_and_biases():
    for name in ("qwen-7b", "qwen2.5-0.5b", "qwen3-8b"):
        model = preset(name)
        small = model.d_model * (2 * model.n_layers + 1)
        if model.qkv_bias:
            small += model.n_layers * model.head_dim * (model.n_heads + 2 * model.n_kv_heads)
        if model.qk_norm:
            small += model.n_layers * 2 * model.head_dim
        table = 0 if model.tie_embeddings else model.vocab_size * model.d_model
        assert matmul_params(model) == count_params(model) - table - small
