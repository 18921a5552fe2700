"""How often a loop runs its body."""

import math
import re
from typing import NamedTuple

from accelerators.syntax import Computation, Instruction


def trips(loop: Instruction, around: Computation, condition: Computation, body: Computation) -> int | None:
    """Returns the trips of a while loop; None if they depend on what the program computes.

    The compiler for GPUs states them. For TPUs they are read from a condition that compares a counter with a constant.
    """
    known = re.search(r'"known_trip_count":{"n":"(\d+)"', loop.rest)
    if known:
        return int(known.group(1))
    compare = condition.root
    if compare.opcode != "compare" or compare.attribute("direction") != "LT":
        return None
    counter, bound = (condition[name] for name in compare.operands)
    if counter.element is None:
        return None
    carried = _Carried(around, around[loop.operands[0]], body)
    start = carried.initial(counter.element)
    end = condition.constant(bound.name) if bound.element is None else carried.invariant(bound.element)
    step = carried.step(counter.element)
    return None if start is None or end is None or not step else max(0, math.ceil((end - start) / step))


class _Carried(NamedTuple):
    """The tuple that a loop carries.

    Attributes:
      around: the computation that holds the loop.
      first: the tuple that enters the loop.
      body: the loop's body, whose root is the next tuple.
    """

    around: Computation
    first: Instruction
    body: Computation

    def initial(self, index: int) -> int | None:
        """Returns the element that enters the loop, if it is a constant."""
        return self.around.constant(self.first.operands[index]) if self.first.opcode == "tuple" else None

    def invariant(self, index: int) -> int | None:
        """Returns an element that is a constant and stays as it is."""
        following = self.body.through_copies(self.body.root.operands[index])
        return self.initial(index) if following.element == index else None

    def step(self, index: int) -> int | None:
        """Returns the constant that the body adds to an element."""
        update = self.body.through_copies(self.body.root.operands[index])
        if update.opcode != "add":
            return None
        addends = [self.body.through_copies(name) for name in update.operands]
        values = [
            self.body.constant(each.name) if each.element is None else self.invariant(each.element)
            for each in addends
            if each.element != index
        ]
        return values[0] if len(values) == 1 else None
