"""FLOPs and HBM bytes of each HLO operation, computed from its shapes.

FLOPs are counted for convolutions and dots (on TPUs every matrix product is a convolution, on GPUs
most are calls of cuBLAS) and for Pallas kernels: from the cost estimate of TPU kernels, and from
the operands of Hopper kernels, whose calls carry no estimate. Elementwise operations are left to
the compiler's cycle estimates. The counting rules are those of XLA's HloCostAnalysis, with two
additions for memory: of an operand that is only sliced, the slices count; of an update in place,
the update counts.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator

from qwen_jax.aot.hlo import HBM, Computation, HloModule, Instruction

_FREE = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "domain", "add-dependency"),
}
_SLICES = ("dynamic-slice", "slice", "gather")
_CUBLAS = ("__cublas$gemm", "__cublas$lt$matmul")
_KERNELS = ("tpu_custom_call", "mosaic_gpu", "mosaic_gpu_v2")

# Products over the head dimension for each pair of query and key, of the kernels in kernels/gpu:
# scores and output; scores, d_out·v, dk, dv and dq; the same without dq; scores, d_out·v and dq.
HOPPER_PRODUCTS = {
    "flash_forward": 2,
    "flash_backward": 5,
    "flash_backward_dkdv": 4,
    "flash_backward_dq": 3,
}
_HOPPER_TILE = 128


def is_free(i: Instruction) -> bool:
    """Returns whether an operation is bookkeeping that takes no time."""
    if i.opcode == "custom-call":
        return i.text("custom_call_target") in ("AllocateBuffer", "ConcatBitcast", "Sharding")
    return i.opcode in _FREE


def _window(text: str, rank: int) -> list[dict[str, int]]:
    """Parses the window of a convolution.

    Args:
      text: attributes of the instruction.
      rank: number of spatial dimensions.

    Returns:
      Per spatial dimension: size, stride, pad_low, lhs_dilate, rhs_dilate, defaults filled in.
    """
    match = re.search(r"window=\{([^}]*)\}", text)
    fields = dict(part.split("=") for part in match[1].split()) if match else {}

    def values(key, default):
        return fields[key].split("x") if key in fields else [default] * rank

    rows = zip(
        values("size", "1"),
        values("stride", "1"),
        values("pad", "0_0"),
        values("lhs_dilate", "1"),
        values("rhs_dilate", "1"),
        strict=True,
    )
    return [
        {"size": int(size), "stride": int(stride), "pad_low": int(pad.split("_")[0]),
         "lhs_dilate": int(lhs), "rhs_dilate": int(rhs)}
        for size, stride, pad, lhs, rhs in rows
    ]  # fmt: skip


def _valid_positions(w: dict[str, int], n_in: int, n_out: int) -> int:
    """Returns the number of (output, kernel) position pairs that read a real input element.

    Pairs that fall on padding or between dilated elements are not counted.

    Args:
      w: window of one dimension, as `_window` returns it.
      n_in: size of the input dimension.
      n_out: size of the output dimension.
    """
    if w == {"size": w["size"], "stride": 1, "pad_low": 0, "lhs_dilate": 1, "rhs_dilate": 1} and (
        n_out + w["size"] - 1 <= n_in
    ):
        return n_out * w["size"]
    extent = (n_in - 1) * w["lhs_dilate"] + 1
    count = 0
    for out in range(n_out):
        first = out * w["stride"] - w["pad_low"]
        for k in range(w["size"]):
            position = first + k * w["rhs_dilate"]
            count += 0 <= position < extent and position % w["lhs_dilate"] == 0
    return count


def _convolution_flops(scope: Computation, i: Instruction) -> float:
    """Returns the FLOPs of a convolution, without products with padding."""
    lhs, rhs = (scope.by_name[name].shapes[0] for name in i.operands[:2])
    labels = re.search(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)", i.attributes)
    if labels is None:
        raise ValueError(f"HLO convolution {i.name} has no dim_labels")
    left, right, out = labels.groups()
    spatial = sorted(c for c in left if c.isdigit())
    windows = _window(i.attributes, len(spatial))
    valid = 1
    for c, w in zip(spatial, windows, strict=True):
        valid *= _valid_positions(w, lhs.dims[left.index(c)], i.shapes[0].dims[out.index(c)])
    # The kernel's input-feature length is already divided by feature_group_count.
    features = rhs.dims[right.index("i")] * i.shapes[0].dims[out.index("f")]
    groups = re.search(r"batch_group_count=(\d+)", i.attributes)
    batch = lhs.dims[left.index("b")] / (int(groups[1]) if groups else 1)
    return 2.0 * valid * features * batch


def _dot_flops(scope: Computation, i: Instruction) -> float:
    """Returns the FLOPs of a dot."""
    lhs = scope.by_name[i.operands[0]].shapes[0]
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
    dims = [int(d) for d in contracted[1].split(",") if d] if contracted else []
    return 2.0 * i.shapes[0].elements * math.prod(lhs.dims[d] for d in dims)


def kernel_estimate(i: Instruction) -> dict[str, float] | None:
    """Returns the `cost_estimate` of a Pallas call, or None.

    Its keys are flops, bytes_accessed and transcendentals.
    """
    match = re.search(r'"cost_estimate":(\{[^}]*\})', i.attributes)
    return {k: float(v) for k, v in json.loads(match[1]).items()} if match else None


def _cublas_flops(scope: Computation, i: Instruction) -> float:
    """Returns the FLOPs of a cuBLAS call."""
    lhs = scope.by_name[i.operands[0]].shapes[0]
    contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', i.attributes)
    dims = [int(d) for d in re.findall(r"\d+", contracted[1])] if contracted else []
    return 2.0 * i.shapes[0].elements * math.prod(lhs.dims[d] for d in dims)


def _hopper_flops(scope: Computation, i: Instruction) -> float | None:
    """Returns the FLOPs of a Hopper attention kernel of this package; None for other kernels.

    Attention is taken as causal; what segments or a window save is ignored. Tiles of 128 queries
    and keys are computed completely. If there are not as many keys as queries (ring attention or a
    cache), every query is counted as seeing all keys.
    """
    parts = (i.text("op_name") or "").split("/")
    products = next((n for name, n in HOPPER_PRODUCTS.items() if name in parts), None)
    if products is None:
        return None
    queries, keys = (scope.by_name[name].shapes[0].dims for name in i.operands[:2])
    batch, length, heads, width = queries
    seen = (length + _HOPPER_TILE) / 2 if length == keys[1] else keys[1]
    return 2.0 * products * batch * heads * width * length * seen


def is_kernel(i: Instruction) -> bool:
    """Returns whether an operation is a Pallas call."""
    return i.opcode == "custom-call" and i.text("custom_call_target") in _KERNELS


def kernel_flops(scope: Computation, i: Instruction) -> float | None:
    """Returns the FLOPs of a Pallas call; None if they are unknown."""
    if i.text("custom_call_target") != "tpu_custom_call":
        return _hopper_flops(scope, i)
    estimate = kernel_estimate(i)
    return None if estimate is None else estimate["flops"]


def pallas_calls(
    module: HloModule, scope: Computation, i: Instruction
) -> Iterator[tuple[Computation, Instruction]]:
    """Yields the Pallas calls of an operation: itself, or those inside a fusion.

    Yields:
      (computation of the call, call).
    """
    if is_kernel(i):
        yield scope, i
    elif i.opcode == "fusion":
        inner = module.called(i, "calls")
        for j in inner.instructions:
            yield from pallas_calls(module, inner, j)


def flops(module: HloModule, scope: Computation, i: Instruction) -> float:
    """Returns the FLOPs of an operation, including computations it calls but not loop bodies."""
    if is_kernel(i):
        return kernel_flops(scope, i) or 0.0
    if i.opcode == "convolution":
        return _convolution_flops(scope, i)
    if i.opcode == "dot":
        return _dot_flops(scope, i)
    if i.opcode == "custom-call" and i.text("custom_call_target") in _CUBLAS:
        return _cublas_flops(scope, i)
    if i.opcode == "fusion":
        inner = module.called(i, "calls")
        return sum(flops(module, inner, j) for j in inner.instructions)
    return 0.0


def _hbm_size(shapes) -> int:
    """Returns the bytes of the shapes that are in HBM."""
    return sum(s.bytes for s in shapes if s.space == HBM)


def _bytes_read(module: HloModule, inner: Computation, value: Instruction) -> int:
    """Returns the bytes of HBM that a fused computation reads through one of its parameters.

    All of the parameter, or only the slices if every use is a slice.

    Args:
      module: the program.
      inner: the fused computation.
      value: the parameter, or a bitcast of it.
    """
    total_bytes = value.shapes[0].bytes
    read = 0
    for user in inner.users.get(value.name, []):
        if user.opcode == "bitcast":
            read += _bytes_read(module, inner, user)
        elif user.opcode == "fusion":
            called = module.called(user, "calls")
            numbers = {str(n) for n, name in enumerate(user.operands) if name == value.name}
            read += sum(
                _bytes_read(module, called, p)
                for p in called.instructions
                if p.opcode == "parameter" and p.literal in numbers
            )
        elif user.opcode in _SLICES and user.operands[0] == value.name:
            read += user.shapes[0].bytes
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
            continue  # the rest is not read
        else:
            return total_bytes
    return min(read, total_bytes)


def _bytes_written(inner: Computation, i: Instruction, outer_bytes: int) -> int:
    """Returns the bytes written for one result of a fused computation.

    For an update in place, these are the bytes of the update.

    Args:
      inner: the fused computation.
      i: instruction that computes the result.
      outer_bytes: size of the result.
    """
    while i.opcode in ("bitcast", "copy", "convert") and i.operands[0] in inner.by_name:
        if i.opcode != "bitcast":
            return outer_bytes
        i = inner.by_name[i.operands[0]]
    if i.opcode == "dynamic-update-slice":
        return inner.by_name[i.operands[1]].shapes[0].bytes
    if i.opcode == "parameter":  # passed through, aliased
        return 0
    return outer_bytes


def hbm_bytes(module: HloModule, scope: Computation, i: Instruction) -> int:
    """Returns the bytes an operation reads from and writes to HBM; VMEM is not counted."""
    operands = [scope.by_name[name] for name in i.operands if name in scope.by_name]
    if i.opcode == "custom-call" and (estimate := kernel_estimate(i)):
        return int(estimate["bytes_accessed"])
    if i.opcode == "custom-call" and i.text("custom_call_target") in _CUBLAS:
        # Only the first result: the second is workspace.
        return _hbm_size(i.shapes[:1]) + sum(_hbm_size(o.shapes[:1]) for o in operands)
    if i.opcode in _SLICES:
        return 2 * _hbm_size(i.shapes)
    if i.opcode == "dynamic-update-slice":
        return 2 * operands[1].shapes[0].bytes if i.shapes[0].space == HBM else 0
    if i.opcode != "fusion":
        return _hbm_size(i.shapes) + sum(_hbm_size(o.shapes) for o in operands)
    inner = module.called(i, "calls")
    parameters = {int(p.literal): p for p in inner.instructions if p.opcode == "parameter"}
    total = 0
    for index, operand in enumerate(operands):
        if len(operand.shapes) == 1 and operand.shapes[0].space == HBM and index in parameters:
            total += _bytes_read(module, inner, parameters[index])
    root = inner.root
    results = [inner.by_name[n] for n in root.operands] if root.opcode == "tuple" else [root]
    if len(results) != len(i.shapes):
        return total + _hbm_size(i.shapes)
    for shape, result in zip(i.shapes, results, strict=True):
        if shape.space == HBM:
            total += _bytes_written(inner, result, shape.bytes)
    return total
