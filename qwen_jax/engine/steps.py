"""Device programs of the engine: prefill, decode steps, and moves of rows and pages.

Pure functions of (parameters, engine state, arrays from the host), each compiled for a few shapes
before the first request. The engine state is donated, so it exists once. Everything the host needs
to plan the next call is known without the results of this one, so calls are dispatched one ahead.

Letters in shapes: S device rows, R rows of a decode call, Q prompts and T token slots of a prefill
call, M cached pages of its prompts, V vocabulary, W distinct attention windows of the model.
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
    Samples,
    SamplingRows,
    TokenCounts,
    count_tokens,
    init_counts,
    put_row,
    sample_rows,
    stack_sampling_params,
)
from qwen_jax.kernels import PagedCache, init_paged_cache
from qwen_jax.kernels.cache import AXES
from qwen_jax.model import ForwardOptions, ModelConfig, Params, logits
from qwen_jax.model.paged import decode, prefill
from qwen_jax.parallel import reshard, spec


@dataclasses.dataclass(frozen=True)
class EngineShapes:
    """Sizes that the engine's programs are compiled for.

    Attributes:
      max_rows: S, most requests that decode at one time.
      max_pages_per_request: page-table entries per request; times `page_size`, the longest prompt
        and output together.
      page_size: tokens per page.
      num_pages: pages of the cache; the page id `num_pages` stands for "no page".
      max_prompts: Q, most prompts of a prefill call.
      prefill_tokens: possible T, token slots of a prefill call; ascending multiples of `page_size`.
      cached_pages: possible M, pages that the prompts of a prefill call have in the cache already;
        ascending from 0.
      decode_rows: possible R, rows of a decode call; ascending up to `max_rows`.
      max_decode_steps: most steps of a decode call.
      swap_pages: pages copied to or from the host per call.
    """

    max_rows: int
    max_pages_per_request: int
    page_size: int
    num_pages: int
    max_prompts: int
    prefill_tokens: tuple[int, ...]
    cached_pages: tuple[int, ...]
    decode_rows: tuple[int, ...]
    max_decode_steps: int
    swap_pages: int = 8

    def __post_init__(self) -> None:
        assert self.cached_pages[0] == 0 and self.decode_rows[-1] == self.max_rows
        assert not any(tokens % self.page_size for tokens in self.prefill_tokens)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeRows:
    """Device-side state of the decoding requests, one row each (S rows).

    Attributes:
      token: int32 [S], the newest token, not in the cache yet.
      length: int32 [S], tokens in the cache.
      token_budget: int32 [S], tokens that may still be sampled.
      alive: bool [S], whether the row's request is still decoding.
      alpha: float32 [S, W], dynamic-NTK factors of its prompt (`model.ntk_alphas`).
      stop_ids: int32 [S, MAX_STOP_IDS], padded with -1.
      sampling: sampling parameters of the S rows.
    """

    token: Any
    length: Any
    token_budget: Any
    alive: Any
    alpha: Any
    stop_ids: Any
    sampling: SamplingRows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EngineState:
    """Everything that stays on the device between calls.

    Attributes:
      cache: paged keys and values of all layers.
      rows: the decoding requests.
      token_counts: int16 [S, V], occurrences of each token in a row's prompt and output, maintained
        for rows with penalties only.
    """

    cache: PagedCache
    rows: DecodeRows
    token_counts: TokenCounts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefillBatch:
    """Prompt chunks of one prefill call as numpy arrays; see also `model.paged.prefill`.

    Attributes:
      tokens: int32 [T], token ids.
      positions: int32 [T], positions from the beginning of each prompt.
      segments: int32 [T], i + 1 for tokens of prompt i of this call, 0 for padding.
      new_pages: int32 [T / page_size], page of each page-sized piece, `num_pages` for padding.
      cached_pages: int32 [M], pages that prompts have in the cache; aligned to the end, 0 before.
      cached_segments: int32 [M], prompt (i + 1) of each cached page, 0 for padding.
      alpha: float32 [Q, W], dynamic-NTK factors of each prompt.
      last_index: int32 [Q], index in [0, T) of the last token of each chunk.
      row: int32 [Q], device row in which the prompt will decode; `max_rows` for a chunk that does
        not end its prompt and for unused entries, whose sample is dropped.
      length: int32 [Q], tokens of the prompt in the cache after this call.
      token_budget: int32 [Q], output tokens that may be sampled, including this call's.
      stop_ids: int32 [Q, MAX_STOP_IDS], padded with -1.
      sampling: sampling parameters of the Q prompts.
    """

    tokens: Any
    positions: Any
    segments: Any
    new_pages: Any
    cached_pages: Any
    cached_segments: Any
    alpha: Any
    last_index: Any
    row: Any
    length: Any
    token_budget: Any
    stop_ids: Any
    sampling: SamplingRows


def empty_prefill(
    shapes: EngineShapes, num_windows: int, tokens: int, cached_pages: int
) -> PrefillBatch:
    """Returns a prefill batch without prompts, in fresh numpy arrays to be filled in.

    Args:
      shapes: sizes that the programs are compiled for.
      num_windows: W, distinct attention windows of the model.
      tokens: T, token slots.
      cached_pages: M, entries for cached pages.
    """
    prompts = shapes.max_prompts

    def full(n: int, value: int = 0) -> np.ndarray:
        return np.full(n, value, np.int32)

    return PrefillBatch(
        tokens=full(tokens),
        positions=full(tokens),
        segments=full(tokens),
        new_pages=full(tokens // shapes.page_size, shapes.num_pages),
        cached_pages=full(cached_pages),
        cached_segments=full(cached_pages),
        alpha=np.ones((prompts, num_windows), np.float32),
        last_index=full(prompts),
        row=full(prompts, shapes.max_rows),
        length=full(prompts),
        token_budget=full(prompts),
        stop_ids=np.full((prompts, MAX_STOP_IDS), -1, np.int32),
        sampling=stack_sampling_params([None] * prompts),
    )


def empty_rows(rows: int, num_windows: int) -> DecodeRows:
    """Returns `rows` unused decode rows in numpy, for a model with `num_windows` windows."""

    def zeros() -> np.ndarray:
        return np.zeros(rows, np.int32)

    return DecodeRows(
        token=zeros(),
        length=zeros(),
        token_budget=zeros(),
        alive=np.zeros(rows, bool),
        alpha=np.ones((rows, num_windows), np.float32),
        stop_ids=np.full((rows, MAX_STOP_IDS), -1, np.int32),
        sampling=stack_sampling_params([None] * rows),
    )


def init_state(config: ModelConfig, shapes: EngineShapes, kv_dtype: Any) -> EngineState:
    """Returns an engine state without requests, sharded when a mesh is in force.

    Args:
      config: the model.
      shapes: sizes of cache and rows.
      kv_dtype: dtype of the cache; uint8 for its 8-bit form.
    """
    cache = init_paged_cache(
        config.n_layers,
        shapes.num_pages,
        config.n_kv_heads,
        config.head_dim,
        page_size=shapes.page_size,
        dtype=kv_dtype,
    )
    rows = jax.tree.map(
        lambda x: reshard(jnp.asarray(x), *[None] * x.ndim),  # replicated over the mesh
        empty_rows(shapes.max_rows, len(config.distinct_windows)),
    )
    return EngineState(cache, rows, init_counts(shapes.max_rows, config.vocab_size))


def _is_stop_id(tokens: jax.Array, stop_ids: jax.Array) -> jax.Array:
    """Returns bool [R]: whether tokens int32 [R] are among stop_ids int32 [R, MAX_STOP_IDS]."""
    return (tokens[:, None] == stop_ids).any(axis=1)


def prefill_step(
    params: Params,
    state: EngineState,
    batch: PrefillBatch,
    *,
    config: ModelConfig,
    options: ForwardOptions,
    vocab_size: int,
) -> tuple[EngineState, Samples]:
    """Computes prompt chunks; prompts that end sample their first token and start decoding.

    Args:
      params: weights of `config`.
      state: the engine state, donated.
      batch: the chunks.
      config, options: the model and how it runs.
      vocab_size: ids from here on are padding and never sampled.

    Returns:
      (the new state, `Samples` of the Q prompts, undefined where `batch.row` names no row).
    """
    alpha = batch.alpha[jnp.maximum(batch.segments - 1, 0)] if config.dynamic_ntk else None
    with jax.named_scope("prefill"):
        x, cache = prefill(
            params,
            batch.tokens,
            batch.positions,
            batch.segments,
            state.cache,
            batch.new_pages,
            batch.cached_pages,
            batch.cached_segments,
            config,
            options,
            alpha,
        )
        scores = logits(params, x[batch.last_index][None], config)[0]
    rows, counts = state.rows, state.token_counts
    of_rows = counts.counts.at[batch.row].get(mode="clip", out_sharding=spec("batch", "vocab"))
    samples = sample_rows(scores, batch.sampling, batch.length, TokenCounts(of_rows), vocab_size)
    alive = (batch.token_budget > 1) & ~_is_stop_id(samples.tokens, batch.stop_ids)
    started = DecodeRows(
        token=samples.tokens,
        length=batch.length,
        token_budget=batch.token_budget - 1,
        alive=alive,
        alpha=batch.alpha,
        stop_ids=batch.stop_ids,
        sampling=batch.sampling,
    )

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[batch.row].set(new, mode="drop")

    new_rows = jax.tree.map(put, rows, started)
    first = put(jnp.zeros_like(rows.alive), jnp.ones_like(alive))
    counts = count_tokens(counts, new_rows.token, first & new_rows.sampling.penalised)
    return EngineState(cache, new_rows, counts), samples


def decode_steps(
    params: Params,
    state: EngineState,
    page_table: jax.Array,
    steps: jax.Array,
    *,
    config: ModelConfig,
    options: ForwardOptions,
    vocab_size: int,
    max_steps: int,
) -> tuple[EngineState, Samples]:
    """Decodes the first R rows for `steps` steps, or until all of them have ended.

    A row ends with a stop id, which is the last token it outputs, or when its number of remaining
    tokens reaches 0.

    Args:
      params: weights of `config`.
      state: the engine state, donated.
      page_table: int32 [R, max_pages_per_request], with pages for every token that may be sampled;
        its number of rows is R.
      steps: int32 scalar, at most `max_steps`.
      config: configuration of the network.
      options: options of the forward pass.
      vocab_size: ids from here on are padding and never sampled.
      max_steps: static size of the result's leading axis.

    Returns:
      (the new state, `Samples` with leading axes [max_steps, R]; token -1 where a row sampled
      none).
    """
    count = page_table.shape[0]
    rows = jax.tree.map(lambda x: x[:count], state.rows)
    counts = TokenCounts(state.token_counts.counts[:count])
    alpha = rows.alpha if config.dynamic_ntk else None
    stop_ids, sampling = rows.stop_ids, rows.sampling

    def more(carry):
        step, _, (_, _, _, alive), *_ = carry
        return (step < steps) & alive.any()

    def one_step(carry):
        step, cache, (token, length, budget, alive), counts, out = carry
        x, cache = decode(params, token, cache, page_table, length, alive, config, options, alpha)
        with jax.named_scope("head"):
            scores = logits(params, x[None], config)[0]
        samples = sample_rows(scores, sampling, length + 1, counts, vocab_size)
        reported = dataclasses.replace(samples, tokens=jnp.where(alive, samples.tokens, -1))
        out = jax.tree.map(lambda all_steps, new: all_steps.at[step].set(new), out, reported)
        counts = count_tokens(counts, samples.tokens, alive & sampling.penalised)
        token = jnp.where(alive, samples.tokens, token)
        length, budget = length + alive, budget - alive
        alive &= (budget > 0) & ~_is_stop_id(token, stop_ids)
        return step + 1, cache, (token, length, budget, alive), counts, out

    with jax.named_scope("decode"):
        changing = (rows.token, rows.length, rows.token_budget, rows.alive)
        scores = jax.eval_shape(lambda: jnp.zeros((count, config.vocab_size)))
        out = _no_samples(scores, sampling, vocab_size, max_steps)
        start = (jnp.int32(0), state.cache, changing, counts, out)
        _, cache, changing, counts, out = jax.lax.while_loop(more, one_step, start)
    names = ("token", "length", "token_budget", "alive")

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(old, new, 0, axis=0)

    changed: dict[str, Any] = {
        n: put(getattr(state.rows, n), x) for n, x in zip(names, changing, strict=True)
    }
    new_counts = TokenCounts(put(state.token_counts.counts, counts.counts))
    return EngineState(cache, dataclasses.replace(state.rows, **changed), new_counts), out


def _no_samples(
    scores: jax.ShapeDtypeStruct, sampling: SamplingRows, vocab_size: int, max_steps: int
) -> Samples:
    """Returns `Samples` of zeros with a leading axis [max_steps] and tokens -1.

    Args:
      scores: shape of the logits, float32 [R, V].
      sampling: parameters of the R rows.
      vocab_size: as in `sample_rows`.
      max_steps: size of the leading axis.
    """
    sample = functools.partial(sample_rows, token_counts=None, vocab_size=vocab_size)
    positions = jax.ShapeDtypeStruct(scores.shape[:1], jnp.int32)
    one = jax.eval_shape(sample, scores, sampling, positions)
    zeros = jax.tree.map(lambda x: jnp.zeros((max_steps, *x.shape), x.dtype), one)
    return dataclasses.replace(zeros, tokens=zeros.tokens - 1)


def stop_rows(state: EngineState, stopped: jax.Array) -> EngineState:
    """Ends the rows where `stopped`, bool [S], is set."""
    return dataclasses.replace(
        state, rows=dataclasses.replace(state.rows, alive=state.rows.alive & ~stopped)
    )


def put_counts(state: EngineState, row: jax.Array, counts: jax.Array) -> EngineState:
    """Sets the token counts of one row, int16 [V] as `sampling.count_row` makes them."""
    return dataclasses.replace(state, token_counts=put_row(state.token_counts, row, counts))


def start_row(state: EngineState, row: jax.Array, request: DecodeRows) -> EngineState:
    """Starts a request whose pages are in the cache in device row `row` (int32 scalar).

    Args:
      state: the engine state, donated.
      row: index of the row.
      request: its state, arrays of one row.
    """

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(old, new, row, axis=0)

    return dataclasses.replace(state, rows=jax.tree.map(put, state.rows, request))


def copy_pages_out(state: EngineState, ids: jax.Array) -> PagedCache:
    """Returns copies of pages `ids` int32 [n] as a cache of n pages; the state stays valid."""

    def take(x: jax.Array) -> jax.Array:
        return x.at[:, ids].get(mode="clip", out_sharding=spec(*AXES))

    return jax.tree.map(take, state.cache)


def copy_pages_in(state: EngineState, ids: jax.Array, pages: PagedCache) -> EngineState:
    """Overwrites pages `ids` int32 [n] by `pages`, a cache of n; ids ≥ num_pages are dropped."""

    def put(stored: jax.Array, new: jax.Array) -> jax.Array:
        def one(i, stored):
            at = jnp.minimum(ids[i], stored.shape[1] - 1)
            old = jax.lax.dynamic_slice_in_dim(stored, at, 1, axis=1)
            page = jax.lax.dynamic_slice_in_dim(new, i, 1, axis=1)
            page = jnp.where(ids[i] < stored.shape[1], page, old)
            return jax.lax.dynamic_update_slice_in_dim(stored, page, at, axis=1)

        return jax.lax.fori_loop(0, ids.shape[0], one, stored)

    return dataclasses.replace(state, cache=jax.tree.map(put, state.cache, pages))
