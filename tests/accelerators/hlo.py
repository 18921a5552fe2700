"""What a compiled program launches, read from XLA's optimized HLO: kernels, loops and matrix products.

A program's text is a list of computations. The entry calls loop bodies and fusions by name:

    %body.1 (param: (s32[], f32[64,256])) -> (s32[], f32[64,256]) {
      %fusion.2 = f32[64,1024]{1,0} fusion(%a, %b), kind=kCustom, calls=%fused_dot, metadata={op_name="jit(f)/while"}
"""

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from accelerators.products import Product, product_of
from accelerators.syntax import Computation, Instruction, parse
from accelerators.trips import trips

# What takes no time by itself, or is counted where it starts.
_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "partition-id", "opt-barrier"}


class Loop(NamedTuple):
    """A while loop.

    Attributes:
      trips: how often it runs its body; None if the program decides.
      is_backward: whether it was made by differentiating backward.
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


class Program:
    """A compiled program."""

    def __init__(self, text: str) -> None:
        self._computations, self._entry = parse(text)

    @functools.cached_property
    def launches(self) -> list[Launch]:
        """Every kernel; of a conditional those of all branches, of a loop of unknown trips those of one trip."""
        return list(self._launches(self._entry, ()))

    @functools.cached_property
    def loops(self) -> list[Loop]:
        """Every loop that launches something, each before those inside it."""
        return list(dict.fromkeys(loop for launch in self.launches for loop in launch.loops))

    def _launches(self, computation: Computation, loops: tuple[Loop, ...]) -> Iterator[Launch]:
        for instruction in computation.values():
            if instruction.opcode == "while":
                body = self._computations[instruction.attribute("body")]
                yield from self._launches(body, (*loops, self._loop(computation, instruction, body)))
            elif instruction.opcode in ("call", "conditional"):
                for called in self._called(instruction):
                    yield from self._launches(called, loops)
            elif instruction.opcode not in _FREE and not instruction.opcode.endswith("-done"):
                times = math.prod(loop.trips or 1 for loop in loops)
                yield Launch(instruction, times, loops, tuple(self._products(computation, instruction)))

    def _loop(self, computation: Computation, loop: Instruction, body: Computation) -> Loop:
        condition = self._computations[loop.attribute("condition")]
        is_innermost = all(each.opcode != "while" for each in body.values())
        return Loop(loop.name, trips(loop, computation, condition, body), loop.is_backward, is_innermost)

    def _called(self, instruction: Instruction) -> list[Computation]:
        """Returns the computations that an instruction runs, other than as a loop."""
        names = re.findall(r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)", instruction.rest)
        if branches := re.search(r"\bbranch_computations={([^}]*)}", instruction.rest):
            names += re.findall(r"%?([\w.\-]+)", branches.group(1))
        return [self._computations[name] for name in names]

    def _products(self, computation: Computation, instruction: Instruction) -> Iterator[Product]:
        """Finds the matrix products of a kernel, inside fusions too."""
        if instruction.opcode == "fusion":
            for called in self._called(instruction):
                for each in called.values():
                    yield from self._products(called, each)
        elif product := product_of(computation, instruction):
            yield product
