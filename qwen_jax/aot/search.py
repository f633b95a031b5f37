"""The largest per-device batch and the cheapest remat that fit, found by compiling alone.

Memory grows with the batch and with what remat keeps, so two walks are enough: the batch is doubled
under the leanest rung until it no longer fits; then, at the largest batch and at half of it, the
rungs are halved between the leanest and the fastest. What counts in the end is the predicted rate.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from qwen_jax.artifact import write_text
from qwen_jax.errors import UserError

RUNGS = ("full", "out", "out_mid", "qkv_out", "attention", "gate", "products", "none")
"""Names in `model.options.REMAT` by growing memory; offloading ones have no place in this order."""

Report = dict[str, Any]

_VERSION = 1  # of the log's form


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
    """Compilations already made, one JSON line each; without a path they are kept in memory only.

    The first line says what was searched, so that no other search takes its tries for its own.
    """

    def __init__(self, path: str | None, asked: Mapping[str, Any] | None = None):
        """Reads what is there, and writes the heading where nothing is.

        Args:
          path: the file, or None.
          asked: everything but batch and rung that a report depends on, by name, in JSON types.

        Raises:
          UserError: the file can't be read or written, is of another search, or is no log.
        """
        self.path = path
        self.tries: dict[tuple[int, str], Try] = {}
        if not path:
            return
        asked = json.loads(json.dumps({"version": _VERSION, **(asked or {})}))
        try:
            lines = self._whole_lines(path)
            if lines:
                self._read(lines, asked)
            else:
                self._append({"search": asked})
        except OSError as error:
            raise UserError(
                f"the search log {path} cannot be used: {error.strerror}; give another file"
            ) from None

    def _whole_lines(self, path: str) -> list[str]:
        """The lines there are, none where there is no file; one that a kill cut short is removed.

        That compilation is made again.
        """
        if not os.path.exists(path):
            return []
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            write_text(path, whole)
        return whole.splitlines()

    def _read(self, lines: Sequence[str], asked: dict[str, Any]) -> None:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                heading = dict(row["search"]) if number == 1 else None
                made = Try.of(row["batch"], row["remat"], row["report"]) if number > 1 else None
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"line {number} of {self.path} is not one of a search log; give another file"
                ) from None
            if made:
                self.tries[made.batch, made.remat] = made
            else:
                _check_same(self.path, heading, asked)

    def _append(self, row: dict[str, Any]) -> None:
        if self.path:
            with open(self.path, "a", encoding="utf-8") as sink:
                sink.write(json.dumps(row) + "\n")

    def add(self, made: Try) -> None:
        """Notes one more."""
        self.tries[made.batch, made.remat] = made
        self._append({"batch": made.batch, "remat": made.remat, "report": made.report})

    @property
    def best(self) -> Try | None:
        """The fastest that fits, by prediction; None before anything fits."""
        fitting = [t for t in self.tries.values() if t.fits]
        return max(fitting, key=lambda t: (t.rate, t.batch)) if fitting else None


def _check_same(path: str | None, found: dict[str, Any], asked: dict[str, Any]) -> None:
    """Refuses the log of a search that asked something else, naming the first thing it did."""
    nothing = object()
    for name in (*asked, *found):
        there, here = found.get(name, nothing), asked.get(name, nothing)
        if there != here:
            there, here = ("absent" if x is nothing else repr(x) for x in (there, here))
            raise UserError(
                f"the search log {path} is of another search: {name} is {there} there and {here} "
                "here; give another file"
            )


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
