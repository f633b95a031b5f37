"""Perplexity of a model under each weight format, and with an 8-bit KV cache.

Weights are quantised in memory exactly as `launch.quantise` writes them. The 8-bit cache is
measured
in a forward pass: every key and value is rounded as the cache rounds it (`kernels.cache`),
including
the newest token's, which a decode step would use unrounded.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

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
from qwen_jax.model.attend import LayerContext
from qwen_jax.model.quantised import INPUT_AXES, QuantFormat, quantise_params, weight_bytes
from qwen_jax.train.losses import next_token_loss

FORMATS = (
    QuantFormat(8, None),
    QuantFormat(8, None, head=True),
    QuantFormat(8, 128),
    QuantFormat(4, None),
    QuantFormat(4, 128),
    QuantFormat(4, 64),
    QuantFormat(4, 32),
)


@dataclasses.dataclass(frozen=True)
class FormatResult:
    """Size and perplexity of the model in one format.

    Attributes:
      name: name of the format, such as "int4-g128".
      bits: bits per weight of the layers' matrices, scales included.
      megabytes: size of all weights.
      perplexity: perplexity over all windows.
    """

    name: str
    bits: float
    megabytes: float
    perplexity: float


def matrix_bits(params: Params, num_weights: int) -> float:
    """Returns the bits per weight of the layers' matrices, scales included.

    Args:
      params: a parameter tree.
      num_weights: number of weights in these matrices.
    """
    layers = params["layers"]
    return 8 * sum(weight_bytes(layers[a][b]) for a, b in INPUT_AXES) / num_weights


def compare(
    params: Params,
    windows: np.ndarray,
    config: ModelConfig,
    *,
    formats: Sequence[QuantFormat] | None = None,
    batch: int = 8,
    on_row: Callable[[FormatResult], None] | None = None,
) -> list[FormatResult]:
    """Measures perplexity in float32, in bfloat16, with an 8-bit KV cache, and in each weight
    format.

    All but the bfloat16 row are computed in float32, so that a row differs from the first by its
    rounding
    only.

    Args:
      params: float32 parameters on one device.
      windows: int [n, T + 1], as `evaluate.perplexity.split_windows` makes them.
      config: the network.
      formats: weight formats, `FORMATS` by default; those that do not apply to this network (groups
        that
        don't divide its matrices, a tied head) are skipped.
      batch: windows per batch.
      on_row: called with each result when it is computed.
    """
    num_weights = sum(math.prod(params["layers"][a][b].shape) for a, b in INPUT_AXES)
    exact = ForwardOptions(dtype="float32")
    rows: list[FormatResult] = []

    def add(name: str, tree: Params, score: float) -> None:
        megabytes = weight_bytes(tree) / 1e6
        rows.append(FormatResult(name, matrix_bits(tree, num_weights), megabytes, score))
        if on_row is not None:
            on_row(rows[-1])

    def score(tree: Params, options: ForwardOptions = exact) -> float:
        return perplexity(tree, windows, config, options, batch=batch).perplexity

    add("float32", params, score(params))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    add("bfloat16", half, score(half, ForwardOptions()))
    add(
        "float32, 8-bit KV cache",
        params,
        _perplexity_8bit_cache(params, windows, config, exact, batch),
    )
    for fmt in FORMATS if formats is None else formats:
        if _is_applicable(fmt, config):
            quantised = quantise_params(params, fmt)
            add(fmt.name + (", head int8" if fmt.head else ""), quantised, score(quantised))
    return rows


def _is_applicable(fmt: QuantFormat, config: ModelConfig) -> bool:
    """Returns whether a format's groups divide the network's matrices and its head can be
    quantised.
    """
    inputs = (config.d_model, config.n_heads * config.head_dim, config.d_ff)
    divided = fmt.group is None or not any(n % fmt.group for n in inputs)
    return divided and not (fmt.head and config.tie_embeddings)


@functools.partial(jax.jit, static_argnames=("config", "options"))
def _nll_8bit_cache(
    params: Params,
    inputs: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    alpha: jax.Array | None,
    *,
    config: ModelConfig,
    options: ForwardOptions,
) -> jax.Array:
    """Returns the summed loss of a batch with keys and values rounded to 8 bits.

    Letters: B windows, T tokens, W distinct attention windows of the model.

    Args:
      params: float32 weights.
      inputs: int32 [B, T].
      targets: int32 [B, T].
      weights: float32 [B, T], 0 for targets that do not count.
      alpha: float32 [B, W], dynamic-NTK factors, or None.
      config, options: the network and how it runs.
    """

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, layer: LayerContext
    ) -> tuple[jax.Array, Any]:
        k, v = (dequantise(*quantise(x)).astype(x.dtype) for x in (k, v))
        return attention(q, k, v, window=layer.window, implementation=options.attention), None

    positions = jnp.arange(inputs.shape[1], dtype=jnp.int32)[None]
    alpha = None if alpha is None else alpha[:, None]
    hidden, _ = network(
        params, inputs, positions, config, options, attend, ntk_alpha=alpha, logn=config.logn
    )
    kernel = output_kernel(params, config)
    return next_token_loss(hidden, kernel, targets, weights, 0.0, 1024).nll


def _perplexity_8bit_cache(
    params: Params, windows: np.ndarray, config: ModelConfig, options: ForwardOptions, batch: int
) -> float:
    """Returns the perplexity of windows int [n, T + 1] with keys and values rounded to 8 bits."""
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
        total += float(_nll_8bit_cache(params, *operands, alpha, config=config, options=options))
    return math.exp(total / (len(windows) * length))


def as_text(rows: Sequence[FormatResult]) -> str:
    """Returns the results as an aligned text table with each row's change from the first."""
    head = ("weights", "bits/weight", "MB", "perplexity", "change")
    first = rows[0].perplexity
    table = [
        (
            row.name,
            f"{row.bits:.2f}",
            f"{row.megabytes:.2f}",
            f"{row.perplexity:.4f}",
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
