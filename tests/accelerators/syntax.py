"""The syntax of HLO text: computations of instructions."""

import re
from typing import NamedTuple

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"^\w+\[([\d,]*)\]")


class Instruction(NamedTuple):
    """A line of a computation.

    Attributes:
      shape: the sizes of the result's axes; empty for scalars and tuples.
      operands: the names of the operands.
      rest: the line from the operands on, with the attributes.
      is_root: whether it is the computation's result.
    """

    name: str
    opcode: str
    shape: tuple[int, ...]
    operands: tuple[str, ...]
    rest: str
    is_root: bool

    def attribute(self, name: str) -> str:
        """Returns the name or number that an attribute such as `body=%name` gives; an empty string without it."""
        found = re.search(rf"""\b{name}=["%]?([\w.\-$]+)""", self.rest)
        return found.group(1) if found else ""

    @property
    def element(self) -> int | None:
        """Which element of a tuple a get-tuple-element takes; None for other instructions."""
        return int(self.attribute("index")) if self.opcode == "get-tuple-element" else None

    @property
    def is_backward(self) -> bool:
        """Whether JAX made it by differentiating backward, as its metadata says."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return bool(found and "transpose(" in found.group(1))

    @property
    def cycles(self) -> int:
        """The cycles that the TPU compiler expects it to take; 0 where it does not say."""
        found = re.search(r'"estimated_cycles":"?(\d+)', self.rest)
        return int(found.group(1)) if found else 0


class Computation(dict[str, Instruction]):
    """The instructions of a computation, by name."""

    @property
    def root(self) -> Instruction:
        """The instruction whose result is the computation's."""
        return next(each for each in self.values() if each.is_root)

    def through_copies(self, name: str) -> Instruction:
        """Returns the instruction of this name, or what it copies."""
        instruction = self[name]
        while instruction.opcode in ("copy", "bitcast"):
            instruction = self[instruction.operands[0]]
        return instruction

    def constant(self, name: str) -> int | None:
        """Returns the value of an integer constant, or of a copy of one; None for others."""
        instruction = self.through_copies(name)
        found = re.match(r"(-?\d+)\)", instruction.rest)
        return int(found.group(1)) if found and instruction.opcode == "constant" else None


def parse(text: str) -> tuple[dict[str, Computation], Computation]:
    """Returns the computations of a program by name, and the one that runs first."""
    computations: dict[str, Computation] = {}
    entry = current = Computation()
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations[header.group(2)] = Computation()
            entry = current if header.group(1) else entry
        elif found := _INSTRUCTION.match(line):
            instruction = _instruction(*found.groups())
            current[instruction.name] = instruction
    return computations, entry


def _instruction(root: str | None, name: str, right: str) -> Instruction:
    """Reads `shape opcode(operands), attributes`, where the shape of a tuple is in brackets."""
    shape = _SHAPE.match(right)
    right = right[_closing(right) + 1 :].lstrip() if right.startswith("(") else right.partition(" ")[2]
    opcode, _, rest = right.partition("(")
    operands = re.findall(r"%([\w.\-]+)", rest[: _closing("(" + rest) - 1])
    sizes = tuple(int(size) for size in shape.group(1).split(",") if size) if shape else ()
    return Instruction(name, opcode, sizes, tuple(operands), rest, bool(root))


def _closing(text: str) -> int:
    """Returns the index of the bracket that closes the one at the start of a text."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return index
    raise ValueError(f"no closing bracket in {text[:80]!r}")
