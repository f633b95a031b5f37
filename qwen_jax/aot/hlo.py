"""Parser of scheduled HLO text: computations, instructions, types and trip counts of loops.

Grammar as printed by XLA (xla/hlo/ir/hlo_instruction.cc, `ToString`), one instruction per line:

    [ROOT] %name = TYPE opcode(%operand, …), attribute=value, …, metadata={…}, backend_config={…}

A value may contain line breaks inside brackets. Only what cost estimates need is parsed; everything
else is kept as text in `Instruction.attributes`.
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
    """One array type.

    Attributes:
      dtype: XLA's name of the element type, such as "bf16".
      dims: sizes of the dimensions.
      space: memory space: 0 HBM, 1 VMEM, 5 host.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = HBM

    @property
    def elements(self) -> int:
        """Returns the number of elements; 1 for a scalar."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Returns the size in bytes without padding; 0 for types without data (tokens)."""
        return self.elements * ITEM_BYTES.get(self.dtype, 0)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One HLO operation.

    Attributes:
      name: unique name within its computation.
      opcode: XLA's name of the operation.
      shapes: result type; the leaves of a tuple, in order.
      operands: names of the operands, in order.
      attributes: everything after the operands, as text.
      literal: text between the parentheses of a constant or parameter.
      root: whether it is marked as the result of its computation.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    literal: str = ""
    root: bool = False

    def called(self, key: str) -> str | None:
        """Returns the computation named by `key=%…` (calls, body, condition, …), or None."""
        match = re.search(rf"\b{key}=\{{?%?([\w.\-]+)", self.attributes)
        return match[1] if match else None

    def text(self, key: str) -> str | None:
        """Returns the value of `key="…"`, or None."""
        match = re.search(rf'\b{key}="([^"]*)"', self.attributes)
        return match[1] if match else None

    def number(self, key: str) -> int | None:
        """Returns the integer after `"key":"…"` in the backend config, or None."""
        match = re.search(rf'"{key}":"?(-?\d+)', self.attributes)
        return int(match[1]) if match else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """An HLO computation.

    Attributes:
      name: unique name within the module.
      instructions: its instructions, in scheduled order.
    """

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        """Returns a mapping from name to instruction."""
        return {i.name: i for i in self.instructions}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Returns a mapping from a name to the instructions that have it as operand."""
        found: dict[str, list[Instruction]] = {}
        for i in self.instructions:
            for name in i.operands:
                found.setdefault(name, []).append(i)
        return found

    @property
    def root(self) -> Instruction:
        """Returns the instruction that is the result; the last one if none is marked."""
        return next((i for i in self.instructions if i.root), self.instructions[-1])


@dataclasses.dataclass(frozen=True)
class HloModule:
    """A compiled program.

    Attributes:
      computations: name -> computation.
      entry: name of the entry computation.
    """

    computations: dict[str, Computation]
    entry: str

    def called(self, i: Instruction, key: str) -> Computation:
        """Returns the computation after `key=%…` of an instruction (calls, body, condition, …).

        Raises:
          ValueError: the instruction has no such attribute.
        """
        name = i.called(key)
        if name is None:
            raise ValueError(f"HLO instruction {i.name} has no attribute {key}")
        return self.computations[name]


def _closing_bracket(text: str, start: int) -> int:
    """Returns the index of the bracket that closes the one at `start`, skipping quoted text.

    Raises:
      ValueError: the bracket is not closed.
    """
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
    """Returns the array types of a type, with tuples flattened.

    `(f32[2]{0:S(1)}, s32[])` has two.
    """
    shapes = []
    for dtype, dims, layout in _SHAPE.findall(text):
        space = _SPACE.search(layout or "")
        sizes = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
        shapes.append(Shape(dtype, sizes, int(space[1]) if space else HBM))
    return tuple(shapes)


def parse_instruction(line: str) -> Instruction | None:
    """Parses one line of a computation; returns None if it is not an instruction."""
    head = _INSTRUCTION.match(line)
    if not head:
        return None
    start = head.end()
    if line[start] == "(":
        end = _closing_bracket(line, start) + 1
    else:
        end = line.index(" ", start)
    opcode = _OPCODE.match(line, end)
    if not opcode:
        return None
    close = _closing_bracket(line, opcode.end() - 1)
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


def _open_brackets(line: str) -> int:
    """Returns the number of opening minus closing brackets of a line, outside quoted text."""
    unquoted = _QUOTED.sub("", line)
    return sum(map(unquoted.count, _OPEN)) - sum(map(unquoted.count, _CLOSE))


def _computation_bodies(text: str) -> Iterator[tuple[bool, str, list[str]]]:
    """Yields (is entry, name, instruction texts) of each computation; continued lines are joined.

    Raises:
      ValueError: the text ends inside a computation.
    """
    name: str | None = None
    lines: list[str] = []
    entry, depth = False, 0
    for line in text.splitlines():
        if name is None:
            header = _HEADER.match(line)
            if header and " = " not in line.split("(")[0]:
                entry, name, lines = bool(header[1]), header[2], []
        elif depth:
            lines[-1] += line
            depth += _open_brackets(line)
        elif line.startswith("}"):
            yield entry, name, lines
            name = None
        elif line.strip():
            lines.append(line)
            depth = _open_brackets(line)
    if name is not None:
        raise ValueError(f"HLO text ends inside the computation {name}")


def parse(text: str) -> HloModule:
    """Parses the text of `compiled.as_text()` or of an XLA dump.

    Raises:
      ValueError: there is no ENTRY computation, or a line in a computation is not an instruction
        (skipping it would make its cost 0).
    """
    computations, entry = {}, None
    for is_entry, name, lines in _computation_bodies(text):
        instructions = []
        for line in lines:
            instruction = parse_instruction(line)
            if instruction is None:
                raise ValueError(
                    f"HLO of {name} has a line that is not an instruction: {line[:80]}"
                )
            instructions.append(instruction)
        computations[name] = Computation(name, tuple(instructions))
        entry = name if is_entry else entry
    if entry is None:
        raise ValueError("HLO text has no ENTRY computation")
    return HloModule(computations, entry)


def _constant_value(computation: Computation, name: str) -> int | None:
    """Returns the value of an integer constant, also behind copies and conversions; else None.

    Args:
      computation: computation of the instruction.
      name: name of the instruction.
    """
    i = computation.by_name.get(name)
    while i is not None and i.opcode in ("copy", "convert", "bitcast") and i.operands:
        i = computation.by_name.get(i.operands[0])
    if i is None or i.opcode != "constant":
        return None
    return int(i.literal) if re.fullmatch(r"-?\d+", i.literal) else None


def _loop_counter(module: HloModule, condition: Computation) -> tuple[int, int] | None:
    """Parses a loop condition of the form `counter < constant`.

    Returns:
      (index of the counter in the loop's state, exclusive bound); None for other conditions.
    """
    compare = condition.root
    scope = condition
    arguments = None
    # The comparison may be fused: its parameters are then the operands of the fusion.
    if compare.opcode == "fusion":
        arguments = compare.operands
        scope = module.called(compare, "calls")
        compare = scope.root
    if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
        return None

    def resolve(name):
        """Returns (computation, name) of an operand, looking through parameters of a fusion."""
        inner = scope.by_name[name]
        if arguments is not None and inner.opcode == "parameter":
            return condition, arguments[int(inner.literal)]
        return scope, name

    bound = _constant_value(*resolve(compare.operands[1]))
    where, counter = resolve(compare.operands[0])
    element = where.by_name[counter]
    index = re.search(r"index=(\d+)", element.attributes)
    if bound is None or element.opcode != "get-tuple-element" or not index:
        return None
    return int(index[1]), bound


def trip_count(module: HloModule, computation: Computation, loop: Instruction) -> int:
    """Returns how often the body of a `while` loop runs.

    From the compiler's `known_trip_count` if it is printed, else from the condition `counter <
    bound` and the counter's initial value (`jax.lax.scan` counts up by one).

    Args:
      module: the program.
      computation: computation that contains the loop.
      loop: the `while` instruction.

    Raises:
      ValueError: the loop has another form.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    found = _loop_counter(module, module.called(loop, "condition"))
    if found is None:
        raise ValueError(f"trip count of loop {loop.name} is not known")
    index, bound = found
    init = computation.by_name[loop.operands[0]]
    start = _constant_value(computation, init.operands[index]) if init.opcode == "tuple" else 0
    return max(0, bound - (start or 0))
