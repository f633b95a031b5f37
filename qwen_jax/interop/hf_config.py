"""Parses a Hugging Face `config.json` into a `ModelConfig`, for every released dense Qwen.

Both formats of the file are accepted: transformers 4, as on the hub (`rope_theta`, `rope_scaling`,
`torch_dtype`, `use_sliding_window` with `max_window_layers`), and transformers 5
(`rope_parameters`, `dtype`, `layer_types`). `hf_config_write` is the inverse.

Sources: config.json and configuration classes of Qwen/Qwen-7B (final, and the August 2023 file with
its GPT-2 style keys); `Qwen2Config`, `Qwen3Config` and `modeling_rope_utils` of transformers 5.
An optional key that is missing takes the default of those classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qwen_jax.errors import UserError, nearest
from qwen_jax.interop.gptq import parse_gptq_config
from qwen_jax.model.config import ModelConfig, Yarn

SUPPORTED = "qwen (Qwen v1), qwen2 (Qwen1.5, Qwen2, Qwen2.5) and qwen3 (dense)"
"""The supported values of `model_type`, for error messages."""

# Keys of the first Qwen-7B files (August 2023) and their names in the final files.
_EARLY_KEYS = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
    "ffn_hidden_size": "intermediate_size",
    "attn_pdrop": "attn_dropout_prob",
    "embd_pdrop": "emb_dropout_prob",
    "padded_vocab_size": "vocab_size",
    "rms_norm_eps": "layer_norm_epsilon",
}
_REQUIRED: Any = object()  # Default of a key that must be present.


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Converts a parsed `config.json` into the `ModelConfig` of the same network.

    Args:
      config: the JSON object. Keys that do not change the network (token ids, cache and flash
        attention switches, `transformers_version`, ...) are ignored.

    Returns:
      The config. Its `max_length` is `max_position_embeddings` unchanged; its `trained_length` is
      v1's `seq_length`, else YaRN's original length, else `max_length`.

    Raises:
      UserError: another architecture (MoE, vision, unknown), weights quantised by another method
        than GPTQ, a missing or malformed key, or a setting that `model` does not implement (output
        biases, other activations, other RoPE scalings, chunked layers, ...).
    """
    reader = _KeyReader(config)
    _check_architecture(config)
    return _from_v1(reader) if config["model_type"] == "qwen" else _from_v2_v3(reader)


class _KeyReader:
    """Type-checked access to the keys of a `config.json` object.

    A key set to null counts as absent. Getters raise `UserError`, with key and value in the
    message, if the value has another type, or if it is absent and no default is given.

    Attributes:
      config: the JSON object.
    """

    def __init__(self, config: Mapping[str, Any]):
        self.config = config

    def _get(self, name: str, default: Any, types: type | tuple[type, ...], expected: str) -> Any:
        """Returns the value of key `name`, or `default` if it is absent or null.

        Args:
          name: the key.
          default: value for an absent key; `_REQUIRED` if there is none.
          types: accepted types; bool is accepted only if it is `types` itself.
          expected: the accepted values in words, for the error message.

        Raises:
          UserError: the key is absent and required, or its value has another type.
        """
        value = self.config.get(name)
        if value is None:
            if default is _REQUIRED:
                raise UserError(
                    f"config.json has no {name!r}{nearest(name, self.config)}; it must give "
                    f"{expected}: add it, or download the file again"
                )
            return default
        if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
            raise UserError(f"config.json: {name} is {value!r}; it must be {expected}")
        return value

    def optional_integer(self, name: str) -> int | None:
        """Returns key `name` as an int ≥ 1, None if it is absent.

        Raises:
          UserError: it is not a positive integer.
        """
        return None if self.config.get(name) is None else self.integer(name)

    def integer(self, name: str, default: Any = _REQUIRED) -> int:
        """Returns key `name` as an int ≥ 1, or `default` if it is absent.

        Raises:
          UserError: it is absent without a default, or is not a positive integer.
        """
        value = self._get(name, default, int, "a positive integer")
        if value < 1:
            raise UserError(f"config.json: {name} is {value}; it must be a positive integer")
        return value

    def optional_number(self, name: str) -> float | None:
        """Returns key `name` as a finite float ≥ 0, None if it is absent.

        Raises:
          UserError: it is not such a number.
        """
        return None if self.config.get(name) is None else self.number(name)

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        """Returns key `name` as a finite float ≥ 0, or `default` if it is absent.

        Raises:
          UserError: it is absent without a default, or is not such a number.
        """
        value = self._get(name, default, (int, float), "a number")
        if not (math.isfinite(value) and value >= 0):
            raise UserError(f"config.json: {name} is {value}; it must be a finite number ≥ 0")
        return float(value)

    def flag(self, name: str, default: Any = _REQUIRED) -> bool:
        """Returns key `name` as a bool, or `default` if it is absent.

        Raises:
          UserError: it is absent without a default, or is not true or false.
        """
        return self._get(name, default, bool, "true or false")

    def table(self, name: str) -> Mapping[str, Any]:
        """Returns key `name` as a dict, {} if it is absent.

        Raises:
          UserError: it is not a JSON object.
        """
        return self._get(name, {}, dict, "a JSON object")

    def require(self, name: str, allowed: Any, default: Any, reason: str) -> None:
        """Checks that key `name` is absent or has the only value that `model` implements.

        Args:
          name: the key.
          allowed: the value it may have.
          default: value that an absent key stands for.
          reason: what the network has, to complete the sentence "this network has ...".

        Raises:
          UserError: it has another value.
        """
        value = self.config.get(name, default)
        if value is not None and value != allowed:
            raise UserError(
                f"config.json: {name} is {value!r}; this network has {reason}, so only "
                f"{allowed!r} can be loaded"
            )


def _check_architecture(config: Mapping[str, Any]) -> None:
    """Checks that a `config.json` object describes a dense text Qwen, plain or GPTQ-quantised.

    Raises:
      UserError: it is no object, or describes another architecture or quantisation method.
    """
    if not isinstance(config, Mapping):
        raise UserError("config.json is not a JSON object; download it again")
    kind = config.get("model_type")
    if kind is None:
        raise UserError(f"config.json has no 'model_type'; it must be one of {SUPPORTED}")
    if config.get("quantization_config") is not None:
        parse_gptq_config(config["quantization_config"])
    if kind in ("qwen", "qwen2", "qwen3"):
        if "visual" in config or "vision_config" in config:
            raise UserError(
                "config.json describes a vision-language model (Qwen-VL); only text models are "
                f"supported: {SUPPORTED}"
            )
        return
    name = str(kind)
    if "moe" in name or "num_experts" in config or "num_local_experts" in config:
        what = "a mixture of experts"
    elif any(s in name for s in ("_vl", "vision", "_audio", "omni")):
        what = "a multi-modal model"
    else:
        what = "an architecture this network does not implement"
    raise UserError(f"config.json: model_type {name!r} is {what}; supported are {SUPPORTED}")


def _from_v1(keys: _KeyReader) -> ModelConfig:
    """Converts a Qwen v1 config (model_type "qwen"), with final or early key names.

    Raises:
      UserError: a missing or malformed key, or a setting that `model` does not implement.
    """
    config = dict(keys.config)
    for early, final in _EARLY_KEYS.items():
        # The padded size is the number of stored rows; the early file had both sizes.
        if early in config and (final not in config or early == "padded_vocab_size"):
            config[final] = config[early]
    keys = _KeyReader(config)
    keys.require("no_bias", True, True, "no biases outside the q, k, v projections")
    keys.require("scale_attn_weights", True, True, "attention scores divided by √head_dim")
    keys.require("activation", "swiglu", "swiglu", "a SwiGLU feed-forward")
    keys.require("pos_emb", "rotary", "rotary", "rotary positions")
    keys.require("apply_residual_connection_post_layernorm", False, False, "pre-norm residuals")
    d_model, n_heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    if d_model % n_heads or keys.integer("kv_channels", d_model // n_heads) * n_heads != d_model:
        raise UserError(
            f"config.json: hidden_size {d_model} must be num_attention_heads {n_heads} × "
            f"kv_channels {config.get('kv_channels')}; correct one of them"
        )
    twice_d_ff = keys.integer("intermediate_size")
    if twice_d_ff % 2:
        raise UserError(
            f"config.json: intermediate_size is {twice_d_ff}; a Qwen v1 config holds twice the "
            "width of w1 and w2, so it must be even"
        )
    return ModelConfig(
        family="qwen",
        vocab_size=keys.integer("vocab_size"),
        d_model=d_model,
        n_layers=keys.integer("num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=d_model // n_heads,
        d_ff=twice_d_ff // 2,
        max_length=keys.integer("max_position_embeddings"),
        tie_embeddings=keys.flag("tie_word_embeddings", False),
        norm_eps=keys.number("layer_norm_epsilon", 1e-6),
        rope_theta=keys.number("rotary_emb_base", 10_000.0),
        rope_fraction=keys.number("rotary_pct", 1.0),
        trained_length=keys.integer("seq_length"),
        # The two released classes had different defaults; every released file has these keys.
        dynamic_ntk=keys.flag("use_dynamic_ntk"),
        logn=keys.flag("use_logn_attn"),
        init_std=keys.number("initializer_range", 0.02),
        # The early file's `resid_pdrop` is not read: no released code used it.
        embed_dropout=keys.number("emb_dropout_prob", 0.0),
        attn_dropout=keys.number("attn_dropout_prob", 0.0),
    )


def _from_v2_v3(keys: _KeyReader) -> ModelConfig:
    """Converts a config of model_type "qwen2" (Qwen1.5, 2, 2.5) or "qwen3", in either format.

    Raises:
      UserError: a missing or malformed key, or a setting that `model` does not implement.
    """
    family = keys.config["model_type"]
    keys.require("hidden_act", "silu", "silu", "a SwiGLU feed-forward")
    if family == "qwen3":  # Qwen2's class has no such key: q, k, v always have biases.
        keys.require("attention_bias", False, False, "no biases in Qwen3's attention")
    keys.require("mlp_bias", False, False, "no biases in the feed-forward")
    d_model, n_heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    head_dim = keys.optional_integer("head_dim")
    if head_dim is None and family == "qwen3":
        head_dim = 128
    elif head_dim is None:
        if d_model % n_heads:
            raise UserError(
                f"config.json: hidden_size {d_model} is not a multiple of num_attention_heads "
                f"{n_heads}; correct one of them or give head_dim"
            )
        head_dim = d_model // n_heads
    n_layers = keys.integer("num_hidden_layers")
    max_length = keys.integer("max_position_embeddings")
    if "num_key_value_heads" not in keys.config:
        keys.integer("num_key_value_heads")  # Raises. Null is allowed: as many as query heads.
    theta, yarn = _rope(keys, max_length)
    return ModelConfig(
        family=family,
        vocab_size=keys.integer("vocab_size"),
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=keys.integer("num_key_value_heads", n_heads),
        head_dim=head_dim,
        d_ff=keys.integer("intermediate_size"),
        max_length=max_length,
        tie_embeddings=keys.flag("tie_word_embeddings", False),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        norm_eps=keys.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        yarn=yarn,
        trained_length=yarn.original_length if yarn else max_length,
        windows=_windows(keys, n_layers),
        init_std=keys.number("initializer_range", 0.02),
        attn_dropout=keys.number("attention_dropout", 0.0),
    )


def _rope(keys: _KeyReader, max_length: int) -> tuple[float, Yarn | None]:
    """Returns the RoPE base and the YaRN settings, None without YaRN.

    Args:
      keys: a Qwen2 or Qwen3 config, with `rope_parameters` (transformers 5) or `rope_theta` and
        `rope_scaling` (transformers 4).
      max_length: `max_position_embeddings`, the default of YaRN's original length.

    Raises:
      UserError: both formats are present and disagree, RoPE differs between layers, or the type of
        scaling is not "default" or "yarn".
    """
    new, old = dict(keys.table("rope_parameters")), dict(keys.table("rope_scaling"))
    if any(isinstance(v, dict) for v in new.values()):
        raise UserError(
            "config.json: rope_parameters differ by layer type; this network has one RoPE for "
            "all layers"
        )
    theta = keys.optional_number("rope_theta")
    new_theta = _KeyReader(new).optional_number("rope_theta")
    if theta is not None and new_theta is not None and theta != new_theta:
        raise UserError(
            f"config.json gives two RoPE bases, rope_theta {theta} and "
            f"rope_parameters.rope_theta {new_theta}; remove one"
        )
    for table in (new, old):
        table.pop("rope_theta", None)
    if new and old and _rope_kind(new) != _rope_kind(old):
        raise UserError(
            "config.json: rope_parameters and rope_scaling disagree; remove one of them"
        )
    table = new or old
    if table.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"config.json: partial_rotary_factor is {table['partial_rotary_factor']}; Qwen2 and "
            "Qwen3 rotate whole heads, so it must be 1.0"
        )
    base = next((t for t in (theta, new_theta) if t is not None), 10_000.0)
    kind = _rope_kind(table)[0]
    if kind == "default":
        return base, None
    if kind != "yarn":
        raise UserError(
            f"config.json: RoPE type {kind!r} is not supported; it must be 'default' or 'yarn'"
        )
    return base, _yarn(table, max_length)


def _rope_kind(table: Mapping[str, Any]) -> tuple[str, Any]:
    """Returns the type ("default" if none is given) and the factor of a table of RoPE settings."""
    return table.get("rope_type", table.get("type")) or "default", table.get("factor")


def _yarn(table: Mapping[str, Any], max_length: int) -> Yarn:
    """Converts a table of RoPE settings of type "yarn".

    A missing factor is `max_length` over the original length. If `mscale` and `mscale_all_dim` are
    given, the attention factor is computed from them as `modeling_rope_utils` does.

    Args:
      table: `rope_parameters` or `rope_scaling`.
      max_length: `max_position_embeddings`, the default of the original length.

    Raises:
      UserError: a malformed key, or `truncate` false.
    """
    keys = _KeyReader(table)
    keys.require("truncate", True, True, "YaRN's rounded correction range")
    original = keys.integer("original_max_position_embeddings", max_length)
    factor = keys.optional_number("factor") or max_length / original
    attention = keys.optional_number("attention_factor")
    mscale, mscale_all = keys.optional_number("mscale"), keys.optional_number("mscale_all_dim")
    if attention is None and mscale and mscale_all:
        log = max(math.log(factor), 0.0)
        attention = (0.1 * mscale * log + 1.0) / (0.1 * mscale_all * log + 1.0)
    return Yarn(
        factor=factor,
        original_length=original,
        beta_fast=keys.optional_number("beta_fast") or 32.0,
        beta_slow=keys.optional_number("beta_slow") or 1.0,
        attention_factor=attention,
    )


def _windows(keys: _KeyReader, n_layers: int) -> tuple[int | None, ...]:
    """Returns the sliding-window length of each layer, None for full attention.

    Returns () if every layer has full attention. Layers come from `layer_types`, else from
    `max_window_layers`, the first layer with a window.

    Raises:
      UserError: an unknown layer type, another number of them than `n_layers`, or sliding layers
        without a window length.
    """
    window = (
        keys.optional_integer("sliding_window") if keys.flag("use_sliding_window", False) else None
    )
    kinds = keys.config.get("layer_types")
    if kinds is None:
        first = keys.number("max_window_layers", 28.0)
        kinds = [
            "sliding_attention" if window and i >= first else "full_attention"
            for i in range(n_layers)
        ]
    if len(kinds) != n_layers:
        raise UserError(
            f"config.json: layer_types names {len(kinds)} layers but num_hidden_layers is "
            f"{n_layers}; they must agree"
        )
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        raise UserError(
            f"config.json: layer type {unknown[0]!r} is not supported; it must be "
            "'full_attention' or 'sliding_attention'"
        )
    if "sliding_attention" not in kinds:
        return ()
    if window is None:
        raise UserError(
            "config.json: layer_types has sliding layers, but use_sliding_window is false or "
            "sliding_window is missing; set both or make every layer 'full_attention'"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
