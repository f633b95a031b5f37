"""The largest per-device batch and the cheapest remat that fit, found by compiling alone.

Memory grows with the batch and with what remat keeps, so two walks are enough: the batch is doubled
under the leanest rung until it no longer fits; then, at the largest batch and at half of it, the
rungs are halved between the leanest and the fastest. What counts in the end is the predicted rate.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

RUNGS = ("full", "out", "out_mid", "qkv_out", "attention", "gate", "products", "none")
"""Names in `model.options.REMAT` by growing memory; offloading ones have no place in this order."""

Report = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Try:
    """One compilation: what was asked, whether it fits, its tokens/s per chip (0: it does not).

    The rate is the prediction's or, for GPUs, the roofline's.
    """

    batch: int
    remat: str
    fits: bool
    rate: float
    report: Report

    @classmethod
    def of(cls, batch: int, remat: str, report: Report) -> Try:
        """From the report of that compilation."""
        fits = report["memory"]["fits"]
        rate = 0.0
        if fits:
            times = report["prediction"] or report["roofline"]
            rate = times["tokens_per_second_per_chip"]
        return cls(batch, remat, fits, rate, report)


class Log:
    """Compilations already made, one JSON line each; `None` keeps them in memory only."""

    def __init__(self, path: str | None):
        self.path = path
        self.tries: dict[tuple[int, str], Try] = {}
        if path and os.path.exists(path):
            self._read(path)

    def _read(self, path: str) -> None:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # a kill cut the last line short: that compilation is made again
            with open(f"{path}.partial", "w", encoding="utf-8") as sink:
                sink.write(whole)
            os.replace(f"{path}.partial", path)
        for line in whole.splitlines():
            row = json.loads(line)
            self.tries[row["batch"], row["remat"]] = Try.of(
                row["batch"], row["remat"], row["report"]
            )

    def add(self, made: Try) -> None:
        """Notes one more."""
        self.tries[made.batch, made.remat] = made
        if self.path:
            row = {"batch": made.batch, "remat": made.remat, "report": made.report}
            with open(self.path, "a", encoding="utf-8") as sink:
                sink.write(json.dumps(row) + "\n")

    @property
    def best(self) -> Try | None:
        """The fastest that fits, by prediction; None before anything fits."""
        fitting = [t for t in self.tries.values() if t.fits]
        return max(fitting, key=lambda t: (t.rate, t.batch)) if fitting else None


def search(
    measure: Callable[[int, str], Report],
    log: Log,
    *,
    first_batch: int = 1,
    largest_batch: int = 64,
    rungs: Sequence[str] = RUNGS,
) -> Iterator[Try]:
    """Yields every try as it is made (those in the log at no cost); `log.best` is the result.

    Args:
      measure: compiles a per-device batch with a rung and returns its report.
      first_batch, largest_batch: bounds of the doubling.
    """

    def attempt(batch, remat):
        if (batch, remat) not in log.tries:
            log.add(Try.of(batch, remat, measure(batch, remat)))
        return log.tries[batch, remat]

    batch, fitting = first_batch, 0
    while batch <= largest_batch:
        made = attempt(batch, rungs[0])
        yield made
        if not made.fits:
            break
        fitting, batch = batch, 2 * batch
    for candidate in (fitting, fitting // 2):
        if candidate < first_batch:
            continue
        low, high = 0, len(rungs)  # rungs[low] fits, rungs[high] does not
        while high - low > 1:
            middle = (low + high) // 2
            made = attempt(candidate, rungs[middle])
            yield made
            low, high = (middle, high) if made.fits else (low, middle)
