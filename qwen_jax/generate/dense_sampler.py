"""Sampling whole batches in one jitted call: prefill, then one token at a time over a dense cache.

For demos, tests and evaluation during training. Prompts of different lengths stand side by side,
padded on the right: padding is never attended to, and the cache writes the first new token of a row
over its padding, so a row computes what it would compute alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

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

# Prompts are padded to a multiple of this, so that few lengths are ever compiled.
_WIDTH = 64


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
    """Continues every prompt; a row's result depends on its prompt, its index and `seed` alone.

    What the release turns on at inference acts here too: dynamic NTK with the factor of each
    prompt's length, and LogN (report §2.5), where `config` has them.

    Args:
      params: the parameters of `config`, on a mesh that is in force or on one device.
      prompts: token ids of each prompt, at least one each.
      config, options: the network and how it runs; the cache is in the compute dtype.
      max_new_tokens: tokens to add to each prompt.
      temperature: divides the logits; 0 takes the most probable token.
      top_k: draw among so many most probable tokens only (ties with the last one stay); 0: all.
      seed: of the draws.
      stop_id: token that ends a row; it is not part of the result.
      vocab_size: ids of the tokenizer; the model's rows from there on are padding and never drawn.

    Returns:
      the new ids of each prompt, at most `max_new_tokens`.

    Raises:
      UserError: no prompts, an empty one, an id outside the vocabulary, or a number out of range.
    """
    vocab_size = config.vocab_size if vocab_size is None else vocab_size
    _check(prompts, config, vocab_size, max_new_tokens, temperature, top_k)
    # On a mesh, rows of nothing but padding fill the batch up to what its devices can share.
    devices = batch_devices(current_mesh()) if on_mesh() else 1
    rows = -(-len(prompts) // devices) * devices
    lengths = np.zeros(rows, np.int32)
    lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
    tokens = np.zeros((rows, -(-lengths.max() // _WIDTH) * _WIDTH), np.int32)
    for row, prompt in zip(tokens, prompts, strict=False):
        row[: len(prompt)] = prompt
    alpha = None
    if config.dynamic_ntk:
        alpha = np.stack([ntk_alphas(int(n), config) for n in lengths])
    drawn = _generate(
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
    drawn = np.asarray(drawn)[: len(prompts)]
    return [row[row >= 0].tolist() for row in drawn]


def _check(prompts, config, vocab_size, max_new_tokens, temperature, top_k) -> None:
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
        raise UserError(f"temperature is {temperature}; it must be a number from 0 up.")
    if top_k < 0:
        raise UserError(f"top_k is {top_k}; it must be positive, or 0 for all tokens.")


@functools.partial(
    jax.jit,
    static_argnames=(*("config", "options", "steps", "greedy", "top_k", "stop_id", "vocab_size"),),
)
def _generate(
    params, tokens, lengths, alpha, key, temperature,
    *, config, options, steps, greedy, top_k, stop_id, vocab_size,
) -> jax.Array:  # fmt: skip
    """Drawn ids int32 [B,steps], -1 from the stop on; tokens int32 [B,T], lengths int32 [B]."""
    rows, width = tokens.shape
    forward = functools.partial(
        hidden_states,
        params,
        config=config,
        options=options,
        ntk_alpha=None if alpha is None else reshard(alpha, "batch", None),
        logn=config.logn,
    )

    def scores(hidden, at):  # [B,T,D], slot of each row [B] -> float32 [B,V], whole everywhere
        pick = jax.nn.one_hot(at, hidden.shape[1], dtype=hidden.dtype)
        pick = reshard(pick, "batch", "sequence")
        sharding = spec("batch", "channels")
        last = jnp.einsum("BTD,BT->BD", hidden, pick, out_sharding=sharding)
        out = reshard(logits(params, last[:, None], config)[:, 0], None, None)
        return jnp.where(jnp.arange(out.shape[-1]) < vocab_size, out, -jnp.inf)

    def draw(scores, step):
        if greedy:
            return scores.argmax(axis=-1).astype(jnp.int32)
        scores = scores / temperature
        if top_k:
            scores = jnp.where(scores >= jax.lax.top_k(scores, top_k)[0][:, -1:], scores, -jnp.inf)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.fold_in(key, step), jnp.arange(rows)
        )
        return jax.vmap(jax.random.categorical)(keys, scores).astype(jnp.int32)

    def more(carry):
        step, *_, alive, _ = carry
        return (step < steps) & alive.any()

    def decode(carry):
        step, cache, scored, alive, out = carry
        token = draw(scored, step)
        alive &= token != stop_id
        out = out.at[:, step].set(jnp.where(alive, token, -1))
        hidden, cache = forward(
            tokens=reshard(token[:, None], "batch", "sequence"),
            # Finished rows append padding, which takes no slot.
            segment_ids=reshard(alive[:, None].astype(jnp.int32), "batch", "sequence"),
            cache=cache,
        )
        return step + 1, cache, scores(hidden, jnp.zeros(rows, jnp.int32)), alive, out

    with jax.named_scope("prefill"):
        segments = (jnp.arange(width) < lengths[:, None]).astype(jnp.int32)
        hidden, cache = forward(
            tokens=reshard(tokens, "batch", "sequence"),
            segment_ids=reshard(segments, "batch", "sequence"),
            cache=init_cache(config, rows, width + steps, options.compute_dtype),
        )
        scored = scores(hidden, jnp.maximum(lengths - 1, 0))
    with jax.named_scope("decode"):
        start = (jnp.int32(0), cache, scored, lengths > 0, jnp.full((rows, steps), -1, jnp.int32))
        return jax.lax.while_loop(more, decode, start)[-1]
