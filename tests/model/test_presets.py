"""The declared weights add up to the exact sizes of the releases."""

import pytest

from qwen_jax.errors import UserError
from qwen_jax.model import count_params
from qwen_jax.model.presets import PRESETS, preset

# Qwen v1: report page (two equal the total_size of the official safetensors index, / 2 bytes).
# 1.5–3: computed from the same shapes by hand in closed form, see `closed_form`.
RELEASED = {
    "qwen-1.8b": 1_836_828_672,
    "qwen-7b": 7_721_324_544,
    "qwen-14b": 14_167_290_880,
    "qwen-72b": 72_287_920_128,
    # Hub model cards / safetensors totals.
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
}


@pytest.mark.parametrize("name", RELEASED)
def test_parameter_count_equals_the_release(name):
    assert count_params(preset(name)) == RELEASED[name]


def closed_form(c):
    attention = c.d_model * c.head_dim * (2 * c.n_heads + 2 * c.n_kv_heads)
    bias = c.head_dim * (c.n_heads + 2 * c.n_kv_heads) if c.qkv_bias else 0
    norms = 2 * c.d_model + (2 * c.head_dim if c.qk_norm else 0)
    layer = attention + bias + norms + 3 * c.d_model * c.d_ff
    embeddings = c.vocab_size * c.d_model * (1 if c.tie_embeddings else 2)
    return c.n_layers * layer + embeddings + c.d_model


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count_of_every_preset_matches_the_closed_form(name):
    assert count_params(PRESETS[name]) == closed_form(PRESETS[name])


def test_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match=r"did you mean 'qwen2.5-7b'"):
        preset("qwen2.5-7B")
