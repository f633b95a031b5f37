"""How large an engine is: what the user says, and what follows from the model and the machine."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import jax
from absl import logging

from qwen_jax.engine.steps import Shapes
from qwen_jax.errors import UserError, nearest
from qwen_jax.kernels.cache import PAGE_SIZE, SCALE_ROWS
from qwen_jax.model import ModelConfig

KV_DTYPES = ("auto", "uint8")
"""Of the cache: "auto" is the compute dtype, "uint8" the release's 8-bit form (half of bf16)."""


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """Sizes of an engine; None follows from the model and the machine.

    Attributes:
      rows: most requests that decode side by side; 64, on CPUs 8.
      max_length: longest prompt + answer in tokens; what the model claims, on CPUs at most 4,096,
        and no more than the cache holds.
      page_size: tokens a page, the grain of the cache and of what prompts share; 128, on CPUs 16.
      pages: of the cache; enough for `rows` requests of `max_length`, or what `memory` leaves.
      memory: share of a device's memory for weights and cache together. Where JAX tells no limit
        (CPUs), the cache alone gets a quarter of the machine's memory at most.
      prefill_tokens: most prompt tokens computed between two steps of running answers; 2,048, on
        CPUs 256.
      burst: most steps of decoding between two looks at the result, when nobody reads along.
      kv_dtype: one of `KV_DTYPES`.
      prefix_cache: keep pages of prompts and answers for later requests that begin the same.
      seed: of the seeds given to requests that bring none.
    """

    rows: int | None = None
    max_length: int | None = None
    page_size: int | None = None
    pages: int | None = None
    memory: float = 0.9
    prefill_tokens: int | None = None
    burst: int = 8
    kv_dtype: str = "auto"
    prefix_cache: bool = True
    seed: int = 0

    def __post_init__(self):
        for name in ("rows", "max_length", "page_size", "pages", "prefill_tokens", "burst"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"engine.{name} is {value}; it must be at least 1.")
        if self.max_length == 1:
            raise UserError("engine.max_length is 1; a prompt and its answer need at least 2.")
        if not 0 < self.memory <= 1:
            raise UserError(f"engine.memory is {self.memory}; it must be above 0 and at most 1.")
        if self.seed < 0:
            raise UserError(f"engine.seed is {self.seed}; it must be 0 or more.")
        if self.kv_dtype not in KV_DTYPES:
            raise UserError(
                f"engine.kv_dtype is {self.kv_dtype!r}{nearest(self.kv_dtype, KV_DTYPES)}; "
                f"choose one of {', '.join(KV_DTYPES)}."
            )


_PROMPTS = 8
"""Most prompts of a prefill call: each takes a product with the whole output projection."""

_CPU_LENGTH = 4096
"""Default longest sequence on CPUs."""


def _quarters(most: int, least: int, count: int) -> tuple[int, ...]:
    """At most `count` multiples of `least` up to `most`, each about a quarter of the next."""
    sizes = [most]
    while len(sizes) < count and sizes[0] // 4 >= least:
        sizes.insert(0, sizes[0] // 4 // least * least)
    return tuple(sizes)


def page_bytes(config: ModelConfig, page_size: int, itemsize: int, tensor: int = 1) -> int:
    """Bytes of a page of all layers on each of `tensor` devices; itemsize 1 is the 8-bit form."""
    token = 2 * config.head_dim * itemsize + (4 * len(SCALE_ROWS) if itemsize == 1 else 0)
    return config.n_layers * page_size * config.n_kv_heads // tensor * token


def cache_room(memory: float, devices: Sequence[jax.Device]) -> int:
    """Bytes that the cache may take on each of these devices, after what is there already.

    The fullest counts.
    """
    stats = [device.memory_stats() for device in devices]
    if all(s and "bytes_limit" in s for s in stats):
        return min(int(s["bytes_limit"] * memory) - s["bytes_in_use"] for s in stats)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4


def choose_shapes(
    options: EngineOptions,
    config: ModelConfig,
    *,
    platform: str,
    room: int,
    itemsize: int,
    tensor: int = 1,
) -> Shapes:
    """Sizes of the programs and of the cache.

    Args:
      options: what the user wants.
      config: of the model.
      platform: "cpu", "gpu" or "tpu".
      room: bytes that the cache may take on each device.
      itemsize: bytes of a number in the cache. tensor: devices that share the kv heads.

    Raises:
      UserError: the sizes wanted exclude one another, or don't fit into memory.
    """
    cpu = platform == "cpu"
    rows = options.rows or (8 if cpu else 64)
    size = options.page_size or (16 if cpu else PAGE_SIZE)
    length = options.max_length or min(config.max_length, _CPU_LENGTH if cpu else config.max_length)
    tokens = options.prefill_tokens or max(256 if cpu else 2048, size)
    if tokens % size:
        raise UserError(
            f"engine.prefill_tokens is {tokens}; it must be a multiple of engine.page_size={size}."
        )
    table = -(-length // size)
    each = page_bytes(config, size, itemsize, tensor)
    pages = options.pages or min(rows * table, room // each)
    if options.pages and options.pages * each > room:
        raise UserError(
            f"engine.pages={options.pages} need {options.pages * each / 1e9:.2f} GB and there is "
            f"room for {max(room, 0) / 1e9:.2f} GB; ask for at most {max(room, 0) // each} pages."
        )
    if pages < table:
        if options.max_length or pages < 1 or pages * size < 2:
            raise UserError(
                f"The cache has room for {max(pages, 0) * size} tokens and engine.max_length is "
                f"{length}; give it more memory, or ask for less."
            )
        logging.warning("the cache holds %d tokens; longer sequences are refused", pages * size)
        table = pages
    return Shapes(
        rows=rows,
        table=table,
        page_size=size,
        pages=pages,
        prompts=min(_PROMPTS, rows),
        prefill_tokens=_quarters(tokens, size, 3),
        past_pages=(0, *_quarters(table, 1, 3)),
        # One request alone is the most common case of all.
        decode_rows=tuple(sorted({1, *_quarters(rows, 1, 8)})),
        burst=options.burst,
    )
