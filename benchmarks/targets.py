"""What this project wants to reach on one H200, and whether a run of the suite did.

    python -m benchmarks.targets [FOLDER]   (results/ by default, as benchmarks/gpu_suite.sh writes)

Reads whatever of correctness.json, attention.json, decode.json and train.json is there and prints a
line for each bar: wanted, found, met or missed; "not measured" where the rows are not there. The
exit status is 1 where something is wrong, 0 otherwise: a missed bar is a result, no failure.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys

LONG = 8192
"""Tokens from which a context counts as long."""


@dataclasses.dataclass(frozen=True)
class Bar:
    """One aim. found: the worst of the cases that it speaks of, None if none was measured."""

    name: str
    wanted: float
    found: float | None
    cases: int

    @property
    def verdict(self) -> str:
        """ "met", "MISSED" or "not measured"."""
        if self.found is None:
            return "not measured"
        return "met" if self.found >= self.wanted else "MISSED"


def _worst(name: str, wanted: float, found: list[float]) -> Bar:
    return Bar(name, wanted, min(found, default=None), len(found))


def against_cudnn(rows: list[dict], what: str) -> list[float]:
    """Our TFLOP/s over cuDNN's, for each case with heads of 128, T ≥ 4096, causal, bf16.

    what: "forward" or "backward".
    """
    keys = ("length", "heads", "kv_heads", "width", "mask", "batch", "dtype")
    speeds = {
        (row["implementation"], *(row[k] for k in keys)): row[f"{what}_tflops"]
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


def decode_shares(rows: list[dict], cache: str) -> list[float]:
    """Shares of the copy bandwidth at batch ≥ 8 and a long context."""
    return [
        row["share"]
        for row in rows
        if row["implementation"] == "qwen_jax"
        and "share" in row
        and row["cache"] == cache
        and row["batch"] >= 8
        and row["context"] >= LONG
    ]


def training(report: dict, what: str) -> list[float]:
    """`mfu` of our Qwen-1.8B step at 2,048 tokens a row, or its `speed_ratio` to PyTorch's."""
    rows = [r for r in report.get("results", ()) if r["network"] == "qwen-1.8b"]
    if report.get("sequence") != 2048:
        return []
    found = [r["ours"].get("mfu") if what == "mfu" else r.get(what) for r in rows]
    return [x for x in found if x is not None]


def bars(reports: dict[str, dict]) -> list[Bar]:
    """Every bar, from the reports by name."""
    attention = reports.get("attention", {}).get("rows", [])
    decode = reports.get("decode", {}).get("results", [])
    train = reports.get("train", {})
    return [
        *(
            _worst(f"attention {x}, times cuDNN's speed", 1.0, against_cudnn(attention, x))
            for x in ("forward", "backward")
        ),
        *(
            _worst(f"decode, {x} cache: share of the copy bandwidth", 0.8, decode_shares(decode, x))
            for x in ("bfloat16", "uint8")
        ),
        _worst("Qwen-1.8B training: MFU", 0.5, training(train, "mfu")),
        _worst("Qwen-1.8B training: times PyTorch's speed", 1.2, training(train, "speed_ratio")),
    ]


def read(folder: pathlib.Path) -> dict[str, dict]:
    """The reports that are there."""
    paths = {x: folder / f"{x}.json" for x in ("correctness", "attention", "decode", "train")}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def main(arguments: list[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=pathlib.Path, default=pathlib.Path("results"))
    reports = read(parser.parse_args(arguments).folder)
    for name, report in reports.items():
        if not report.get("complete"):
            print(f"{name}: cut off before its end")
    wrong = reports.get("correctness", {}).get("wrong")
    said = "not measured" if wrong is None else ", ".join(wrong) or "nothing is wrong"
    print(f"correctness: {said}")
    print(f"{'bar':<52}{'wanted':>8}{'found':>8}{'cases':>7}")
    for bar in bars(reports):
        found = "-" if bar.found is None else f"{bar.found:.2f}"
        print(f"{bar.name:<52}{bar.wanted:>8.2f}{found:>8}{bar.cases:>7}  {bar.verdict}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
