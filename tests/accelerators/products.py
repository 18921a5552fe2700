"""Matrix products in compiled programs, however a compiler writes them."""

import math
import re
from typing import NamedTuple

from accelerators.syntax import Computation, Instruction


class Product(NamedTuple):
    """A matrix product [m, k] x [k, n].

    Attributes:
      k: the length of the sum, times batch axes: those of two directions, or of a sum in parts.
      is_backward: whether it was made by differentiating backward.
    """

    m: int
    n: int
    k: int
    is_backward: bool


def product_of(computation: Computation, instruction: Instruction) -> Product | None:
    """Returns the product that an instruction computes, if it computes one.

    It is a dot, a convolution whose batch are the rows (on TPUs), or a call of a library.
    """
    if instruction.opcode not in ("dot", "convolution", "custom-call"):
        return None
    if instruction.opcode == "custom-call" and "gemm" not in instruction.attribute("custom_call_target"):
        return None
    left, right = (computation[name].shape for name in instruction.operands[:2])
    if instruction.opcode == "convolution":
        labels = re.search(r"\bdim_labels=(\w+)_(\w+)->", instruction.rest)
        assert labels
        m, n = left[labels.group(1).index("b")], right[labels.group(2).index("o")]
        return Product(m, n, math.prod(right) // n, instruction.is_backward)
    contracted, batch = (_axes(instruction, kind) for kind in ("contracting", "batch"))
    m, n = (
        math.prod(size for axis, size in enumerate(shape) if axis not in contracted[side] + batch[side])
        for side, shape in enumerate((left, right))
    )
    return Product(m, n, math.prod(right) // n, instruction.is_backward)


def _axes(instruction: Instruction, kind: str) -> list[list[int]]:
    """Returns the axes of this kind of both operands: an attribute of a dot, a list in the options of a library."""
    found = (
        re.search(rf'\b{side}_{kind}_(?:dims={{|dimensions":\[)([^\]}}]*)', instruction.rest) for side in ("lhs", "rhs")
    )
    return [[int(axis) for axis in re.findall(r"\d+", each.group(1))] if each else [] for each in found]
