"""What a run takes: chip-hours, days and money from a throughput per chip."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib

from qwen_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Cost:
    """chip_hours: over all chips; days: on the wall; money: in the currency of the price."""

    chip_hours: float
    days: float | None
    money: float | None


def cost(
    tokens: float,
    tokens_per_second_per_chip: float,
    *,
    chips: int | None = None,
    price_per_chip_hour: float | None = None,
    goodput: float = 1.0,
) -> Cost:
    """The cost of training on `tokens` tokens.

    Args:
      tokens: to train on.
      tokens_per_second_per_chip: throughput while steps run.
      chips: how many run at once; without it there are no days.
      price_per_chip_hour: without it there is no money.
      goodput: share of the time in which steps run; restarts and evaluation take the rest.

    Raises:
      UserError: a number that is not positive, or goodput above 1.
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
        raise UserError(f"goodput is {goodput:g}; it is a share of the time, at most 1")
    chip_hours = tokens / tokens_per_second_per_chip / 3600 / goodput
    return Cost(
        chip_hours,
        chip_hours / chips / 24 if chips else None,
        chip_hours * price_per_chip_hour if price_per_chip_hour else None,
    )


def read_rate(path: str) -> float:
    """Tokens per second per chip that an ahead-of-time report (launch.aot) predicts.

    Raises:
      UserError: no such file, not JSON, of a step that does not fit, or without
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
            f"--report={path} says that the step does not fit {report.get('topology')}; give the "
            "report of one that does"
        )
    if isinstance(report.get("roofline"), dict) and prediction is None:
        raise UserError(
            f"--report={path} is of GPUs, for which no rate is predicted; give the one you "
            "measured with --rate=NAME=TOKENS_PER_SECOND_PER_GPU"
        )
    rate = prediction.get("tokens_per_second_per_chip") if isinstance(prediction, dict) else None
    if isinstance(rate, bool) or not isinstance(rate, int | float):
        raise UserError(
            f"--report={path} has no number at prediction.tokens_per_second_per_chip; make it with "
            "python -m launch.aot"
        )
    return float(rate)


def parse_rate(name: str, text: str) -> float:
    """Tokens per second per chip of --rate=NAME=RATE.

    Raises:
      UserError: not a number.
    """
    try:
        return float(text)
    except ValueError:
        raise UserError(
            f"--rate={name}={text} must be NAME=TOKENS_PER_SECOND_PER_CHIP, such as --rate=7B=9500"
        ) from None


def table_row(
    name: str, tokens: float, rate: float, source: str, found: Cost, chips: int | None
) -> str:
    """One row of the table in docs/launch.md, Markdown; source: where the rate is from."""
    cells = [
        name,
        f"{tokens:.3g}",
        f"{rate:,.0f} ({source})",
        f"{found.chip_hours:,.0f}",
        f"{chips:,}" if chips else "-",
        "-" if found.days is None else f"{found.days:,.1f}",
        "-" if found.money is None else f"{found.money:,.0f}",
    ]
    return f"| {' | '.join(cells)} |"


HEADER = (
    "| run | tokens | tokens/s per chip | chip-hours | chips | days | cost |\n"
    "|---|---|---|---|---|---|---|"
)
