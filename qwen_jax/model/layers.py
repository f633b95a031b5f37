"""The layers of a Qwen block as Linen modules, each weight declared once where it is used.

Modules are used functionally: `Block(...).apply({"params": p}, x, …)`; stacking, scanning and remat
are plain JAX in `model/transformer.py`.

Letters in shapes: B batch, T tokens, D hidden size, F FFN width, N query heads, K kv heads, H head
size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.core import meta
from jax.ad_checkpoint import checkpoint_name

from qwen_jax.kernels.cpu_matmul import einsum
from qwen_jax.model.attend import Attend, LayerContext
from qwen_jax.model.config import ModelConfig
from qwen_jax.model.options import ForwardOptions
from qwen_jax.model.quantised import is_quantised, quantised_einsum
from qwen_jax.model.rope import apply_rope
from qwen_jax.parallel import gather_weight, reshard, spec

Axes = tuple[str | None, ...]
"""Logical axis names of an array's dimensions (`parallel/rules.py`); None is unsharded."""

Initializer = Callable[[jax.Array, tuple[int, ...], Axes], jax.Array]
"""(PRNG key, shape, logical axes) -> float32 array with the sharding of those axes."""


@flax.struct.dataclass
class Weight(meta.AxisMetadata[Any]):
    """A weight together with its declaration.

    Abstract shapes, shardings, decay masks, parameter counts and the checks of the Hugging Face
    mapping are derived from this one declaration.

    Attributes:
      value: the array, or a `ShapeDtypeStruct`.
      axes: logical axis name of each dimension.
      decay: whether weight decay applies.
    """

    value: Any
    axes: Axes = flax.struct.field(pytree_node=False)
    decay: bool = flax.struct.field(pytree_node=False)

    def unbox(self) -> Any:
        """Returns the array without its declaration."""
        return self.value

    def replace_boxed(self, val: Any) -> Weight:
        """Returns the same declaration around another value."""
        return dataclasses.replace(self, value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> Weight:
        """Declares an additional axis `params["name"]` at `index`, as stacking layers adds one."""
        axes = list(self.axes)
        axes.insert(index, params["name"])
        return dataclasses.replace(self, axes=tuple(axes))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Weight:
        """Removes the axis at `index` from the declaration."""
        return dataclasses.replace(self, axes=self.axes[:index] + self.axes[index + 1 :])


def normal(stddev: float) -> Initializer:
    """Returns an initialiser that samples float32 N(0, stddev²), initialised sharded."""

    def init(key: jax.Array, shape: tuple[int, ...], axes: Axes) -> jax.Array:
        return stddev * jax.random.normal(key, shape, jnp.float32, out_sharding=spec(*axes))

    return init


def constant(value: float) -> Initializer:
    """Returns an initialiser that fills a float32 array with `value`, initialised sharded."""

    def init(key: jax.Array, shape: tuple[int, ...], axes: Axes) -> jax.Array:
        del key
        return jnp.full(shape, value, jnp.float32, out_sharding=spec(*axes))

    return init


class Layer(nn.Module):
    """Base class of all layers: model and run options, and the declaration of weights.

    Attributes:
      config: the model.
      options: dtype, remat and attention implementation.
    """

    config: ModelConfig
    options: ForwardOptions

    def weight(
        self,
        name: str,
        shape: tuple[int, ...],
        axes: Axes,
        init: Initializer,
        *,
        decay: bool = True,
    ) -> jax.Array:
        """Declares the float32 weight `name` and returns it in the compute dtype.

        The result is gathered along the `fsdp` mesh axis.

        Args:
          name: key of the weight in the layer's parameters.
          shape: its shape.
          axes: logical axis name of each dimension.
          init: its initialiser.
          decay: whether weight decay applies.
        """
        value: Any = self.param(name, lambda key: Weight(init(key, shape, axes), axes, decay))
        return gather_weight(value, axes, self.options.compute_dtype)

    def product(
        self,
        name: str,
        equation: str,
        x: jax.Array,
        shape: tuple[int, ...],
        axes: Axes,
        init: Initializer,
        *,
        out: Axes | None = None,
    ) -> jax.Array:
        """Declares the weight `name` and returns einsum(equation, x, weight).

        The only place where matrices are multiplied with activations, so quantised weights are
        handled here.

        Args:
          name: key of the weight in the layer's parameters.
          equation: einsum equation of x and the weight.
          x: activations.
          shape: shape of the weight.
          axes: logical axes of the weight.
          init: its initialiser.
          out: logical axes of the result, where they don't follow from those of x and the weight.
        """
        stored: Any = self.get_variable("params", name)
        if is_quantised(stored):
            return quantised_einsum(equation, x, stored, shape, axes, out)
        w = self.weight(name, shape, axes, init)
        return einsum(equation, x, w, out_sharding=None if out is None else spec(*out))


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Applies inverted dropout to x; the identity without a key.

    The mask does not depend on the mesh.
    """
    if key is None or not rate:
        return x
    sharding = jax.typeof(x).sharding.spec if spec() is not None else None
    keep = jax.random.bernoulli(key, 1 - rate, x.shape, out_sharding=sharding)
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))


# The TPU compiler tends to fuse elementwise operations into the matmuls that read their result,
# once per tile of each: an activation with several readers is then computed several times while the
# matrix unit waits. The next two functions make the compiler store it once.


@jax.custom_vjp
def materialize(x: jax.Array) -> jax.Array:
    """Returns x, stored in memory before anything reads it; the gradient is unaffected."""
    return jax.lax.optimization_barrier(x)


materialize.defvjp(lambda x: (materialize(x), None), lambda _, d: (d,))


@jax.custom_vjp
def materialize_gradient(x: jax.Array) -> jax.Array:
    """Returns x; its gradient is stored in memory before anything reads it."""
    return x


materialize_gradient.defvjp(lambda x: (x, None), lambda _, d: (jax.lax.optimization_barrier(d),))


def mean_square(x: jax.Array) -> jax.Array:
    """Returns the mean of squares over the last axis, float32 [..., 1]."""
    return jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)


@jax.custom_vjp
def precomputed(x: jax.Array, value: jax.Array) -> jax.Array:
    """Returns `value`, which must equal x, but differentiates as x.

    The compiler then removes the computation of x.
    """
    del x
    return value


precomputed.defvjp(lambda x, value: (value, None), lambda _, d: (d, jnp.zeros_like(d)))


class RMSNorm(Layer):
    """Root-mean-square norm over the last axis, with a learned scale.

    Statistics are float32; the scale is applied in the dtype of the input, as released.
    """

    @nn.compact
    def __call__(self, x: jax.Array, variance: jax.Array | None = None) -> jax.Array:
        """Normalises x [..., C] over its last axis; same shape and dtype.

        Args:
          x: activations with C channels.
          variance: `mean_square(x)`, float32 [..., 1], if it is known already.
        """
        scale = self.weight("scale", (x.shape[-1],), ("norm",), constant(1.0), decay=False)
        wide = x.astype(jnp.float32)
        own = mean_square(x)
        variance = own if variance is None else precomputed(own, variance)
        return (wide * jax.lax.rsqrt(variance + self.config.norm_eps)).astype(x.dtype) * scale


class Attention(Layer):
    """Grouped-query attention with RoPE: q/k/v biases (v1 to 2.5) or q/k norms (v3)."""

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        logn: jax.Array | None,
        attend: Attend,
        layer: LayerContext,
    ) -> tuple[jax.Array, Any]:
        """Maps normed activations x [B, T, D] to (output [B, T, D], what `attend` keeps).

        The other arguments are those of `Block`.
        """
        c = self.config
        heads, kv_heads, width = c.n_heads, c.n_kv_heads, c.head_dim
        x = materialize(x)
        q = self._project(x, "q", heads, "heads")
        k = self._project(x, "k", kv_heads, "kv_heads")
        v = self._project(x, "v", kv_heads, "kv_heads")
        if c.qk_norm:
            q = RMSNorm(c, self.options, name="q_norm")(q)
            k = RMSNorm(c, self.options, name="k_norm")(k)
        q, k = (apply_rope(x, rope, c.rope_dim) for x in (q, k))
        if logn is not None:
            q = q * logn[:, :, None, None].astype(q.dtype)
        q, k, v = (checkpoint_name(t, n) for t, n in ((q, "query"), (k, "key"), (v, "value")))
        out, kept = attend(q, k, v, layer)
        out = self.product(
            "o",
            "BTNH,NHD->BTD",
            out,
            (heads, width, c.d_model),
            ("heads", "head_dim", "embed"),
            normal(c.init_std / (2 * c.n_layers) ** 0.5),
            out=("batch", "sequence", "channels"),
        )
        return out, kept

    def _project(self, x: jax.Array, name: str, heads: int, axis: str) -> jax.Array:
        """Projects x [B, T, D] to `heads` heads, [B, T, heads, H], with the model's bias."""
        c = self.config
        shape, axes = (c.d_model, heads, c.head_dim), ("embed", axis, "head_dim")
        y = self.product(name, "BTD,DNH->BTNH", x, shape, axes, normal(c.init_std))
        if c.qkv_bias:
            zero = constant(0.0)
            y += self.weight(f"{name}_bias", shape[1:], axes[1:], zero, decay=False)
        return y


class MLP(Layer):
    """SwiGLU feed-forward layer: down(silu(gate(x)) · up(x)).

    Qwen v1 calls the gate projection w2 and the up projection w1.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps normed activations [B, T, D] to [B, T, D]."""
        c = self.config
        shape, axes, init = (c.d_model, c.d_ff), ("embed", "ffn"), normal(c.init_std)
        x = materialize(x)
        gate = materialize_gradient(self.product("gate", "BTD,DF->BTF", x, shape, axes, init))
        up = materialize_gradient(self.product("up", "BTD,DF->BTF", x, shape, axes, init))
        gate, up = checkpoint_name(gate, "gate"), checkpoint_name(up, "up")
        return self.product(
            "down",
            "BTF,FD->BTD",
            checkpoint_name(materialize(jax.nn.silu(gate) * up), "ffn"),
            (c.d_ff, c.d_model),
            ("ffn", "embed"),
            normal(c.init_std / (2 * c.n_layers) ** 0.5),
            out=("batch", "sequence", "channels"),
        )


class Block(Layer):
    """Pre-norm transformer block: h = x + Attention(norm(x)); y = h + MLP(norm(h)).

    A layer whose token mixer is not attention, or whose MLP is a mixture of experts, differs from
    this class only in the two modules it calls; callers pass the same arguments.
    """

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        logn: jax.Array | None,
        attend: Attend,
        layer: LayerContext,
        variance: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """Applies the block.

        Args:
          x: residual stream [B, T, D].
          rope: cosines and signed sines of the positions, float32 [B, T, H] each.
          logn: LogN factors of the queries, float32 [B, T], or None.
          attend: the caller's attention, applied to rotated queries and keys.
          layer: context of this layer; its dropout key, if any, serves the whole block.
          variance: `mean_square(x)`, float32 [B, T, 1], if it is known already.

        Returns:
          (the residual stream after the block [B, T, D], what `attend` keeps).
        """
        c, o = self.config, self.options
        key = layer.dropout_key
        keys = [None] * 3 if key is None else list(jax.random.split(key, 3))
        with jax.named_scope("attention"):
            normed = RMSNorm(c, o, name="attn_norm")(x, variance)
            attention = Attention(c, o, name="attn")
            out, kept = attention(normed, rope, logn, attend, layer._replace(dropout_key=keys[0]))
            x = checkpoint_name(x + dropout(out, c.residual_dropout, keys[1]), "residual_mid")
        with jax.named_scope("mlp"):
            out = MLP(c, o, name="mlp")(RMSNorm(c, o, name="mlp_norm")(x))
            x += dropout(out, c.residual_dropout, keys[2])
        return x, kept


class Embed(Layer):
    """Input embedding table, sharded along channels over fsdp and tensor."""

    @nn.compact
    def __call__(self, tokens: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        """Looks up tokens int32 [B, T]; returns [B, T, D] in the compute dtype."""
        c = self.config
        axes: Axes = ("table_rows", "table_channels")
        shape = (c.vocab_size, c.d_model)
        init = normal(c.init_std)
        table: Any = self.param("table", lambda key: Weight(init(key, shape, axes), axes, True))
        # Each device looks up the tokens of its whole fsdp group in its channels; then channels are
        # exchanged for rows of the batch.
        tokens = reshard(tokens, "table_batch", "sequence")
        rows = table.at[tokens].get(out_sharding=spec("table_batch", "sequence", "table_channels"))
        rows = rows.astype(self.options.compute_dtype)
        x = reshard(rows, "table_batch", "sequence", "embed")  # all-gather over tensor,
        x = reshard(x, "batch", "sequence", "channels")  # all-to-all over fsdp
        return dropout(x, c.embed_dropout, dropout_key)


class Head(Layer):
    """Output projection from hidden states to vocabulary logits, unless the embedding is tied."""

    @nn.compact
    def __call__(self) -> jax.Array:
        """Returns the kernel, float32 [D, V], sharded as stored."""
        c = self.config
        axes: Axes = ("embed", "vocab")
        shape = (c.d_model, c.vocab_size)
        init = normal(c.init_std)
        kernel: Any = self.param("kernel", lambda key: Weight(init(key, shape, axes), axes, True))
        return kernel
