"""The network as pure functions over a plain nested dict of arrays.

Parameters (every leaf under `layers` has a leading layer axis L)::

    embed/table [V,D]
    layers/attn_norm/scale [L,D]   layers/attn/{q [L,D,N,H], k, v [L,D,K,H], o [L,N,H,D]}
    layers/attn/{q_bias [L,N,H], k_bias, v_bias [L,K,H]}       (v1, 1.5, 2, 2.5)
    layers/attn/{q_norm, k_norm}/scale [L,H]                   (3)
    layers/mlp_norm/scale [L,D]    layers/mlp/{gate, up [L,D,F], down [L,F,D]}
    final_norm/scale [D]           head/kernel [D,V]           (no head when embeddings are tied)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from qwen_jax.errors import UserError
from qwen_jax.kernels import attention
from qwen_jax.model.config import ModelConfig
from qwen_jax.model.dense_cache import KVCache, append, attend_cached, check_room
from qwen_jax.model.layers import Block, Embed, Head, RMSNorm, Weight, mean_square
from qwen_jax.model.options import REMAT, ForwardOptions
from qwen_jax.model.quantised import is_quantised, quantised_logits, scannable
from qwen_jax.model.rope import logn_scale, rope_table
from qwen_jax.parallel import (
    RULES,
    context_size,
    current_mesh,
    from_zigzag,
    gather_weight,
    named_sharding,
    on_mesh,
    reshard,
    spec,
    to_zigzag,
)

Params = dict[str, Any]


# --- parameters ---------------------------------------------------------------------------------


def _boxed_init(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Initialises everything, each leaf in the `Weight` box that declares it.

    Linen declares weights while a layer runs, so each runs once on the smallest batch the mesh can
    split; only the weights are kept, and the compiler drops the rest.
    """
    options = ForwardOptions(dtype="float32", attention="reference")
    shape = current_mesh().shape if on_mesh() else {}
    batch = math.prod(shape.get(axis, 1) for axis in RULES["batch"])
    length = 2 * context_size()  # as many chunks as zigzag order has
    tokens = jnp.zeros((batch, length), jnp.int32, out_sharding=spec("batch", "sequence"))
    activations = spec("batch", "sequence", "channels")
    x = jnp.zeros((batch, length, config.d_model), out_sharding=activations)
    embed_key, block_key, norm_key, head_key = jax.random.split(key, 4)
    rope = rope_table(tokens, config)

    def unattended(q, k, v, key):  # which tokens are seen has no part in declaring weights
        return q, None

    def block(key):
        return Block(config, options).init(key, x, rope, None, unattended, None)["params"]

    layers = jax.vmap(block)(jax.random.split(block_key, config.n_layers))
    boxed = {
        "embed": Embed(config, options).init(embed_key, tokens)["params"],
        "layers": meta.add_axis(layers, 0, {"name": "layers"}),
        "final_norm": RMSNorm(config, options).init(norm_key, x)["params"],
    }
    if not config.tie_embeddings:
        boxed["head"] = Head(config, options).init(head_key)["params"]
    return boxed


def declare(config: ModelConfig) -> dict[str, Any]:
    """What each weight is: a tree of `Weight` boxes around `ShapeDtypeStruct`s. Computes nothing.

    Under `jax.set_mesh` the structs carry the shardings that `RULES` gives.
    """
    return jax.eval_shape(lambda: _boxed_init(config, jax.random.key(0)))


def _map_declared(f, config: ModelConfig) -> Params:
    return jax.tree.map(f, declare(config), is_leaf=lambda x: isinstance(x, Weight))


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Random float32 parameters as the release initialises them; call it under `jax.jit`.

    N(0, init_std) for matrices and embeddings, init_std/√(2L) for the two output projections of
    each layer, ones for norms, zeros for biases (Qwen-7B modeling_qwen.py, `_init_weights`).
    """
    return meta.unbox(_boxed_init(config, key))


def abstract_params(config: ModelConfig, mesh: jax.sharding.Mesh | None = None) -> Params:
    """The parameter tree as `ShapeDtypeStruct`s, with concrete shardings when a mesh is given."""

    def leaf(weight: Weight):
        sharding = None
        if mesh is not None:
            sharding = named_sharding(mesh, *weight.axes)
        return jax.ShapeDtypeStruct(weight.value.shape, weight.value.dtype, sharding=sharding)

    return _map_declared(leaf, config)


def decay_mask(config: ModelConfig) -> Params:
    """True where weight decay applies: matrices and embeddings, not norms or biases."""
    return _map_declared(lambda weight: weight.decay, config)


def count_params(config: ModelConfig) -> int:
    """Number of parameters, embedding padding included."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config)))


# --- forward ------------------------------------------------------------------------------------


def network(
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    config: ModelConfig,
    options: ForwardOptions,
    attend: Callable[..., tuple[jax.Array, Any]],
    *,
    per_layer: Any = None,
    ntk_alpha: jax.Array | float | None = None,
    logn: bool = False,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """Embedding, layers and final norm, whatever the tokens attend to.

    Args:
      tokens, positions: int32 [B,T]; positions are those of RoPE and LogN.
      attend: attention of one layer, called as attend(q, k, v, window, of_layer, dropout_key) with
        q [B,T,N,H], k and v [B,T,K,H] rotated; returns ([B,T,N,H], what to keep).
      per_layer: arrays with a leading layer axis; `attend` gets its layer's as `of_layer`.
      ntk_alpha: dynamic-NTK factors (`rope.ntk_alphas`): a scalar for all, or float32 [...,W] with
        one for each of `config.distinct_windows`, where ... broadcasts against [B,T].
      logn, dropout_key: as in `hidden_states`.

    Returns:
      ([B,T,D] in the compute dtype, what the layers kept, stacked to [L,...]).
    """
    rope, of_layer_window = _rope_tables(positions, config, ntk_alpha)
    logn_factor = logn_scale(positions, config.trained_length) if logn else None
    keys = [None, None] if dropout_key is None else list(jax.random.split(dropout_key))
    windows, uniform = _windows(config)
    layer_keys = None if keys[1] is None else jax.random.split(keys[1], config.n_layers)

    # Each layer hands on the mean square of what it gives, which its last product can make along
    # with it: the next norm, and the backward pass, need not read all of x for one number a token.
    def layer(carry, scanned):
        x, variance = carry
        weights, window, table, layer_key, of_layer = scanned
        window = uniform if window is None else window
        here = rope if table is None else jax.tree.map(lambda t: t[table], rope)

        def attend_here(q, k, v, key):
            return attend(q, k, v, window, of_layer, key)

        block = Block(config, options)
        x, kept = block.apply(
            {"params": weights}, x, here, logn_factor, attend_here, layer_key, variance
        )
        return (x, jax.lax.stop_gradient(mean_square(x))), kept

    with jax.named_scope("embed"):
        x = Embed(config, options).apply({"params": params["embed"]}, tokens, keys[0])
    with jax.named_scope("layers"):
        carry = (x, jax.lax.stop_gradient(mean_square(x)))
        others = (windows, of_layer_window, layer_keys, per_layer)
        (x, variance), kept = _run_layers(layer, carry, params["layers"], others, config, options)
    with jax.named_scope("final_norm"):
        x = RMSNorm(config, options).apply({"params": params["final_norm"]}, x, variance)
    return x, kept


def _run_layers(layer, carry, weights, others, config: ModelConfig, options: ForwardOptions):
    """All layers in turn: `jax.lax.scan`, one loop for each stage of `options.remat`.

    Layers that `unstack_layers` made are run one by one, without remat: they serve inference.

    Args:
      layer: (carry, (weights of one layer, one layer of `others`)) -> (carry, what to stack).
      weights, others: leaves [L,…].

    Raises:
      UserError: the stages are of more layers than there are.
    """
    if isinstance(weights, tuple):
        kept = []
        for i, own in enumerate(weights):
            carry, out = layer(carry, (own, *jax.tree.map(lambda a, i=i: a[i], others)))
            kept.append(out)
        return carry, jax.tree.map(lambda *each: jnp.stack(each), *kept)

    weights, complete = scannable(weights)

    def one(carry, scanned):
        return layer(carry, (complete(scanned[0]), *scanned[1:]))

    stacked, first, per_layer = [], 0, (weights, *others)
    for name, count in options.remat_stages:
        after = config.n_layers if count is None else first + count
        if after > config.n_layers or first == after:
            raise UserError(
                f"options.remat={options.remat!r} leaves no layer of {config.n_layers} for "
                f"{name!r}; give the stages before it fewer"
            )
        part = per_layer
        if after - first < config.n_layers:
            part = jax.tree.map(lambda a, part=slice(first, after): a[part], per_layer)
        kept = jax.checkpoint(one, policy=REMAT[name], prevent_cse=False)
        carry, out = jax.lax.scan(kept, carry, part)
        stacked.append(out)
        first = after
    if len(stacked) == 1:
        return carry, stacked[0]
    return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), *stacked)


def unstack_layers(params: Params) -> Params:
    """The same parameters with each layer's weights in arrays of their own, for `network`.

    The layers are then compiled one by one instead of as a loop. XLA's CPU programs copy a layer's
    weights out of the stack each time before they use them, which costs a decoding step more than
    its products; elsewhere a stack is read in place, and so are group-quantised ones everywhere.
    """
    stack, complete = scannable(params["layers"])
    leaves, tree = jax.tree.flatten(stack)
    layers = zip(*([*leaf] for leaf in leaves), strict=True)
    return {**params, "layers": tuple(complete(tree.unflatten(each)) for each in layers)}


def hidden_states(
    params: Params,
    tokens: jax.Array,
    config: ModelConfig,
    options: ForwardOptions,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    cache: KVCache | None = None,
    ntk_alpha: jax.Array | float | None = None,
    logn: bool = False,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, KVCache | None]:
    """Runs the network up to its final norm.

    Over a `context` axis the layers see the sequence in zigzag order; inputs and output are in
    natural order everywhere.

    Args:
      tokens: int32 [B,T].
      positions: int32 [B,T], RoPE positions; by default 0… (or from the cache's length).
      segment_ids: int32 [B,T], 0 for padding; tokens attend within their own segment. None: one.
      cache: earlier tokens; the new ones are written after them.
      ntk_alpha: dynamic-NTK factors of each request, constant over its life: float32 [B,W]
        (`rope.ntk_alphas` for each row), or a scalar; None in training.
      logn: scale queries past `config.trained_length` by LogN; False in training.
      dropout_key: turns on the model's dropout rates.

    Returns:
      ([B,T,D] in the compute dtype, the cache with the new tokens or None).
    """
    if positions is None:
        steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        positions = reshard(steps, None, "sequence")
        if cache is not None:
            positions = cache.length[:, None] + positions
    if getattr(ntk_alpha, "ndim", 0):
        assert ntk_alpha.shape == (len(tokens), len(config.distinct_windows)), ntk_alpha.shape
        ntk_alpha = ntk_alpha[:, None]  # the same for all tokens of a row
    how = {"dropout_rate": config.attn_dropout, "implementation": options.attention}
    run = functools.partial(
        network, config=config, options=options, ntk_alpha=ntk_alpha, logn=logn,
        dropout_key=dropout_key,
    )  # fmt: skip
    if cache is None:
        # A cache is refused where the order matters.
        tokens, positions = to_zigzag(tokens), to_zigzag(positions)
        segments = None if segment_ids is None else to_zigzag(segment_ids)

        def attend(q, k, v, window, of_layer, key):
            how_here = {"window": window, "dropout_key": key, **how}
            return attention(q, k, v, q_segments=segments, k_segments=segments, **how_here), None

        return from_zigzag(run(params, tokens, positions, attend=attend)[0]), None
    check_room(cache, tokens.shape[1])
    new = jnp.ones_like(tokens) if segment_ids is None else segment_ids
    slots = append(cache.segments, new, cache.length)

    def attend_to_cache(q, k, v, window, of_layer, key):
        how_here = {"window": window, "dropout_key": key, **how}
        return attend_cached(q, k, v, of_layer, new, slots, cache.length, **how_here)

    old = (cache.keys, cache.values)
    x, (ks, vs) = run(params, tokens, positions, attend=attend_to_cache, per_layer=old)
    return x, KVCache(ks, vs, slots, cache.length + (new > 0).sum(axis=1, dtype=jnp.int32))


def _windows(config: ModelConfig) -> tuple[jax.Array | None, int | None]:
    """Sliding windows as (per-layer array, or None) and (the one value all layers share)."""
    distinct = config.distinct_windows
    if len(distinct) == 1:
        return None, distinct[0]
    everything = 2**30  # wider than any sequence
    return jnp.asarray([everything if w is None else w for w in config.windows], jnp.int32), None


def _rope_tables(positions, config: ModelConfig, alpha):
    """Rotations, and which of them each layer takes: (table, None), or tables with a leading W."""
    if alpha is None or not jnp.ndim(alpha):
        return rope_table(positions, config, alpha), None
    if alpha.shape[-1] == 1:
        return rope_table(positions, config, alpha[..., 0]), None
    tables = [rope_table(positions, config, alpha[..., w]) for w in range(alpha.shape[-1])]
    stacked = jax.tree.map(lambda *t: jnp.stack(t), *tables)
    return stacked, jnp.asarray(config.window_of_layer, jnp.int32)


def output_kernel(params: Params, config: ModelConfig) -> jax.Array:
    """The matrix from D to vocabulary logits, float32 [D,V], sharded (`embed`, `vocab`).

    A quantised head is dequantised; `logits` multiplies by it as it is.
    """
    if config.tie_embeddings:
        return reshard(params["embed"]["table"].T, "embed", "vocab")
    kernel = params["head"]["kernel"]
    return kernel.codes * kernel.scales if is_quantised(kernel) else kernel


def logits(params: Params, hidden: jax.Array, config: ModelConfig) -> jax.Array:
    """Vocabulary logits, float32 [B,T,V]. For training use `train.losses`, which never holds them.

    The product is taken in hidden's dtype with float32 accumulation, as the loss does.
    """
    if not config.tie_embeddings and is_quantised(params["head"]["kernel"]):
        with jax.named_scope("logits"):
            return quantised_logits(hidden, params["head"]["kernel"])
    kernel = gather_weight(output_kernel(params, config), ("embed", "vocab"), hidden.dtype)
    with jax.named_scope("logits"):
        return jnp.einsum("BTD,DV->BTV", hidden, kernel, preferred_element_type=jnp.float32)


def forward(
    params: Params, tokens: jax.Array, config: ModelConfig, options: ForwardOptions, **kwargs
) -> tuple[jax.Array, KVCache | None]:
    """Logits float32 [B,T,V] and the cache; keyword arguments as in `hidden_states`."""
    hidden, cache = hidden_states(params, tokens, config, options, **kwargs)
    return logits(params, hidden, config), cache
