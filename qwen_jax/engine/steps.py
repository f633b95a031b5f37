"""What the engine runs on the device: prompts, bursts of decoding, and moving rows and pages.

Pure functions of (parameters, state, a batch of numbers from the host), compiled for a few shapes
each before the first request comes. The state is donated: it exists once. All that the host must
know to plan further it knows beforehand, so it sends the next call before it reads the last.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.engine.request import MAX_STOP_IDS
from qwen_jax.engine.sampling import (
    Drawn,
    SamplingRows,
    TokenCounts,
    count_tokens,
    init_counts,
    put_row,
    sample_rows,
    sampling_rows,
)
from qwen_jax.kernels import PagedCache, init_paged_cache
from qwen_jax.kernels.cache import AXES
from qwen_jax.model import ForwardOptions, ModelConfig, Params, logits
from qwen_jax.model.paged import decode, prefill
from qwen_jax.parallel import reshard, spec


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Sizes that programs are compiled for.

    Attributes:
      rows: S, most requests that decode side by side.
      table: page-table entries of a request; with `page_size`, the longest prompt + answer.
      page_size: tokens a page. pages: of the cache; the id `pages` means nowhere.
      prompts: Q, most prompts of a prefill call.
      prefill_tokens: T, tokens of a prefill call, ascending, multiples of `page_size`.
      past_pages: M, pages that its prompts may have in the cache already, ascending from 0.
      decode_rows: R, rows of a decoding call, ascending up to `rows`.
      burst: most steps of a decoding call.
      swap: pages that move to or from the host in one call.
    """

    rows: int
    table: int
    page_size: int
    pages: int
    prompts: int
    prefill_tokens: tuple[int, ...]
    past_pages: tuple[int, ...]
    decode_rows: tuple[int, ...]
    burst: int
    swap: int = 8

    def __post_init__(self):
        assert self.past_pages[0] == 0 and self.decode_rows[-1] == self.rows
        assert not any(t % self.page_size for t in self.prefill_tokens)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Requests that decode, a row each; S rows.

    Attributes:
      token: int32 [S], the newest token, not in the cache yet; length: int32 [S], tokens that are.
      budget: int32 [S], tokens that may still be drawn.
      alive: bool [S], whether it goes on.
      alpha: float32 [S,W], dynamic-NTK factors of its prompt (`model.ntk_alphas`).
      stop_ids: int32 [S, MAX_STOP_IDS], filled up with -1.
      sampling: parameters of its draws.
    """

    token: jax.Array
    length: jax.Array
    budget: jax.Array
    alive: jax.Array
    alpha: jax.Array
    stop_ids: jax.Array
    sampling: SamplingRows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """All that stays on the device between calls.

    Attributes:
      cache: keys and values. rows: requests that decode.
      seen: int16 [S,V], tokens of each row's prompt and answer, where it has penalties.
    """

    cache: PagedCache
    rows: Rows
    seen: TokenCounts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefillBatch:
    """Chunks of prompts for one call, in numpy; what `model.paged.prefill` says of them holds.

    Attributes:
      tokens, positions, segments: int32 [T]; segment i is prompt i - 1 of this call, 0 padding.
      new_pages: int32 [T / page_size], filled up with `Shapes.pages`.
      past_pages, past_segments: int32 [M], at the end; filled up with 0 before.
      alpha: float32 [Q,W].
      last: int32 [Q], packed index of the chunk's last token.
      slot: int32 [Q], row in which the prompt decodes from here on; `Shapes.rows` when this was not
        its last chunk, or where there is no prompt: then nothing is kept of the draw.
      length: int32 [Q], tokens of the prompt in the cache after this call.
      budget: int32 [Q], tokens that may be drawn, the one of this call included.
      stop_ids: int32 [Q, MAX_STOP_IDS], filled up with -1.
      sampling: parameters of Q prompts.
    """

    tokens: Any
    positions: Any
    segments: Any
    new_pages: Any
    past_pages: Any
    past_segments: Any
    alpha: Any
    last: Any
    slot: Any
    length: Any
    budget: Any
    stop_ids: Any
    sampling: SamplingRows


def empty_prefill(shapes: Shapes, windows: int, tokens: int, past: int) -> PrefillBatch:
    """A batch of these sizes without a prompt, in fresh numpy arrays to be filled in.

    windows: W of the model; tokens, past: T and M.
    """
    prompts = shapes.prompts

    def full(n, value=0):
        return np.full(n, value, np.int32)

    return PrefillBatch(
        tokens=full(tokens),
        positions=full(tokens),
        segments=full(tokens),
        new_pages=full(tokens // shapes.page_size, shapes.pages),
        past_pages=full(past),
        past_segments=full(past),
        alpha=np.ones((prompts, windows), np.float32),
        last=full(prompts),
        slot=full(prompts, shapes.rows),
        length=full(prompts),
        budget=full(prompts),
        stop_ids=full((prompts, MAX_STOP_IDS), -1),
        sampling=sampling_rows([None] * prompts),
    )


def empty_rows(rows: int, windows: int) -> Rows:
    """Rows that nobody decodes in, in numpy."""
    zeros = np.zeros(rows, np.int32)
    return Rows(
        *(zeros, zeros.copy(), zeros.copy(), np.zeros(rows, bool)),
        alpha=np.ones((rows, windows), np.float32),
        stop_ids=np.full((rows, MAX_STOP_IDS), -1, np.int32),
        sampling=sampling_rows([None] * rows),
    )


def init_state(config: ModelConfig, shapes: Shapes, kv_dtype) -> State:
    """An empty state; `kv_dtype` of the cache, uint8 for its 8-bit form. On a mesh, sharded."""
    kv = (config.n_kv_heads, config.head_dim)
    cache = init_paged_cache(
        *(config.n_layers, shapes.pages, *kv), page_size=shapes.page_size, dtype=kv_dtype
    )
    rows = jax.tree.map(
        lambda x: reshard(jnp.asarray(x), *[None] * x.ndim),  # whole on every device of a mesh
        empty_rows(shapes.rows, len(config.distinct_windows)),
    )
    return State(cache, rows, init_counts(shapes.rows, config.vocab_size))


def _stopped(tokens: jax.Array, stop_ids: jax.Array) -> jax.Array:
    return (tokens[:, None] == stop_ids).any(axis=1)


def prefill_step(
    params: Params,
    state: State,
    batch: PrefillBatch,
    *,
    config: ModelConfig,
    options: ForwardOptions,
    vocab_size: int,
) -> tuple[State, Drawn]:
    """Runs chunks of prompts; those that are complete draw a token and begin to decode.

    Returns:
      (the state, `Drawn` of Q prompts: where `slot` names no row, it means nothing).
    """
    alpha = batch.alpha[jnp.maximum(batch.segments - 1, 0)] if config.dynamic_ntk else None
    with jax.named_scope("prefill"):
        packed = (batch.tokens, batch.positions, batch.segments)
        pages = (batch.new_pages, batch.past_pages, batch.past_segments)
        x, cache = prefill(params, *packed, state.cache, *pages, config, options, alpha)
        scores = logits(params, x[batch.last][None], config)[0]
    rows, seen = state.rows, state.seen
    wanted = seen.counts.at[batch.slot].get(mode="clip", out_sharding=spec("batch", "vocab"))
    here = TokenCounts(wanted)
    drawn = sample_rows(scores, batch.sampling, batch.length, here, vocab_size)
    goes_on = (batch.budget > 1) & ~_stopped(drawn.tokens, batch.stop_ids)
    started = Rows(
        token=drawn.tokens,
        length=batch.length,
        budget=batch.budget - 1,
        alive=goes_on,
        alpha=batch.alpha,
        stop_ids=batch.stop_ids,
        sampling=batch.sampling,
    )

    def put(old, new):
        return old.at[batch.slot].set(new, mode="drop")

    new_rows = jax.tree.map(put, rows, started)
    first = put(jnp.zeros_like(rows.alive), jnp.ones_like(goes_on))
    seen = count_tokens(seen, new_rows.token, first & new_rows.sampling.penalised)
    return State(cache, new_rows, seen), drawn


def decode_steps(
    params: Params,
    state: State,
    page_table: jax.Array,
    steps: jax.Array,
    *,
    config: ModelConfig,
    options: ForwardOptions,
    vocab_size: int,
    burst: int,
) -> tuple[State, Drawn]:
    """Decodes rows 0 … R - 1 for so many steps, or until all have ended.

    A row ends with a stop id, which is the last token it gives, or when its budget is spent.

    Args:
      page_table: int32 [R, table], with pages for every token that may be drawn.
      steps: int32 scalar, at most `burst`.

    Returns:
      (the state, `Drawn` with a leading [burst]; token -1 where a row drew nothing).
    """
    count = page_table.shape[0]
    rows = jax.tree.map(lambda x: x[:count], state.rows)
    seen = TokenCounts(state.seen.counts[:count])
    fixed = (rows.alpha if config.dynamic_ntk else None, rows.stop_ids, rows.sampling)
    alpha, stop_ids, sampling = fixed

    def more(carry):
        step, _, moving, *_ = carry
        return (step < steps) & moving[3].any()

    def one(carry):
        step, cache, (token, length, budget, alive), seen, out = carry
        operands = (params, token, cache, page_table, length, alive)
        x, cache = decode(*operands, config, options, alpha)
        with jax.named_scope("head"):
            scores = logits(params, x[None], config)[0]
        drawn = sample_rows(scores, sampling, length + 1, seen, vocab_size)
        given = dataclasses.replace(drawn, tokens=jnp.where(alive, drawn.tokens, -1))
        out = jax.tree.map(lambda all, new: all.at[step].set(new), out, given)
        seen = count_tokens(seen, drawn.tokens, alive & sampling.penalised)
        token = jnp.where(alive, drawn.tokens, token)
        length, budget = length + alive, budget - alive
        alive &= (budget > 0) & ~_stopped(token, stop_ids)
        return step + 1, cache, (token, length, budget, alive), seen, out

    with jax.named_scope("decode"):
        moving = (rows.token, rows.length, rows.budget, rows.alive)
        scores = jax.eval_shape(lambda: jnp.zeros((count, config.vocab_size)))
        out = _no_draws(scores, sampling, vocab_size, burst)
        start = (jnp.int32(0), state.cache, moving, seen, out)
        _, cache, moving, seen, out = jax.lax.while_loop(more, one, start)
    names = ("token", "length", "budget", "alive")

    def put(old, new):
        return jax.lax.dynamic_update_slice_in_dim(old, new, 0, axis=0)

    changed = {n: put(getattr(state.rows, n), x) for n, x in zip(names, moving, strict=True)}
    counts = put(state.seen.counts, seen.counts)
    return State(cache, dataclasses.replace(state.rows, **changed), TokenCounts(counts)), out


def _no_draws(scores, sampling, vocab_size, burst) -> Drawn:
    """`Drawn` of zeros with a leading [burst]; its tokens are -1."""
    draw = functools.partial(sample_rows, seen=None, vocab_size=vocab_size)
    positions = jax.ShapeDtypeStruct(scores.shape[:1], jnp.int32)
    one = jax.eval_shape(draw, scores, sampling, positions)
    zeros = jax.tree.map(lambda x: jnp.zeros((burst, *x.shape), x.dtype), one)
    return dataclasses.replace(zeros, tokens=zeros.tokens - 1)


def stop_rows(state: State, ended: jax.Array) -> State:
    """Ends rows, bool [S]."""
    return dataclasses.replace(
        state, rows=dataclasses.replace(state.rows, alive=state.rows.alive & ~ended)
    )


def put_counts(state: State, row: jax.Array, counts: jax.Array) -> State:
    """Sets what a row's penalties know, int16 [V] of `sampling.count_row`."""
    return dataclasses.replace(state, seen=put_row(state.seen, row, counts))


def start_row(state: State, slot: jax.Array, row: Rows) -> State:
    """Puts a request whose pages are in the cache into a row: `row` has one entry."""

    def put(old, new):
        return jax.lax.dynamic_update_slice_in_dim(old, new, slot, axis=0)

    return dataclasses.replace(state, rows=jax.tree.map(put, state.rows, row))


def take_pages(state: State, ids: jax.Array) -> PagedCache:
    """Copies of some pages, ids int32 [n], as a cache of n pages."""

    def take(x):
        return x.at[:, ids].get(mode="clip", out_sharding=spec(*AXES))

    return jax.tree.map(take, state.cache)


def put_pages(state: State, ids: jax.Array, pages: PagedCache) -> State:
    """Writes copies back; ids int32 [n], and those past the last page mean nowhere."""

    def put(all, new):
        def one(i, all):
            at = jnp.minimum(ids[i], all.shape[1] - 1)
            old = jax.lax.dynamic_slice_in_dim(all, at, 1, axis=1)
            page = jax.lax.dynamic_slice_in_dim(new, i, 1, axis=1)
            page = jnp.where(ids[i] < all.shape[1], page, old)
            return jax.lax.dynamic_update_slice_in_dim(all, page, at, axis=1)

        return jax.lax.fori_loop(0, ids.shape[0], one, all)

    return dataclasses.replace(state, cache=jax.tree.map(put, state.cache, pages))
