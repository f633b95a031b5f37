"""Where training batches come from: the part of a recipe that this package reads."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Literal

from qwen_jax.errors import UserError, nearest

Packing = Literal["plain", "masked"]
PACKINGS = ("plain", "masked")


@dataclasses.dataclass(frozen=True)
class Source:
    """A folder written by `qwen_jax.corpus.pack` and its share of the tokens (any scale)."""

    path: str
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where training batches come from.

    Attributes:
      sources: the mixture as one string, `FOLDER=weight,FOLDER=weight`; the weight is a share of
        the tokens on any scale, 1 where left out. A recipe may leave it "" for the command line to
        give; reading refuses "".
      seq_len: tokens per row T; must be the one the sources were packed with.
      global_batch: rows per step over all processes.
      packing: "plain" is the report's: rows are attended as one text, positions run through.
        "masked" separates documents: segment ids per document, positions restart with each.
      seed: of the order of windows.

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


def parse_sources(text: str) -> tuple[Source, ...]:
    """Parses `FOLDER=weight,FOLDER=weight` (weight 1 where left out; no commas in folder names).

    Raises:
      UserError: nothing there, a weight that is not a positive number, or a folder listed twice.
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
                "and leave a source out to give it none."
            )
        sources.append(Source(path, weight))
    places = [os.path.realpath(source.path) for source in sources]
    for source, place in zip(sources, places, strict=True):
        if places.count(place) > 1:
            raise UserError(
                f"data.sources lists {source.path} twice; give it once, with one weight."
            )
    return tuple(sources)


def check_packing(packing: str) -> None:
    """Raises UserError unless `packing` is one of `PACKINGS`."""
    if packing not in PACKINGS:
        raise UserError(
            f"data.packing is {packing!r}{nearest(packing, PACKINGS)}; "
            "it must be 'plain' or 'masked'."
        )
