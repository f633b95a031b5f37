"""Batch sampling in one jitted call: prefill, then one token per step over a dense KV cache.

For demos, tests and evaluation during training. Prompts of different lengths are padded on the
right: padding is never attended to, and the first new token of a row overwrites its padding in the
cache, so the result of a row is the same as alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.errors import UserError
from qwen_jax.model import (
    ForwardOptions,
    ModelConfig,
    Params,
    hidden_states,
    init_cache,
    logits,
    ntk_alphas,
)
from qwen_jax.parallel import batch_devices, current_mesh, on_mesh, reshard, spec

# Prompts are padded to a multiple of this length, to limit the number of compilations.
_LENGTH_MULTIPLE = 64


def sample(
    params: Params,
    prompts: Sequence[Sequence[int]],
    config: ModelConfig,
    options: ForwardOptions,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
    stop_id: int | None = None,
    vocab_size: int | None = None,
) -> list[list[int]]:
    """Continues every prompt and returns the new token ids.

    The result of a row depends only on its prompt, its index and `seed`. Dynamic NTK, with the
    factor of each prompt's length, and LogN (report §2.5) apply if `config` has them.

    Args:
      params: parameters of `config`, sharded over the mesh in force or on one device.
      prompts: token ids of each prompt, at least one each.
      config: configuration of the network.
      options: how to run it; the cache has its compute dtype.
      max_new_tokens: maximum number of tokens to add to each prompt.
      temperature: divides the logits; 0 takes the most probable token.
      top_k: number of most probable tokens to sample from (ties with the last one are kept); 0
        disables it.
      seed: seed of the samples.
      stop_id: token that ends a row; it is not part of the result.
      vocab_size: number of ids of the tokenizer; the model's ids from there on are padding and are
        never sampled. By default `config.vocab_size`.

    Returns:
      The new ids of each prompt, at most `max_new_tokens`.

    Raises:
      UserError: there are no prompts, a prompt is empty or has an id outside the vocabulary, or a
        number is out of range.
    """
    vocab_size = config.vocab_size if vocab_size is None else vocab_size
    _check_inputs(prompts, config, vocab_size, max_new_tokens, temperature, top_k)
    tokens, lengths = _pad_prompts(prompts)
    alpha = None
    if config.dynamic_ntk:
        alpha = np.stack([ntk_alphas(int(n), config) for n in lengths])
    generated = _generate(
        params,
        tokens,
        lengths,
        alpha,
        jax.random.key(seed),
        max(temperature, 1e-6),
        config=config,
        options=options,
        steps=max_new_tokens,
        greedy=temperature == 0,
        top_k=min(top_k, vocab_size),
        stop_id=-1 if stop_id is None else stop_id,
        vocab_size=vocab_size,
    )
    rows = np.asarray(generated)[: len(prompts)]
    return [row[row >= 0].tolist() for row in rows]


def _check_inputs(
    prompts: Sequence[Sequence[int]],
    config: ModelConfig,
    vocab_size: int,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
) -> None:
    """Checks the arguments of `sample`.

    Raises:
      UserError: as `sample`.
    """
    if not prompts:
        raise UserError("There are no prompts to continue; give at least one.")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"Prompt {i} has no tokens; start it with at least one.")
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise UserError(
                f"Prompt {i} has ids from {min(prompt)} to {max(prompt)}; ids of this model are 0 "
                f"to {config.vocab_size - 1}."
            )
    if not 1 <= vocab_size <= config.vocab_size:
        raise UserError(f"vocab_size is {vocab_size}; the model has {config.vocab_size} rows.")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature is {temperature}; it must be a finite number of 0 or more.")
    if top_k < 0:
        raise UserError(f"top_k is {top_k}; it must be positive, or 0 for all tokens.")


def _pad_prompts(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Stacks prompts as rows, padded on the right with zeros.

    On a mesh, empty rows (length 0) extend the batch to a multiple of the number of devices that
    the batch is sharded over.

    Returns:
      Token ids, int32 [B, T] for B rows of T tokens, and the lengths of the prompts, int32 [B].
    """
    devices = batch_devices(current_mesh()) if on_mesh() else 1
    rows = -(-len(prompts) // devices) * devices
    lengths = np.zeros(rows, np.int32)
    lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
    width = -(-lengths.max() // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
    tokens = np.zeros((rows, width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=False):
        row[: len(prompt)] = prompt
    return tokens, lengths


@functools.partial(
    jax.jit,
    static_argnames=("config", "options", "steps", "greedy", "top_k", "stop_id", "vocab_size"),
)
def _generate(
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    alpha: jax.Array | None,
    key: jax.Array,
    temperature: jax.Array,
    *,
    config: ModelConfig,
    options: ForwardOptions,
    steps: int,
    greedy: bool,
    top_k: int,
    stop_id: int,
    vocab_size: int,
) -> jax.Array:
    """Runs prefill and up to `steps` decode steps; stops early when all rows have ended.

    Shapes: B rows, prompts padded to T tokens, W distinct attention windows.

    Args:
      params: parameters of `config`.
      tokens: int32 [B, T], prompts padded on the right.
      lengths: int32 [B], lengths of the prompts; 0 for a row that is not used.
      alpha: float32 [B, W], dynamic-NTK factor of each row and window (`ntk_alphas`); None without
        dynamic NTK.
      key: PRNG key for sampling.
      temperature: float32 scalar above 0.
      config: configuration of the network.
      options: options of the forward pass.
      steps: maximum number of new tokens.
      greedy: whether to take the most probable token, ignoring `temperature` and `top_k`.
      top_k: number of most probable tokens to sample from; 0 for all.
      stop_id: id that ends a row; -1 for none.
      vocab_size: ids from this one on are never sampled.

    Returns:
      New ids, int32 [B, steps]; -1 in place of the stop id and after it.
    """
    rows, width = tokens.shape
    forward = functools.partial(
        hidden_states,
        params,
        config=config,
        options=options,
        ntk_alpha=None if alpha is None else reshard(alpha, "batch", None),
        logn=config.logn,
    )
    next_logits = functools.partial(
        _next_token_logits, params, config=config, vocab_size=vocab_size
    )
    choose = (
        _greedy_tokens if greedy else functools.partial(_sample_tokens, key, temperature, top_k)
    )

    def unfinished(carry: Any) -> jax.Array:
        """Returns whether steps are left and a row has not ended."""
        step, *_, alive, _ = carry
        return (step < steps) & alive.any()

    def decode(carry: Any) -> Any:
        """Chooses a token per row, then computes the logits [B, V] of the one after it."""
        step, cache, scores, alive, out = carry
        token = choose(scores, step)
        alive &= token != stop_id
        out = out.at[:, step].set(jnp.where(alive, token, -1))
        hidden, cache = forward(
            tokens=reshard(token[:, None], "batch", "sequence"),
            # Finished rows append padding, which takes no cache slot.
            segment_ids=reshard(alive[:, None].astype(jnp.int32), "batch", "sequence"),
            cache=cache,
        )
        return step + 1, cache, next_logits(hidden, jnp.zeros(rows, jnp.int32)), alive, out

    with jax.named_scope("prefill"):
        segments = (jnp.arange(width) < lengths[:, None]).astype(jnp.int32)
        hidden, cache = forward(
            tokens=reshard(tokens, "batch", "sequence"),
            segment_ids=reshard(segments, "batch", "sequence"),
            cache=init_cache(config, rows, width + steps, options.compute_dtype),
        )
        scores = next_logits(hidden, jnp.maximum(lengths - 1, 0))
    with jax.named_scope("decode"):
        start = (jnp.int32(0), cache, scores, lengths > 0, jnp.full((rows, steps), -1, jnp.int32))
        return jax.lax.while_loop(unfinished, decode, start)[-1]


def _next_token_logits(
    params: Params,
    hidden: jax.Array,
    position: jax.Array,
    *,
    config: ModelConfig,
    vocab_size: int,
) -> jax.Array:
    """Computes the logits at one position of each row, replicated on all devices.

    Args:
      params: parameters of `config`.
      hidden: [B, T, D], hidden states of B rows, T tokens and D channels.
      position: int32 [B], which of the T tokens of each row.
      config: configuration of the network.
      vocab_size: number of ids of the tokenizer; logits of the padding ids after them are -inf.

    Returns:
      Logits, float32 [B, V] with V = `config.vocab_size`, the rows of the embedding table.
    """
    one_hot = jax.nn.one_hot(position, hidden.shape[1], dtype=hidden.dtype)
    one_hot = reshard(one_hot, "batch", "sequence")
    sharding = spec("batch", "channels")
    last = jnp.einsum("BTD,BT->BD", hidden, one_hot, out_sharding=sharding)
    out = reshard(logits(params, last[:, None], config)[:, 0], None, None)
    return jnp.where(jnp.arange(out.shape[-1]) < vocab_size, out, -jnp.inf)


def _greedy_tokens(scores: jax.Array, step: jax.Array) -> jax.Array:
    """Returns the id of the highest logit of each row, int32 [B].

    Args:
      scores: logits [B, V].
      step: unused; the signature is that of `_sample_tokens`.
    """
    del step
    return scores.argmax(axis=-1).astype(jnp.int32)


def _sample_tokens(
    key: jax.Array, temperature: jax.Array, top_k: int, scores: jax.Array, step: jax.Array
) -> jax.Array:
    """Samples an id for each row from its logits, with a key per step and row.

    Args:
      key: PRNG key.
      temperature: divides the logits, above 0.
      top_k: number of most probable ids to sample from; 0 for all.
      scores: float32 [B, V], logits of B rows over V ids.
      step: int32 scalar, index of the new token.

    Returns:
      int32 [B].
    """
    scores = scores / temperature
    if top_k:
        scores = jnp.where(scores >= jax.lax.top_k(scores, top_k)[0][:, -1:], scores, -jnp.inf)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
        jax.random.fold_in(key, step), jnp.arange(scores.shape[0])
    )
    return jax.vmap(jax.random.categorical)(keys, scores).astype(jnp.int32)
