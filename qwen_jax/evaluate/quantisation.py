"""What a quantised model loses: perplexity of the same windows in each format.

Weights are quantised in memory as `launch.quantise` writes them, so the numbers are those of the
folders. The 8-bit KV cache is measured in a forward pass: every key and value is rounded as the
cache rounds it (`kernels.cache`), also those a decoding step would see unrounded, its own token's.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.evaluate.perplexity import perplexity
from qwen_jax.kernels import attention
from qwen_jax.kernels.cache import dequantise, quantise
from qwen_jax.model import (
    ForwardOptions,
    ModelConfig,
    Params,
    network,
    ntk_alphas,
    output_kernel,
)
from qwen_jax.model.quantised import INPUT_AXES, Format, quantise_params, weight_bytes
from qwen_jax.train.losses import next_token_loss

FORMATS = (
    Format(8, None),
    Format(8, None, head=True),
    Format(8, 128),
    Format(4, None),
    Format(4, 128),
    Format(4, 64),
    Format(4, 32),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One format.

    Attributes:
      name: such as "int4-g128".
      bits: a number of the layers' matrices takes, scales included.
      megabytes: all weights.
      perplexity: over all windows.
    """

    name: str
    bits: float
    megabytes: float
    perplexity: float


def matrix_bits(params: Params, numbers: int) -> float:
    """Bits a number of the layers' matrices takes, of `numbers` in all."""
    layers = params["layers"]
    return 8 * sum(weight_bytes(layers[a][b]) for a, b in INPUT_AXES) / numbers


def compare(
    params: Params,
    windows: np.ndarray,
    config: ModelConfig,
    *,
    formats: Sequence[Format] | None = None,
    batch: int = 8,
    on_row: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Perplexity in float32, in bfloat16, with an 8-bit KV cache, and in each format.

    All but bfloat16's are computed in float32, so a row's difference from the first is what its
    rounding costs and nothing else.

    Args:
      params: float32, on one device.
      windows: int [n,T+1], as `evaluate.perplexity.cut` makes them.
      config: the network.
      formats: of weights, `FORMATS` by default; those whose groups don't divide its matrices, or
        whose head it has not, are left out.
      batch: windows at a time.
      on_row: called with each row as it is found.
    """
    numbers = sum(math.prod(params["layers"][a][b].shape) for a, b in INPUT_AXES)
    exact, rows = ForwardOptions(dtype="float32"), []

    def add(name, tree, score):
        megabytes = weight_bytes(tree) / 1e6
        rows.append(Row(name, matrix_bits(tree, numbers), megabytes, score))
        if on_row is not None:
            on_row(rows[-1])

    def of(tree, options=exact):
        return perplexity(tree, windows, config, options, batch=batch).perplexity

    add("float32", params, of(params))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    add("bfloat16", half, of(half, ForwardOptions()))
    add("float32, 8-bit KV cache", params, _with_8bit_cache(params, windows, config, exact, batch))
    for fmt in FORMATS if formats is None else formats:
        if _fits(fmt, config):
            quantised = quantise_params(params, fmt)
            add(fmt.name + (", head int8" if fmt.head else ""), quantised, of(quantised))
    return rows


def _fits(fmt: Format, config: ModelConfig) -> bool:
    inputs = (config.d_model, config.n_heads * config.head_dim, config.d_ff)
    divided = fmt.group is None or not any(n % fmt.group for n in inputs)
    return divided and not (fmt.head and config.tie_embeddings)


@functools.partial(jax.jit, static_argnames=("config", "options"))
def _nll(params, inputs, targets, weights, alpha, *, config, options):
    def attend(q, k, v, window, of_layer, dropout_key):
        k, v = (dequantise(*quantise(x)).astype(x.dtype) for x in (k, v))
        return attention(q, k, v, window=window, implementation=options.attention), None

    positions = jnp.arange(inputs.shape[1], dtype=jnp.int32)[None]
    alpha = None if alpha is None else alpha[:, None]
    hidden, _ = network(
        params, inputs, positions, config, options, attend, ntk_alpha=alpha, logn=config.logn
    )
    kernel = output_kernel(params, config)
    return next_token_loss(hidden, kernel, targets, weights, 0.0, 1024).nll


def _with_8bit_cache(params, windows, config: ModelConfig, options, batch: int) -> float:
    """Perplexity where attention sees keys and values as an 8-bit cache gives them back."""
    length, total = windows.shape[1] - 1, 0.0
    alpha = None
    if config.dynamic_ntk:
        alpha = jnp.asarray(np.tile(ntk_alphas(length, config), (batch, 1)))
    for start in range(0, len(windows), batch):
        here = np.zeros((batch, length + 1), np.int32)
        rows = windows[start : start + batch]
        here[: len(rows)] = rows
        weights = np.zeros((batch, length), np.float32)
        weights[: len(rows)] = 1
        operands = (jnp.asarray(here[:, :-1]), jnp.asarray(here[:, 1:]), jnp.asarray(weights))
        total += float(_nll(params, *operands, alpha, config=config, options=options))
    return math.exp(total / (len(windows) * length))


def as_text(rows: Sequence[Row]) -> str:
    """The rows as a table for people."""
    head = ("weights", "bits a weight", "MB", "perplexity", "change")
    first = rows[0].perplexity
    table = [
        (
            *(row.name, f"{row.bits:.2f}", f"{row.megabytes:.2f}", f"{row.perplexity:.4f}"),
            f"{100 * (row.perplexity / first - 1):+.2f} %",
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in (head, *table)) for i in range(len(head))]
    lines = []
    for line in (head, *table):
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells))
    return "\n".join(lines)
