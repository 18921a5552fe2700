"""What a compiled program launches, read from XLA's optimized HLO: kernels, loops and matrix products.

A program's text is a list of computations. The entry calls loop bodies and fusions by name:

    %body.1 (param: (s32[], f32[64,256])) -> (s32[], f32[64,256]) {
      %fusion.2 = f32[64,1024]{1,0} fusion(%a, %b), kind=kCustom, calls=%fused_dot, metadata={op_name="jit(f)/while"}
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"^\w+\[([\d,]*)\]")
# What takes no time by itself, or is counted where it starts.
_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "partition-id", "opt-barrier"}


class Instruction(NamedTuple):
    """A line of a computation.

    Attributes:
      shape: the sizes of the result's axes; empty for scalars and tuples.
      rest: the line from the operands on, with the attributes.
    """

    name: str
    opcode: str
    shape: tuple[int, ...]
    operands: tuple[str, ...]
    rest: str
    is_root: bool

    def attribute(self, name: str) -> str | None:
        """Returns the name that an attribute such as `body=%name` gives."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found.group(1) if found else None

    def axes(self, name: str) -> tuple[int, ...]:
        """Returns the axes that an attribute such as `lhs_batch_dims={0,1}` lists."""
        found = re.search(rf"\b{name}={{([\d,]+)}}", self.rest)
        return tuple(map(int, found.group(1).split(","))) if found else ()

    @property
    def is_backward(self) -> bool:
        """Whether JAX made it by transposing, as its metadata says."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return bool(found and "transpose(" in found.group(1))

    @property
    def cycles(self) -> int:
        """The cycles that the TPU compiler expects it to take; 0 where it does not say."""
        found = re.search(r'"estimated_cycles":"?(\d+)', self.rest)
        return int(found.group(1)) if found else 0


class Product(NamedTuple):
    """A matrix product [m, k] x [k, n]; batch axes of several directions or of a split contraction multiply k."""

    m: int
    n: int
    k: int
    is_backward: bool


class Loop(NamedTuple):
    """A while loop.

    Attributes:
      trips: how often it runs its body; None if the program decides.
      is_innermost: whether it holds no other loop.
    """

    name: str
    trips: int | None
    is_backward: bool
    is_innermost: bool


class Launch(NamedTuple):
    """A kernel: an instruction outside fusions, how often it runs, and the loops around it, outermost first."""

    instruction: Instruction
    times: int
    loops: tuple[Loop, ...]
    products: tuple[Product, ...]


def _closing(text: str) -> int:
    """Returns the index of the bracket that closes the one at the start of a text."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return index
    raise ValueError(f"no closing bracket in {text[:80]!r}")


def _instruction(line: str) -> Instruction | None:
    found = _INSTRUCTION.match(line)
    if not found:
        return None
    root, name, right = found.groups()
    shape = _SHAPE.match(right)
    right = right[_closing(right) + 1 :].lstrip() if right.startswith("(") else right.partition(" ")[2]
    opcode, _, rest = right.partition("(")
    inside = rest[: _closing("(" + rest) - 1]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    sizes = tuple(int(size) for size in shape.group(1).split(",") if size) if shape else ()
    return Instruction(name, opcode, sizes, operands, rest, bool(root))


@dataclasses.dataclass(frozen=True)
class Program:
    """The computations of an optimized program.

    Attributes:
      computations: the instructions of each computation, by name.
      entry: the name of the computation that runs.
    """

    computations: dict[str, dict[str, Instruction]]
    entry: str

    @classmethod
    def parse(cls, text: str) -> "Program":
        """Reads the text of a compiled program."""
        computations: dict[str, dict[str, Instruction]] = {}
        entry = current = ""
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = header.group(2)
                computations[current] = {}
                entry = current if header.group(1) else entry
            elif current and (instruction := _instruction(line)):
                computations[current][instruction.name] = instruction
        return cls(computations, entry)

    @functools.cached_property
    def launches(self) -> list[Launch]:
        """Every kernel of the program."""
        return list(self._launches(self.entry, ()))

    @functools.cached_property
    def loops(self) -> list[Loop]:
        """Every loop of the program, each before those inside it."""
        return list(dict.fromkeys(loop for launch in self.launches for loop in launch.loops))

    def _launches(self, computation: str, loops: tuple[Loop, ...]) -> Iterator[Launch]:
        for instruction in self.computations[computation].values():
            if instruction.opcode == "while":
                body = instruction.attribute("body") or ""
                yield from self._launches(body, (*loops, self._loop(computation, instruction)))
            elif instruction.opcode in ("call", "conditional"):
                for called in self._called(instruction):
                    yield from self._launches(called, loops)
            elif instruction.opcode not in _FREE and not instruction.opcode.endswith("-done"):
                times = math.prod(loop.trips or 1 for loop in loops)
                products = tuple(self._products(computation, instruction))
                yield Launch(instruction, times, loops, products)

    def _called(self, instruction: Instruction) -> list[str]:
        """Returns the computations that an instruction runs, other than as a loop."""
        names = re.findall(r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)", instruction.rest)
        if branches := re.search(r"\bbranch_computations={([^}]*)}", instruction.rest):
            names += re.findall(r"%?([\w.\-]+)", branches.group(1))
        return [name for name in names if name in self.computations]

    def _loop(self, computation: str, instruction: Instruction) -> Loop:
        body = self.computations[instruction.attribute("body") or ""]
        known = re.search(r'"known_trip_count":{"n":"(\d+)"', instruction.rest)
        trips = int(known.group(1)) if known else self._counted_trips(computation, instruction)
        innermost = not any(each.opcode == "while" for each in body.values())
        return Loop(instruction.name, trips, instruction.is_backward, innermost)

    def _counted_trips(self, computation: str, loop: Instruction) -> int | None:
        """Returns the trips of a loop whose condition compares a counter with a constant; None for other loops."""
        condition = self.computations[loop.attribute("condition") or ""]
        compare = next(each for each in condition.values() if each.is_root)
        if compare.opcode != "compare" or "direction=LT" not in compare.rest:
            return None
        counter, bound = (condition[name] for name in compare.operands)
        if counter.opcode != "get-tuple-element":
            return None
        index = _index(counter)
        start = self._scalar(computation, self._element(computation, loop.operands[0], index))
        end = self._bound(computation, loop, bound)
        step = self._step(computation, loop, index)
        return None if start is None or end is None or not step else max(0, math.ceil((end - start) / step))

    def _bound(self, computation: str, loop: Instruction, bound: Instruction) -> int | None:
        """Returns the constant that a counter is compared with, where it is one or enters the loop as one."""
        if bound.opcode == "get-tuple-element":
            return self._invariant(computation, loop, _index(bound))
        return self._scalar(loop.attribute("condition") or "", bound)

    def _step(self, computation: str, loop: Instruction, index: int) -> int | None:
        """Returns what a loop adds to its counter."""
        body_name = loop.attribute("body") or ""
        body = self.computations[body_name]
        root = next(each for each in body.values() if each.is_root)
        update = body[root.operands[index]]
        while update.opcode in ("copy", "bitcast"):
            update = body[update.operands[0]]
        if update.opcode != "add":
            return None
        for name in update.operands:
            addend = body[name]
            if addend.opcode == "get-tuple-element" and _index(addend) != index:
                return self._invariant(computation, loop, _index(addend))
            if (value := self._scalar(body_name, addend)) is not None:
                return value
        return None

    def _invariant(self, computation: str, loop: Instruction, index: int) -> int | None:
        """Returns the constant that a loop carries unchanged at an index."""
        body = self.computations[loop.attribute("body") or ""]
        root = next(each for each in body.values() if each.is_root)
        carried = body[root.operands[index]]
        if carried.opcode != "get-tuple-element" or _index(carried) != index:
            return None
        return self._scalar(computation, self._element(computation, loop.operands[0], index))

    def _element(self, computation: str, tuple_name: str, index: int) -> Instruction | None:
        made = self.computations[computation].get(tuple_name)
        return self.computations[computation].get(made.operands[index]) if made and made.opcode == "tuple" else None

    def _scalar(self, computation: str, instruction: Instruction | None) -> int | None:
        """Returns the value of an integer constant, through copies."""
        while instruction and instruction.opcode in ("copy", "bitcast") and instruction.operands:
            instruction = self.computations[computation].get(instruction.operands[0])
        found = instruction and instruction.opcode == "constant" and re.match(r"(-?\d+)\)", instruction.rest)
        return int(found.group(1)) if found else None

    def _products(self, computation: str, instruction: Instruction) -> Iterator[Product]:
        """Finds the matrix products of a kernel, inside fusions too."""
        is_library_call = instruction.opcode == "custom-call" and "gemm" in instruction.rest
        if is_library_call or instruction.opcode in ("dot", "convolution"):
            yield self._product(computation, instruction)
        elif instruction.opcode == "fusion":
            for called in self._called(instruction):
                for each in self.computations[called].values():
                    yield from self._products(called, each)

    def _product(self, computation: str, instruction: Instruction) -> Product:
        names = self.computations[computation]
        left, right = (names[name].shape for name in instruction.operands[:2])
        if instruction.opcode == "convolution":
            m, n, k = _convolution_sizes(instruction, left, right)
        else:
            m, n, k = _dot_sizes(instruction, left, right)
        return Product(m, n, k, instruction.is_backward)


def _index(element: Instruction) -> int:
    """Returns the index of a get-tuple-element."""
    found = re.search(r"\bindex=(\d+)", element.rest)
    assert found
    return int(found.group(1))


def _dot_sizes(instruction: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, int, int]:
    """Returns m, n, k of a dot, or of a call of a library, whose configuration names the same axes."""
    taken = []
    for side, shape in (("lhs", left), ("rhs", right)):
        axes = instruction.axes(f"{side}_contracting_dims"), instruction.axes(f"{side}_batch_dims")
        if not axes[0]:  # in the configuration of a library's call
            lists = (re.search(rf'"{side}_{kind}_dimensions":\[([^\]]*)\]', instruction.rest) for kind in _KINDS)
            axes = tuple(tuple(map(int, re.findall(r"\d+", each.group(1)))) if each else () for each in lists)  # type: ignore[assignment]
        contracted, batch = (math.prod(shape[axis] for axis in kind) for kind in axes)
        taken.append((contracted, batch, math.prod(shape) // contracted // batch))
    (k, batch, m), (_, _, n) = taken
    return m, n, k * batch


_KINDS = ("contracting", "batch")


def _convolution_sizes(instruction: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, int, int]:
    """Returns m, n, k of a product that is written as a convolution, where `bf_io->bf` labels the axes."""
    found = re.search(r"\bdim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    assert found
    left_labels, right_labels, _ = found.groups()
    m, n = left[left_labels.index("b")], right[right_labels.index("o")]
    return m, n, math.prod(right) // n
