"""The engine: requests come and go, the device is kept busy, tokens are handed out.

A step plans a round, sends it to the device, and only then reads the round before: while the host
reads and plans, the device has work. Not thread-safe: one thread owns an engine.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from qwen_jax.engine.batch import pack_prefill, page_table, row_of
from qwen_jax.engine.options import EngineOptions, cache_room, choose_shapes
from qwen_jax.engine.page_pool import root_key
from qwen_jax.engine.programs import Programs
from qwen_jax.engine.request import Output, Request
from qwen_jax.engine.sampling import Drawn, count_row
from qwen_jax.engine.scheduler import Round, Running, Scheduler
from qwen_jax.errors import UserError
from qwen_jax.model import ForwardOptions, ModelConfig, Params, ntk_alphas
from qwen_jax.parallel import on_mesh, platform


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """What an engine holds now, and what it has done since its start.

    Attributes:
      waiting, running: requests in the queue (new ones, and those put aside), and with a row.
      pages_total, pages_free: of the cache; a free page has no holder, cached or not.
      cached_pages: pages that new requests could use, held or free.
      preemptions: how often a request was put aside.
      prompt_tokens: of prompts that were computed to their end; cached_tokens: of these, found in
        the cache.
      new_tokens: handed out.
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
class _Call:
    """A call on its way: its result, and which column of it belongs to whom."""

    drawn: Drawn
    columns: tuple[tuple[int, Running], ...]

    def live(self) -> bool:
        return any(running.finish is None for _, running in self.columns)

    def array(self, name: str) -> np.ndarray:
        """A field of the result, [steps, columns, ...]; waits for it."""
        value = getattr(self.drawn, name)
        # A prefill call draws once and has no axis of steps. `value[None]` would be a program.
        return np.asarray(value) if self.drawn.tokens.ndim == 2 else np.asarray(value)[None]

    def fetch(self) -> None:
        """Begins to copy to the host what will be read."""
        self.drawn.tokens.copy_to_host_async()
        if any(running.request.params.logprobs is not None for _, running in self.columns):
            for array in jax.tree.leaves(self.drawn):
                array.copy_to_host_async()


class Engine:
    """Continues many prompts at once on one device or mesh.

    Everything the device runs is compiled for a few shapes; `warm_up` does it beforehand.

    Attributes:
      max_length: longest prompt + answer in tokens.
      shapes: what the programs are compiled for.
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
        """Made under the mesh in force, if there is one; all its devices share the kv heads.

        Args:
          params: weights of `config`. They are given up to the engine, which may lay them out anew.
          config: of the model; `dynamic_ntk` and `logn` as they should act.
          options: dtype and attention.
          engine: sizes.
          vocab_size: ids of the tokenizer; the model's rows from there on are padding and never
            drawn. None: all of the model's.

        Raises:
          UserError: sizes that exclude one another or don't fit, or a mesh that divides more than
            heads.
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
            *(engine, config),
            platform=platform()[0],
            room=cache_room(engine.memory, devices),
            itemsize=np.dtype(kv_dtype).itemsize,
            tensor=tensor,
        )
        wanted = engine.max_length or config.max_length
        self.max_length = min(wanted, self.shapes.table * self.shapes.page_size)
        self._scheduler = Scheduler(
            self.shapes, reuse=engine.prefix_cache, one_past=bool(config.windows)
        )
        self._requests: dict[str, Running] = {}
        self._flying: list[_Call] = []
        self._seeds = np.random.default_rng(engine.seed)
        self._counters = collections.Counter()
        with self._on_mesh():
            self._programs = self._make_programs(params, options, vocab_size, kv_dtype)
            self._state = self._programs.init_state()

    def _make_programs(self, params, options, vocab_size, kv_dtype):
        how = {"vocab_size": vocab_size, "kv_dtype": kv_dtype}
        return Programs(params, self._config, options, self.shapes, **how)

    def _on_mesh(self):
        """Whichever thread steps works on the mesh that the engine was made under."""
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def warm_up(self, progress: Callable[[int, int, str], None] | None = None) -> None:
        """Compiles everything, so that no request waits for the compiler.

        Args:
          progress: called after each program with (done, all, name).
        """
        with self._on_mesh():
            self._programs.warm_up(progress)

    # Requests

    def add(self, request: Request) -> None:
        """Takes a request; its tokens come out of `step`.

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
        running = Running(request, alpha, root_key(alpha), budget)
        self._requests[request.id] = running
        self._scheduler.add(running)

    def cancel(self, request_id: str) -> None:
        """Ends a request, wherever it is: no more outputs for it. An unknown id is ignored.

        A request may end by itself at any time, so an id that isn't there is no mistake.
        """
        running = self._requests.pop(request_id, None)
        if running is not None:
            self._scheduler.end(running, "cancelled")

    @property
    def busy(self) -> bool:
        """Whether there are requests, waiting or running."""
        return bool(self._requests)

    def stats(self) -> EngineStats:
        """Numbers for people and monitors."""
        scheduler = self._scheduler
        return EngineStats(
            waiting=len(scheduler.waiting),
            running=len(scheduler.running()),
            pages_total=self.shapes.pages,
            pages_free=scheduler.pool.available,
            cached_pages=scheduler.pool.cached,
            preemptions=scheduler.preemptions,
            prompt_tokens=self._counters["prompt"],
            cached_tokens=self._counters["cached"],
            new_tokens=self._counters["new"],
        )

    # A round

    def step(self) -> list[Output]:
        """Sends one round of work to the device and returns what has become known meanwhile.

        The first tokens of a request come out one call after they were sent for. With nothing to
        do it returns at once.
        """
        with self._on_mesh():
            outputs: list[Output] = []
            self._flying = [call for call in self._flying if call.live()]
            while (work := self._scheduler.plan(settled=not self._flying)) is None:
                outputs += self._read(self._flying.pop(0))
            before, self._flying = self._flying, []
            self._send(work)
            for call in before:
                outputs += self._read(call)
            return outputs

    def _send(self, work: Round) -> None:
        programs, shapes = self._programs, self.shapes
        if work.stop:
            ended = np.zeros(shapes.rows, bool)
            ended[list(work.stop)] = True
            self._state = programs.stop(self._state, ended)
        for running, pages in work.aside:
            running.aside = self._take(pages)
        for running in work.back:
            self._put_back(running)
        if work.chunks:
            self._send_prefill(work)
        if work.decode:
            table = page_table(work.decode, work.rows, shapes)
            self._state, drawn = programs.decode(self._state, table, work.steps)
            self._fly(drawn, tuple((r.row, r) for r in work.decode))

    def _fly(self, drawn: Drawn, columns: tuple[tuple[int, Running], ...]) -> None:
        call = _Call(drawn, columns)
        call.fetch()
        self._flying.append(call)

    def _send_prefill(self, work: Round) -> None:
        last = tuple((i, c.running) for i, c in enumerate(work.chunks) if c.last)
        for _, running in last:
            self._counters["prompt"] += running.prompt_length
            self._counters["cached"] += running.cached
            self._put_counts(running)
        batch = pack_prefill(work.chunks, work.tokens, self.shapes)
        self._state, drawn = self._programs.prefill(self._state, batch)
        if last:
            self._fly(drawn, last)

    def _put_counts(self, running: Running) -> None:
        if running.request.params.penalised:
            ids = (running.request.prompt, running.answer)
            counts = count_row(*ids, self._config.vocab_size)
            self._state = self._programs.put_counts(self._state, running.row, counts)

    def _swaps(self, pages: tuple[int, ...]) -> list[np.ndarray]:
        """Ids of pages, cut to the size of one copy; filled up with the id that means nowhere."""
        swap = self.shapes.swap
        ids = np.full(-(-len(pages) // swap) * swap, self.shapes.pages, np.int32)
        ids[: len(pages)] = pages
        return list(ids.reshape(-1, swap))

    def _take(self, pages: tuple[int, ...]) -> list:
        copies = []
        for ids in self._swaps(pages):
            copy = self._programs.take_pages(self._state, ids)
            copies.append(jax.tree.map(np.asarray, copy))
        return copies

    def _put_back(self, running: Running) -> None:
        pages = running.pages[: -(-running.known_slots() // self.shapes.page_size)]
        for ids, copy in zip(self._swaps(tuple(pages)), running.aside, strict=True):
            self._state = self._programs.put_pages(self._state, ids, copy)
        running.aside = None
        self._put_counts(running)
        self._state = self._programs.start_row(self._state, running.row, row_of(running))

    # Results

    def _read(self, call: _Call) -> list[Output]:
        """Waits for a call and makes outputs of it."""
        if not call.live():
            return []
        tokens = call.array("tokens")
        outputs = []
        for column, running in call.columns:
            if running.finish is not None:
                continue  # it ended in an earlier call, or was cancelled
            drawn = tokens[:, column]
            before = len(running.answer)
            finish = self._scheduler.learn(running, drawn[drawn >= 0].tolist())
            outputs.append(self._output(call, column, running, before, finish))
            if finish is not None:
                self._scheduler.end(running, finish)
                del self._requests[running.request.id]
        return outputs

    def _output(self, call: _Call, column: int, running: Running, before: int, finish) -> Output:
        new = running.answer[before:]
        self._counters["new"] += len(new)
        fields = {}
        wanted = running.request.params.logprobs
        if wanted is not None:

            def numbers(name):
                return call.array(name)[: len(new), column]

            fields["logprobs"] = numbers("logprob")
            fields["raw_logprobs"] = numbers("raw_logprob")
            fields["top_ids"] = numbers("top_ids")[:, :wanted]
            fields["top_logprobs"] = numbers("top_logprobs")[:, :wanted]
        cached = running.cached if not before else 0
        tokens = np.array(new, np.int32)
        return Output(running.request.id, tokens, finish, cached_tokens=cached, **fields)
