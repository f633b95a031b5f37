"""Builds the numpy arrays of device calls from the scheduler's decisions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from qwen_jax.engine.request import MAX_STOP_IDS, SamplingParams
from qwen_jax.engine.sampling import stack_sampling_params
from qwen_jax.engine.scheduler import PrefillChunk, RequestState, smallest_bucket
from qwen_jax.engine.steps import DecodeRows, EngineShapes, PrefillBatch, empty_prefill


def stop_ids_array(state: RequestState) -> np.ndarray:
    """Returns a request's stop ids as int32 [MAX_STOP_IDS], padded with -1."""
    ids = state.request.params.stop_ids
    return np.array([*ids, *[-1] * (MAX_STOP_IDS - len(ids))], np.int32)


def pack_prefill(chunks: Sequence[PrefillChunk], tokens: int, shapes: EngineShapes) -> PrefillBatch:
    """Packs prompt chunks side by side, each from a page boundary on.

    Args:
      chunks: the chunks of one call, at most `shapes.max_prompts`.
      tokens: token slots of the call, one of `shapes.prefill_tokens`.
      shapes: sizes that the programs are compiled for.
    """
    size = shapes.page_size
    cached = [chunk.state.pages[: chunk.start // size] for chunk in chunks]
    num_cached = sum(map(len, cached))
    cached_size = smallest_bucket(shapes.cached_pages, num_cached)
    batch = empty_prefill(shapes, len(chunks[0].state.alpha), tokens, cached_size)
    params: list[SamplingParams | None] = [None] * shapes.max_prompts
    at, cached_at = 0, cached_size - num_cached
    for i, (chunk, pages) in enumerate(zip(chunks, cached, strict=True)):
        state, end = chunk.state, chunk.start + chunk.count
        params[i] = state.request.params
        here = slice(at, at + chunk.count)
        new = state.pages[len(pages) : -(-end // size)]
        batch.tokens[here] = state.request.prompt[chunk.start : end]
        batch.positions[here] = np.arange(chunk.start, end)
        batch.segments[here] = i + 1
        batch.new_pages[at // size : at // size + len(new)] = new
        batch.cached_pages[cached_at : cached_at + len(pages)] = pages
        batch.cached_segments[cached_at : cached_at + len(pages)] = i + 1
        batch.alpha[i] = state.alpha
        batch.last_index[i] = at + chunk.count - 1
        batch.length[i] = end
        batch.token_budget[i] = state.token_budget
        batch.stop_ids[i] = stop_ids_array(state)
        if chunk.ends_prompt:
            batch.row[i] = state.row
        at += len(new) * size
        cached_at += len(pages)
    return dataclasses.replace(batch, sampling=stack_sampling_params(params))


def page_table(decode: Sequence[RequestState], rows: int, shapes: EngineShapes) -> np.ndarray:
    """Returns the page table of a decode call, int32 [rows, max_pages_per_request].

    Rows without a decoding request, and entries past a request's last page, are 0.
    """
    table = np.zeros((rows, shapes.max_pages_per_request), np.int32)
    for state in decode:
        table[state.row, : len(state.pages)] = state.pages
    return table


def resumed_row(state: RequestState) -> DecodeRows:
    """Returns the single device row with which a preempted request resumes decoding."""
    output = state.output_tokens
    return DecodeRows(
        token=np.array(output[-1:], np.int32),
        length=np.array([state.num_known_slots()], np.int32),
        token_budget=np.array([state.token_budget - len(output)], np.int32),
        alive=np.ones(1, bool),
        alpha=state.alpha[None],
        stop_ids=stop_ids_array(state)[None],
        sampling=stack_sampling_params([state.request.params]),
    )
