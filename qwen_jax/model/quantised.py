"""Quantised parameters: what one is, how a tree is quantised, how layers multiply by one.

The seven matrices of a layer are quantised, nothing else unless asked (the output head, to int8);
embedding, norms and biases keep their dtype. Two kinds of leaf stand in for a matrix:

- `ChannelWeight`: int8 or int4 numbers, one scale an output. The product is a plain einsum of the
  numbers, scaled afterwards; compilers read the numbers as they are and need no kernel of ours.
- `GroupWeight` (`kernels.quantised`): packed 4 or 8 bits with a scale for each group of inputs, as
  GPTQ folders have them.

Both are for inference: they have no gradient. Quantisation is round to nearest, symmetric, each
scale the one of a few candidates with the least squared error.
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
from qwen_jax.parallel import RULES, on_mesh, platform, spec

INPUT_AXES = {
    **{("attn", name): 1 for name in ("q", "k", "v")},
    ("attn", "o"): 2,
    **{("mlp", name): 1 for name in ("gate", "up", "down")},
}
"""Matrices of a layer that are quantised, and how many of their leading axes are inputs."""

HEAD = ("head", "kernel")


@dataclasses.dataclass(frozen=True)
class Format:
    """How weights are quantised.

    Attributes:
      bits: 4 or 8.
      group: inputs that share a scale, or None for all of them (a scale per output channel).
      head: whether the output head is quantised too, to int8 per output channel.
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
        """Such as "int4-g128" or "int8"."""
        return f"int{self.bits}" + (f"-g{self.group}" if self.group else "")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChannelWeight:
    """A matrix, or L of them, with one scale for each output.

    Attributes:
      codes: int8 or int4 in the shape of the dense leaf, [(L,) *inputs, *outputs].
      scales: float32 [(L,) *outputs].
    """

    codes: jax.Array
    scales: jax.Array

    @property
    def bits(self) -> int:
        """4 or 8."""
        return 4 if self.codes.dtype == jnp.int4 else 8


QuantisedWeight = ChannelWeight | GroupWeight


def is_quantised(x: Any) -> bool:
    """Whether a leaf of a parameter tree is a quantised weight."""
    return isinstance(x, QuantisedWeight)


# --- quantising ---------------------------------------------------------------------------------

_CLIPS = tuple(1 - 0.05 * i for i in range(13))
"""Shares of the largest weight that a scale may be made for; what is beyond is clipped. Below 0.4
none wins on normal weights, and 13 candidates come within 1.5 % of the error that 50 reach."""


@functools.partial(jax.jit, static_argnames=("bits", "group"))
def quantise_matrix(
    w: jax.Array, *, bits: int, group: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Rounds a matrix to the nearest whole numbers of a scale, symmetric.

    The largest weight of a group is 2^(bits−1) − ½ scales long, so numbers use all of −2^(bits−1) …
    2^(bits−1) − 1 (AutoGPTQ's symmetric grid), or a share of that, whichever share in `_CLIPS`
    leaves the least squared error. Scales are rounded to float16 first, which is how folders keep
    them: what is written and read back is the same.

    Args:
      w: [K, O], any float dtype.
      bits: 4 or 8.
      group: inputs a group, a divisor of K; None for K.

    Returns:
      (numbers int8 [K, O], scales float32 [G, O]).
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


def quantise_leaf(w: jax.Array, fmt: Format, inputs: int) -> QuantisedWeight:
    """One matrix [*inputs, *outputs] of a layer, whose first `inputs` axes are inputs.

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
    return GroupWeight(pack(codes.astype(jnp.int32) + middle, fmt.bits), scales[:, None],
                       bits=fmt.bits)  # fmt: skip


def check_group(fmt: Format, inputs: int, shards: int = 1) -> None:
    """Refuses groups that do not divide a matrix's inputs on each of `shards` devices.

    Raises:
      UserError: they don't.
    """
    if fmt.group and inputs % (fmt.group * shards):
        split = f", split over {shards} devices," if shards > 1 else ""
        raise UserError(
            f"a matrix of {inputs} inputs{split} can't be cut into groups of {fmt.group}; choose "
            + ("fewer devices (mesh.tensor)" if shards > 1 else "another group")
            + ", or weights with one scale per output channel (group -1)"
        )


def matrices(params: Mapping[str, Any], fmt: Format) -> dict[tuple[str, ...], int]:
    """Paths of the leaves that `fmt` quantises, each with its number of input axes after L.

    Raises:
      UserError: the head is wanted in int8 and the model ties it to its embedding.
    """
    found = {("layers", *path): inputs for path, inputs in INPUT_AXES.items()}
    if fmt.head:
        if "head" not in params:
            raise UserError(
                "this model's output head is its embedding table (tied), which stays as it is; "
                "leave the head out of quantisation"
            )
        found[HEAD] = 1
    return found


def quantise_params(
    params: Mapping[str, Any], fmt: Format, *, consume: bool = False
) -> dict[str, Any]:
    """Quantises a parameter tree leaf by leaf; `consume` frees each dense leaf as it goes.

    Args:
      params: as `init_params` makes it, of any float dtype, on one device or on a mesh with nothing
        split (quantise while loading to split it: `interop.load_params`).
      fmt: how.
      consume: delete the dense matrices (their arrays can't be used any more).

    Returns:
      The same tree with quantised weights where `fmt` says so.

    Raises:
      UserError: as `matrices` and `quantise_leaf`.
    """
    wanted = matrices(params, fmt)

    def leaf(path, x):
        path = tuple(key.key for key in path)
        if path not in wanted:
            return x
        how = format_of(path, fmt)
        one = functools.partial(quantise_leaf, fmt=how, inputs=wanted[path])
        out = jax.lax.map(one, x) if path[0] == "layers" else one(x)
        if consume:
            jax.block_until_ready(out)
            x.delete()
        return out

    return jax.tree_util.tree_map_with_path(leaf, dict(params))


def format_of(path: tuple[str, ...], fmt: Format) -> Format:
    """How the leaf at `path` is quantised under `fmt`: the head always to int8 per channel."""
    return Format(8, None) if path == HEAD else fmt


def dequantise_params(params: Mapping[str, Any], abstract: Mapping[str, Any]) -> dict[str, Any]:
    """The dense float32 weights that a tree's quantised ones stand for; for small trees and tests.

    abstract: `abstract_params` of the same network, for the shapes. Other leaves stay as they are.
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


# --- what a tree of them looks like -------------------------------------------------------------


def abstract_quantised(abstract: Mapping[str, Any], fmt: Format) -> dict[str, Any]:
    """The tree of `abstract_params` with quantised weights in place of dense ones, shardings too.

    Outputs of q, k, v, gate and up are split over `tensor`, inputs of o and down; along `fsdp`
    quantised weights are whole.

    Raises:
      UserError: as `matrices`; a group that does not divide what a device holds.
    """
    wanted = matrices(abstract, fmt)

    def leaf(path, x):
        path = tuple(key.key for key in path)
        if path not in wanted:
            return x
        lead = 1 if path[0] == "layers" else 0
        return abstract_leaf(x, format_of(path, fmt), lead, wanted[path])

    return jax.tree_util.tree_map_with_path(leaf, dict(abstract))


def abstract_leaf(x, fmt: Format, lead: int, inputs: int, *, zeros=False) -> QuantisedWeight:
    """x, an abstract dense leaf, as a quantised weight of `ShapeDtypeStruct`s.

    Args:
      x: `ShapeDtypeStruct` [(L,) *inputs, *outputs], its sharding followed.
      fmt: how it is quantised.
      lead: 1 with a layer axis, else 0.
      inputs: number of input axes after it.
      zeros: whether groups have zeros of their own.

    Raises:
      UserError: a group that does not divide what a device holds.
    """
    sharding = x.sharding
    axes = [None] * x.ndim
    if isinstance(sharding, jax.NamedSharding):
        fsdp = {RULES["embed"]}
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
    """Bytes of a parameter tree as stored; int4 counts half a byte."""

    def size(x) -> int:
        bits = 4 if x.dtype == jnp.int4 else 8 * x.dtype.itemsize
        return math.prod(x.shape) * bits // 8

    return sum(map(size, jax.tree.leaves(params)))


# --- multiplying --------------------------------------------------------------------------------


def scannable(layers: Any) -> tuple[Any, Callable[[Any], Any]]:
    """What a scan over layers may slice, and how the body completes a slice.

    Group-quantised stacks stay whole and are told their layer instead: their kernel reads its
    blocks out of the stack, where a slice would first be copied.
    """
    leaves, tree = jax.tree.flatten(layers, is_leaf=lambda x: isinstance(x, GroupWeight))
    whole = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, GroupWeight)}
    for i, leaf in whole.items():
        leaves[i] = jnp.arange(leaf.codes.shape[0], dtype=jnp.int32)

    def complete(sliced):
        parts = tree.flatten_up_to(sliced)
        for i, leaf in whole.items():
            parts[i] = dataclasses.replace(leaf, layer=parts[i])
        return jax.tree.unflatten(tree, parts)

    return jax.tree.unflatten(tree, leaves), complete


def quantised_product(
    equation: str,
    x: jax.Array,
    weight: QuantisedWeight,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    out: tuple[str | None, ...] | None = None,
) -> jax.Array:
    """`einsum(equation, x, w)` for a quantised w, in x's dtype, accumulated in float32.

    Args:
      equation: x's last axes are w's first, the inputs; the outputs come last ("BTD,DNH->BTNH").
      x: activations.
      weight: one layer's.
      shape: of the dense weight.
      axes: its logical axes.
      out: logical axes of the result where they don't follow from those of x and w.
    """
    sharding = None if out is None else spec(*out)
    letters = equation.replace("->", ",").split(",")
    inputs = len(set(letters[0]) & set(letters[1]))
    if isinstance(weight, ChannelWeight):
        y = _channel_product(equation, x, weight.codes, inputs, sharding)
        return (y * weight.scales).astype(x.dtype)
    lead, outputs = x.ndim - inputs, shape[inputs:]

    def local(x, weight):
        y = group_matmul(x.reshape(*x.shape[:lead], weight.inputs), weight)
        return y.reshape(*y.shape[:lead], -1, *outputs[1:])

    if not on_mesh():
        return local(x, weight)
    return _on_mesh(local, x, weight, lead, inputs, axes, sharding)


def quantised_logits(hidden: jax.Array, kernel: ChannelWeight) -> jax.Array:
    """hidden [B,T,D] · an int8 head [D,V] -> logits float32 [B,T,V]."""
    return _channel_product("BTD,DV->BTV", hidden, kernel.codes, 1) * kernel.scales


def _channel_product(equation, x, codes, inputs: int, sharding=None) -> jax.Array:
    """einsum(equation, x, codes) in float32; the first `inputs` axes of codes are contracted."""
    if on_mesh() or platform()[0] != "cpu":
        codes = codes.astype(x.dtype)
        how = {"out_sharding": sharding, "preferred_element_type": jnp.float32}
        return jnp.einsum(equation, x, codes, **how)
    lead, out = x.shape[: x.ndim - inputs], codes.shape[inputs:]
    into = math.prod(codes.shape[:inputs])
    y = integer_matmul(x.reshape(math.prod(lead), into), codes.reshape(into, math.prod(out)))
    return y.reshape(*lead, *out)


def _on_mesh(local, x, weight: GroupWeight, lead: int, inputs: int, axes, sharding):
    """`local` on each device's part; parts of the inputs are summed."""
    x_axes = jax.typeof(x).sharding.spec
    x_axes = (*x_axes, *(None,) * (x.ndim - len(x_axes)))
    fsdp = RULES["embed"]
    into, out = (None if RULES[a] == fsdp else RULES[a] for a in (axes[0], axes[inputs]))
    stack = () if weight.layer is None else (None,)
    of_weight = GroupWeight(
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
