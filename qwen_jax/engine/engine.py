"""Continuous-batching inference engine: accepts requests, drives the device, returns tokens.

A step plans a schedule, dispatches it to the device, and only then reads the results of the
previous step, so the device has work while the host reads and plans. Not thread-safe: an engine is
used by one thread at a time.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from qwen_jax.engine.batch import pack_prefill, page_table, resumed_row
from qwen_jax.engine.options import EngineOptions, available_cache_bytes, choose_shapes
from qwen_jax.engine.page_pool import root_key
from qwen_jax.engine.programs import CompiledPrograms
from qwen_jax.engine.request import Output, Request
from qwen_jax.engine.sampling import Samples, count_row
from qwen_jax.engine.scheduler import RequestState, Schedule, Scheduler
from qwen_jax.errors import UserError
from qwen_jax.model import ForwardOptions, ModelConfig, Params, ntk_alphas
from qwen_jax.parallel import on_mesh, platform


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """Current load of an engine, and totals since its start.

    Attributes:
      waiting: requests in the queue, new and preempted ones.
      running: requests that have a device row.
      pages_total: pages of the cache.
      pages_free: pages without references, whether in the prefix cache or not.
      cached_pages: pages in the prefix cache, referenced or not.
      preemptions: how many times a request was preempted.
      prompt_tokens: prompt tokens of requests whose prompt was computed to its end.
      cached_tokens: those of them that were found in the prefix cache.
      new_tokens: output tokens returned.
    """

    waiting: int
    running: int
    pages_total: int
    pages_free: int
    cached_pages: int
    preemptions: int
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int


@dataclasses.dataclass(frozen=True)
class _PendingCall:
    """A dispatched call whose results the host has not read.

    Attributes:
      samples: its results on the device.
      columns: (index on the row axis of `samples`, request) for each request of the call.
    """

    samples: Samples
    columns: tuple[tuple[int, RequestState], ...]

    def is_needed(self) -> bool:
        """Whether any of its requests is still unfinished."""
        return any(state.finish is None for _, state in self.columns)

    def array(self, name: str) -> np.ndarray:
        """Returns a field of `Samples` as numpy [steps, rows, ...]; blocks until it is computed."""
        value = getattr(self.samples, name)
        # A prefill call has no axis of steps. `value[None]` on the device would be a program.
        return np.asarray(value) if self.samples.tokens.ndim == 2 else np.asarray(value)[None]

    def start_copy_to_host(self) -> None:
        """Starts copying the results that will be read to the host, without blocking."""
        self.samples.tokens.copy_to_host_async()
        if any(state.request.params.logprobs is not None for _, state in self.columns):
            for array in jax.tree.leaves(self.samples):
                array.copy_to_host_async()


class Engine:
    """Continues many prompts at once on one device or mesh.

    All device programs are compiled for a few shapes; `warm_up` compiles them in advance.

    Attributes:
      max_length: longest prompt and output together, in tokens.
      shapes: sizes that the programs are compiled for.
    """

    def __init__(
        self,
        params: Params,
        config: ModelConfig,
        options: ForwardOptions = ForwardOptions(),
        engine: EngineOptions = EngineOptions(),
        *,
        vocab_size: int | None = None,
    ):
        """Creates an engine under the mesh in force, whose devices share the kv heads.

        Args:
          params: weights of `config`. The engine takes ownership and may change their layout.
          config: the model; `dynamic_ntk` and `logn` apply as set.
          options: dtype and attention implementation.
          engine: sizes.
          vocab_size: ids of the tokenizer; the model's rows from there on are padding and never
            sampled. None: all of the model's rows.

        Raises:
          UserError: sizes that contradict one another or don't fit, or a mesh with an axis other
            than `tensor` above 1.
        """
        self._mesh = jax.sharding.get_mesh() if on_mesh() else None
        tensor = 1 if self._mesh is None else self._mesh.shape["tensor"]
        if self._mesh is not None and tensor != self._mesh.size:
            raise UserError(
                f"The engine's mesh is {dict(self._mesh.shape)}; only `tensor` may be above 1. "
                "Start an engine for each replica instead."
            )
        if config.n_kv_heads % tensor:
            raise UserError(
                f"{tensor} devices can't share {config.n_kv_heads} kv heads evenly; "
                "use a number of devices that divides them."
            )
        vocab_size = config.vocab_size if vocab_size is None else vocab_size
        if not 1 <= vocab_size <= config.vocab_size:
            raise UserError(f"vocab_size is {vocab_size}; the model has {config.vocab_size} rows.")
        self._config = config
        devices = jax.devices()[:1] if self._mesh is None else self._mesh.local_devices
        kv_dtype = options.compute_dtype if engine.kv_dtype == "auto" else np.uint8
        self.shapes = choose_shapes(
            engine,
            config,
            platform=platform()[0],
            cache_bytes=available_cache_bytes(engine.memory, devices),
            itemsize=np.dtype(kv_dtype).itemsize,
            tensor=tensor,
        )
        longest = self.shapes.max_pages_per_request * self.shapes.page_size
        self.max_length = min(engine.max_length or config.max_length, longest)
        self._scheduler = Scheduler(
            self.shapes,
            prefix_cache=engine.prefix_cache,
            single_cached_prefix=bool(config.windows),
        )
        self._requests: dict[str, RequestState] = {}
        self._pending: list[_PendingCall] = []
        self._seeds = np.random.default_rng(engine.seed)
        self._totals: collections.Counter[str] = collections.Counter()
        with self._on_mesh():
            self._programs = self._make_programs(params, options, vocab_size, kv_dtype)
            self._state = self._programs.init_state()

    def _make_programs(
        self, params: Params, options: ForwardOptions, vocab_size: int, kv_dtype: Any
    ) -> CompiledPrograms:
        """Creates the device programs; tests override this with a simulated device."""
        return CompiledPrograms(
            params, self._config, options, self.shapes, vocab_size=vocab_size, kv_dtype=kv_dtype
        )

    def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        """Enters the mesh under which the engine was created, in whichever thread calls."""
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def warm_up(self, progress: Callable[[int, int, str], None] | None = None) -> None:
        """Compiles all programs, so that no request waits for the compiler.

        Args:
          progress: called after each program with (done, total, name).
        """
        with self._on_mesh():
            self._programs.warm_up(progress)

    # Requests

    def add(self, request: Request) -> None:
        """Submits a request; its tokens are returned by later calls of `step`.

        Raises:
          UserError: the id is in use, an id of the prompt is outside the vocabulary, or the prompt
            can never fit.
        """
        prompt, params = request.prompt, request.params
        if request.id in self._requests:
            raise UserError(f"Request {request.id!r} is running already; give each its own id.")
        if not prompt:
            raise UserError("The prompt has no tokens; start it with at least one.")
        if not 0 <= min(prompt) <= max(prompt) < self._config.vocab_size:
            raise UserError(
                f"The prompt has ids from {min(prompt)} to {max(prompt)}; ids of this model are 0 "
                f"to {self._config.vocab_size - 1}."
            )
        if len(prompt) >= self.max_length:
            raise UserError(
                f"The prompt has {len(prompt)} tokens and prompt and answer together can have "
                f"{self.max_length}; shorten it."
            )
        if params.seed is None:
            seed = int(self._seeds.integers(2**63))
            request = dataclasses.replace(request, params=dataclasses.replace(params, seed=seed))
        alpha = ntk_alphas(len(prompt), self._config)
        budget = min(params.max_tokens, self.max_length - len(prompt))
        state = RequestState(request, alpha, root_key(alpha), budget)
        self._requests[request.id] = state
        self._scheduler.add(state)

    def cancel(self, request_id: str) -> None:
        """Ends a request, waiting or running; `step` returns no more outputs for it.

        An unknown id is ignored, because a request may end at any time before it is cancelled.
        """
        state = self._requests.pop(request_id, None)
        if state is not None:
            self._scheduler.finish(state, "cancelled")

    @property
    def busy(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self._requests)

    def stats(self) -> EngineStats:
        """Returns the current load and the totals since the start."""
        scheduler = self._scheduler
        return EngineStats(
            waiting=len(scheduler.waiting),
            running=len(scheduler.running()),
            pages_total=self.shapes.num_pages,
            pages_free=scheduler.pool.num_available,
            cached_pages=scheduler.pool.num_cached,
            preemptions=scheduler.num_preemptions,
            prompt_tokens=self._totals["prompt"],
            cached_tokens=self._totals["cached"],
            new_tokens=self._totals["new"],
        )

    # A step

    def step(self) -> list[Output]:
        """Dispatches one step of work and returns the outputs of the previous one.

        A request's first tokens are therefore returned one call after they were dispatched. Returns
        at once when there is nothing to do.
        """
        with self._on_mesh():
            outputs: list[Output] = []
            self._pending = [call for call in self._pending if call.is_needed()]
            while (schedule := self._scheduler.plan(results_read=not self._pending)) is None:
                outputs += self._read(self._pending.pop(0))
            previous, self._pending = self._pending, []
            self._dispatch(schedule)
            for call in previous:
                outputs += self._read(call)
            return outputs

    def _dispatch(self, schedule: Schedule) -> None:
        """Sends a schedule to the device, in its order, without waiting for results."""
        programs, shapes = self._programs, self.shapes
        if schedule.stop_rows:
            stopped = np.zeros(shapes.max_rows, bool)
            stopped[list(schedule.stop_rows)] = True
            self._state = programs.stop_rows(self._state, stopped)
        for state, pages in schedule.swap_out:
            state.swapped_out = self._swap_out(pages)
        for state in schedule.swap_in:
            self._swap_in(state)
        if schedule.prefill:
            self._dispatch_prefill(schedule)
        if schedule.decode:
            table = page_table(schedule.decode, schedule.decode_rows, shapes)
            self._state, samples = programs.decode(self._state, table, schedule.decode_steps)
            columns = tuple((state.assigned_row, state) for state in schedule.decode)
            self._add_pending(samples, columns)

    def _add_pending(self, samples: Samples, columns: tuple[tuple[int, RequestState], ...]) -> None:
        """Records a dispatched call and starts copying its results to the host."""
        call = _PendingCall(samples, columns)
        call.start_copy_to_host()
        self._pending.append(call)

    def _dispatch_prefill(self, schedule: Schedule) -> None:
        """Sends the prefill call of a schedule to the device."""
        chunks = schedule.prefill
        ending = tuple((i, chunk.state) for i, chunk in enumerate(chunks) if chunk.ends_prompt)
        for _, state in ending:
            self._totals["prompt"] += state.prompt_length
            self._totals["cached"] += state.num_cached_tokens
            self._put_counts(state)
        batch = pack_prefill(chunks, schedule.prefill_tokens, self.shapes)
        self._state, samples = self._programs.prefill(self._state, batch)
        if ending:
            self._add_pending(samples, ending)

    def _put_counts(self, state: RequestState) -> None:
        """Uploads the token counts of a request that has penalties."""
        if state.request.params.penalised:
            counts = count_row(state.request.prompt, state.output_tokens, self._config.vocab_size)
            self._state = self._programs.put_counts(self._state, state.assigned_row, counts)

    def _swap_batches(self, pages: tuple[int, ...]) -> list[np.ndarray]:
        """Splits page ids into int32 [swap_pages] arrays, padded with the id that is dropped."""
        size = self.shapes.swap_pages
        ids = np.full(-(-len(pages) // size) * size, self.shapes.num_pages, np.int32)
        ids[: len(pages)] = pages
        return list(ids.reshape(-1, size))

    def _swap_out(self, pages: tuple[int, ...]) -> list[Any]:
        """Returns host copies of these pages, one cache of `swap_pages` pages per batch."""
        copies = []
        for ids in self._swap_batches(pages):
            copy = self._programs.copy_pages_out(self._state, ids)
            copies.append(jax.tree.map(np.asarray, copy))
        return copies

    def _swap_in(self, state: RequestState) -> None:
        """Restores the pages of a preempted request from the host and starts its row."""
        assert state.swapped_out is not None, f"request {state.request.id!r} was not swapped out"
        pages = state.pages[: -(-state.num_known_slots() // self.shapes.page_size)]
        for ids, copy in zip(self._swap_batches(tuple(pages)), state.swapped_out, strict=True):
            self._state = self._programs.copy_pages_in(self._state, ids, copy)
        state.swapped_out = None
        self._put_counts(state)
        row = state.assigned_row
        self._state = self._programs.start_row(self._state, row, resumed_row(state))

    # Results

    def _read(self, call: _PendingCall) -> list[Output]:
        """Waits for a call and returns the outputs of its unfinished requests."""
        if not call.is_needed():
            return []
        tokens = call.array("tokens")
        outputs = []
        for column, state in call.columns:
            if state.finish is not None:
                continue  # finished in an earlier call, or cancelled
            sampled = tokens[:, column]
            before = len(state.output_tokens)
            finish = self._scheduler.commit_tokens(state, sampled[sampled >= 0].tolist())
            outputs.append(self._output(call, column, state, before, finish))
            if finish is not None:
                self._scheduler.finish(state, finish)
                del self._requests[state.request.id]
        return outputs

    def _output(
        self,
        call: _PendingCall,
        column: int,
        state: RequestState,
        before: int,
        finish: str | None,
    ) -> Output:
        """Returns the output of one request from a call.

        Args:
          call: the call, whose results are computed.
          column: index of the request on the row axis of the results.
          state: the request, with the call's tokens committed.
          before: number of its output tokens before this call.
          finish: why the request has ended, None if it continues.
        """
        new = state.output_tokens[before:]
        self._totals["new"] += len(new)
        fields: dict[str, np.ndarray] = {}
        wanted = state.request.params.logprobs
        if wanted is not None:

            def of_request(name: str) -> np.ndarray:
                return call.array(name)[: len(new), column]

            fields["logprobs"] = of_request("logprob")
            fields["raw_logprobs"] = of_request("raw_logprob")
            fields["top_ids"] = of_request("top_ids")[:, :wanted]
            fields["top_logprobs"] = of_request("top_logprobs")[:, :wanted]
        return Output(
            state.request.id,
            np.array(new, np.int32),
            finish,
            cached_tokens=0 if before else state.num_cached_tokens,
            **fields,
        )
