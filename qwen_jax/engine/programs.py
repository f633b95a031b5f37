"""The engine's programs, compiled ahead for their few shapes, and parameters laid out for them.

Calling a compiled program never compiles anything: other shapes than it was made for are an error.
On TPU the compiler chooses how parameters lie in memory (AUTO layouts); with a layout of ours, the
loop over decoding steps would begin by copying all of them. On a CPU each layer's weights get
arrays of their own, or every step would copy them out of the stack.
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
from qwen_jax.engine.sampling import Drawn
from qwen_jax.engine.steps import PrefillBatch, Rows, Shapes, State, empty_prefill, empty_rows
from qwen_jax.kernels import PagedCache
from qwen_jax.model import ForwardOptions, ModelConfig, Params
from qwen_jax.model.transformer import unstack_layers
from qwen_jax.parallel import on_mesh, platform


class Programs:
    """Every device call of the engine. Made under the mesh in force, and used under it.

    Attributes:
      params: the parameters as the programs want them to lie; the ones handed in are given up.
    """

    def __init__(
        self,
        params: Params,
        config: ModelConfig,
        options: ForwardOptions,
        shapes: Shapes,
        *,
        vocab_size: int,
        kv_dtype: Any,
    ):
        """Traces nothing yet; `warm_up` compiles, and a program not warmed up does at first use.

        Args:
          params: weights of `config`, arrays or `ShapeDtypeStruct`s (then only `lower` works).
          shapes: what to compile for.
          vocab_size: ids of the tokenizer; the model's rows from there on are never drawn.
          kv_dtype: of the cache; uint8 is its 8-bit form.
        """
        self.params, self.config, self.shapes = params, config, shapes
        self._kv_dtype = kv_dtype
        fixed = {"config": config, "options": options, "vocab_size": vocab_size}
        self._prefill = functools.partial(steps.prefill_step, **fixed)
        self._decode = functools.partial(steps.decode_steps, burst=shapes.burst, **fixed)
        self._compiled: dict[tuple, jax.stages.Compiled] = {}
        self._formats = None

    # --- calls ----------------------------------------------------------------------------------

    def init_state(self) -> State:
        """An empty state on the device."""
        make = functools.partial(steps.init_state, self.config, self.shapes, self._kv_dtype)
        return jax.jit(make)()

    def prefill(self, state: State, batch: PrefillBatch) -> tuple[State, Drawn]:
        """`steps.prefill_step`."""
        key = ("prefill", len(batch.tokens), len(batch.past_pages))
        return self._get(key)(self.params, state, batch)

    def decode(self, state: State, page_table: np.ndarray, count: int) -> tuple[State, Drawn]:
        """`steps.decode_steps`."""
        program = self._get(("decode", len(page_table)))
        return program(self.params, state, page_table, np.int32(count))

    def stop(self, state: State, ended: np.ndarray) -> State:
        """`steps.stop_rows`."""
        return self._get(("stop",))(state, ended)

    def put_counts(self, state: State, row: int, counts: np.ndarray) -> State:
        """`steps.put_counts`."""
        return self._get(("put_counts",))(state, np.int32(row), counts)

    def start_row(self, state: State, slot: int, row: Rows) -> State:
        """`steps.start_row`."""
        return self._get(("start_row",))(state, np.int32(slot), row)

    def take_pages(self, state: State, ids: np.ndarray) -> PagedCache:
        """`steps.take_pages` of `Shapes.swap` ids."""
        return self._get(("take_pages",))(state, ids)

    def put_pages(self, state: State, ids: np.ndarray, pages: PagedCache) -> State:
        """`steps.put_pages` of `Shapes.swap` ids; pages from `take_pages`, numpy or not."""
        return self._get(("put_pages",))(state, ids, pages)

    # --- compiling ------------------------------------------------------------------------------

    def keys(self) -> list[tuple]:
        """Names of all programs, the ones that every request needs first."""
        decodes = [("decode", r) for r in self.shapes.decode_rows]
        prefills = [
            ("prefill", *sizes)
            for sizes in itertools.product(self.shapes.prefill_tokens, self.shapes.past_pages)
        ]
        others = ("stop", "put_counts", "start_row", "take_pages", "put_pages")
        return [*decodes, *prefills, *((name,) for name in others)]

    def warm_up(self, progress: Callable[[int, int, str], None] | None = None) -> None:
        """Compiles everything; `progress(done, all, name)` is called after each program."""
        keys, start = self.keys(), time.monotonic()
        for done, key in enumerate(keys, start=1):
            self._get(key)
            if progress:
                progress(done, len(keys), " ".join(map(str, key)))
        logging.info("compiled %d programs in %.1f s", len(keys), time.monotonic() - start)

    def _get(self, key: tuple) -> jax.stages.Compiled:
        if key not in self._compiled:
            if self._formats is None:
                self._lay_out()
            if key not in self._compiled:
                self._compiled[key] = self.lower(key).compile()
        return self._compiled[key]

    def _lay_out(self) -> None:
        """Lets the program that runs most choose where parameters lie, and puts them there."""
        if platform()[0] != "tpu":
            if platform()[0] == "cpu" and not on_mesh():
                self.params = unstack_layers(self.params)
            self._formats = False
            return
        key = ("decode", self.shapes.rows)
        compiled = self._compiled[key] = self.lower(key, auto=True).compile()
        self._formats = compiled.input_formats[0][0]
        # One at a time: there is no room for everything twice.
        leaves, tree = jax.tree.flatten(self.params)
        self.params = None
        for i, wanted in enumerate(jax.tree.leaves(self._formats)):
            leaves[i] = jax.device_put(leaves[i], wanted, donate=True)
        self.params = tree.unflatten(leaves)

    def lower(self, key: tuple, *, auto: bool = False) -> jax.stages.Lowered:
        """One program, traced for the mesh in force; auto: the compiler lays out parameters."""
        name, *sizes = key
        operands = self._operands(name, *sizes)
        run = getattr(self, f"_{name}", None) or getattr(steps, _NAMES.get(name, name))
        with_params = name in ("prefill", "decode")
        how = {} if name == "take_pages" else {"donate_argnums": int(with_params)}
        formats = self._formats or None
        if auto:
            formats = jax.tree.map(lambda x: Format(Layout.AUTO, _sharding(x)), self.params)
        if with_params and formats is not None:
            how["in_shardings"] = (formats, *[None] * len(operands))
        if with_params:
            abstract = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_sharding(x)), self.params
            )
            operands = (abstract, *operands)
        return jax.jit(run, **how).lower(*operands)

    def abstract_state(self) -> State:
        """The state's shapes, on a mesh with its shardings."""
        make = functools.partial(steps.init_state, self.config, self.shapes, self._kv_dtype)
        return self._placed(jax.eval_shape(make))

    def _placed(self, tree):
        """Shapes with the shardings they have, on the devices that the parameters are on."""
        if not on_mesh():
            return tree
        mesh = jax.tree.leaves(self.params)[0].sharding.mesh
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=jax.NamedSharding(mesh, x.sharding.spec)
            ),
            tree,
        )

    def _abstract(self, tree):
        """Numpy arrays as shapes; on a mesh, whole on every device."""
        sharding = None
        if on_mesh():
            mesh = jax.tree.leaves(self.params)[0].sharding.mesh
            sharding = jax.NamedSharding(mesh, jax.P())
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    def _operands(self, name: str, *sizes: int) -> tuple:
        """Everything but the parameters, as shapes."""
        shapes, windows = self.shapes, len(self.config.distinct_windows)
        state, _abstract = self.abstract_state(), self._abstract
        number = _abstract(np.int32(0))
        ids = np.zeros(shapes.swap, np.int32)
        match name:
            case "prefill":
                return state, _abstract(empty_prefill(shapes, windows, *sizes))
            case "decode":
                return state, _abstract(np.zeros((*sizes, shapes.table), np.int32)), number
            case "stop":
                return state, _abstract(np.zeros(shapes.rows, bool))
            case "put_counts":
                return state, number, _abstract(np.zeros(self.config.vocab_size, np.int16))
            case "start_row":
                return state, number, _abstract(empty_rows(1, windows))
            case "take_pages":
                return state, _abstract(ids)
            case "put_pages":
                pages = self._placed(jax.eval_shape(steps.take_pages, state, _abstract(ids)))
                return state, _abstract(ids), pages
        raise AssertionError(f"no program is called {name}")


_NAMES = {"stop": "stop_rows"}


def _sharding(x):
    if on_mesh() or getattr(x, "sharding", None) is not None:
        return x.sharding
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])
