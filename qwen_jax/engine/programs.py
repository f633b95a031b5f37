"""Compiled programs of the engine, ahead of time for their few shapes, and parameter layouts.

Calling a compiled program never compiles: arguments of other shapes are an error. On TPU the
compiler chooses the memory layouts of the parameters (AUTO layouts); with fixed layouts the decode
loop would begin by copying all of them. On a CPU each layer's weights are stored as separate
arrays, because every step would otherwise copy them out of the stack.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental.layout import Format, Layout

from qwen_jax.engine import steps
from qwen_jax.engine.sampling import Samples
from qwen_jax.engine.steps import (
    DecodeRows,
    EngineShapes,
    EngineState,
    PrefillBatch,
    empty_prefill,
    empty_rows,
)
from qwen_jax.kernels import PagedCache
from qwen_jax.model import ForwardOptions, ModelConfig, Params
from qwen_jax.model.transformer import unstack_layers
from qwen_jax.parallel import on_mesh, platform

ProgramKey = tuple[Any, ...]
"""Name of a program followed by its sizes: ("decode", rows), ("prefill", tokens, cached pages)."""


class CompiledPrograms:
    """All device calls of an engine, compiled under the mesh in force at creation.

    Attributes:
      params: the parameters in the layout that the programs need; those passed in are consumed.
      config: the model.
      shapes: the sizes that programs are compiled for.
    """

    def __init__(
        self,
        params: Params,
        config: ModelConfig,
        options: ForwardOptions,
        shapes: EngineShapes,
        *,
        vocab_size: int,
        kv_dtype: Any,
    ):
        """Compiles nothing yet: `warm_up` does, or the first call of each program.

        Args:
          params: weights of `config`, arrays or `ShapeDtypeStruct`s (then only `lower` works).
          config, options: the model and how it runs.
          shapes: the sizes to compile for.
          vocab_size: ids of the tokenizer; the model's rows from there on are never sampled.
          kv_dtype: dtype of the cache; uint8 is its 8-bit form.
        """
        self.params, self.config, self.shapes = params, config, shapes
        self._kv_dtype = kv_dtype
        fixed: dict[str, Any] = {"config": config, "options": options, "vocab_size": vocab_size}
        self._functions: dict[str, Callable[..., Any]] = {
            "prefill": functools.partial(steps.prefill_step, **fixed),
            "decode": functools.partial(
                steps.decode_steps, max_steps=shapes.max_decode_steps, **fixed
            ),
            "stop_rows": steps.stop_rows,
            "put_counts": steps.put_counts,
            "start_row": steps.start_row,
            "copy_pages_out": steps.copy_pages_out,
            "copy_pages_in": steps.copy_pages_in,
        }
        self._compiled: dict[ProgramKey, jax.stages.Compiled] = {}
        self._params_placed = False
        self._formats: Any = None

    # --- calls ----------------------------------------------------------------------------------

    def init_state(self) -> EngineState:
        """Returns an empty engine state on the device."""
        make = functools.partial(steps.init_state, self.config, self.shapes, self._kv_dtype)
        return jax.jit(make)()

    def prefill(self, state: EngineState, batch: PrefillBatch) -> tuple[EngineState, Samples]:
        """Computes a prefill batch; prompts that end sample their first token and start decoding.

        Calls the compiled `steps.prefill_step`; the old state is donated.
        """
        key = ("prefill", len(batch.tokens), len(batch.cached_pages))
        return self._get(key)(self.params, state, batch)

    def decode(
        self, state: EngineState, page_table: np.ndarray, count: int
    ) -> tuple[EngineState, Samples]:
        """Decodes all rows for at most `count` steps; calls the compiled `steps.decode_steps`."""
        program = self._get(("decode", len(page_table)))
        return program(self.params, state, page_table, np.int32(count))

    def stop_rows(self, state: EngineState, stopped: np.ndarray) -> EngineState:
        """Ends the rows where `stopped`, bool [S], is set (S decode rows)."""
        return self._get(("stop_rows",))(state, stopped)

    def put_counts(self, state: EngineState, row: int, counts: np.ndarray) -> EngineState:
        """Sets the token counts of one row, int16 [V] (V vocabulary entries)."""
        return self._get(("put_counts",))(state, np.int32(row), counts)

    def start_row(self, state: EngineState, row: int, request: DecodeRows) -> EngineState:
        """Starts a request whose pages are in the cache in decode row `row`."""
        return self._get(("start_row",))(state, np.int32(row), request)

    def copy_pages_out(self, state: EngineState, ids: np.ndarray) -> PagedCache:
        """Returns copies of pages as a cache of their own.

        Args:
          state: engine state.
          ids: page ids, int32 [`EngineShapes.swap_pages`].
        """
        return self._get(("copy_pages_out",))(state, ids)

    def copy_pages_in(self, state: EngineState, ids: np.ndarray, pages: PagedCache) -> EngineState:
        """Overwrites the pages `ids`, int32 [`EngineShapes.swap_pages`], by those of a cache.

        Args:
          state: engine state.
          ids: page ids; ids ≥ num_pages are dropped.
          pages: a cache of as many pages, as JAX or numpy arrays.
        """
        return self._get(("copy_pages_in",))(state, ids, pages)

    # --- compilation ----------------------------------------------------------------------------

    def keys(self) -> list[ProgramKey]:
        """Returns the keys of all programs, those that every request needs first."""
        decodes = [("decode", rows) for rows in self.shapes.decode_rows]
        prefills = [
            ("prefill", *sizes)
            for sizes in itertools.product(self.shapes.prefill_tokens, self.shapes.cached_pages)
        ]
        others = [(name,) for name in self._functions if name not in ("prefill", "decode")]
        return [*decodes, *prefills, *others]

    def warm_up(self, progress: Callable[[int, int, str], None] | None = None) -> None:
        """Compiles every program; calls progress(done, total, name) after each."""
        keys, start = self.keys(), time.monotonic()
        for done, key in enumerate(keys, start=1):
            self._get(key)
            if progress:
                progress(done, len(keys), " ".join(map(str, key)))
        logging.info("compiled %d programs in %.1f s", len(keys), time.monotonic() - start)

    def _get(self, key: ProgramKey) -> jax.stages.Compiled:
        """Returns the compiled program of `key`, compiling it on first use."""
        if key not in self._compiled:
            if not self._params_placed:
                self._place_params()
            if key not in self._compiled:
                self._compiled[key] = self.lower(key).compile()
        return self._compiled[key]

    def _place_params(self) -> None:
        """Moves the parameters to the layout that the most frequent program prefers."""
        self._params_placed = True
        if platform()[0] != "tpu":
            if platform()[0] == "cpu" and not on_mesh():
                self.params = unstack_layers(self.params)
            return
        key = ("decode", self.shapes.max_rows)
        compiled = self._compiled[key] = self.lower(key, auto=True).compile()
        self._formats = compiled.input_formats[0][0]
        # One leaf at a time: there is no room for two copies of all parameters.
        leaves, tree = jax.tree.flatten(self.params)
        self.params = {}
        for i, wanted in enumerate(jax.tree.leaves(self._formats)):
            leaves[i] = jax.device_put(leaves[i], wanted, donate=True)
        self.params = jax.tree.unflatten(tree, leaves)

    def lower(self, key: ProgramKey, *, auto: bool = False) -> jax.stages.Lowered:
        """Traces one program for the mesh in force.

        Args:
          key: which program.
          auto: whether the compiler chooses the layouts of the parameters.
        """
        name, *sizes = key
        operands = self._operands(name, *sizes)
        with_params = name in ("prefill", "decode")
        how: dict[str, Any] = {}
        if name != "copy_pages_out":
            how["donate_argnums"] = int(with_params)
        if with_params:
            formats = self._formats
            if auto:
                formats = jax.tree.map(lambda x: Format(Layout.AUTO, _sharding(x)), self.params)
            if formats is not None:
                how["in_shardings"] = (formats, *[None] * len(operands))
            abstract = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_sharding(x)),
                self.params,
            )
            operands = (abstract, *operands)
        return jax.jit(self._functions[name], **how).lower(*operands)

    def abstract_state(self) -> EngineState:
        """Returns the shapes of the engine state, with shardings on a mesh."""
        make = functools.partial(steps.init_state, self.config, self.shapes, self._kv_dtype)
        return self._with_shardings(jax.eval_shape(make))

    def _with_shardings(self, tree: Any) -> Any:
        """Returns `ShapeDtypeStruct`s whose shardings are on the mesh of the parameters.

        Args:
          tree: shapes whose shardings are on an abstract mesh; returned unchanged without a mesh.
        """
        if not on_mesh():
            return tree
        mesh = jax.tree.leaves(self.params)[0].sharding.mesh
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=jax.NamedSharding(mesh, x.sharding.spec)
            ),
            tree,
        )

    def _replicated(self, tree: Any) -> Any:
        """Returns the shapes of numpy arrays, replicated over the mesh if there is one."""
        sharding = None
        if on_mesh():
            mesh = jax.tree.leaves(self.params)[0].sharding.mesh
            sharding = jax.NamedSharding(mesh, jax.P())
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    def _operands(self, name: str, *sizes: int) -> tuple[Any, ...]:
        """Returns the arguments of a program after the parameters, as `ShapeDtypeStruct`s.

        Args:
          name: name of a method of this class that calls a program.
          *sizes: sizes that the program is compiled for: token slots and cached pages of "prefill",
            rows of "decode", none for other programs.
        """
        shapes, windows = self.shapes, len(self.config.distinct_windows)
        state, shape_of = self.abstract_state(), self._replicated
        number = shape_of(np.int32(0))
        ids = shape_of(np.zeros(shapes.swap_pages, np.int32))
        match name:
            case "prefill":
                return state, shape_of(empty_prefill(shapes, windows, *sizes))
            case "decode":
                table = np.zeros((*sizes, shapes.max_pages_per_request), np.int32)
                return state, shape_of(table), number
            case "stop_rows":
                return state, shape_of(np.zeros(shapes.max_rows, bool))
            case "put_counts":
                return state, number, shape_of(np.zeros(self.config.vocab_size, np.int16))
            case "start_row":
                return state, number, shape_of(empty_rows(1, windows))
            case "copy_pages_out":
                return state, ids
            case "copy_pages_in":
                pages = jax.eval_shape(steps.copy_pages_out, state, ids)
                return state, ids, self._with_shardings(pages)
        raise AssertionError(f"no program is called {name}")


def _sharding(x: Any) -> jax.sharding.Sharding:
    """Returns the sharding of an array or shape, by default that of the first device."""
    if on_mesh() or getattr(x, "sharding", None) is not None:
        return x.sharding
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])
