"""Converts a `ModelConfig` into a Hugging Face `config.json` object; the inverse of `hf_config`.

The result has the keys of transformers 4, as on the hub, plus `layer_types`, so that transformers 4
and 5 both read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen_jax.errors import UserError
from qwen_jax.model.config import ModelConfig


def config_to_hf(
    cfg: ModelConfig, *, dtype: str = "bfloat16", extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Returns the `config.json` object of a network; `config_from_hf` of it gives `cfg` back.

    Dropout rates without a key in the released class (`residual_dropout`, and `embed_dropout` after
    v1) are left out: they only matter in training.

    Args:
      cfg: the network.
      dtype: value of `torch_dtype`: "bfloat16", "float16" or "float32".
      extra: further keys, such as `eos_token_id`.

    Returns:
      The JSON object.

    Raises:
      UserError: `cfg` has a setting that the released class of its family cannot express, or
        `extra` would change a key of the network.
    """
    _check_expressible(cfg)
    out = _to_v1(cfg, dtype) if cfg.family == "qwen" else _to_v2_v3(cfg, dtype)
    for key, value in (extra or {}).items():
        if out.setdefault(key, value) != value:
            raise UserError(
                f"config.json key {key} would be {value!r}, but the model has {out[key]!r}; "
                "leave the key out"
            )
    return out


def _check_expressible(cfg: ModelConfig) -> None:
    """Checks that the released class of the config's family can express all its settings.

    Raises:
      UserError: it cannot; the message names the first such setting.
    """
    v1 = cfg.family == "qwen"
    wanted: dict[str, Any] = {
        "qkv_bias": cfg.family != "qwen3",
        "qk_norm": cfg.family == "qwen3",
    }
    if v1:
        wanted |= {
            "n_kv_heads": cfg.n_heads,
            "head_dim": cfg.d_model // cfg.n_heads,
            "yarn": None,
            "windows": (),
        }
    else:
        wanted |= {"rope_fraction": 1.0, "dynamic_ntk": False, "logn": False}
    for name, value in wanted.items():
        if getattr(cfg, name) != value:
            raise UserError(
                f"model.{name} is {getattr(cfg, name)!r}, which Hugging Face's {cfg.family!r} "
                f"format cannot express: it must be {value!r}; choose another family or setting"
            )
    if v1 and cfg.d_model % cfg.n_heads:
        raise UserError(
            f"model.d_model={cfg.d_model} is not a multiple of model.n_heads={cfg.n_heads}, which "
            "Hugging Face's 'qwen' format requires; choose another family or setting"
        )
    if len({w for w in cfg.windows if w is not None}) > 1:
        raise UserError(
            f"model.windows has several lengths {sorted(set(filter(None, cfg.windows)))}, but "
            "Hugging Face's format holds one for all sliding layers; use one length"
        )


def _to_v1(cfg: ModelConfig, dtype: str) -> dict[str, Any]:
    """Returns the `config.json` object of a Qwen v1 network; `dtype` is that of the weights."""
    return {
        "architectures": ["QWenLMHeadModel"],
        # transformers has no class for v1; the released code is published there.
        "auto_map": {
            "AutoConfig": "Qwen/Qwen-7B--configuration_qwen.QWenConfig",
            "AutoModelForCausalLM": "Qwen/Qwen-7B--modeling_qwen.QWenLMHeadModel",
        },
        "model_type": "qwen",
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "kv_channels": cfg.head_dim,
        "intermediate_size": 2 * cfg.d_ff,
        "max_position_embeddings": cfg.max_length,
        "seq_length": cfg.trained_length,
        "use_dynamic_ntk": cfg.dynamic_ntk,
        "use_logn_attn": cfg.logn,
        "rotary_pct": cfg.rope_fraction,
        "rotary_emb_base": cfg.rope_theta,
        "layer_norm_epsilon": cfg.norm_eps,
        "initializer_range": cfg.init_std,
        "emb_dropout_prob": cfg.embed_dropout,
        "attn_dropout_prob": cfg.attn_dropout,
        "no_bias": True,
        "scale_attn_weights": True,
        "tie_word_embeddings": cfg.tie_embeddings,
        "use_cache": True,
        "torch_dtype": dtype,
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "fp32": dtype == "float32",
    }


def _to_v2_v3(cfg: ModelConfig, dtype: str) -> dict[str, Any]:
    """Returns the `config.json` object of a Qwen2 or Qwen3 network; `dtype` is the weights'."""
    window = next((w for w in cfg.windows if w is not None), None)
    out: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM" if cfg.family == "qwen2" else "Qwen3ForCausalLM"],
        "model_type": cfg.family,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.d_ff,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_kv_heads,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": cfg.max_length,
        "initializer_range": cfg.init_std,
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": None,
        "attention_dropout": cfg.attn_dropout,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": next(
            (i for i, w in enumerate(cfg.windows) if w is not None), cfg.n_layers
        ),
        "layer_types": [
            "full_attention" if w is None else "sliding_attention"
            for w in cfg.windows or (None,) * cfg.n_layers
        ],
        "tie_word_embeddings": cfg.tie_embeddings,
        "use_cache": True,
        "torch_dtype": dtype,
    }
    if cfg.family == "qwen3":
        out["attention_bias"] = False
    if cfg.yarn is not None:
        scaling = {
            "rope_type": "yarn",
            "factor": cfg.yarn.factor,
            "original_max_position_embeddings": cfg.yarn.original_length,
            "beta_fast": cfg.yarn.beta_fast,
            "beta_slow": cfg.yarn.beta_slow,
            "attention_factor": cfg.yarn.attention_factor,
        }
        out["rope_scaling"] = {k: v for k, v in scaling.items() if v is not None}
    return out
