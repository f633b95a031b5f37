"""Performance targets on one H200, and whether a run of the GPU suite met them.

    python -m benchmarks.targets [FOLDER]   (results/ by default, as benchmarks/gpu_suite.sh writes)

Reads those of correctness.json, attention.json, decode.json and train.json that exist and prints
a line for each target: the wanted and the measured value, and "met", "MISSED" or "not measured".
The exit status is 1 if a kernel computed wrong results, 0 otherwise; a missed target is not an
error.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
from typing import Any

LONG_CONTEXT = 8192
"""Tokens from which a context counts as long."""


@dataclasses.dataclass(frozen=True)
class Target:
    """One performance target and what a run measured.

    Attributes:
      name: the quantity.
      wanted: smallest value that meets the target.
      measured: worst value over the cases that count, None if there is none.
      cases: number of these cases.
    """

    name: str
    wanted: float
    measured: float | None
    cases: int

    @property
    def verdict(self) -> str:
        """Returns "met", "MISSED" or "not measured"."""
        if self.measured is None:
            return "not measured"
        return "met" if self.measured >= self.wanted else "MISSED"


def _target(name: str, wanted: float, values: list[float]) -> Target:
    """Returns a target measured by the smallest of `values`."""
    return Target(name, wanted, min(values, default=None), len(values))


def attention_ratios(rows: list[dict[str, Any]], phase: str) -> list[float]:
    """Returns our TFLOP/s over cuDNN's for each case with head_dim 128, T ≥ 4096, causal, bf16.

    Args:
      rows: rows of attention.json.
      phase: "forward" or "backward".
    """
    keys = ("length", "heads", "kv_heads", "width", "mask", "batch", "dtype")
    speeds = {
        (row["implementation"], *(row[key] for key in keys)): row[f"{phase}_tflops"]
        for row in rows
        if row["status"] == "ok"
    }
    ratios = []
    for (name, *case), speed in speeds.items():
        length, _, _, width, mask, _, dtype = case
        peer = speeds.get(("cudnn", *case))
        counts = width == 128 and length >= 4096 and mask == "causal" and dtype == "bfloat16"
        if name == "pallas_gpu" and counts and peer:
            ratios.append(speed / peer)
    return ratios


def decode_shares(rows: list[dict[str, Any]], cache: str) -> list[float]:
    """Returns the shares of copy bandwidth that decoding reached at batch ≥ 8 and long context.

    Args:
      rows: rows of decode.json.
      cache: dtype of the cache, "bfloat16" or "uint8".
    """
    return [
        row["share"]
        for row in rows
        if row["implementation"] == "qwen_jax"
        and "share" in row
        and row["cache"] == cache
        and row["batch"] >= 8
        and row["context"] >= LONG_CONTEXT
    ]


def training_values(report: dict[str, Any], quantity: str) -> list[float]:
    """Returns a quantity of the Qwen-1.8B train step at 2,048 tokens per row.

    Args:
      report: train.json.
      quantity: "mfu", or "speed_ratio" to PyTorch.
    """
    rows = [row for row in report.get("results", ()) if row["network"] == "qwen-1.8b"]
    if report.get("sequence") != 2048:
        return []
    values = [row["ours"].get("mfu") if quantity == "mfu" else row.get(quantity) for row in rows]
    return [x for x in values if x is not None]


def targets(reports: dict[str, dict[str, Any]]) -> list[Target]:
    """Returns every target, measured by the reports of the suite by name (`read_reports`)."""
    attention = reports.get("attention", {}).get("rows", [])
    decode = reports.get("decode", {}).get("results", [])
    train = reports.get("train", {})
    return [
        *(
            _target(f"attention {x}, times cuDNN's speed", 1.0, attention_ratios(attention, x))
            for x in ("forward", "backward")
        ),
        *(
            _target(f"decode, {x} cache: share of copy bandwidth", 0.8, decode_shares(decode, x))
            for x in ("bfloat16", "uint8")
        ),
        _target("Qwen-1.8B training: MFU", 0.5, training_values(train, "mfu")),
        _target(
            "Qwen-1.8B training: times PyTorch's speed", 1.2, training_values(train, "speed_ratio")
        ),
    ]


def read_reports(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Returns the reports of the suite that exist in a folder, by name."""
    paths = {x: folder / f"{x}.json" for x in ("correctness", "attention", "decode", "train")}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def main(arguments: list[str] | None = None) -> int:
    """Prints the table of targets; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "folder",
        nargs="?",
        type=pathlib.Path,
        default=pathlib.Path("results"),
        help="where benchmarks/gpu_suite.sh wrote its reports (default: results)",
    )
    reports = read_reports(parser.parse_args(arguments).folder)
    for name, report in reports.items():
        if not report.get("complete"):
            print(f"{name}: incomplete, stopped before its end")
    wrong = reports.get("correctness", {}).get("wrong")
    summary = "not measured" if wrong is None else ", ".join(wrong) or "all results are correct"
    print(f"correctness: {summary}")
    print(f"{'target':<52}{'wanted':>8}{'measured':>9}{'cases':>7}")
    for target in targets(reports):
        measured = "-" if target.measured is None else f"{target.measured:.2f}"
        print(
            f"{target.name:<52}{target.wanted:>8.2f}{measured:>9}{target.cases:>7}"
            f"  {target.verdict}"
        )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
