"""Evaluation of language models during training: loss and bits per byte on held-out shards."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import jax
import numpy as np

from qwen_jax.data import Packing, eval_batches
from qwen_jax.errors import UserError
from qwen_jax.model import Params
from qwen_jax.parallel.host_arrays import local_rows, to_global
from qwen_jax.train.config import StepConfig
from qwen_jax.train.objective import NextToken
from qwen_jax.train.state import Batch


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Loss of a model on held-out text.

    Attributes:
      loss: nats per loss-carrying token.
      bits_per_byte: the same sum in bits per UTF-8 byte of the targets.
      tokens: number of loss-carrying tokens.
      n_bytes: number of UTF-8 bytes of the targets.
    """

    loss: float
    bits_per_byte: float
    tokens: int
    n_bytes: int

    def metrics(self) -> dict[str, float]:
        """Returns the numbers that the training loop logs: loss and bits per byte."""
        return {"loss": self.loss, "bits_per_byte": self.bits_per_byte}


def parse_eval_sources(text: str) -> dict[str, str]:
    """Parses the setting `eval`, "name=FOLDER,name=FOLDER", to a dict; "" gives an empty one.

    Raises:
      UserError: a part without a name or folder, or a name given twice.
    """
    sources: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, folder = part.partition("=")
        if not equals or not name or not folder or name in sources:
            raise UserError(f"eval has {part!r}; write name=FOLDER,name=FOLDER with each name once")
        sources[name] = folder
    return sources


def check_sources(
    sources: Mapping[str, str], *, packing: Packing, seq_len: int, tokenizer_sha256: str
) -> None:
    """Opens every held-out source once, so that errors appear before the training, not after it.

    Args:
      sources: name -> packed folder.
      packing: as in `eval_batches`.
      seq_len: tokens per row that the folders must have.
      tokenizer_sha256: hash of the tokenizer that the folders must be made with.

    Raises:
      UserError: a source is missing, empty, damaged or made for another model.
    """
    for folder in sources.values():
        eval_batches(folder, 1, packing=packing, seq_len=seq_len, tokenizer_sha256=tokenizer_sha256)


@functools.cache
def _eval_step(config: StepConfig) -> Callable[[Params, Batch], tuple[jax.Array, ...]]:
    """Returns a jitted function (params, batch) -> float32 scalars nll, tokens, n_bytes."""

    def step(params: Params, batch: Batch) -> tuple[jax.Array, ...]:
        loss = NextToken()(params, batch, config, None)
        return loss.sums["nll"], loss.weight, loss.sums["n_bytes"]

    return jax.jit(step)


def evaluate(
    params: Params,
    sources: Mapping[str, str],
    config: StepConfig,
    mesh: jax.sharding.Mesh,
    *,
    batch_size: int,
    packing: Packing,
    seq_len: int,
    tokenizer_sha256: str,
) -> dict[str, HeldOut]:
    """Computes the loss on all windows of each held-out source; call it under `jax.set_mesh(mesh)`.

    Sums are taken over all windows before dividing, so results depend neither on the batch size nor
    on the mesh. Every loss-carrying token counts, `<|endoftext|>` too, though it has no bytes.

    Args:
      params: weights of `config.model`.
      sources: name -> packed folder.
      config: model, forward options and loss settings.
      mesh: devices that hold the weights.
      batch_size: rows per forward pass over all processes.
      packing: as in `eval_batches`.
      seq_len: tokens per row that the folders must have.
      tokenizer_sha256: hash of the tokenizer that the folders must be made with.

    Returns:
      Source name -> result.

    Raises:
      UserError: a source is missing, empty or made for another model.
    """
    first, count = local_rows(mesh, batch_size)
    step = _eval_step(config)
    results = {}
    for name, folder in sources.items():
        totals = np.zeros(3)  # float64: the sum may be over billions of tokens
        batches = eval_batches(
            folder,
            batch_size,
            packing=packing,
            seq_len=seq_len,
            tokenizer_sha256=tokenizer_sha256,
            first=first,
            count=count,
        )
        for batch in batches:
            totals += jax.device_get(step(params, to_global(batch, mesh, first, batch_size)))
        nll, tokens, n_bytes = totals.tolist()
        results[name] = HeldOut(
            loss=nll / max(tokens, 1.0),
            bits_per_byte=nll / math.log(2) / max(n_bytes, 1.0),
            tokens=int(tokens),
            n_bytes=int(n_bytes),
        )
    return results
