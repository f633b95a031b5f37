"""The layers of a Qwen block as Linen modules, each weight declared once where it is used.

Modules are used functionally: `Block(...).apply({"params": p}, x, …)`; stacking, scanning and remat
are plain JAX in `model/transformer.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.core import meta
from jax.ad_checkpoint import checkpoint_name

from qwen_jax.kernels.cpu_matmul import einsum
from qwen_jax.model.config import ModelConfig
from qwen_jax.model.options import ForwardOptions
from qwen_jax.model.quantised import is_quantised, quantised_product
from qwen_jax.model.rope import apply_rope
from qwen_jax.parallel import gather_weight, reshard, spec


@flax.struct.dataclass
class Weight(meta.AxisMetadata[Any]):
    """A weight and what is declared about it: logical axes, and whether weight decay applies.

    From this one declaration follow abstract shapes, shardings, decay masks, parameter counts and
    the Hugging Face mapping's checks.
    """

    value: Any
    axes: tuple[str | None, ...] = flax.struct.field(pytree_node=False)
    decay: bool = flax.struct.field(pytree_node=False)

    def unbox(self) -> Any:
        """The bare array."""
        return self.value

    def replace_boxed(self, val: Any) -> Weight:
        """The same declaration around another value."""
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> Weight:
        """Declares a new stacked axis, as `jax.vmap` over an initialiser makes one."""
        axes = list(self.axes)
        axes.insert(index, params["name"])
        return self.replace(axes=tuple(axes))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Weight:
        """Undoes `add_axis`."""
        return self.replace(axes=self.axes[:index] + self.axes[index + 1 :])


def normal(stddev: float):
    """Initialiser N(0, stddev²), float32, born with its sharding."""

    def init(key, shape, axes):
        return stddev * jax.random.normal(key, shape, jnp.float32, out_sharding=spec(*axes))

    return init


def constant(value: float):
    """Initialiser of a constant, float32."""

    def init(key, shape, axes):
        del key
        return jnp.full(shape, value, jnp.float32, out_sharding=spec(*axes))

    return init


class Layer(nn.Module):
    """Base of all layers: knows the model, how it runs, and how to declare a weight."""

    config: ModelConfig
    options: ForwardOptions

    def weight(self, name, shape, axes, init, *, decay=True) -> jax.Array:
        """Declares the float32 weight `name`, and returns it ready for use.

        Ready means: in the compute dtype, and whole along `fsdp`.
        """
        value = self.param(name, lambda key: Weight(init(key, shape, axes), axes, decay))
        return gather_weight(value, axes, self.options.compute_dtype)

    def product(self, name, equation, x, shape, axes, init, *, out=None) -> jax.Array:
        """The product `equation` of x and the weight `name`; `out` names the result's axes.

        The only place where matrices meet activations, so quantised ones are recognised here.
        """
        stored = self.get_variable("params", name)
        if is_quantised(stored):
            return quantised_product(equation, x, stored, shape, axes, out)
        w = self.weight(name, shape, axes, init)
        return einsum(equation, x, w, out_sharding=None if out is None else spec(*out))


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout; the identity without a key. The mask does not depend on the mesh."""
    if key is None or not rate:
        return x
    sharding = jax.typeof(x).sharding.spec if spec() is not None else None
    keep = jax.random.bernoulli(key, 1 - rate, x.shape, out_sharding=sharding)
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))


# The TPU compiler likes to compute what is elementwise inside the products that read it, once per
# tile of each: an activation that several products read is then made several times, and the matrix
# unit waits for it. These two say that it is made once.


@jax.custom_vjp
def whole(x: jax.Array) -> jax.Array:
    """The identity; what reads it waits until it is in memory."""
    return jax.lax.optimization_barrier(x)


whole.defvjp(lambda x: (whole(x), None), lambda _, d: (d,))


@jax.custom_vjp
def whole_gradient(x: jax.Array) -> jax.Array:
    """The identity; what reads its gradient waits until that is in memory."""
    return x


whole_gradient.defvjp(lambda x: (x, None), lambda _, d: (jax.lax.optimization_barrier(d),))


def mean_square(x: jax.Array) -> jax.Array:
    """Mean of squares over the last axis, float32 [..., 1]."""
    return jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)


@jax.custom_vjp
def known_as(x: jax.Array, value: jax.Array) -> jax.Array:
    """`value`, differentiated as `x`, which it equals: x is then computed for nothing, so not."""
    del x
    return value


known_as.defvjp(lambda x, value: (value, None), lambda _, d: (d, jnp.zeros_like(d)))


class RMSNorm(Layer):
    """x / rms(x) over the last axis: statistics in float32, scaled in x's dtype (as released)."""

    @nn.compact
    def __call__(self, x: jax.Array, variance: jax.Array | None = None) -> jax.Array:
        """x [..., C] -> the same shape and dtype. variance: `mean_square(x)` if it is known."""
        scale = self.weight("scale", (x.shape[-1],), ("norm",), constant(1.0), decay=False)
        wide = x.astype(jnp.float32)
        own = mean_square(x)
        variance = own if variance is None else known_as(own, variance)
        return (wide * jax.lax.rsqrt(variance + self.config.norm_eps)).astype(x.dtype) * scale


Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], tuple[jax.Array, Any]]
"""(q [B,T,N,H], k, v [B,T,K,H], PRNG key or None) -> (out [B,T,N,H], what is kept of k and v).

How a layer attends is its caller's: to the tokens at hand, or to those of a cache too."""


class Attention(Layer):
    """Grouped-query attention with RoPE, optional q/k/v biases (v1–2.5) or q/k norms (v3)."""

    @nn.compact
    def __call__(self, x, rope, logn, attend: Attend, dropout_key):
        """x [B,T,D] -> ([B,T,D], what `attend` keeps); see `Block` for the arguments."""
        c = self.config
        heads, kv_heads, width = c.n_heads, c.n_kv_heads, c.head_dim
        x = whole(x)
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
        out, kept = attend(q, k, v, dropout_key)
        out = self.product(
            *("o", "BTNH,NHD->BTD", out),
            (heads, width, c.d_model),
            ("heads", "head_dim", "embed"),
            normal(c.init_std / (2 * c.n_layers) ** 0.5),
            out=("batch", "sequence", "channels"),
        )
        return out, kept

    def _project(self, x, name, heads, axis):
        c = self.config
        shape, axes = (c.d_model, heads, c.head_dim), ("embed", axis, "head_dim")
        y = self.product(name, "BTD,DNH->BTNH", x, shape, axes, normal(c.init_std))
        if c.qkv_bias:
            zero = constant(0.0)
            y += self.weight(f"{name}_bias", shape[1:], axes[1:], zero, decay=False)
        return y


class MLP(Layer):
    """SwiGLU: down(silu(gate(x)) · up(x)); v1 calls the gate w2 and the up projection w1."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B,T,D] -> [B,T,D]."""
        c = self.config
        inward = ((c.d_model, c.d_ff), ("embed", "ffn"), normal(c.init_std))
        x = whole(x)
        gate = whole_gradient(self.product("gate", "BTD,DF->BTF", x, *inward))
        up = whole_gradient(self.product("up", "BTD,DF->BTF", x, *inward))
        gate, up = checkpoint_name(gate, "gate"), checkpoint_name(up, "up")
        return self.product(
            *("down", "BTF,FD->BTD", checkpoint_name(whole(jax.nn.silu(gate) * up), "ffn")),
            (c.d_ff, c.d_model),
            ("ffn", "embed"),
            normal(c.init_std / (2 * c.n_layers) ** 0.5),
            out=("batch", "sequence", "channels"),
        )


class Block(Layer):
    """Pre-norm block: h = x + Attention(norm(x)); y = h + MLP(norm(h))."""

    @nn.compact
    def __call__(self, x, rope, logn, attend: Attend, dropout_key, variance=None):
        """One layer.

        Args:
          x: residual stream [B,T,D].
          rope: (cos, signed sin) [B,T,H].
          logn: float32 [B,T] or None.
          attend: attention proper, on rotated queries and keys.
          dropout_key: PRNG key or None for no dropout.
          variance: `mean_square(x)`, float32 [B,T,1], where whoever made x has it already.

        Returns:
          ([B,T,D], what `attend` keeps).
        """
        c, o = self.config, self.options
        keys = [None] * 3 if dropout_key is None else list(jax.random.split(dropout_key, 3))
        with jax.named_scope("attention"):
            normed = RMSNorm(c, o, name="attn_norm")(x, variance)
            out, kept = Attention(c, o, name="attn")(normed, rope, logn, attend, keys[0])
            x = checkpoint_name(x + dropout(out, c.residual_dropout, keys[1]), "residual_mid")
        with jax.named_scope("mlp"):
            out = MLP(c, o, name="mlp")(RMSNorm(c, o, name="mlp_norm")(x))
            x += dropout(out, c.residual_dropout, keys[2])
        return x, kept


class Embed(Layer):
    """The input embedding table."""

    @nn.compact
    def __call__(self, tokens: jax.Array, dropout_key=None) -> jax.Array:
        """tokens int32 [B,T] -> [B,T,D] in the compute dtype."""
        c = self.config
        axes = ("table_rows", "table_channels")
        table = self.param(
            "table",
            lambda key: Weight(
                normal(c.init_std)(key, (c.vocab_size, c.d_model), axes), axes, True
            ),
        )
        # Tokens of the whole fsdp group are looked up in each device's channels, then channels are
        # traded for rows of the batch.
        tokens = reshard(tokens, "table_batch", "sequence")
        rows = table.at[tokens].get(out_sharding=spec("table_batch", "sequence", "table_channels"))
        rows = rows.astype(self.options.compute_dtype)
        x = reshard(rows, "table_batch", "sequence", "embed")  # all-gather over tensor,
        x = reshard(x, "batch", "sequence", "channels")  # all-to-all over fsdp
        return dropout(x, c.embed_dropout, dropout_key)


class Head(Layer):
    """Output projection, D -> V, kept apart from the embedding unless the model ties them."""

    @nn.compact
    def __call__(self) -> jax.Array:
        """The kernel, float32 [D,V], sharded as at rest."""
        c = self.config
        axes = ("embed", "vocab")
        init = normal(c.init_std)
        return self.param(
            "kernel", lambda key: Weight(init(key, (c.d_model, c.vocab_size), axes), axes, True)
        )
