"""Engine options, and the compiled sizes that follow from them, the model and the machine."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import jax
from absl import logging

from qwen_jax.engine.steps import EngineShapes
from qwen_jax.errors import UserError, nearest
from qwen_jax.kernels.cache import PAGE_SIZE, SCALE_ROWS
from qwen_jax.model import ModelConfig

KV_DTYPES = ("auto", "uint8")
"""Cache dtypes: "auto" is the compute dtype, "uint8" the release's 8-bit form (half of bf16)."""


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """Sizes of an engine; None is replaced by a value derived from the model and the machine.

    Attributes:
      max_running_requests: most requests that decode at one time; default 64, on CPUs 8.
      max_length: longest prompt and output together, in tokens; default the model's, on CPUs at
        most 4,096, and no more than the cache holds.
      page_size: tokens per page, the granularity of cache allocation and of prefix sharing; default
        128, on CPUs 16.
      pages: pages of the cache; default enough for `max_running_requests` requests of `max_length`,
        or what `memory` leaves.
      memory: fraction of a device's memory for weights and cache together. Where JAX reports no
        limit (CPUs), the cache gets at most a quarter of the machine's memory instead.
      prefill_tokens: most prompt tokens computed between two decode calls; default 2,048, on CPUs
        256.
      decode_steps_per_call: most decode steps per call, when no running request streams and none
        waits.
      kv_dtype: one of `KV_DTYPES`.
      prefix_cache: whether pages of prompts and outputs are kept for later requests with the same
        beginning.
      seed: seed of the generator that gives seeds to requests without one.
    """

    max_running_requests: int | None = None
    max_length: int | None = None
    page_size: int | None = None
    pages: int | None = None
    memory: float = 0.9
    prefill_tokens: int | None = None
    decode_steps_per_call: int = 8
    kv_dtype: str = "auto"
    prefix_cache: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        at_least_one = (
            "max_running_requests",
            "max_length",
            "page_size",
            "pages",
            "prefill_tokens",
            "decode_steps_per_call",
        )
        for name in at_least_one:
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


_MAX_PROMPTS = 8
"""Most prompts of a prefill call: each costs a matmul with the whole output projection."""

_CPU_MAX_LENGTH = 4096
"""Default `max_length` on CPUs."""


def _geometric_sizes(largest: int, unit: int, count: int) -> tuple[int, ...]:
    """Returns at most `count` ascending sizes up to `largest`, each about a quarter of the next.

    All but the largest are multiples of `unit`.
    """
    sizes = [largest]
    while len(sizes) < count and sizes[0] // 4 >= unit:
        sizes.insert(0, sizes[0] // 4 // unit * unit)
    return tuple(sizes)


def page_bytes(config: ModelConfig, page_size: int, itemsize: int, tensor: int = 1) -> int:
    """Returns the bytes that one page, of all layers, takes on each device.

    Args:
      config: the model.
      page_size: tokens per page.
      itemsize: bytes of a cached number; 1 is the 8-bit form, whose scales are included.
      tensor: devices that share the kv heads.
    """
    token = 2 * config.head_dim * itemsize + (4 * len(SCALE_ROWS) if itemsize == 1 else 0)
    return config.n_layers * page_size * config.n_kv_heads // tensor * token


def available_cache_bytes(memory: float, devices: Sequence[jax.Device]) -> int:
    """Returns the bytes that the cache may take on each device, least over all of them.

    Args:
      memory: fraction of each device's memory for everything, what is in use already included.
      devices: the engine's devices. If they report no limit (CPUs), the result is a quarter of the
        machine's memory.
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
    cache_bytes: int,
    itemsize: int,
    tensor: int = 1,
) -> EngineShapes:
    """Returns the sizes of programs and cache for these options.

    Args:
      options: what the user requested.
      config: the model.
      platform: "cpu", "gpu" or "tpu".
      cache_bytes: bytes that the cache may take on each device.
      itemsize: bytes of a cached number; 1 is the 8-bit form.
      tensor: devices that share the kv heads.

    Raises:
      UserError: the requested sizes contradict one another, or don't fit into memory.
    """
    cpu = platform == "cpu"
    rows = options.max_running_requests or (8 if cpu else 64)
    size = options.page_size or (16 if cpu else PAGE_SIZE)
    longest = min(config.max_length, _CPU_MAX_LENGTH) if cpu else config.max_length
    length = options.max_length or longest
    tokens = options.prefill_tokens or max(256 if cpu else 2048, size)
    if tokens % size:
        raise UserError(
            f"engine.prefill_tokens is {tokens}; it must be a multiple of engine.page_size={size}."
        )
    pages_per_request = -(-length // size)
    each = page_bytes(config, size, itemsize, tensor)
    pages = options.pages or min(rows * pages_per_request, cache_bytes // each)
    if options.pages and options.pages * each > cache_bytes:
        room = max(cache_bytes, 0)
        raise UserError(
            f"engine.pages={options.pages} need {options.pages * each / 1e9:.2f} GB and there is "
            f"room for {room / 1e9:.2f} GB; ask for at most {room // each} pages."
        )
    if pages < pages_per_request:
        if options.max_length or pages < 1 or pages * size < 2:
            raise UserError(
                f"The cache has room for {max(pages, 0) * size} tokens and engine.max_length is "
                f"{length}; give it more memory, or ask for less."
            )
        logging.warning(
            "the KV cache has room for %d tokens; longer sequences are refused", pages * size
        )
        pages_per_request = pages
    return EngineShapes(
        max_rows=rows,
        max_pages_per_request=pages_per_request,
        page_size=size,
        num_pages=pages,
        max_prompts=min(_MAX_PROMPTS, rows),
        prefill_tokens=_geometric_sizes(tokens, size, 3),
        cached_pages=(0, *_geometric_sizes(pages_per_request, 1, 3)),
        # A single running request is the most common case.
        decode_rows=tuple(sorted({1, *_geometric_sizes(rows, 1, 8)})),
        max_decode_steps=options.decode_steps_per_call,
    )
