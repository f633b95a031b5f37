"""GPTQ folders (AutoGPTQ's layout): what their config says, which tensors they hold, reading one.

A linear layer X of a folder with `bits` bits and groups of `group_size` inputs is stored as

    X.qweight  int32 [in·bits/32, out]      packed along the input, lowest bits first
    X.qzeros   int32 [groups, out·bits/32]  packed along the output, zero − 1
    X.scales   float [groups, out]
    X.g_idx    int32 [in]                   the group of each input (left out by some writers)

and its weight [in, out] is (q − zero) · scale. Checkpoints of format "gptq_v2" store zero itself.
Sources: AutoGPTQ's `qlinear_cuda_old.QuantLinear` and `BaseQuantizeConfig`; the released
Qwen-*-Chat-Int4 and -Int8 folders, whose layers may carry biases of zeros where the model has none.
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

HEAD_BITS = {"bits": 8, "group_size": -1}
"""How an output head is packed, in the words of `dynamic`."""


@dataclasses.dataclass(frozen=True)
class Packing:
    """What a folder's quantisation config says.

    Attributes:
      format: bits, group, and whether the output head is packed too.
      zero_bias: what is to be added to the zeros as stored.
    """

    format: QuantFormat
    zero_bias: int = 1

    def of(self, slot: mapping.Slot) -> QuantFormat | None:
        """How a native leaf is packed; None if it isn't."""
        if slot.path == HEAD:
            return QuantFormat(8, None) if self.format.head else None
        return self.format if slot.path[1:] in INPUT_AXES else None


def read_packing(config: Mapping[str, Any]) -> Packing:
    """Reads a `quantization_config` object, or what `quantize_config.json` holds.

    Raises:
      UserError: another method than GPTQ, other bits, reordered inputs (`desc_act`), settings that
        differ from layer to layer, or a malformed key.
    """
    method = config.get("quant_method", "gptq")
    if method != "gptq":
        raise UserError(
            f"the weights are quantised by quant_method {method!r}, which is not read; use a GPTQ "
            "or the unquantised release, or quantise that one with launch.quantise"
        )
    bits, group = config.get("bits"), config.get("group_size", -1)
    if bits not in (4, 8) or isinstance(bits, bool):
        raise UserError(f"the quantisation config has bits {bits!r}; GPTQ of 4 or 8 bits is read")
    if type(group) is not int or (group != -1 and group < 1):
        raise UserError(
            f"the quantisation config has group_size {group!r}; it must be a positive integer or -1"
        )
    if config.get("desc_act"):
        raise UserError(
            "the weights are quantised with desc_act true (inputs in another order), which is not "
            "read; use a release with desc_act false, as Qwen's own are"
        )
    form = config.get("checkpoint_format", "gptq")
    if form not in ("gptq", "gptq_v2"):
        raise UserError(
            f"the quantisation config has checkpoint_format {form!r}; 'gptq' and 'gptq_v2' are read"
        )
    head = bool(config.get("lm_head"))
    dynamic = config.get("dynamic") or {}
    if dynamic != ({"lm_head": HEAD_BITS} if head else {}):
        raise UserError(
            f"the quantisation config has dynamic {dynamic!r}; only an output head (lm_head) of "
            f"{HEAD_BITS} may differ from the other layers"
        )
    return Packing(
        QuantFormat(bits, None if group == -1 else group, head),
        zero_bias=1 if form == "gptq" else 0,
    )


def describe(fmt: QuantFormat) -> dict[str, Any]:
    """The `quantization_config` of a folder in this format; `read_packing` of it gives it back."""
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
        out["dynamic"] = {"lm_head": HEAD_BITS}
    return out


def expected(
    cfg: ModelConfig, packing: Packing | None
) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Every tensor a folder must hold: name → (shape, dtypes it may have).

    Raises:
      UserError: groups that don't divide a layer's inputs, or a packed head where the model has
        none of its own.
    """
    if packing is not None and packing.format.head and cfg.tie_embeddings:
        raise UserError(
            "the quantisation config has lm_head true, but the model ties its output head to its "
            "embedding; correct one of the two"
        )
    out: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}
    for name, tensor in mapping.hf_tensors(cfg).items():
        fmt = packing and packing.of(tensor.parts[0][0])
        if fmt is None:
            out[name] = (tensor.shape, tuple(FLOAT_DTYPES))
            continue
        outputs, inputs = tensor.shape
        if inputs % (fmt.group or 32) or inputs * fmt.bits % 32 or outputs * fmt.bits % 32:
            raise UserError(
                f"{name} has {inputs} inputs and {outputs} outputs, which groups of "
                f"{fmt.group or inputs} and words of {32 // fmt.bits} numbers do not divide; "
                "correct the quantisation config"
            )
        base, groups = name.removesuffix(".weight"), inputs // (fmt.group or inputs)
        out[base + ".qweight"] = ((inputs * fmt.bits // 32, outputs), ("I32",))
        out[base + ".qzeros"] = ((groups, outputs * fmt.bits // 32), ("I32",))
        out[base + ".scales"] = ((groups, outputs), tuple(FLOAT_DTYPES))
    return out


def optional(cfg: ModelConfig, packing: Packing) -> dict[str, tuple[int, ...]]:
    """Tensors that packed layers may have beside the expected ones: name → shape."""
    out = {}
    for name, tensor in mapping.hf_tensors(cfg).items():
        if packing.of(tensor.parts[0][0]) is not None:
            base = name.removesuffix(".weight")
            out[base + ".bias"] = tensor.shape[:1]
            out[base + ".g_idx"] = tensor.shape[1:]
    return out


def check_values(files: TensorFiles, cfg: ModelConfig, packing: Packing) -> None:
    """Looks into the small tensors: groups in order, and no bias where the model has none.

    Raises:
      UserError: one of the two.
    """
    known = mapping.hf_tensors(cfg)
    for name, tensor in known.items():
        fmt = packing.of(tensor.parts[0][0])
        if fmt is None:
            continue
        base, inputs = name.removesuffix(".weight"), tensor.shape[1]
        groups = base + ".g_idx"
        in_order = np.arange(inputs) // (fmt.group or inputs)
        if groups in files.infos and (files.tensor(groups) != in_order).any():
            raise UserError(
                f"{groups} puts inputs into groups out of order (desc_act), which is not read; "
                "use a release with desc_act false"
            )
        bias = base + ".bias"
        if bias in files.infos and bias not in known and files.tensor(bias).any():
            raise UserError(
                f"{bias} is a bias that is not zero, and this model has none there; correct "
                "config.json or use the release it was made from"
            )


def unpack_rows(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 [W, O] -> uint8 [W·32/bits, O]: the numbers packed along the first axis."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)[:, None]
    codes = words.view(np.uint32)[:, None] >> shifts & np.uint32(2**bits - 1)
    return codes.astype(np.uint8).reshape(-1, words.shape[1])


def pack_rows(codes: np.ndarray, bits: int) -> np.ndarray:
    """Numbers from 0, [K, O] -> int32 [K·bits/32, O], lowest bits first; undoes `unpack_rows`."""
    per_word = 32 // bits
    grouped = codes.reshape(-1, per_word, codes.shape[1]).astype(np.uint32)
    words = np.zeros((len(grouped), codes.shape[1]), np.uint32)
    for i in range(per_word):
        words |= grouped[:, i] << np.uint32(bits * i)
    return words.view(np.int32)


def read_zeros(files: TensorFiles, name: str, packing: Packing, bits: int) -> np.ndarray:
    """The zeros of a tensor `X.qzeros`, int32 [G, O]."""
    packed = np.ascontiguousarray(files.tensor(name).T)
    return unpack_rows(packed, bits).T.astype(np.int32) + packing.zero_bias


def symmetric(files: TensorFiles, slot: mapping.Slot, packing: Packing) -> bool:
    """Whether every zero of a leaf is the middle, 2^(bits−1), so that none need be kept."""
    bits = packing.of(slot).bits
    rows = slice(*slot.rows)
    return all(
        (
            read_zeros(files, _base(name) + ".qzeros", packing, bits)[:, rows] == 2 ** (bits - 1)
        ).all()
        for name in slot.names
    )


def layer_reader(
    files: TensorFiles, slot: mapping.Slot, packing: Packing, kind: type[QuantisedWeight]
) -> Callable[[int], QuantisedWeight]:
    """A function that reads one layer of a packed leaf as numpy arrays, as `kind` holds it.

    `ChannelWeight` needs a single group and symmetric zeros.
    """
    bits, columns = packing.of(slot).bits, slice(*slot.rows)
    keep_zeros = kind is GroupWeight and not symmetric(files, slot, packing)

    def read(layer: int) -> QuantisedWeight:
        base = _base(slot.names[layer])
        words = files.tensor(base + ".qweight")[:, columns]
        scales = files.tensor(base + ".scales")[:, columns].astype(np.float32)
        if kind is ChannelWeight:
            codes = (unpack_rows(words, bits).astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)
            shape = slot.layer_shape
            return ChannelWeight(codes.reshape(shape), scales.reshape(_outputs(slot)))
        zeros = None
        if keep_zeros:
            zeros = read_zeros(files, base + ".qzeros", packing, bits)[:, columns]
            zeros = zeros.astype(np.float32)[:, None]
        return GroupWeight(words, scales[:, None], zeros, bits=bits)

    return read


def _base(name: str) -> str:
    return name.removesuffix(".weight")


def _outputs(slot: mapping.Slot) -> tuple[int, ...]:
    inputs = 1 if slot.path == HEAD else INPUT_AXES[slot.path[1:]]
    return slot.layer_shape[inputs:]


def is_packed(infos: Mapping[str, TensorInfo]) -> bool:
    """Whether a folder holds packed weights, whatever its config says."""
    return any(name.endswith(".qweight") for name in infos)
