"""Run time of a compiled program as the TPU compiler predicts it, read from the program's text."""

from __future__ import annotations

import re


def split_computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Returns the lines of each computation of an HLO text by name, and the entry's name."""
    computations: dict[str, list[str]] = {}
    entry, current = "", None
    for line in hlo.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if head:
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif current is not None:
            current.append(line)
    return computations, entry


def predicted_cycles(hlo: str) -> int:
    """Returns the sum of the compiler's `estimated_cycles`, loop bodies times their trip counts."""
    computations, entry = split_computations(hlo)

    def trip_count(condition: str) -> int:
        lines = "\n".join(computations[condition])
        bounds = re.findall(r"s32\[\]\S* constant\((\d+)\)", lines)
        assert len(bounds) == 1, f"no single bound in the loop condition {condition}"
        return int(bounds[0])

    def total(name: str) -> int:
        cycles = 0
        for line in computations[name]:
            loop = re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
            if loop:
                cycles += trip_count(loop[1]) * total(loop[2])
            elif estimate := re.search(r'"estimated_cycles":"(\d{1,15})"', line):
                cycles += int(estimate[1])
        return cycles

    return total(entry)
