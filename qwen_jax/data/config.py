"""Configuration of training data: sources with weights, row length, batch size, packing."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Literal

from qwen_jax.errors import UserError, nearest

Packing = Literal["plain", "masked"]
PACKINGS = ("plain", "masked")


@dataclasses.dataclass(frozen=True)
class DataSource:
    """One source of a training mixture.

    Attributes:
      path: folder written by `qwen_jax.corpus.pack`.
      weight: its share of the training tokens, relative to the other sources' on any scale.
    """

    path: str
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Mixture, shape and order of training batches.

    Attributes:
      sources: the mixture as one string, "FOLDER=weight,FOLDER=weight"; the weight is a share of
        the tokens on any scale, 1 where left out. A recipe may leave it "" to be set on the command
        line; opening the data rejects "".
      seq_len: tokens per row T; must be the length the sources were packed with.
      global_batch: rows per optimizer step over all processes.
      packing: "plain", as in the report, attends within the whole row, positions run from 0 to T-1;
        "masked" separates documents: segment ids per document, positions restart with each.
      seed: seed of the order of windows.

    Raises:
      UserError: a field out of range or not understood.
    """

    sources: str
    seq_len: int
    global_batch: int
    packing: Packing = "plain"
    seed: int = 0

    def __post_init__(self):
        if self.sources:
            parse_sources(self.sources)
        for name in ("seq_len", "global_batch"):
            if getattr(self, name) < 1:
                raise UserError(f"data.{name} is {getattr(self, name)}; it must be at least 1.")
        check_packing(self.packing)


def parse_sources(text: str) -> tuple[DataSource, ...]:
    """Parses "FOLDER=weight,FOLDER=weight" (weight 1 where left out; no commas in folder names).

    Raises:
      UserError: the text is empty, a weight is not a positive number, or a folder is listed twice.
    """
    if not text.strip():
        raise UserError(
            "data.sources is empty; name the packed folders, such as data/web=0.7,data/code=0.3."
        )
    sources = []
    for part in text.split(","):
        path, equals, number = part.strip().rpartition("=")
        if not equals:
            path, number = number, "1"
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not path or not (math.isfinite(weight) and weight > 0):
            raise UserError(
                f"data.sources has {part.strip()!r}; write FOLDER=weight with a positive weight, "
                "and leave out a source that should have none."
            )
        sources.append(DataSource(path, weight))
    places = [os.path.realpath(source.path) for source in sources]
    for source, place in zip(sources, places, strict=True):
        if places.count(place) > 1:
            raise UserError(
                f"data.sources lists {source.path} twice; give it once, with one weight."
            )
    return tuple(sources)


def check_packing(packing: str) -> None:
    """Checks that `packing` is one of `PACKINGS` and raises UserError otherwise."""
    if packing not in PACKINGS:
        raise UserError(
            f"data.packing is {packing!r}{nearest(packing, PACKINGS)}; "
            "it must be 'plain' or 'masked'."
        )
