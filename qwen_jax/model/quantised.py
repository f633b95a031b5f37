"""Quantised parameters: their leaf types, quantisation of parameter trees, and matmuls with them.

The seven matrices of a layer are quantised and, on request, the output head (to int8); embedding,
norms and biases keep their dtype. Two leaf types replace a matrix:

- `ChannelWeight`: int8 or int4 integers with one scale per output. The matmul is an einsum of the
  integers, scaled afterwards; compilers read the integers directly and need no custom kernel.
- `GroupWeight` (`kernels.quantised`): packed 4 or 8 bit integers with a scale per group of inputs,
  as in GPTQ folders.

Both are for inference and have no gradient. Quantisation rounds to nearest, symmetrically; each
scale is the one of a few candidates with the least squared error. Letters in shapes: L layers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax.errors import UserError
from qwen_jax.kernels.quantised import GroupWeight, group_matmul, integer_matmul, pack
from qwen_jax.kernels.quantised import dequantise as dequantise_groups
from qwen_jax.parallel import RULES, mesh_axis, on_mesh, platform, spec

INPUT_AXES: dict[tuple[str, ...], int] = {
    **{("attn", name): 1 for name in ("q", "k", "v")},
    ("attn", "o"): 2,
    **{("mlp", name): 1 for name in ("gate", "up", "down")},
}
"""Quantised matrices of a layer, and how many of their leading axes are inputs."""

HEAD = ("head", "kernel")
"""Path of the output head in the parameter tree."""


@dataclasses.dataclass(frozen=True)
class QuantFormat:
    """Format of quantised weights.

    Attributes:
      bits: bits per weight, 4 or 8.
      group: number of inputs that share a scale; None for all of them (one scale per output).
      head: whether the output head is quantised too, to int8 with one scale per output.
    """

    bits: int = 4
    group: int | None = 128
    head: bool = False

    def __post_init__(self):
        if self.bits not in (4, 8):
            raise UserError(f"weights of {self.bits} bits are not supported; choose 4 or 8")
        if self.group is not None and (self.group < 8 or self.group % 8):
            raise UserError(
                f"a group of {self.group} inputs is not supported; give a multiple of 8, or -1 for "
                "one scale per output channel"
            )

    @property
    def name(self) -> str:
        """Name of the format, such as "int4-g128" or "int8"."""
        return f"int{self.bits}" + (f"-g{self.group}" if self.group else "")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChannelWeight:
    """A quantised matrix, or a stack of L of them, with one scale per output.

    Attributes:
      codes: int8 or int4 integers in the shape of the dense leaf, [(L,) *inputs, *outputs].
      scales: float32 [(L,) *outputs].
    """

    codes: jax.Array
    scales: jax.Array

    @property
    def bits(self) -> int:
        """Bits per weight, 4 or 8."""
        return 4 if self.codes.dtype == jnp.int4 else 8


QuantisedWeight = ChannelWeight | GroupWeight


def is_quantised(x: Any) -> bool:
    """Returns whether a leaf of a parameter tree is a quantised weight."""
    return isinstance(x, QuantisedWeight)


# --- quantisation -------------------------------------------------------------------------------

_CLIPS = tuple(1 - 0.05 * i for i in range(13))
"""Candidate clipping points as fractions of the largest weight. On normal weights none below 0.4 is
best, and 13 candidates come within 1.5 % of the error of 50."""


@functools.partial(jax.jit, static_argnames=("bits", "group"))
def quantise_matrix(
    w: jax.Array, *, bits: int, group: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Rounds a matrix to the nearest integer multiples of a scale per group and output.

    The largest weight of a group is 2^(bits−1) − ½ scales, so that integers use all of −2^(bits−1)
    … 2^(bits−1) − 1 (AutoGPTQ's symmetric grid), or it is clipped to the fraction in `_CLIPS` with
    the least squared error. Scales are rounded to float16 first, as folders store them, so that a
    saved and reloaded weight is identical.

    Args:
      w: [K, O] (inputs, outputs), any float dtype.
      bits: 4 or 8.
      group: inputs per group, a divisor of K; None for K.

    Returns:
      (integers int8 [K, O], scales float32 [K / group, O]).
    """
    inputs, outputs = w.shape
    w = w.astype(jnp.float32).reshape(-1, group or inputs, outputs)
    half = 2 ** (bits - 1)
    largest = jnp.abs(w).max(axis=1, keepdims=True)

    def scaled(share):
        scale = (share * largest / (half - 0.5)).astype(jnp.float16).astype(jnp.float32)
        return jnp.where(scale > 0, scale, jnp.where(largest > 0, 2.0**-24, 1.0))

    def numbers(scale):
        return jnp.clip(jnp.round(w / scale), -half, half - 1)

    def better(best, share):
        error, kept = best
        scale = scaled(share)
        mine = jnp.square(numbers(scale) * scale - w).sum(axis=1, keepdims=True)
        return (jnp.minimum(mine, error), jnp.where(mine < error, scale, kept)), None

    start = (jnp.full_like(largest, jnp.inf), scaled(1.0))
    (_, scale), _ = jax.lax.scan(better, start, jnp.asarray(_CLIPS, jnp.float32))
    return numbers(scale).astype(jnp.int8).reshape(inputs, outputs), scale[:, 0]


def quantise_leaf(w: jax.Array, fmt: QuantFormat, inputs: int) -> QuantisedWeight:
    """Quantises one matrix [*inputs, *outputs], whose first `inputs` axes are inputs.

    Raises:
      UserError: the group does not divide the inputs.
    """
    into, out = math.prod(w.shape[:inputs]), w.shape[inputs:]
    check_group(fmt, into)
    codes, scales = quantise_matrix(w.reshape(into, -1), bits=fmt.bits, group=fmt.group)
    if fmt.group is None:
        dtype = jnp.int4 if fmt.bits == 4 else jnp.int8
        return ChannelWeight(codes.reshape(w.shape).astype(dtype), scales.reshape(out))
    middle = 2 ** (fmt.bits - 1)
    packed = pack(codes.astype(jnp.int32) + middle, fmt.bits)
    return GroupWeight(packed, scales[:, None], bits=fmt.bits)


@functools.partial(jax.jit, static_argnames=("fmt", "inputs"))
def _quantise_stack(w: jax.Array, fmt: QuantFormat, inputs: int) -> QuantisedWeight:
    """Quantises a stack [L, *inputs, *outputs] one layer at a time, to bound float32 copies."""
    return jax.lax.map(lambda layer: quantise_leaf(layer, fmt, inputs), w)


def check_group(fmt: QuantFormat, inputs: int, shards: int = 1) -> None:
    """Checks that the format's groups divide a matrix's inputs on each of `shards` devices.

    Raises:
      UserError: otherwise.
    """
    if fmt.group and inputs % (fmt.group * shards):
        split = f", split over {shards} devices," if shards > 1 else ""
        raise UserError(
            f"a matrix of {inputs} inputs{split} can't be cut into groups of {fmt.group}; choose "
            + ("fewer devices (mesh.tensor)" if shards > 1 else "another group")
            + ", or weights with one scale per output channel (group -1)"
        )


def quantised_paths(params: Mapping[str, Any], fmt: QuantFormat) -> dict[tuple[str, ...], int]:
    """Returns the paths of the leaves that `fmt` quantises, and their number of input axes.

    A leading layer axis is not counted.

    Raises:
      UserError: the head is to be quantised and the model ties it to its embedding.
    """
    found: dict[tuple[str, ...], int] = {
        ("layers", *path): inputs for path, inputs in INPUT_AXES.items()
    }
    if fmt.head:
        if "head" not in params:
            raise UserError(
                "this model's output head is its embedding table (tied), which stays as it is; "
                "leave the head out of quantisation"
            )
        found[HEAD] = 1
    return found


def quantise_params(
    params: Mapping[str, Any], fmt: QuantFormat, *, consume: bool = False
) -> dict[str, Any]:
    """Quantises a parameter tree leaf by leaf.

    Args:
      params: tree as `init_params` makes it, of any float dtype, on one device or replicated on a
        mesh (to shard it, quantise while loading: `interop.load_params`).
      fmt: format of the quantised weights.
      consume: whether to delete each dense matrix once it is quantised, to save memory.

    Returns:
      The tree with quantised weights in place of the matrices that `fmt` covers.

    Raises:
      UserError: as `quantised_paths` and `quantise_leaf`.
    """
    wanted = quantised_paths(params, fmt)

    def leaf(path, x):
        path = tuple(key.key for key in path)
        if path not in wanted:
            return x
        how = format_of(path, fmt)
        run = _quantise_stack if path[0] == "layers" else quantise_leaf
        out = run(x, how, wanted[path])
        if consume:
            jax.block_until_ready(out)
            x.delete()
        return out

    return jax.tree_util.tree_map_with_path(leaf, dict(params))


def format_of(path: tuple[str, ...], fmt: QuantFormat) -> QuantFormat:
    """Returns the format of the leaf at `path` under `fmt`: the head is always int8 per output."""
    return QuantFormat(8, None) if path == HEAD else fmt


def dequantise_params(params: Mapping[str, Any], abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tree with quantised weights replaced by the dense float32 ones they represent.

    For small trees and tests.

    Args:
      params: a parameter tree; leaves that are not quantised stay unchanged.
      abstract: `abstract_params` of the same network, for the shapes.
    """
    shapes = {path: x.shape for path, x in jax.tree_util.tree_leaves_with_path(dict(abstract))}

    def leaf(path, x):
        if isinstance(x, GroupWeight):
            return dequantise_groups(x).reshape(shapes[path])
        if not isinstance(x, ChannelWeight):
            return x
        lead = 1 if path[0].key == "layers" else 0
        inputs = range(lead, lead + x.codes.ndim - x.scales.ndim)
        return x.codes.astype(jnp.float32) * jnp.expand_dims(x.scales, tuple(inputs))

    return jax.tree_util.tree_map_with_path(leaf, dict(params), is_leaf=is_quantised)


# --- shapes and shardings -----------------------------------------------------------------------


def abstract_quantised(abstract: Mapping[str, Any], fmt: QuantFormat) -> dict[str, Any]:
    """Returns the tree of `abstract_params` with quantised weights in place of dense ones.

    Outputs of q, k, v, gate and up are sharded over `tensor`, and inputs of o and down; along
    `fsdp` quantised weights are replicated.

    Raises:
      UserError: as `quantised_paths`; a group that does not divide what a device holds.
    """
    wanted = quantised_paths(abstract, fmt)

    def leaf(path, x):
        path = tuple(key.key for key in path)
        if path not in wanted:
            return x
        lead = 1 if path[0] == "layers" else 0
        return abstract_leaf(x, format_of(path, fmt), lead, wanted[path])

    return jax.tree_util.tree_map_with_path(leaf, dict(abstract))


def abstract_leaf(
    x: jax.ShapeDtypeStruct, fmt: QuantFormat, lead: int, inputs: int, *, zeros: bool = False
) -> QuantisedWeight:
    """Returns an abstract dense leaf as a quantised weight of `ShapeDtypeStruct`s.

    Args:
      x: `ShapeDtypeStruct` [(L,) *inputs, *outputs]; the result is sharded like it, but for `fsdp`.
      fmt: format of the quantised weight.
      lead: 1 with a layer axis, else 0.
      inputs: number of input axes after the layer axis.
      zeros: whether groups have zero points of their own.

    Raises:
      UserError: a group that does not divide what a device holds.
    """
    sharding = x.sharding
    axes = [None] * x.ndim
    if isinstance(sharding, jax.NamedSharding):
        fsdp = {mesh_axis("embed")}
        axes = [None if axis in fsdp else axis for axis in (*sharding.spec, *axes)][: x.ndim]

    def struct(shape, dtype, axes):
        place = sharding
        if isinstance(sharding, jax.NamedSharding):
            place = jax.NamedSharding(sharding.mesh, jax.P(*axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    first, last = x.shape[:lead], x.shape[lead + inputs :]
    if fmt.group is None and not zeros:
        dtype = jnp.int4 if fmt.bits == 4 else jnp.int8
        return ChannelWeight(
            struct(x.shape, dtype, axes),
            struct((*first, *last), jnp.float32, axes[:lead] + axes[lead + inputs :]),
        )
    into, out = math.prod(x.shape[lead : lead + inputs]), math.prod(last)
    axis_in, axis_out = axes[lead], axes[lead + inputs]
    shards = 1 if axis_in is None else sharding.mesh.shape[axis_in]
    fmt = dataclasses.replace(fmt, group=fmt.group or into)
    check_group(fmt, into, shards)
    codes = (*first, into * fmt.bits // 32, out)
    scales = struct(
        *((*first, into // fmt.group, 1, out), jnp.float32),
        [*axes[:lead], axis_in, None, axis_out],
    )
    return GroupWeight(
        struct(codes, jnp.int32, [*axes[:lead], axis_in, axis_out]),
        scales,
        scales if zeros else None,
        bits=fmt.bits,
    )


def weight_bytes(params: Mapping[str, Any]) -> int:
    """Returns the bytes of a parameter tree as stored; int4 counts half a byte."""

    def size(x) -> int:
        bits = 4 if x.dtype == jnp.int4 else 8 * x.dtype.itemsize
        return math.prod(x.shape) * bits // 8

    return sum(map(size, jax.tree.leaves(params)))


# --- matmuls ------------------------------------------------------------------------------------


def scannable(layers: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Splits stacked layers into what a scan slices and a function that completes a slice.

    Group-quantised stacks are not sliced but receive the layer's index: their kernel reads its
    blocks out of the stack, where a slice would be copied first.

    Args:
      layers: parameters of all layers, leaves [L, …].

    Returns:
      (tree to scan over, function from one slice of it to the parameters of that layer).
    """
    tree: Any
    leaves, tree = jax.tree.flatten(layers, is_leaf=lambda x: isinstance(x, GroupWeight))
    stacks = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, GroupWeight)}
    for i, leaf in stacks.items():
        leaves[i] = jnp.arange(leaf.codes.shape[0], dtype=jnp.int32)

    def complete(sliced):
        parts = tree.flatten_up_to(sliced)
        for i, leaf in stacks.items():
            parts[i] = dataclasses.replace(leaf, layer=parts[i])
        return jax.tree.unflatten(tree, parts)

    return jax.tree.unflatten(tree, leaves), complete


def quantised_einsum(
    equation: str,
    x: jax.Array,
    weight: QuantisedWeight,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    out: tuple[str | None, ...] | None = None,
) -> jax.Array:
    """Computes einsum(equation, x, w) for a quantised w, in x's dtype, accumulated in float32.

    Args:
      equation: einsum equation in which x's last axes are w's first ones, the inputs, and the
        outputs are last ("BTD,DNH->BTNH").
      x: activations.
      weight: the weight of one layer.
      shape: shape of the dense weight.
      axes: logical axes of the dense weight.
      out: logical axes of the result, where they don't follow from those of x and w.
    """
    sharding = None if out is None else spec(*out)
    letters = equation.replace("->", ",").split(",")
    inputs = len(set(letters[0]) & set(letters[1]))
    if isinstance(weight, ChannelWeight):
        y = _channel_einsum(equation, x, weight.codes, inputs, sharding)
        return (y * weight.scales).astype(x.dtype)
    lead, outputs = x.ndim - inputs, shape[inputs:]

    def local(x, weight):
        y = group_matmul(x.reshape(*x.shape[:lead], weight.inputs), weight)
        return y.reshape(*y.shape[:lead], -1, *outputs[1:])

    if not on_mesh():
        return local(x, weight)
    return _on_mesh(local, x, weight, lead, inputs, axes, sharding)


def quantised_logits(hidden: jax.Array, kernel: ChannelWeight) -> jax.Array:
    """Multiplies hidden states [B, T, D] by an int8 head [D, V]; logits float32 [B, T, V]."""
    return _channel_einsum("BTD,DV->BTV", hidden, kernel.codes, 1) * kernel.scales


def _channel_einsum(
    equation: str, x: jax.Array, codes: jax.Array, inputs: int, sharding: Any = None
) -> jax.Array:
    """Computes einsum(equation, x, codes) in float32, before scaling.

    Args:
      equation: einsum equation, as in `quantised_einsum`.
      x: activations.
      codes: int8 or int4, unscaled weights.
      inputs: number of leading axes of codes that are contracted.
      sharding: sharding of the result, or None.
    """
    if on_mesh() or platform()[0] != "cpu":
        codes = codes.astype(x.dtype)
        return jnp.einsum(
            equation, x, codes, out_sharding=sharding, preferred_element_type=jnp.float32
        )
    lead, out = x.shape[: x.ndim - inputs], codes.shape[inputs:]
    into = math.prod(codes.shape[:inputs])
    y = integer_matmul(x.reshape(math.prod(lead), into), codes.reshape(into, math.prod(out)))
    return y.reshape(*lead, *out)


def _on_mesh(
    local: Callable[[jax.Array, GroupWeight], jax.Array],
    x: jax.Array,
    weight: GroupWeight,
    lead: int,
    inputs: int,
    axes: tuple[str | None, ...],
    sharding: Any,
) -> jax.Array:
    """Runs a group matmul on each device's shards and sums over sharded inputs.

    Args:
      local: matmul of device-local activations and weight.
      x: activations, `lead` leading axes before the inputs.
      weight: the weight of one layer.
      lead: number of leading axes of x.
      inputs: number of input axes of x and of the dense weight.
      axes: logical axes of the dense weight.
      sharding: sharding of the result, or None to keep what follows.
    """
    x_axes = jax.typeof(x).sharding.spec
    x_axes = (*x_axes, *(None,) * (x.ndim - len(x_axes)))
    fsdp = mesh_axis("embed")
    into, out = (None if RULES[a] == fsdp else RULES[a] for a in (axes[0], axes[inputs]))
    stack = () if weight.layer is None else (None,)
    group: Any = GroupWeight  # a tree of partition specs in the place of arrays
    of_weight = group(
        jax.P(*stack, into, out),
        jax.P(*stack, into, None, out),
        None if weight.zeros is None else jax.P(*stack, into, None, out),
        None if weight.layer is None else jax.P(),
        bits=weight.bits,
    )
    split = into is not None and into in jax.typeof(x).sharding.mesh.shape

    def part(x, weight):
        y = local(x, weight)
        return jax.lax.psum(y, into) if split else y

    y_axes = (*x_axes[:lead], out, *(None,) * (len(axes) - inputs - 1))
    x_axes = (*x_axes[:lead], into, *(None,) * (inputs - 1))
    run = jax.shard_map(
        part, in_specs=(jax.P(*x_axes), of_weight), out_specs=jax.P(*y_axes), check_vma=False
    )
    y = run(x, weight)
    return y if sharding is None else jax.reshard(y, sharding)
