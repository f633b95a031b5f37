"""Loss and bits per byte of a model on held-out shards."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import numpy as np

from qwen_jax.data import eval_batches
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
    """`name=FOLDER,name=FOLDER` as a dict; "" gives none.

    Raises:
      UserError: a part without a name, or a name twice.
    """
    sources: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, folder = part.partition("=")
        if not equals or not name or not folder or name in sources:
            raise UserError(f"eval has {part!r}; write name=FOLDER,name=FOLDER with each name once")
        sources[name] = folder
    return sources


def check_sources(sources: Mapping[str, str], **wanted) -> None:
    """Opens every source once, so that a missing one is found before the training, not after it.

    Args:
      **wanted: packing, seq_len and tokenizer_sha256 as in `eval_batches`.

    Raises:
      UserError: a source that is missing, empty, damaged or made for another model.
    """
    for folder in sources.values():
        eval_batches(folder, 1, **wanted)


@functools.cache
def _eval_step(config: StepConfig):
    """Returns a jitted function (params, batch) -> float32 scalars nll, tokens, n_bytes."""

    def step(params: Params, batch: Batch):
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
    **wanted,
) -> dict[str, HeldOut]:
    """Evaluates on every window of each source; call it under `jax.set_mesh(mesh)`.

    Sums are taken over all windows before dividing, so results depend neither on the batch size nor
    on the mesh. Every loss-carrying token counts, `<|endoftext|>` too, though it has no bytes.

    Args:
      batch_size: rows at a time over all processes.
      **wanted: packing, seq_len and tokenizer_sha256 as in `eval_batches`.

    Raises:
      UserError: a source that is missing, empty or made for another model.
    """
    first, count = local_rows(mesh, batch_size)
    step = _eval_step(config)
    results = {}
    for name, folder in sources.items():
        totals = np.zeros(3)  # float64: the sum may be over billions of tokens
        for batch in eval_batches(folder, batch_size, first=first, count=count, **wanted):
            totals += jax.device_get(step(params, to_global(batch, mesh, first, batch_size)))
        nll, tokens, n_bytes = totals.tolist()
        results[name] = HeldOut(
            loss=nll / max(tokens, 1.0),
            bits_per_byte=nll / math.log(2) / max(n_bytes, 1.0),
            tokens=int(tokens),
            n_bytes=int(n_bytes),
        )
    return results
