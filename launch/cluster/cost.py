"""Cost of a training run: chip-hours, days and price from a throughput per chip."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib

from qwen_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class RunCost:
    """Cost of a training run.

    Attributes:
      chip_hours: hours of all chips together.
      days: duration; None if the number of chips is unknown.
      money: price, in the currency of the price per chip-hour; None if that is unknown.
    """

    chip_hours: float
    days: float | None
    money: float | None


def run_cost(
    tokens: float,
    tokens_per_second_per_chip: float,
    *,
    chips: int | None = None,
    price_per_chip_hour: float | None = None,
    goodput: float = 1.0,
) -> RunCost:
    """Computes the cost of training on `tokens` tokens.

    Args:
      tokens: tokens to train on.
      tokens_per_second_per_chip: throughput while steps run.
      chips: number of chips that run at the same time; None: the duration is not computed.
      price_per_chip_hour: None: the price is not computed.
      goodput: share of the time in which steps run; restarts and evaluation take the rest.

    Raises:
      UserError: a number is not positive, or goodput is above 1.
    """
    for name, value in (
        ("tokens", tokens),
        ("tokens per second per chip", tokens_per_second_per_chip),
        ("chips", 1 if chips is None else chips),
        ("goodput", goodput),
        ("price per chip-hour", 1 if price_per_chip_hour is None else price_per_chip_hour),
    ):
        if not 0 < value < math.inf:
            raise UserError(f"{name} is {value:g}; it must be a positive number")
    if goodput > 1:
        raise UserError(f"goodput is {goodput:g}; it must be a share of the time, at most 1")
    chip_hours = tokens / tokens_per_second_per_chip / 3600 / goodput
    return RunCost(
        chip_hours,
        chip_hours / chips / 24 if chips else None,
        chip_hours * price_per_chip_hour if price_per_chip_hour else None,
    )


def read_rate(path: str) -> float:
    """Returns the tokens per second per chip that a report of launch.aot predicts.

    Raises:
      UserError: the file is missing, not JSON, of a step that does not fit, or has no
        prediction.tokens_per_second_per_chip.
    """
    try:
        report = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--report={path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"--report={path} is not JSON: {error}") from None
    report = report if isinstance(report, dict) else {}
    memory, prediction = report.get("memory"), report.get("prediction")
    if isinstance(memory, dict) and memory.get("fits") is False:
        raise UserError(
            f"--report={path} is of a step that does not fit {report.get('topology')}; give the "
            "report of one that does"
        )
    if isinstance(report.get("roofline"), dict) and prediction is None:
        raise UserError(
            f"--report={path} is of GPUs, for which no rate is predicted; give a measured rate "
            "with --rate=NAME=TOKENS_PER_SECOND_PER_GPU"
        )
    rate = prediction.get("tokens_per_second_per_chip") if isinstance(prediction, dict) else None
    if isinstance(rate, bool) or not isinstance(rate, int | float):
        raise UserError(
            f"--report={path} has no number at prediction.tokens_per_second_per_chip; create it "
            "with python -m launch.aot"
        )
    return float(rate)


def parse_rate(name: str, text: str) -> float:
    """Parses the tokens per second per chip of --rate=NAME=RATE.

    Raises:
      UserError: it is not a number.
    """
    try:
        return float(text)
    except ValueError:
        raise UserError(
            f"--rate={name}={text} must be NAME=TOKENS_PER_SECOND_PER_CHIP, such as --rate=7B=9500"
        ) from None


def table_row(
    name: str, tokens: float, rate: float, source: str, cost: RunCost, chips: int | None
) -> str:
    """Formats one row of the Markdown table of costs.

    Args:
      name: name of the run.
      tokens: tokens to train on.
      rate: tokens per second per chip.
      source: where the rate is from: "predicted" or "given".
      cost: the computed cost.
      chips: number of chips, or None.
    """
    cells = [
        name,
        f"{tokens:.3g}",
        f"{rate:,.0f} ({source})",
        f"{cost.chip_hours:,.0f}",
        f"{chips:,}" if chips else "-",
        "-" if cost.days is None else f"{cost.days:,.1f}",
        "-" if cost.money is None else f"{cost.money:,.0f}",
    ]
    return f"| {' | '.join(cells)} |"


HEADER = (
    "| run | tokens | tokens/s per chip | chip-hours | chips | days | cost |\n"
    "|---|---|---|---|---|---|---|"
)
