"""A small parser of scheduled HLO text: computations, instructions, types, loop trip counts.

Grammar as printed by XLA (xla/hlo/ir/hlo_instruction.cc, `ToString`), one instruction a line:

    [ROOT] %name = TYPE opcode(%operand, …), attribute=value, …, metadata={…}, backend_config={…}

A value may hold line breaks, inside brackets. Only what costing needs is understood; everything
else stays in `Instruction.attributes` as text.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

ITEM_BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "s4", "u4", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("s16", "u16", "f16", "bf16"), 2),
    **dict.fromkeys(("s32", "u32", "f32"), 4),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 8),
    "c128": 16,
}

# Memory spaces in TPU layouts, `{…:S(n)}`; 0 is HBM (left out in the text).
HBM, VMEM, HOST = 0, 1, 5

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_SHAPE = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_NAME = re.compile(r"%([\w.\-]+)")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_OPEN, _CLOSE = "([{", ")]}"


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array type: dtype name, dimensions, memory space (0 HBM, 1 VMEM, 5 host)."""

    dtype: str
    dims: tuple[int, ...]
    space: int = HBM

    @property
    def elements(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Unpadded size; 0 for types that hold no data (tokens)."""
        return self.elements * ITEM_BYTES.get(self.dtype, 0)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One operation.

    Attributes:
      shapes: its type, the leaves of a tuple in order. operands: names, in order.
      attributes: everything after the operands, as text. literal: what stands between a constant's
        parentheses.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    literal: str = ""
    root: bool = False

    def called(self, key: str) -> str | None:
        """Name of the computation after `key=%…`, e.g. calls, body, condition."""
        match = re.search(rf"\b{key}=\{{?%?([\w.\-]+)", self.attributes)
        return match[1] if match else None

    def text(self, key: str) -> str | None:
        """Value of `key="…"`."""
        match = re.search(rf'\b{key}="([^"]*)"', self.attributes)
        return match[1] if match else None

    def number(self, key: str) -> int | None:
        """Integer after `"key":"…"` in the backend config."""
        match = re.search(rf'"{key}":"?(-?\d+)', self.attributes)
        return int(match[1]) if match else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in the order they are scheduled."""

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        """Instructions by name."""
        return {i.name: i for i in self.instructions}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Who reads each instruction."""
        found: dict[str, list[Instruction]] = {}
        for i in self.instructions:
            for name in i.operands:
                found.setdefault(name, []).append(i)
        return found

    @property
    def root(self) -> Instruction:
        """The result; the last instruction where none is marked."""
        return next((i for i in self.instructions if i.root), self.instructions[-1])


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: its computations by name, and which one is entered."""

    computations: dict[str, Computation]
    entry: str


def _close(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`; quoted text is skipped."""
    depth, quoted, i = 0, False, start
    while i < len(text):
        c = text[i]
        if quoted:
            if c == "\\":
                i += 1
            elif c == '"':
                quoted = False
        elif c == '"':
            quoted = True
        elif c in _OPEN:
            depth += 1
        elif c in _CLOSE:
            depth -= 1
            if depth == 0:
                return i
        i += 1
    raise ValueError(f"unclosed bracket in HLO: {text[start : start + 80]}")


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """The array types in a type, tuples flattened: `(f32[2]{0:S(1)}, s32[])` has two."""
    shapes = []
    for dtype, dims, layout in _SHAPE.findall(text):
        space = _SPACE.search(layout or "")
        sizes = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
        shapes.append(Shape(dtype, sizes, int(space[1]) if space else HBM))
    return tuple(shapes)


def parse_instruction(line: str) -> Instruction | None:
    """One line of a computation's body; None for a line that isn't an instruction."""
    head = _INSTRUCTION.match(line)
    if not head:
        return None
    start = head.end()
    if line[start] == "(":
        end = _close(line, start) + 1
    else:
        end = line.index(" ", start)
    opcode = _OPCODE.match(line, end)
    if not opcode:
        return None
    close = _close(line, opcode.end() - 1)
    inner = line[opcode.end() : close]
    return Instruction(
        name=head[2],
        opcode=opcode[1],
        shapes=parse_shapes(line[start:end]),
        operands=tuple(_NAME.findall(inner)) if opcode[1] != "constant" else (),
        attributes=line[close + 1 :],
        literal=inner if opcode[1] in ("constant", "parameter") else "",
        root=bool(head[1]),
    )


def _depth(line: str) -> int:
    """Brackets a line leaves open (negative: closes), those in quoted text left out."""
    bare = _QUOTED.sub("", line)
    return sum(map(bare.count, _OPEN)) - sum(map(bare.count, _CLOSE))


def _bodies(text: str) -> Iterator[tuple[bool, str, list[str]]]:
    """(is the entry, name, instructions) of each computation, an instruction's lines joined."""
    name, entry, lines, depth = None, False, [], 0
    for line in text.splitlines():
        if name is None:
            header = _HEADER.match(line)
            if header and " = " not in line.split("(")[0]:
                entry, name, lines = bool(header[1]), header[2], []
        elif depth:
            lines[-1] += line
            depth += _depth(line)
        elif line.startswith("}"):
            yield entry, name, lines
            name = None
        elif line.strip():
            lines.append(line)
            depth = _depth(line)
    if name is not None:
        raise ValueError(f"HLO text ends inside the computation {name}")


def parse(text: str) -> Module:
    """Parses `compiled.as_text()` or a dump of XLA.

    Raises:
      ValueError: no ENTRY computation, or a line of one that is no instruction: what is left out
        would count as free.
    """
    computations, entry = {}, None
    for is_entry, name, lines in _bodies(text):
        instructions = tuple(map(parse_instruction, lines))
        if None in instructions:
            line = lines[instructions.index(None)]
            raise ValueError(f"HLO of {name} has a line that is no instruction: {line[:80]}")
        computations[name] = Computation(name, instructions)
        entry = name if is_entry else entry
    if entry is None:
        raise ValueError("HLO text has no ENTRY computation")
    return Module(computations, entry)


def _constant(computation: Computation, name: str) -> int | None:
    i = computation.by_name.get(name)
    while i is not None and i.opcode in ("copy", "convert", "bitcast") and i.operands:
        i = computation.by_name.get(i.operands[0])
    if i is None or i.opcode != "constant":
        return None
    return int(i.literal) if re.fullmatch(r"-?\d+", i.literal) else None


def _counter_bound(module: Module, condition: Computation) -> tuple[int, int] | None:
    """(index of the counter in the loop's state, exclusive bound) of `counter < constant`."""
    compare = condition.root
    scope = condition
    arguments = None
    if compare.opcode == "fusion":  # the comparison may be fused: its parameters are our operands
        arguments = compare.operands
        scope = module.computations[compare.called("calls")]
        compare = scope.root
    if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
        return None

    def outside(name):
        inner = scope.by_name[name]
        if arguments is not None and inner.opcode == "parameter":
            return condition, arguments[int(inner.literal)]
        return scope, name

    bound = _constant(*outside(compare.operands[1]))
    where, counter = outside(compare.operands[0])
    element = where.by_name[counter]
    index = re.search(r"index=(\d+)", element.attributes)
    if bound is None or element.opcode != "get-tuple-element" or not index:
        return None
    return int(index[1]), bound


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int:
    """How often the body of a `while` runs.

    Taken from the compiler's `known_trip_count` where it is printed, else from the condition
    `counter < bound` with the counter's first value; `jax.lax.scan` counts up by one.

    Raises:
      ValueError: the loop is of another form.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    found = _counter_bound(module, module.computations[loop.called("condition")])
    if found is None:
        raise ValueError(f"trip count of loop {loop.name} is not known")
    index, bound = found
    init = computation.by_name[loop.operands[0]]
    start = _constant(computation, init.operands[index]) if init.opcode == "tuple" else 0
    return max(0, bound - (start or 0))
