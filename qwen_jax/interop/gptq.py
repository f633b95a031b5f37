"""GPTQ model folders in AutoGPTQ's layout: parses their config, checks and unpacks their tensors.

A linear layer X with `bits` bits and groups of `group_size` inputs is stored as

    X.qweight  int32 [in·bits/32, out]      q, packed along the input, lowest bits first
    X.qzeros   int32 [groups, out·bits/32]  zero − 1, packed along the output
    X.scales   float [groups, out]
    X.g_idx    int32 [in]                   the group of each input (left out by some writers)

and its weight [in, out] is (q − zero) · scale. Checkpoints of format "gptq_v2" store zero instead
of zero − 1. In names here, codes are the integers q, and a zero is a zero point.

Sources: AutoGPTQ's `qlinear_cuda_old.QuantLinear` and `BaseQuantizeConfig`; the released
Qwen-*-Chat-Int4 and -Int8 folders, whose layers may have biases of zeros where the model has none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from qwen_jax.errors import UserError
from qwen_jax.interop import mapping
from qwen_jax.interop.safetensors_io import FLOAT_DTYPES, TensorFiles, TensorInfo
from qwen_jax.kernels.quantised import GroupWeight
from qwen_jax.model.config import ModelConfig
from qwen_jax.model.quantised import HEAD, INPUT_AXES, ChannelWeight, QuantFormat, QuantisedWeight

HEAD_SETTINGS = {"bits": 8, "group_size": -1}
"""Entry of a quantised output head in the config's `dynamic` (settings per module)."""


@dataclasses.dataclass(frozen=True)
class GptqConfig:
    """Quantisation settings of a GPTQ model folder.

    Attributes:
      format: bits, group size, and whether the output head is quantised.
      zero_bias: number to add to stored zeros: 1 for format "gptq", 0 for "gptq_v2".
    """

    format: QuantFormat
    zero_bias: int = 1

    def format_of(self, leaf_map: mapping.LeafMapping) -> QuantFormat | None:
        """Returns the format of the native leaf of a mapping entry, None if it is not quantised."""
        if leaf_map.path == HEAD:
            return QuantFormat(8, None) if self.format.head else None
        return self.format if leaf_map.path[1:] in INPUT_AXES else None


def parse_gptq_config(config: Mapping[str, Any]) -> GptqConfig:
    """Parses the `quantization_config` of a `config.json`, or the whole `quantize_config.json`.

    Raises:
      UserError: another method than GPTQ, bits other than 4 or 8, reordered inputs (`desc_act`),
        settings that differ between layers, or a malformed key.
    """
    method = config.get("quant_method", "gptq")
    if method != "gptq":
        raise UserError(
            f"the weights are quantised by quant_method {method!r}, which is not supported; use "
            "a GPTQ or the unquantised release, or quantise the latter with launch.quantise"
        )
    bits, group = config.get("bits"), config.get("group_size", -1)
    if bits not in (4, 8) or isinstance(bits, bool):
        raise UserError(f"the quantisation config has bits {bits!r}; it must be 4 or 8 (GPTQ)")
    if type(group) is not int or (group != -1 and group < 1):
        raise UserError(
            f"the quantisation config has group_size {group!r}; it must be a positive integer or -1"
        )
    if config.get("desc_act"):
        raise UserError(
            "the weights are quantised with desc_act true (inputs in another order), which is not "
            "supported; use a release with desc_act false, as Qwen's own are"
        )
    form = config.get("checkpoint_format", "gptq")
    if form not in ("gptq", "gptq_v2"):
        raise UserError(
            f"the quantisation config has checkpoint_format {form!r}; it must be 'gptq' or "
            "'gptq_v2'"
        )
    head = bool(config.get("lm_head"))
    dynamic = config.get("dynamic") or {}
    if dynamic != ({"lm_head": HEAD_SETTINGS} if head else {}):
        raise UserError(
            f"the quantisation config has dynamic {dynamic!r}; only an output head (lm_head) of "
            f"{HEAD_SETTINGS} may differ from the other layers"
        )
    return GptqConfig(
        QuantFormat(bits, None if group == -1 else group, head),
        zero_bias=1 if form == "gptq" else 0,
    )


def to_quantization_config(fmt: QuantFormat) -> dict[str, Any]:
    """Returns the `quantization_config` object of a format; inverts `parse_gptq_config`."""
    out: dict[str, Any] = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": fmt.bits,
        "group_size": fmt.group or -1,
        "sym": True,
        "desc_act": False,
        "lm_head": fmt.head,
    }
    if fmt.head:
        out["dynamic"] = {"lm_head": HEAD_SETTINGS}
    return out


def expected_tensors(
    cfg: ModelConfig, gptq_config: GptqConfig | None
) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Returns the tensors that a model folder must contain: name → (shape, allowed dtypes).

    Args:
      cfg: the network.
      gptq_config: how the folder is quantised; None for plain weights.

    Raises:
      UserError: groups or packed words do not divide a layer's inputs or outputs, or the output
        head is quantised and tied to the embedding.
    """
    if gptq_config is not None and gptq_config.format.head and cfg.tie_embeddings:
        raise UserError(
            "the quantisation config has lm_head true, but the model ties its output head to its "
            "embedding; correct one of the two"
        )
    out: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}
    for name, tensor in mapping.hf_tensors(cfg).items():
        fmt = None if gptq_config is None else gptq_config.format_of(tensor.blocks[0][0])
        if fmt is None:
            out[name] = (tensor.shape, tuple(FLOAT_DTYPES))
            continue
        outputs, inputs = tensor.shape
        if inputs % (fmt.group or 32) or inputs * fmt.bits % 32 or outputs * fmt.bits % 32:
            raise UserError(
                f"{name} has {inputs} inputs and {outputs} outputs, which are not divisible into "
                f"groups of {fmt.group or inputs} and words of {32 // fmt.bits} weights; correct "
                "the quantisation config"
            )
        base, groups = _module_name(name), inputs // (fmt.group or inputs)
        out[base + ".qweight"] = ((inputs * fmt.bits // 32, outputs), ("I32",))
        out[base + ".qzeros"] = ((groups, outputs * fmt.bits // 32), ("I32",))
        out[base + ".scales"] = ((groups, outputs), tuple(FLOAT_DTYPES))
    return out


def optional_tensors(cfg: ModelConfig, gptq_config: GptqConfig) -> dict[str, tuple[int, ...]]:
    """Returns name → shape of the tensors a GPTQ folder may have besides the expected ones.

    These are the bias and `g_idx` of every quantised layer.
    """
    out = {}
    for name, tensor in mapping.hf_tensors(cfg).items():
        if gptq_config.format_of(tensor.blocks[0][0]) is not None:
            base = _module_name(name)
            out[base + ".bias"] = tensor.shape[:1]
            out[base + ".g_idx"] = tensor.shape[1:]
    return out


def check_small_tensors(files: TensorFiles, cfg: ModelConfig, gptq_config: GptqConfig) -> None:
    """Checks the values of `g_idx` and of extra biases in an open GPTQ folder.

    Raises:
      UserError: a `g_idx` is not in order (reordered inputs), or a bias that the model does not
        have is not zero.
    """
    known = mapping.hf_tensors(cfg)
    for name, tensor in known.items():
        fmt = gptq_config.format_of(tensor.blocks[0][0])
        if fmt is None:
            continue
        base, inputs = _module_name(name), tensor.shape[1]
        groups = base + ".g_idx"
        in_order = np.arange(inputs) // (fmt.group or inputs)
        if groups in files.infos and (files.tensor(groups) != in_order).any():
            raise UserError(
                f"{groups} assigns inputs to groups out of order (desc_act), which is not "
                "supported; use a release with desc_act false"
            )
        bias = base + ".bias"
        if bias in files.infos and bias not in known and files.tensor(bias).any():
            raise UserError(
                f"{bias} is a bias that is not zero, and this model has no bias there; correct "
                "config.json or use the release it was made from"
            )


def unpack_rows(words: np.ndarray, bits: int) -> np.ndarray:
    """Unpacks int32 words [W, O] into codes uint8 [W·32/bits, O].

    The 32/bits codes of a word become consecutive along the first axis, lowest bits first.
    """
    shifts = np.arange(0, 32, bits, dtype=np.uint32)[:, None]
    codes = words.view(np.uint32)[:, None] >> shifts & np.uint32(2**bits - 1)
    return codes.astype(np.uint8).reshape(-1, words.shape[1])


def pack_rows(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packs codes [K, O] in 0 … 2^bits − 1 into int32 words [K·bits/32, O]; inverts `unpack_rows`.

    The 32/bits codes of a word are consecutive along the first axis, lowest bits first.
    """
    per_word = 32 // bits
    grouped = codes.reshape(-1, per_word, codes.shape[1]).astype(np.uint32)
    words = np.zeros((len(grouped), codes.shape[1]), np.uint32)
    for i in range(per_word):
        words |= grouped[:, i] << np.uint32(bits * i)
    return words.view(np.int32)


def read_zeros(files: TensorFiles, name: str, gptq_config: GptqConfig, bits: int) -> np.ndarray:
    """Reads and unpacks the tensor `name` ("X.qzeros") into zero points int32 [groups, outputs]."""
    packed = np.ascontiguousarray(files.tensor(name).T)
    return unpack_rows(packed, bits).T.astype(np.int32) + gptq_config.zero_bias


def is_symmetric(
    files: TensorFiles, leaf_map: mapping.LeafMapping, gptq_config: GptqConfig
) -> bool:
    """Returns whether every zero point of a GPTQ-packed leaf is the middle code, 2^(bits−1).

    Such zero points need not be kept. They are read from `files`.
    """
    bits, rows = _bits_of(leaf_map, gptq_config), slice(*leaf_map.rows)
    middle = 2 ** (bits - 1)
    return all(
        (
            read_zeros(files, _module_name(name) + ".qzeros", gptq_config, bits)[:, rows] == middle
        ).all()
        for name in leaf_map.names
    )


def layer_reader(
    files: TensorFiles,
    leaf_map: mapping.LeafMapping,
    gptq_config: GptqConfig,
    kind: type[QuantisedWeight],
) -> Callable[[int], QuantisedWeight]:
    """Returns a function that reads one layer of a quantised leaf.

    Args:
      files: the open folder.
      leaf_map: position of the leaf in it; `gptq_config` must quantise it.
      gptq_config: the folder's quantisation settings.
      kind: `GroupWeight`, or `ChannelWeight` for leaves with one group and symmetric zero points.

    Returns:
      Function from layer index to that layer as a `kind` of numpy arrays. A `GroupWeight` has zero
      points only if those of the leaf are not symmetric.
    """
    bits, columns = _bits_of(leaf_map, gptq_config), slice(*leaf_map.rows)
    keep_zeros = kind is GroupWeight and not is_symmetric(files, leaf_map, gptq_config)

    def read(layer: int) -> QuantisedWeight:
        base = _module_name(leaf_map.names[layer])
        # `Any`: the weight classes declare jax.Array, and numpy arrays stand in until loading.
        words: Any = files.tensor(base + ".qweight")[:, columns]
        scales: Any = files.tensor(base + ".scales")[:, columns].astype(np.float32)
        if kind is ChannelWeight:
            codes: Any = (unpack_rows(words, bits).astype(np.int16) - 2 ** (bits - 1)).astype(
                np.int8
            )
            return ChannelWeight(
                codes.reshape(leaf_map.layer_shape), scales.reshape(_outputs(leaf_map))
            )
        zeros: Any = None
        if keep_zeros:
            zeros = read_zeros(files, base + ".qzeros", gptq_config, bits)[:, columns]
            zeros = zeros.astype(np.float32)[:, None]
        return GroupWeight(words, scales[:, None], zeros, bits=bits)

    return read


def _module_name(weight_name: str) -> str:
    """Returns the name of a linear layer, given that of its weight ("X.weight" → "X")."""
    return weight_name.removesuffix(".weight")


def _bits_of(leaf_map: mapping.LeafMapping, gptq_config: GptqConfig) -> int:
    """Returns the bits per weight of a leaf that is quantised."""
    fmt = gptq_config.format_of(leaf_map)
    assert fmt is not None, f"{leaf_map.path} is not quantised"
    return fmt.bits


def _outputs(leaf_map: mapping.LeafMapping) -> tuple[int, ...]:
    """Returns the output axes of one layer's shape ([*inputs, *outputs] → outputs)."""
    inputs = 1 if leaf_map.path == HEAD else INPUT_AXES[leaf_map.path[1:]]
    return leaf_map.layer_shape[inputs:]


def has_packed_tensors(infos: Mapping[str, TensorInfo]) -> bool:
    """Returns whether any tensor in a folder's list has the name of a packed weight."""
    return any(name.endswith(".qweight") for name in infos)
