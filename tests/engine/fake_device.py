"""A simulated device: a "model" whose every token depends on all cache slots it should have read.

It keeps the contract of `engine.programs.CompiledPrograms` in numpy. What a page holds of a token
is a number made of the token, its position and its prompt's factors; the next token is a hash of
these numbers in order, read through the pages the host names. A wrong or stale page, a wrong table,
a lost or doubled token, a row not stopped: each changes an answer.
"""

import dataclasses
import functools

import numpy as np

from qwen_jax.engine.engine import Engine
from qwen_jax.engine.sampling import Samples, count_row
from qwen_jax.engine.steps import DecodeRows, empty_rows
from qwen_jax.model import ForwardOptions, ModelConfig

VOCAB = 50
CONFIG = ModelConfig(
    family="qwen", vocab_size=VOCAB, d_model=8, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=8,
    d_ff=8, max_length=64, trained_length=16, dynamic_ntk=True, logn=True,
)  # fmt: skip
_MOD = (1 << 61) - 1


def written(token, position, alpha) -> int:
    """Returns the number that the simulated cache stores for a token."""
    return (int(token) * 7919 + int(position) * 104729 + int(alpha * 8) * 1299709 + 1) % _MOD


def next_token(held, params, counts, vocab=VOCAB) -> int:
    """Returns the token that follows the stored numbers `held`; counts are for penalties."""
    state = int(params.seed) if params.temperature else 0
    for value in held:
        state = (state * 6364136223846793005 + int(value)) % _MOD
    if counts is not None:
        state = (state * 31 + int((counts * np.arange(1, vocab + 1)).sum())) % _MOD
    return (state >> 7) % vocab


def alone(prompt, params, alpha, max_length):
    """Returns (output, finish) of a request that runs alone, computed without pages or rows."""
    held = [written(t, i, alpha) for i, t in enumerate(prompt)]
    answer = []
    while True:
        counts = count_row(prompt, answer, VOCAB) if params.penalised else None
        token = next_token(held, params, counts)
        if token in params.stop_ids:
            return answer, "stop"
        answer.append(token)
        if len(answer) == params.max_tokens or len(prompt) + len(answer) == max_length:
            return answer, "length"
        held.append(written(token, len(held), alpha))


class PendingArray(np.ndarray):
    """An array that records whether its copy to the host was started."""

    fetched = False

    def copy_to_host_async(self):
        self.fetched = True


@dataclasses.dataclass
class State:
    memory: np.ndarray  # [pages, page]
    rows: DecodeRows
    counts: np.ndarray  # [S,V]
    given: bool = False  # donated: must not be used again


def _donates(call):
    @functools.wraps(call)
    def run(self, state, *args):
        assert not state.given, f"{call.__name__} got a state that was donated before"
        state.given = True
        new = State(state.memory, state.rows, state.counts)
        # What the host hands over is its own again at once: keep no reference.
        return call(self, new, *args)

    return run


class CompiledPrograms:
    """Simulates `engine.programs.CompiledPrograms` in numpy; see the module docstring."""

    def __init__(self, shapes):
        self.shapes = shapes
        self.single_cached_prefix = False  # as for a model with windows
        self.calls = []

    def init_state(self):
        shapes = self.shapes
        memory = np.full((shapes.num_pages, shapes.page_size), -1, np.int64)
        rows = empty_rows(shapes.max_rows, 1)
        return State(memory, rows, np.zeros((shapes.max_rows, VOCAB), np.int16))

    def warm_up(self, progress=None):
        pass

    def _drawn(self, tokens):
        tokens = np.array(tokens, np.int32)
        chosen = tokens.astype(np.float32) / 64
        top = np.repeat(tokens[..., None], 20, -1)
        fields = (tokens, -chosen, -2 * chosen, top, -(top / 64).astype(np.float32))
        return Samples(*(x.view(PendingArray) for x in fields))

    def _draw(self, held, sampling, i, counts):
        params = _Params(sampling, i)
        assert all(value >= 0 for value in held), "a slot was read before it was written"
        return next_token(held, params, counts if params.penalised else None)

    @_donates
    def prefill(self, state, batch):
        shapes, size = self.shapes, self.shapes.page_size
        assert len(batch.tokens) in shapes.prefill_tokens
        assert len(batch.cached_pages) in shapes.cached_pages
        assert len(batch.last_index) == shapes.max_prompts
        self.calls.append(("prefill", len(batch.tokens), int((batch.segments > 0).sum())))
        used = batch.segments[batch.segments > 0]
        assert (np.diff(used) >= 0).all() and (np.diff(batch.cached_segments) >= 0).all()
        if self.single_cached_prefix and batch.cached_segments.any():
            assert set(batch.cached_segments) <= {0, 1} and used[0] == 1
        old = state.memory.copy()
        for page, at in zip(batch.new_pages, range(0, len(batch.tokens), size), strict=True):
            here = slice(at, at + size)
            if page == shapes.num_pages:
                assert not batch.segments[here].any()
                continue
            segment = batch.segments[at]
            assert segment and set(batch.segments[here]) <= {segment, 0}
            for i in range(at, at + size):
                inside = batch.segments[i] > 0
                what = written(batch.tokens[i], batch.positions[i], batch.alpha[segment - 1, 0])
                state.memory[page, i - at] = what if inside else -1
        drawn = np.zeros(shapes.max_prompts, np.int32)
        for q in range(shapes.max_prompts):
            mine = np.flatnonzero(batch.segments == q + 1)
            if not len(mine):
                assert batch.row[q] == shapes.max_rows
                continue
            past = batch.cached_pages[batch.cached_segments == q + 1]
            start = batch.positions[mine[0]]
            assert mine[0] % size == 0 and start == len(past) * size, "not at a page boundary"
            assert mine[-1] == batch.last_index[q] and start + len(mine) == batch.length[q]
            alpha = batch.alpha[q, 0]
            # What this very call writes may not be another prompt's past.
            held = [*old[past].ravel(), *(
                written(batch.tokens[i], batch.positions[i], alpha) for i in mine
            )]  # fmt: skip
            if batch.row[q] < shapes.max_rows:
                drawn[q] = self._start(state, batch, q, held)
        return state, self._drawn(drawn)

    def _start(self, state, batch, q, held):
        slot, rows = batch.row[q], state.rows
        assert not rows.alive[slot], "the row is in use"
        token = self._draw(held, batch.sampling, q, state.counts[slot])
        state.counts[slot, token] += 2
        rows.token[slot], rows.length[slot] = token, batch.length[q]
        rows.token_budget[slot] = batch.token_budget[q] - 1
        rows.alive[slot] = batch.token_budget[q] > 1 and token not in batch.stop_ids[q]
        rows.alpha[slot], rows.stop_ids[slot] = batch.alpha[q], batch.stop_ids[q]
        _copy_sampling(rows.sampling, slot, batch.sampling, q)
        return token

    @_donates
    def decode(self, state, page_table, steps):
        shapes, rows = self.shapes, state.rows
        assert (
            page_table.shape[0] in shapes.decode_rows
            and page_table.shape[1] == shapes.max_pages_per_request
        )
        assert 1 <= steps <= shapes.max_decode_steps
        self.calls.append(("decode", len(page_table), int(steps)))
        assert not rows.alive[len(page_table) :].any(), "a live row is outside the call"
        out = np.full((shapes.max_decode_steps, len(page_table)), -1, np.int32)
        for step in range(steps):
            for r in np.flatnonzero(rows.alive):
                out[step, r] = self._one(state, r, page_table[r])
        return state, self._drawn(out)

    def _one(self, state, r, table):
        rows, size = state.rows, self.shapes.page_size
        length = int(rows.length[r])
        what = written(rows.token[r], length, rows.alpha[r, 0])
        state.memory[table[length // size], length % size] = what
        held = state.memory[table].ravel()[: length + 1]
        token = self._draw(held, rows.sampling, r, state.counts[r])
        state.counts[r, token] += 2
        rows.token[r], rows.length[r] = token, length + 1
        rows.token_budget[r] -= 1
        rows.alive[r] = rows.token_budget[r] > 0 and token not in rows.stop_ids[r]
        return token

    @_donates
    def stop_rows(self, state, ended):
        assert ended.shape == (self.shapes.max_rows,)
        state.rows.alive[ended] = False
        return state

    @_donates
    def put_counts(self, state, row, counts):
        state.counts[row] = counts
        return state

    @_donates
    def start_row(self, state, slot, row):
        rows = state.rows
        assert not rows.alive[slot], "the row is in use"
        for name in ("token", "length", "token_budget", "alive", "alpha", "stop_ids"):
            getattr(rows, name)[slot] = getattr(row, name)[0]
        _copy_sampling(rows.sampling, slot, row.sampling, 0)
        return state

    def copy_pages_out(self, state, ids):
        assert not state.given and ids.shape == (self.shapes.swap_pages,)
        return state.memory[np.minimum(ids, self.shapes.num_pages - 1)].copy()

    @_donates
    def copy_pages_in(self, state, ids, pages):
        real = ids < self.shapes.num_pages
        state.memory[ids[real]] = pages[real]
        return state


class _Params:
    """The sampling parameters of one row of `SamplingRows`."""

    def __init__(self, rows, i):
        self.temperature = rows.temperature[i]
        self.seed = int(rows.seed[i, 0]) << 32 | int(rows.seed[i, 1])
        numbers = (rows.repetition[i], rows.presence[i], rows.frequency[i])
        self.penalised = numbers != (1, 0, 0)


def _copy_sampling(into, row, source, i):
    for field in dataclasses.fields(into):
        getattr(into, field.name)[row] = getattr(source, field.name)[i]


class FakeDeviceEngine(Engine):
    """An engine over the simulated device."""

    def __init__(self, options, config=CONFIG):
        super().__init__(None, config, ForwardOptions("float32"), options)

    def _make_programs(self, params, options, vocab_size, kv_dtype):
        return CompiledPrograms(self.shapes)

    @property
    def programs(self):
        return self._programs

    def check(self):
        """Asserts the invariants that hold between any two steps."""
        scheduler = self._scheduler
        scheduler.pool.check(scheduler.page_lists())
        waiting = [r.arrival for r in scheduler.waiting]
        running = [r.arrival for r in scheduler.running()]
        assert waiting == sorted(waiting)
        assert not (waiting and running) or running[-1] < waiting[0], (
            "a request was overtaken by a younger one"
        )
