"""One table that says where each native weight lives in the released files, both ways.

A `Slot` is one native leaf. Its layers are HF tensors (or a block of rows of one: Qwen v1 keeps
q, k and v in a single `c_attn`); a layer is that block split into heads (`view`) with its axes
permuted (`perm`), because torch Linear weights are [out, in] and native kernels are [in, out].
Loading, saving, shape checks and byte counts are all read off this table.

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
class Slot:
    """How one native leaf is stored in Hugging Face tensors.

    Attributes:
      path: keys of the leaf in the parameter tree.
      names: the HF tensor of each layer; one name when the leaf has no layer axis.
      stacked: whether the native leaf has a leading layer axis L.
      tensor_shape: shape of each of those HF tensors.
      rows: [start, stop) of the tensor's first axis that belongs to this leaf.
      view: shape that block is split to, without moving data.
      perm: native axis i (after L) is axis perm[i] of the view.
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
        """Shape of one layer of the native leaf."""
        return tuple(self.view[axis] for axis in self.perm)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the native leaf."""
        return (len(self.names), *self.layer_shape) if self.stacked else self.layer_shape

    def to_native(self, tensor: Any) -> Any:
        """One layer of the native leaf from its whole HF tensor; numpy returns a view."""
        return tensor[self.rows[0] : self.rows[1]].reshape(self.view).transpose(self.perm)

    def to_hf(self, layer: Any) -> Any:
        """The block of rows of the HF tensor that `layer` (one layer of the leaf) fills."""
        inverse = tuple(self.perm.index(axis) for axis in range(len(self.perm)))
        return layer.transpose(inverse).reshape(
            (self.rows[1] - self.rows[0], *self.tensor_shape[1:])
        )


@dataclasses.dataclass(frozen=True)
class HFTensor:
    """One tensor of the HF files: its shape, and the (slot, layer) blocks stacked along axis 0."""

    shape: tuple[int, ...]
    parts: tuple[tuple[Slot, int], ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


# HF names by family: model prefix, then the tensors of a layer and those outside.
_V1 = {
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
_V2 = {
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


def slots(cfg: ModelConfig) -> tuple[Slot, ...]:
    """Every native leaf of `cfg`, in the order of the forward pass."""
    names = _V1 if cfg.family == "qwen" else _V2
    v, d, f = cfg.vocab_size, cfg.d_model, cfg.d_ff
    out = [_whole(("embed", "table"), names["embed"], (v, d))]
    in_layers = ("attn_norm", "scale"), names["attn_norm"] + ".weight", (d,)
    out.append(_stacked(cfg, names, *in_layers))
    out += _attention_slots(cfg, names)
    out.append(_stacked(cfg, names, ("mlp_norm", "scale"), names["mlp_norm"] + ".weight", (d,)))
    for leaf, shape in (("gate", (f, d)), ("up", (f, d)), ("down", (d, f))):
        path, name = ("mlp", leaf), names[leaf] + ".weight"
        out.append(_stacked(cfg, names, path, name, shape, perm=(1, 0)))
    out.append(_whole(("final_norm", "scale"), names["final_norm"], (d,)))
    if not cfg.tie_embeddings:
        out.append(_whole(("head", "kernel"), "lm_head.weight", (v, d), perm=(1, 0)))
    return tuple(out)


def _attention_slots(cfg: ModelConfig, names: Mapping[str, str]) -> list[Slot]:
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
            _stacked(cfg, names, ("attn", leaf), name + ".weight", (out_rows, d),
                     rows=rows, view=(n, h, d), perm=(2, 0, 1))
        )  # fmt: skip
        biases.append(
            _stacked(cfg, names, ("attn", f"{leaf}_bias"), name + ".bias", (out_rows,),
                     rows=rows, view=(n, h))
        )  # fmt: skip
        start += n * h
    o_shape = (d, cfg.n_heads * h)
    weights.append(
        _stacked(cfg, names, ("attn", "o"), names["o"] + ".weight", o_shape,
                 view=(d, cfg.n_heads, h), perm=(1, 2, 0))
    )  # fmt: skip
    norms = [
        _stacked(cfg, names, ("attn", leaf, "scale"), f"self_attn.{leaf}.weight", (h,))
        for leaf in ("q_norm", "k_norm")
    ]
    return weights + biases * cfg.qkv_bias + norms * cfg.qk_norm


def _whole(path, name, shape, perm=None) -> Slot:
    perm = perm or tuple(range(len(shape)))
    return Slot(path, (name,), False, shape, (0, shape[0]), shape, perm)


def _stacked(cfg, names, path, name, shape, *, rows=None, view=None, perm=None) -> Slot:
    prefix = names["layer"]
    layers = tuple(prefix.format(l) + name for l in range(cfg.n_layers))
    view = view or shape
    perm = perm or tuple(range(len(view)))
    return Slot(("layers", *path), layers, True, shape, rows or (0, shape[0]), view, perm)


def hf_tensors(cfg: ModelConfig) -> dict[str, HFTensor]:
    """Every tensor of the released files of `cfg` by name: embedding, layer by layer, head."""
    parts: dict[str, list[tuple[Slot, int]]] = {}
    table = slots(cfg)
    before = [s for s in table if not s.stacked and s.path[0] == "embed"]
    after = [s for s in table if not s.stacked and s.path[0] != "embed"]
    layered = [s for s in table if s.stacked]
    order = [(s, 0) for s in before]
    order += [(s, l) for l in range(cfg.n_layers) for s in layered]
    order += [(s, 0) for s in after]
    for slot, layer in order:
        parts.setdefault(slot.names[layer], []).append((slot, layer))
    return {
        name: HFTensor(blocks[0][0].tensor_shape, tuple(sorted(blocks, key=lambda b: b[0].rows)))
        for name, blocks in parts.items()
    }


def leaf_of(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """The leaf of a nested dict at `path`; KeyError when there is none."""
    for key in path:
        tree = tree[key]
    return tree


def tree_to_hf(tree: Mapping[str, Any], cfg: ModelConfig) -> dict[str, np.ndarray]:
    """A whole parameter-shaped tree (weights, gradients) as named HF arrays, in host memory.

    For small trees and comparisons; `save.save_hf` writes large models one layer at a time.
    """
    out = {}
    for name, tensor in hf_tensors(cfg).items():
        blocks = []
        for slot, layer in tensor.parts:
            leaf = np.asarray(leaf_of(tree, slot.path))
            blocks.append(slot.to_hf(leaf[layer] if slot.stacked else leaf))
        out[name] = np.concatenate(blocks)
    return out


def tree_from_hf(tensors: Mapping[str, np.ndarray], cfg: ModelConfig) -> dict[str, Any]:
    """The inverse of `tree_to_hf`: named HF arrays as a native tree of numpy arrays."""
    tree: dict[str, Any] = {}
    for slot in slots(cfg):
        layers = [slot.to_native(np.asarray(tensors[name])) for name in slot.names]
        set_leaf(tree, slot.path, np.stack(layers) if slot.stacked else layers[0])
    return tree


def set_leaf(tree: dict[str, Any], path: tuple[str, ...], leaf: Any) -> None:
    """Puts `leaf` at `path` of a nested dict, making the dicts on the way."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf
