"""The network as pure functions over a plain nested dict of arrays.

Letters in shapes: B batch, T tokens, L layers, D hidden size, F FFN width, N query heads, K kv
heads, H head size, V vocabulary, W distinct attention windows of the model.

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
from qwen_jax.model.attend import Attend, LayerContext
from qwen_jax.model.config import ModelConfig
from qwen_jax.model.dense_cache import KVCache, append, attend_cached, check_capacity
from qwen_jax.model.layers import Block, Embed, Head, RMSNorm, Weight, mean_square
from qwen_jax.model.options import REMAT, ForwardOptions
from qwen_jax.model.quantised import is_quantised, quantised_logits, scannable
from qwen_jax.model.rope import logn_scale, rope_table
from qwen_jax.parallel import (
    context_size,
    current_mesh,
    from_zigzag,
    gather_weight,
    mesh_axes,
    named_sharding,
    on_mesh,
    reshard,
    spec,
    to_zigzag,
)

Params = dict[str, Any]
"""Parameters of a network: the nested dict described above, of arrays or their shapes."""


# --- parameters ---------------------------------------------------------------------------------


def _boxed_init(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Initialises all parameters, each leaf in the `Weight` box that declares it.

    Linen declares weights while a layer runs, so each layer runs once on the smallest batch that
    the mesh can split; only the weights are kept, and the compiler drops the rest.
    """
    options = ForwardOptions(dtype="float32", attention="reference")
    shape = current_mesh().shape if on_mesh() else {}
    batch = math.prod(shape.get(axis, 1) for axis in mesh_axes("batch"))
    length = 2 * context_size()  # the number of chunks in zigzag order
    tokens = jnp.zeros((batch, length), jnp.int32, out_sharding=spec("batch", "sequence"))
    activations = spec("batch", "sequence", "channels")
    x = jnp.zeros((batch, length, config.d_model), out_sharding=activations)
    embed_key, block_key, norm_key, head_key = jax.random.split(key, 4)
    rope = rope_table(tokens, config)

    def no_attention(
        q: jax.Array, k: jax.Array, v: jax.Array, layer: LayerContext
    ) -> tuple[jax.Array, Any]:
        return q, None  # initialisation only needs shapes, so attention is skipped

    def block(key):
        return Block(config, options).init(key, x, rope, None, no_attention, LayerContext())[
            "params"
        ]

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
    """Returns the declaration of every weight: a tree of `Weight` boxes around shapes.

    Computes nothing. Under `jax.set_mesh` the shapes have the shardings that `RULES` gives.
    """
    return jax.eval_shape(lambda: _boxed_init(config, jax.random.key(0)))


def _map_declared(f: Callable[[Weight], Any], config: ModelConfig) -> Params:
    """Returns the parameter tree of a model with f(declaration) at each leaf."""
    return jax.tree.map(f, declare(config), is_leaf=lambda x: isinstance(x, Weight))


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Returns random float32 parameters as the release initialises them; call it under `jax.jit`.

    N(0, init_std) for matrices and embeddings, init_std/√(2L) for the two output projections of
    each of the L layers, ones for norms, zeros for biases (Qwen-7B modeling_qwen.py,
    `_init_weights`).
    """
    return meta.unbox(_boxed_init(config, key))


def abstract_params(config: ModelConfig, mesh: jax.sharding.Mesh | None = None) -> Params:
    """Returns the parameter tree as `ShapeDtypeStruct`s, with shardings when a mesh is given."""

    def leaf(weight: Weight) -> jax.ShapeDtypeStruct:
        sharding = None
        if mesh is not None:
            sharding = named_sharding(mesh, *weight.axes)
        return jax.ShapeDtypeStruct(weight.value.shape, weight.value.dtype, sharding=sharding)

    return _map_declared(leaf, config)


def decay_mask(config: ModelConfig) -> Params:
    """Returns a parameter tree of bools: whether weight decay applies.

    True for matrices and embeddings, False for norms and biases.
    """
    return _map_declared(lambda weight: weight.decay, config)


def count_params(config: ModelConfig) -> int:
    """Returns the number of parameters, embedding padding included."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config)))


# --- forward ------------------------------------------------------------------------------------


def network(
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    config: ModelConfig,
    options: ForwardOptions,
    attend: Attend,
    *,
    layer_state: Any = None,
    ntk_alpha: jax.Array | float | None = None,
    logn: bool = False,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """Runs embedding, layers and final norm; `attend` defines what tokens attend to.

    Args:
      params: weights of `config`.
      tokens: int32 [B, T], token ids.
      positions: int32 [B, T], positions for RoPE and LogN.
      config: the model.
      options: dtype, remat and attention implementation.
      attend: attention of one layer; see `model.attend.Attend`.
      layer_state: tree of arrays with a leading layer axis; each layer's slice is passed to
        `attend` as `LayerContext.state`.
      ntk_alpha: dynamic-NTK factors (`rope.ntk_alphas`): a scalar for all tokens, or float32
        [..., W] with one per distinct window, where ... broadcasts against [B, T].
      logn: whether queries past `config.trained_length` are scaled by LogN.
      dropout_key: enables the model's dropout rates.

    Returns:
      (hidden states [B, T, D] in the compute dtype, what `attend` kept, stacked to [L, ...]).
    """
    rope, table_of_layer = _rope_tables(positions, config, ntk_alpha)
    logn_factor = logn_scale(positions, config.trained_length) if logn else None
    keys = [None, None] if dropout_key is None else list(jax.random.split(dropout_key))
    windows, uniform = _windows(config)
    layer_keys = None if keys[1] is None else jax.random.split(keys[1], config.n_layers)

    # Each layer passes on the mean square of its output, which its last matmul can compute along
    # with it: the next norm, and the backward pass, need not read all of x for one number per
    # token.
    def layer(carry, scanned):
        x, variance = carry
        weights, window, table, layer_key, state = scanned
        window = uniform if window is None else window
        rope_of_layer = rope if table is None else jax.tree.map(lambda t: t[table], rope)
        context = LayerContext(window, state, layer_key)
        block = Block(config, options)
        x, kept = block.apply(
            {"params": weights}, x, rope_of_layer, logn_factor, attend, context, variance
        )
        return (x, jax.lax.stop_gradient(mean_square(x))), kept

    x: Any
    with jax.named_scope("embed"):
        x = Embed(config, options).apply({"params": params["embed"]}, tokens, keys[0])
    with jax.named_scope("layers"):
        carry = (x, jax.lax.stop_gradient(mean_square(x)))
        others = (windows, table_of_layer, layer_keys, layer_state)
        (x, variance), kept = _run_layers(layer, carry, params["layers"], others, config, options)
    with jax.named_scope("final_norm"):
        x = RMSNorm(config, options).apply({"params": params["final_norm"]}, x, variance)
    return x, kept


def _run_layers(
    layer: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    weights: Any,
    others: Any,
    config: ModelConfig,
    options: ForwardOptions,
) -> tuple[Any, Any]:
    """Runs all layers in turn: one `jax.lax.scan` for each stage of `options.remat`.

    Layers from `unstack_layers` are run one by one, without remat: they are for inference.

    Args:
      layer: (carry, (weights of one layer, *one layer of `others`)) -> (carry, result to stack).
      carry: what the first layer receives.
      weights: parameters of all layers, leaves [L, …].
      others: further trees of arrays with leaves [L, …].
      config: the model.
      options: has the remat stages.

    Returns:
      (the carry after the last layer, the results stacked to [L, …]).

    Raises:
      UserError: the remat stages cover more layers than there are.
    """
    if isinstance(weights, tuple):
        results = []
        for i, own in enumerate(weights):
            carry, out = layer(carry, (own, *jax.tree.map(lambda a, i=i: a[i], others)))
            results.append(out)
        return carry, jax.tree.map(lambda *each: jnp.stack(each), *results)

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
        rematerialised = jax.checkpoint(one, policy=REMAT[name], prevent_cse=False)
        carry, out = jax.lax.scan(rematerialised, carry, part)
        stacked.append(out)
        first = after
    if len(stacked) == 1:
        return carry, stacked[0]
    return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), *stacked)


def unstack_layers(params: Params) -> Params:
    """Returns the parameters with each layer's weights in separate arrays, for `network`.

    The layers are then compiled one by one instead of as a loop. XLA's CPU programs copy a layer's
    weights out of the stack each time before they use them, which costs a decode step more than its
    matmuls; on other platforms a stack is read in place, and so are group-quantised stacks on all.
    """
    stack, complete = scannable(params["layers"])
    leaves, tree = jax.tree.flatten(stack)
    layers = zip(*([*leaf] for leaf in leaves), strict=True)
    unstacked = (complete(jax.tree.unflatten(tree, each)) for each in layers)
    return {**params, "layers": tuple(unstacked)}


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
    """Runs the network up to its final norm, over the batch's tokens or over a dense cache.

    Over a `context` mesh axis the layers run in zigzag order; inputs and output are in natural
    order everywhere.

    Args:
      params: weights of `config`.
      tokens: int32 [B, T], token ids.
      config: the model.
      options: dtype, remat and attention implementation.
      positions: int32 [B, T], RoPE positions; by default 0, 1, … (or from the cache's length on).
      segment_ids: int32 [B, T], 0 for padding; tokens attend within their own segment. None: one
        segment per row.
      cache: earlier tokens; the new ones are written after them.
      ntk_alpha: dynamic-NTK factors of each request, constant over its life: float32 [B, W]
        (`rope.ntk_alphas` for each row), or a scalar; None in training.
      logn: whether queries past `config.trained_length` are scaled by LogN; False in training.
      dropout_key: enables the model's dropout rates.

    Returns:
      (hidden states [B, T, D] in the compute dtype, the cache with the new tokens or None).
    """
    if positions is None:
        steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        positions = reshard(steps, None, "sequence")
        if cache is not None:
            positions = cache.length[:, None] + positions
    if ntk_alpha is not None and jnp.ndim(ntk_alpha):
        factors = jnp.asarray(ntk_alpha)
        assert factors.shape == (len(tokens), len(config.distinct_windows)), factors.shape
        ntk_alpha = factors[:, None]  # the same for all tokens of a row
    how: dict[str, Any] = {
        "dropout_rate": config.attn_dropout,
        "implementation": options.attention,
    }
    run = functools.partial(
        network,
        config=config,
        options=options,
        ntk_alpha=ntk_alpha,
        logn=logn,
        dropout_key=dropout_key,
    )
    if cache is None:
        # A cache is refused on a mesh with a context axis, where the order matters.
        tokens, positions = to_zigzag(tokens), to_zigzag(positions)
        segments = None if segment_ids is None else to_zigzag(segment_ids)

        def attend(
            q: jax.Array, k: jax.Array, v: jax.Array, layer: LayerContext
        ) -> tuple[jax.Array, Any]:
            out = attention(
                q,
                k,
                v,
                q_segments=segments,
                k_segments=segments,
                window=layer.window,
                dropout_key=layer.dropout_key,
                **how,
            )
            return out, None

        return from_zigzag(run(params, tokens, positions, attend=attend)[0]), None
    check_capacity(cache, tokens.shape[1])
    start = cache.length
    new = jnp.ones_like(tokens) if segment_ids is None else segment_ids
    slots = append(cache.segments, new, start)

    def attend_to_cache(
        q: jax.Array, k: jax.Array, v: jax.Array, layer: LayerContext
    ) -> tuple[jax.Array, Any]:
        return attend_cached(
            q,
            k,
            v,
            layer.state,
            new,
            slots,
            start,
            window=layer.window,
            dropout_key=layer.dropout_key,
            **how,
        )

    old = (cache.keys, cache.values)
    x, (ks, vs) = run(params, tokens, positions, attend=attend_to_cache, layer_state=old)
    return x, KVCache(ks, vs, slots, start + (new > 0).sum(axis=1, dtype=jnp.int32))


def _windows(config: ModelConfig) -> tuple[jax.Array | None, int | None]:
    """Returns the windows of the layers, per layer or as one for all.

    Returns:
      (int32 [L], None) if the L layers differ, with 2^30 for full attention; else (None, window of
      all layers, which is None for full attention).
    """
    distinct = config.distinct_windows
    if len(distinct) == 1:
        return None, distinct[0]
    unlimited = 2**30  # wider than any sequence
    return jnp.asarray([unlimited if w is None else w for w in config.windows], jnp.int32), None


def _rope_tables(
    positions: jax.Array, config: ModelConfig, alpha: jax.Array | float | None
) -> tuple[tuple[jax.Array, jax.Array], jax.Array | None]:
    """Returns RoPE tables and the table of each layer.

    Args:
      positions: int32 [B, T].
      config: the model.
      alpha: NTK factors as in `network`.

    Returns:
      (cosines and sines as `rope_table`, None) if all layers share one table; otherwise tables with
      a leading axis W and the int32 [L] index of each layer's table.
    """
    if alpha is None or not jnp.ndim(alpha):
        return rope_table(positions, config, alpha), None
    factors = jnp.asarray(alpha)
    if factors.shape[-1] == 1:
        return rope_table(positions, config, factors[..., 0]), None
    tables = [rope_table(positions, config, factors[..., w]) for w in range(factors.shape[-1])]
    stacked = jax.tree.map(lambda *t: jnp.stack(t), *tables)
    return stacked, jnp.asarray(config.window_of_layer, jnp.int32)


def output_kernel(params: Params, config: ModelConfig) -> jax.Array:
    """Returns the matrix from hidden size to logits, float32 [D, V], sharded (`embed`, `vocab`).

    A quantised head is dequantised; `logits` multiplies by it without doing so.
    """
    if config.tie_embeddings:
        return reshard(params["embed"]["table"].T, "embed", "vocab")
    kernel = params["head"]["kernel"]
    return kernel.codes * kernel.scales if is_quantised(kernel) else kernel


def logits(params: Params, hidden: jax.Array, config: ModelConfig) -> jax.Array:
    """Computes vocabulary logits float32 [B, T, V] of hidden states [B, T, D].

    The matmul is in hidden's dtype with float32 accumulation, as in the loss. For training use
    `train.losses`, which never stores all logits.
    """
    if not config.tie_embeddings and is_quantised(params["head"]["kernel"]):
        with jax.named_scope("logits"):
            return quantised_logits(hidden, params["head"]["kernel"])
    kernel = gather_weight(output_kernel(params, config), ("embed", "vocab"), hidden.dtype)
    with jax.named_scope("logits"):
        return jnp.einsum("BTD,DV->BTV", hidden, kernel, preferred_element_type=jnp.float32)


def forward(
    params: Params, tokens: jax.Array, config: ModelConfig, options: ForwardOptions, **kwargs: Any
) -> tuple[jax.Array, KVCache | None]:
    """Computes (logits float32 [B, T, V], the cache) of tokens int32 [B, T].

    Keyword arguments are those of `hidden_states`.
    """
    hidden, cache = hidden_states(params, tokens, config, options, **kwargs)
    return logits(params, hidden, config), cache
