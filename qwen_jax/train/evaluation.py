"""Loss and bits per byte of a model on held-out shards."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax

from qwen_jax.data import eval_batches
from qwen_jax.errors import UserError
from qwen_jax.model import Params
from qwen_jax.parallel.feed import local_rows, to_global
from qwen_jax.train.step import StepConfig, loss_sums


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """loss: nats per token; bits_per_byte: over UTF-8 bytes; tokens and n_bytes: how much text."""

    loss: float
    bits_per_byte: float
    tokens: int
    n_bytes: int


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


@functools.cache
def _eval_step(config: StepConfig):
    """Sums of one batch and the bytes they stand for."""
    return jax.jit(lambda params, batch: (loss_sums(params, batch, config), batch["n_bytes"].sum()))


def evaluate(
    params: Params,
    sources: Mapping[str, str],
    config: StepConfig,
    mesh: jax.sharding.Mesh,
    *,
    batch_size: int,
    seq_len: int,
    packing: str,
    tokenizer_sha256: str,
) -> dict[str, HeldOut]:
    """Evaluates on every window of each source; call it under `jax.set_mesh(mesh)`.

    Sums are taken over all windows before dividing, so results depend neither on the batch size nor
    on the mesh. Every loss-carrying token counts, `<|endoftext|>` too, though it has no bytes.

    Raises:
      UserError: a source that is missing, empty or made for another model.
    """
    first, count = local_rows(mesh, batch_size)
    step = _eval_step(config)
    results = {}
    for name, folder in sources.items():
        nll = tokens = n_bytes = 0.0
        for batch in eval_batches(
            folder,
            batch_size,
            packing=packing,
            seq_len=seq_len,
            tokenizer_sha256=tokenizer_sha256,
            first=first,
            count=count,
        ):
            batch = to_global(batch, mesh, first, batch_size)
            sums, bytes_there = step(params, batch)
            nll += float(sums.nll)
            tokens += float(sums.weight)
            n_bytes += float(bytes_there)
        results[name] = HeldOut(
            loss=nll / max(tokens, 1.0),
            bits_per_byte=nll / math.log(2) / max(n_bytes, 1.0),
            tokens=int(tokens),
            n_bytes=int(n_bytes),
        )
    return results
