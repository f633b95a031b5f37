"""From what the scheduler decided to the arrays that the programs take, in numpy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from qwen_jax.engine.request import MAX_STOP_IDS
from qwen_jax.engine.sampling import sampling_rows
from qwen_jax.engine.scheduler import Chunk, Running, bucket
from qwen_jax.engine.steps import PrefillBatch, Rows, Shapes, empty_prefill


def stop_row(running: Running) -> np.ndarray:
    """int32 [MAX_STOP_IDS], filled up with -1."""
    ids = running.request.params.stop_ids
    return np.array([*ids, *[-1] * (MAX_STOP_IDS - len(ids))], np.int32)


def pack_prefill(chunks: Sequence[Chunk], tokens: int, shapes: Shapes) -> PrefillBatch:
    """Chunks side by side in `tokens` slots, each from a border of pages on."""
    size = shapes.page_size
    pasts = [chunk.running.pages[: chunk.start // size] for chunk in chunks]
    past = bucket(shapes.past_pages, sum(map(len, pasts)))
    batch = empty_prefill(shapes, len(chunks[0].running.alpha), tokens, past)
    params = [None] * shapes.prompts
    at, past_at = 0, past - sum(map(len, pasts))
    for i, (chunk, pages) in enumerate(zip(chunks, pasts, strict=True)):
        running, end = chunk.running, chunk.start + chunk.count
        params[i] = running.request.params
        here, new = slice(at, at + chunk.count), running.pages[len(pages) : -(-end // size)]
        batch.tokens[here] = running.request.prompt[chunk.start : end]
        batch.positions[here] = np.arange(chunk.start, end)
        batch.segments[here] = i + 1
        batch.new_pages[at // size : at // size + len(new)] = new
        batch.past_pages[past_at : past_at + len(pages)] = pages
        batch.past_segments[past_at : past_at + len(pages)] = i + 1
        batch.alpha[i] = running.alpha
        batch.last[i], batch.length[i] = at + chunk.count - 1, end
        batch.budget[i], batch.stop_ids[i] = running.budget, stop_row(running)
        if chunk.last:
            batch.slot[i] = running.row
        at += len(new) * size
        past_at += len(pages)
    return dataclasses.replace(batch, sampling=sampling_rows(params))


def page_table(decode: Sequence[Running], rows: int, shapes: Shapes) -> np.ndarray:
    """int32 [rows, table]; rows that nobody decodes in, and entries past the end, are 0."""
    table = np.zeros((rows, shapes.table), np.int32)
    for running in decode:
        table[running.row, : len(running.pages)] = running.pages
    return table


def row_of(running: Running) -> Rows:
    """One row, for a request that goes on where it was put aside."""
    answer = running.answer
    return Rows(
        token=np.array(answer[-1:], np.int32),
        length=np.array([running.known_slots()], np.int32),
        budget=np.array([running.budget - len(answer)], np.int32),
        alive=np.ones(1, bool),
        alpha=running.alpha[None],
        stop_ids=stop_row(running)[None],
        sampling=sampling_rows([running.request.params]),
    )
