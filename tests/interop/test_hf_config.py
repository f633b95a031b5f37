"""Conversion of config.json: released configs, both formats, and settings that are rejected."""

import dataclasses
import json

import pytest
from transformers import Qwen2Config, Qwen3Config

from qwen_jax.errors import UserError
from qwen_jax.interop import config_from_hf, config_to_hf
from qwen_jax.model.config import ModelConfig, Yarn

# Qwen/Qwen-7B, final file and the first one of August 2023 (GPT-2 style keys).
QWEN_7B = {
    "architectures": ["QWenLMHeadModel"], "attn_dropout_prob": 0.0, "emb_dropout_prob": 0.0,
    "hidden_size": 4096, "intermediate_size": 22016, "initializer_range": 0.02,
    "kv_channels": 128, "layer_norm_epsilon": 1e-06, "max_position_embeddings": 8192,
    "model_type": "qwen", "no_bias": True, "num_attention_heads": 32, "num_hidden_layers": 32,
    "rotary_emb_base": 10000, "rotary_pct": 1.0, "scale_attn_weights": True, "seq_length": 8192,
    "tie_word_embeddings": False, "use_dynamic_ntk": True, "use_logn_attn": True,
    "vocab_size": 151936,
}  # fmt: skip
QWEN_7B_EARLY = {
    "activation": "swiglu", "apply_residual_connection_post_layernorm": False, "attn_pdrop": 0.0,
    "embd_pdrop": 0.1, "ffn_hidden_size": 22016, "initializer_range": 0.02, "kv_channels": 128,
    "layer_norm_epsilon": 1e-05, "model_type": "qwen", "n_embd": 4096, "n_head": 32,
    "n_layer": 32, "n_positions": 6144, "no_bias": True, "padded_vocab_size": 151936,
    "pos_emb": "rotary", "resid_pdrop": 0.1, "rotary_emb_base": 10000, "rotary_pct": 1.0,
    "scale_attn_weights": True, "seq_length": 2048, "tie_word_embeddings": False,
    "vocab_size": 151851, "use_dynamic_ntk": True, "use_logn_attn": True,
}  # fmt: skip
# Qwen/Qwen2.5-7B-Instruct with the YaRN block that its model card recommends.
QWEN25_7B = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "hidden_act": "silu",
    "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 18944,
    "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen2",
    "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_sliding_window": False,
    "vocab_size": 152064,
    "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
}  # fmt: skip
QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
    "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
    "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip


def test_v1_config_halves_the_ffn_width_and_keeps_ntk_and_logn():
    cfg = config_from_hf(QWEN_7B)
    assert cfg == ModelConfig(
        family="qwen", vocab_size=151_936, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32,
        head_dim=128, d_ff=11_008, max_length=8192, trained_length=8192, dynamic_ntk=True,
        logn=True, norm_eps=1e-6, rope_theta=10_000.0,
    )  # fmt: skip


def test_early_v1_key_names_give_the_same_config():
    cfg = config_from_hf(QWEN_7B_EARLY)
    same = dataclasses.replace(
        config_from_hf(QWEN_7B),
        max_length=6144, trained_length=2048, norm_eps=1e-5, embed_dropout=0.1,
    )  # fmt: skip
    assert cfg == same  # Embedding rows are padded_vocab_size, not vocab_size.


def test_qwen25_and_qwen3_configs_are_parsed():
    cfg = config_from_hf(QWEN25_7B)
    assert (cfg.n_kv_heads, cfg.head_dim, cfg.d_ff, cfg.qkv_bias) == (4, 128, 18944, True)
    assert cfg.windows == () and cfg.yarn == Yarn(4.0, 32768) and cfg.rope_theta == 1e6
    cfg = config_from_hf(QWEN3_06B)
    assert (cfg.n_heads, cfg.head_dim, cfg.d_model) == (16, 128, 1024)
    assert cfg.qk_norm and not cfg.qkv_bias and cfg.tie_embeddings and cfg.max_length == 40960


@pytest.mark.parametrize("config", [QWEN_7B, QWEN_7B_EARLY, QWEN25_7B, QWEN3_06B])
def test_config_round_trip_is_lossless(config):
    cfg = config_from_hf(config)
    written = json.loads(json.dumps(config_to_hf(cfg, dtype="bfloat16")))
    assert config_from_hf(written) == cfg


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": 16,
         "layer_types": ["sliding_attention", "full_attention"] * 2},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16,
                          "original_max_position_embeddings": 64}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}},
        {"num_key_value_heads": None},
    ],
)  # fmt: skip
@pytest.mark.parametrize("cls", [Qwen2Config, Qwen3Config])
def test_both_formats_agree_and_transformers_reads_the_output(cls, kwargs):
    theirs = cls(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, **({"num_key_value_heads": 2} | kwargs),
    )  # fmt: skip
    new_format = json.loads(theirs.to_json_string())
    cfg = config_from_hf(new_format)
    assert cfg.n_kv_heads == (2 if kwargs.get("num_key_value_heads", 2) else 4)
    hub_format = config_to_hf(cfg)
    assert config_from_hf(hub_format) == cfg
    back = cls(**hub_format)
    for name in ("rope_parameters", "layer_types", "sliding_window", "rms_norm_eps"):
        ours, want = getattr(back, name), getattr(theirs, name)
        if isinstance(ours, dict):
            ours = {k: ours[k] for k in want if k != "type"}
            want = {k: v for k, v in want.items() if k != "type"}
        assert ours == want, name
    if "max_window_layers" in kwargs:
        assert cfg.windows == (None, None, 16, 16)
    if "rope_scaling" in kwargs:
        assert cfg.yarn == Yarn(4.0, 64, beta_fast=16.0)


def test_yarn_mscale_is_converted_to_an_attention_factor():
    table = {"type": "yarn", "factor": 8.0, "mscale": 2.0, "mscale_all_dim": 1.0}
    cfg = config_from_hf(QWEN25_7B | {"rope_scaling": table})
    assert cfg.yarn.original_length == 32768
    # (0.1·2·ln 8 + 1) / (0.1·ln 8 + 1)
    assert cfg.yarn.attention_factor == pytest.approx(1.172147, abs=1e-6)


@pytest.mark.parametrize(
    ("base", "change", "names"),
    [
        (QWEN_7B, {"model_type": "llama"}, ["llama", "qwen2", "qwen3"]),
        (QWEN_7B, {"model_type": "qwen2_moe"}, ["qwen2_moe", "mixture of experts"]),
        (QWEN_7B, {"model_type": "qwen3_moe"}, ["qwen3_moe", "mixture of experts"]),
        (QWEN_7B, {"model_type": "qwen2_5_vl"}, ["qwen2_5_vl", "multi-modal"]),
        (QWEN_7B, {"model_type": None}, ["model_type"]),
        (QWEN_7B, {"visual": {"width": 1}}, ["vision"]),
        (QWEN_7B, {"no_bias": False}, ["no_bias", "False"]),
        (QWEN_7B, {"kv_channels": 64}, ["4096", "32", "64"]),
        (QWEN_7B, {"intermediate_size": 22017}, ["22017", "even"]),
        (QWEN_7B, {"seq_length": None}, ["seq_length"]),
        (QWEN_7B, {"use_dynamic_ntk": None}, ["use_dynamic_ntk"]),
        (QWEN_7B, {"use_logn_attn": 1}, ["use_logn_attn", "true or false"]),
        (QWEN_7B, {"scale_attn_weights": False}, ["scale_attn_weights"]),
        (QWEN_7B, {"quantization_config": {"quant_method": "awq"}}, ["awq", "unquantised"]),
        (QWEN25_7B, {"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        (QWEN25_7B, {"rope_scaling": {"type": "linear", "factor": 2.0}}, ["linear", "yarn"]),
        (QWEN25_7B, {"rope_scaling": {"type": "mrope"}}, ["mrope"]),
        (QWEN25_7B, {"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": False}},
         ["truncate"]),
        (QWEN25_7B, {"rope_parameters": {"rope_theta": 5.0}}, ["1000000.0", "5.0"]),
        (QWEN25_7B, {"rope_parameters": {"rope_type": "default"}}, ["disagree"]),
        (QWEN25_7B, {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
         ["layer type"]),
        (QWEN25_7B, {"layer_types": ["full_attention"]}, ["1 layers", "28"]),
        (QWEN25_7B, {"layer_types": ["sliding_attention"] * 28}, ["use_sliding_window"]),
        (QWEN25_7B, {"layer_types": ["linear_attention"] * 28}, ["linear_attention"]),
        (QWEN25_7B, {"hidden_size": "3584"}, ["hidden_size", "'3584'"]),
        (QWEN25_7B, {"num_hidden_layers": 0}, ["num_hidden_layers", "0"]),
        (QWEN25_7B, {"rms_norm_eps": float("nan")}, ["rms_norm_eps"]),
        (QWEN25_7B, {"num_attention_heads": 30}, ["3584", "30"]),
        (QWEN3_06B, {"attention_bias": True}, ["attention_bias"]),
        (QWEN3_06B, {"num_key_value_heads": 3}, ["n_kv_heads=3"]),
    ],
)  # fmt: skip
def test_unsupported_settings_are_rejected_with_key_and_value(base, change, names):
    with pytest.raises(UserError) as error:
        config_from_hf(base | change)
    for name in names:
        assert name in str(error.value)


@pytest.mark.parametrize("key", ["hidden_size", "num_key_value_heads", "vocab_size"])
def test_missing_required_key_is_named(key):
    config = {k: v for k, v in QWEN25_7B.items() if k != key}
    with pytest.raises(UserError, match=key):
        config_from_hf(config)


@pytest.mark.parametrize(
    ("base", "change", "name"),
    [
        (QWEN_7B, {"windows": (None,) * 31 + (64,)}, "windows"),
        (QWEN_7B, {"yarn": Yarn(2.0, 64)}, "yarn"),
        (QWEN_7B, {"n_kv_heads": 8}, "n_kv_heads"),
        (QWEN_7B, {"qkv_bias": False}, "qkv_bias"),
        (QWEN25_7B, {"windows": (16,) * 14 + (32,) * 14}, "windows"),
        (QWEN25_7B, {"dynamic_ntk": True}, "dynamic_ntk"),
        (QWEN25_7B, {"rope_fraction": 0.5}, "rope_fraction"),
        (QWEN3_06B, {"qk_norm": False}, "qk_norm"),
    ],
)
def test_writing_inexpressible_settings_is_rejected(base, change, name):
    cfg = dataclasses.replace(config_from_hf(base), **change)
    with pytest.raises(UserError, match=f"model.{name}"):
        config_to_hf(cfg)


def test_extra_keys_are_added_but_cannot_override_network_keys():
    cfg = config_from_hf(QWEN3_06B)
    assert config_to_hf(cfg, extra={"eos_token_id": 151645})["eos_token_id"] == 151645
    with pytest.raises(UserError, match="hidden_size"):
        config_to_hf(cfg, extra={"hidden_size": 8})
