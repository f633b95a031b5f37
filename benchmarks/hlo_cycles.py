"""The TPU compiler's own prediction of run time, read from a compiled program's text."""

from __future__ import annotations

import re


def computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Lines of each computation of an HLO text, and the name of the entry."""
    found: dict[str, list[str]] = {}
    entry, current = "", None
    for line in hlo.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if head:
            current = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif current is not None:
            current.append(line)
    return found, entry


def predicted_cycles(hlo: str) -> int:
    """Sum of the compiler's `estimated_cycles`, bodies of counted loops times their trips."""
    found, entry = computations(hlo)

    def trips(condition: str) -> int:
        bounds = re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(found[condition]))
        assert len(bounds) == 1, f"no single bound in the loop condition {condition}"
        return int(bounds[0])

    def total(name: str) -> int:
        cycles = 0
        for line in found[name]:
            loop = re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
            if loop:
                cycles += trips(loop[1]) * total(loop[2])
            elif estimate := re.search(r'"estimated_cycles":"(\d{1,15})"', line):
                cycles += int(estimate[1])
        return cycles

    return total(entry)
