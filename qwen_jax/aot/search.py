"""Search for the largest per-device batch and the fastest remat policy that fit, by compiling only.

Memory grows with the batch and with what the remat policy saves, so two searches suffice: the batch
is doubled under the most memory-saving policy until it no longer fits; then, at the largest batch
and at half of it, a bisection finds the least memory-saving policy that fits. The result is the
trial with the highest predicted rate.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from qwen_jax.artifact import write_text
from qwen_jax.errors import UserError

REMAT_POLICIES = ("full", "out", "out_mid", "qkv_out", "attention", "gate", "products", "none")
"""Names in `model.options.REMAT` by increasing memory, without those that offload to the host."""

StepReport = dict[str, Any]

_VERSION = 1  # of the log's format


@dataclasses.dataclass(frozen=True)
class Trial:
    """Result of one compilation.

    Attributes:
      batch: rows per device.
      remat: remat policy.
      fits: whether it fits into memory.
      rate: tokens/s per chip by the prediction (for GPUs, the roofline); 0 if it does not fit.
      report: report of the compilation.
    """

    batch: int
    remat: str
    fits: bool
    rate: float
    report: StepReport

    @classmethod
    def of(cls, batch: int, remat: str, report: StepReport) -> Trial:
        """Makes a trial from the report of its compilation."""
        fits = report["memory"]["fits"]
        rate = 0.0
        if fits:
            times = report["prediction"] or report["roofline"]
            rate = times["tokens_per_second_per_chip"]
        return cls(batch, remat, fits, rate, report)


class SearchLog:
    """Finished trials of a search, stored as JSON lines; without a path, in memory only.

    The first line has the inputs of the search, so that another search cannot reuse its trials.

    Attributes:
      path: the file, or None.
      trials: (batch, remat policy) -> trial.
    """

    def __init__(self, path: str | None, inputs: Mapping[str, Any] | None = None):
        """Reads an existing file, or creates it with its first line.

        Args:
          path: the file, or None.
          inputs: everything but batch and remat policy that a report depends on, by name, in JSON
            types.

        Raises:
          UserError: the file can't be read or written, is of another search, or is not a search
            log.
        """
        self.path = path
        self.trials: dict[tuple[int, str], Trial] = {}
        if not path:
            return
        heading = json.loads(json.dumps({"version": _VERSION, **(inputs or {})}))
        try:
            lines = self._complete_lines(path)
            if lines:
                self._read(lines, heading)
            else:
                self._append({"search": heading})
        except OSError as error:
            raise UserError(
                f"the search log {path} cannot be used: {error.strerror}; give another file"
            ) from None

    def _complete_lines(self, path: str) -> list[str]:
        """Returns the lines of the file, [] if there is none; an incomplete last line is removed.

        An interruption can leave one; its compilation is then repeated.
        """
        if not os.path.exists(path):
            return []
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read()
        complete = text[: text.rfind("\n") + 1]
        if complete != text:
            write_text(path, complete)
        return complete.splitlines()

    def _read(self, lines: Sequence[str], inputs: dict[str, Any]) -> None:
        """Parses the lines of the file into `trials`.

        Raises:
          UserError: a line is malformed, or the inputs differ.
        """
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                if number == 1:
                    heading = dict(row["search"])
                    continue
                trial = Trial.of(row["batch"], row["remat"], row["report"])
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"line {number} of {self.path} is not a line of a search log; give another file"
                ) from None
            self.trials[trial.batch, trial.remat] = trial
        _check_inputs(self.path, heading, inputs)

    def _append(self, row: dict[str, Any]) -> None:
        """Appends one JSON line to the file, if there is one."""
        if self.path:
            with open(self.path, "a", encoding="utf-8") as sink:
                sink.write(json.dumps(row) + "\n")

    def add(self, trial: Trial) -> None:
        """Adds a trial and writes it to the file."""
        self.trials[trial.batch, trial.remat] = trial
        self._append({"batch": trial.batch, "remat": trial.remat, "report": trial.report})

    @property
    def best(self) -> Trial | None:
        """Returns the trial with the highest predicted rate that fits; None if none fits."""
        fitting = [t for t in self.trials.values() if t.fits]
        return max(fitting, key=lambda t: (t.rate, t.batch)) if fitting else None


def _check_inputs(path: str | None, found: dict[str, Any], inputs: dict[str, Any]) -> None:
    """Checks that a log was written by a search with the same inputs.

    Raises:
      UserError: they differ; the message names the first difference.
    """
    nothing = object()
    for name in (*inputs, *found):
        stored, wanted = found.get(name, nothing), inputs.get(name, nothing)
        if stored != wanted:
            stored, wanted = ("absent" if x is nothing else repr(x) for x in (stored, wanted))
            raise UserError(
                f"the search log {path} is of another search: {name} is {stored} there but "
                f"{wanted} now; give another file"
            )


def search(
    measure: Callable[[int, str], StepReport],
    log: SearchLog,
    *,
    first_batch: int = 1,
    largest_batch: int = 64,
    policies: Sequence[str] = REMAT_POLICIES,
) -> Iterator[Trial]:
    """Runs a search and yields each trial (those in the log without compiling again).

    `log.best` is the result.

    Args:
      measure: compiles a per-device batch with a remat policy and returns its report.
      log: finished trials.
      first_batch: rows per device of the first trial.
      largest_batch: bound of the doubling.
      policies: remat policies, by increasing memory.
    """

    def run_trial(batch, remat):
        """Returns the trial of the log, or compiles it."""
        if (batch, remat) not in log.trials:
            log.add(Trial.of(batch, remat, measure(batch, remat)))
        return log.trials[batch, remat]

    batch, fitting = first_batch, 0
    while batch <= largest_batch:
        trial = run_trial(batch, policies[0])
        yield trial
        if not trial.fits:
            break
        fitting, batch = batch, 2 * batch
    for candidate in (fitting, fitting // 2):
        if candidate < first_batch:
            continue
        low, high = 0, len(policies)  # policies[low] fits, policies[high] does not
        while high - low > 1:
            middle = (low + high) // 2
            trial = run_trial(candidate, policies[middle])
            yield trial
            low, high = (middle, high) if trial.fits else (low, middle)
