"""Mapping between native parameter leaves and the tensors of released Hugging Face (HF) files.

`leaf_mappings` is the one table: per native leaf, the HF tensors that store it. A leaf of the layer
stack is one tensor per layer, or a block of its rows (Qwen v1 stores q, k and v in one `c_attn`).
A layer is that block split into heads (`view`) with its axes permuted (`perm`), because torch
Linear weights are [out, in] and native kernels are [in, out]. Loading, saving, shape checks and
byte counts all derive from the table.

Sources: the safetensors indices and modelling code of Qwen/Qwen-7B (v1: w2 is the gate, w1 the up
projection) and transformers' Qwen2 and Qwen3 classes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from qwen_jax.model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class LeafMapping:
    """Position and layout of one native parameter leaf in Hugging Face (HF) tensors.

    Attributes:
      path: keys of the leaf in the native parameter tree.
      names: name of the HF tensor of each layer; a single name if the leaf has no layer axis.
      stacked: whether the native leaf has a leading layer axis.
      tensor_shape: shape of each of these HF tensors.
      rows: (start, stop) of the rows (first axis) of an HF tensor that belong to this leaf.
      view: shape that this block of rows is reshaped to before axes are permuted.
      perm: axis i of a native layer is axis perm[i] of `view`.
    """

    path: tuple[str, ...]
    names: tuple[str, ...]
    stacked: bool
    tensor_shape: tuple[int, ...]
    rows: tuple[int, int]
    view: tuple[int, ...]
    perm: tuple[int, ...]

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """Shape of one layer of the native leaf, without the layer axis."""
        return tuple(self.view[axis] for axis in self.perm)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the native leaf, with the layer axis if it is stacked."""
        return (len(self.names), *self.layer_shape) if self.stacked else self.layer_shape

    def to_native(self, tensor: Any) -> Any:
        """Returns one layer of the native leaf, given the whole HF tensor that stores it.

        Args:
          tensor: numpy or jax array of shape `tensor_shape`.

        Returns:
          Array of shape `layer_shape`; for numpy a view.
        """
        return tensor[self.rows[0] : self.rows[1]].reshape(self.view).transpose(self.perm)

    def to_hf(self, layer: Any) -> Any:
        """Returns the block of rows of the HF tensor that stores one layer of the native leaf.

        Args:
          layer: numpy or jax array of shape `layer_shape`.

        Returns:
          Array [stop − start, *tensor_shape[1:]], with `rows` = (start, stop).
        """
        inverse = tuple(self.perm.index(axis) for axis in range(len(self.perm)))
        return layer.transpose(inverse).reshape(
            (self.rows[1] - self.rows[0], *self.tensor_shape[1:])
        )


@dataclasses.dataclass(frozen=True)
class HFTensor:
    """One tensor of Hugging Face files.

    Attributes:
      shape: its shape.
      blocks: (mapping of a native leaf, layer index) of each block of rows, from top to bottom.
    """

    shape: tuple[int, ...]
    blocks: tuple[tuple[LeafMapping, int], ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


# Names of HF tensors: "layer" is the prefix of a layer's, by index. "embed" and "final_norm" are
# complete names; the others follow the prefix and lack ".weight" or ".bias".
_V1_NAMES = {
    "layer": "transformer.h.{}.",
    "embed": "transformer.wte.weight",
    "final_norm": "transformer.ln_f.weight",
    "attn_norm": "ln_1",
    "mlp_norm": "ln_2",
    "qkv": "attn.c_attn",
    "o": "attn.c_proj",
    "gate": "mlp.w2",
    "up": "mlp.w1",
    "down": "mlp.c_proj",
}
_V2_NAMES = {
    "layer": "model.layers.{}.",
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def leaf_mappings(cfg: ModelConfig) -> tuple[LeafMapping, ...]:
    """Returns the mapping of every native leaf of a network, in the order of the forward pass."""
    names = _V1_NAMES if cfg.family == "qwen" else _V2_NAMES
    v, d, f = cfg.vocab_size, cfg.d_model, cfg.d_ff
    out = [_unstacked(("embed", "table"), names["embed"], (v, d))]
    out.append(_stacked(cfg, names, ("attn_norm", "scale"), names["attn_norm"] + ".weight", (d,)))
    out += _attention_mappings(cfg, names)
    out.append(_stacked(cfg, names, ("mlp_norm", "scale"), names["mlp_norm"] + ".weight", (d,)))
    for leaf, shape in (("gate", (f, d)), ("up", (f, d)), ("down", (d, f))):
        path, name = ("mlp", leaf), names[leaf] + ".weight"
        out.append(_stacked(cfg, names, path, name, shape, perm=(1, 0)))
    out.append(_unstacked(("final_norm", "scale"), names["final_norm"], (d,)))
    if not cfg.tie_embeddings:
        out.append(_unstacked(("head", "kernel"), "lm_head.weight", (v, d), perm=(1, 0)))
    return tuple(out)


def _attention_mappings(cfg: ModelConfig, names: Mapping[str, str]) -> list[LeafMapping]:
    """Returns the mappings of the attention leaves: q, k, v, o, then q, k, v biases, q, k norms.

    Args:
      cfg: the network; it determines which biases and norms exist.
      names: HF names of its family; with the key "qkv", q, k and v are blocks of rows of one
        tensor.
    """
    d, h = cfg.d_model, cfg.head_dim
    heads = {"q": cfg.n_heads, "k": cfg.n_kv_heads, "v": cfg.n_kv_heads}
    fused = "qkv" in names
    total = sum(heads.values()) * h
    weights, biases, start = [], [], 0
    for leaf, n in heads.items():
        name = names["qkv"] if fused else f"self_attn.{leaf}_proj"
        out_rows = total if fused else n * h
        rows = (start, start + n * h) if fused else (0, n * h)
        weights.append(
            _stacked(
                cfg,
                names,
                ("attn", leaf),
                name + ".weight",
                (out_rows, d),
                rows=rows,
                view=(n, h, d),
                perm=(2, 0, 1),
            )
        )
        bias_path = ("attn", f"{leaf}_bias")
        biases.append(
            _stacked(cfg, names, bias_path, name + ".bias", (out_rows,), rows=rows, view=(n, h))
        )
        start += n * h
    weights.append(
        _stacked(
            cfg,
            names,
            ("attn", "o"),
            names["o"] + ".weight",
            (d, cfg.n_heads * h),
            view=(d, cfg.n_heads, h),
            perm=(1, 2, 0),
        )
    )
    norms = [
        _stacked(cfg, names, ("attn", leaf, "scale"), f"self_attn.{leaf}.weight", (h,))
        for leaf in ("q_norm", "k_norm")
    ]
    return weights + biases * cfg.qkv_bias + norms * cfg.qk_norm


def _unstacked(
    path: tuple[str, ...],
    name: str,
    shape: tuple[int, ...],
    perm: tuple[int, ...] | None = None,
) -> LeafMapping:
    """Returns the mapping of a leaf outside the layers that is one whole HF tensor.

    Args:
      path: keys of the native leaf.
      name: name of the HF tensor.
      shape: its shape.
      perm: permutation of its axes; None keeps them.
    """
    perm = perm or tuple(range(len(shape)))
    return LeafMapping(path, (name,), False, shape, (0, shape[0]), shape, perm)


def _stacked(
    cfg: ModelConfig,
    names: Mapping[str, str],
    path: tuple[str, ...],
    name: str,
    shape: tuple[int, ...],
    *,
    rows: tuple[int, int] | None = None,
    view: tuple[int, ...] | None = None,
    perm: tuple[int, ...] | None = None,
) -> LeafMapping:
    """Returns the mapping of a parameter with a layer axis, stored in one HF tensor per layer.

    Args:
      cfg: configuration of the network, for its number of layers.
      names: role -> name of HF tensors and prefixes in this model family.
      path: keys of the parameter below "layers".
      name: name of the HF tensor after the layer's prefix.
      shape: shape of the HF tensor.
      rows: (start, stop) of its rows that belong to the parameter; None: all.
      view: shape that these rows are reshaped to; None: not reshaped.
      perm: permutation of the view's axes; None: none.
    """
    prefix = names["layer"]
    layers = tuple(prefix.format(l) + name for l in range(cfg.n_layers))
    view = view or shape
    perm = perm or tuple(range(len(view)))
    return LeafMapping(("layers", *path), layers, True, shape, rows or (0, shape[0]), view, perm)


def hf_tensors(cfg: ModelConfig) -> dict[str, HFTensor]:
    """Returns name → tensor of the HF files of a network: embedding, layer by layer, norm, head."""
    blocks: dict[str, list[tuple[LeafMapping, int]]] = {}
    table = leaf_mappings(cfg)
    before = [s for s in table if not s.stacked and s.path[0] == "embed"]
    after = [s for s in table if not s.stacked and s.path[0] != "embed"]
    layered = [s for s in table if s.stacked]
    order = [(s, 0) for s in before]
    order += [(s, l) for l in range(cfg.n_layers) for s in layered]
    order += [(s, 0) for s in after]
    for leaf_map, layer in order:
        blocks.setdefault(leaf_map.names[layer], []).append((leaf_map, layer))
    return {
        name: HFTensor(own[0][0].tensor_shape, tuple(sorted(own, key=lambda b: b[0].rows)))
        for name, own in blocks.items()
    }


def get_leaf(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """Returns the value of a nested dict at `path`.

    Raises:
      KeyError: there is none.
    """
    leaf: Any = tree
    for key in path:
        leaf = leaf[key]
    return leaf


def tree_to_hf(tree: Mapping[str, Any], cfg: ModelConfig) -> dict[str, np.ndarray]:
    """Converts a tree with the structure of the parameters into numpy arrays by HF tensor name.

    Everything is copied to host memory: this is for small trees and comparisons (weights or
    gradients). `save.save_hf` writes large models one layer at a time.

    Args:
      tree: native nested dict of arrays.
      cfg: the network.

    Returns:
      HF tensor name → array.
    """
    out = {}
    for name, tensor in hf_tensors(cfg).items():
        blocks = []
        for leaf_map, layer in tensor.blocks:
            leaf = np.asarray(get_leaf(tree, leaf_map.path))
            blocks.append(leaf_map.to_hf(leaf[layer] if leaf_map.stacked else leaf))
        out[name] = np.concatenate(blocks)
    return out


def tree_from_hf(tensors: Mapping[str, np.ndarray], cfg: ModelConfig) -> dict[str, Any]:
    """Converts arrays by HF tensor name into the native parameter tree; inverts `tree_to_hf`.

    Args:
      tensors: HF tensor name → array, for every tensor of the network.
      cfg: the network.

    Returns:
      Nested dict of numpy arrays.
    """
    tree: dict[str, Any] = {}
    for leaf_map in leaf_mappings(cfg):
        layers = [leaf_map.to_native(np.asarray(tensors[name])) for name in leaf_map.names]
        set_leaf(tree, leaf_map.path, np.stack(layers) if leaf_map.stacked else layers[0])
    return tree


def set_leaf(tree: dict[str, Any], path: tuple[str, ...], leaf: Any) -> None:
    """Sets the value of a nested dict at `path` to `leaf`, in place, adding missing dicts."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf
