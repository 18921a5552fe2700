"""What is counted in a compiled program, and the graphs that a GPU makes of its loops."""

import functools
import pathlib
import re
import tempfile
import time
from typing import Any, NamedTuple

import jax

from accelerators import targets
from accelerators.cases import GATES, B, Case, D, H, program
from accelerators.hlo import Launch, Product, Program


class Pass(NamedTuple):
    """What one pass over time costs: the forward one, or the backward one of a training step.

    Attributes:
      kernels: launches in loops for each of the steps that are in loops.
      share: the part of the steps that is in loops, by their recurrent products.
      cycles: the TPU compiler's estimate for a step in a loop; 0 on GPUs, whose compiler gives none.
    """

    kernels: float
    share: float
    cycles: int


class Counts(NamedTuple):
    """What is counted in a program.

    Attributes:
      passes: forward, then for training backward.
      launches: all kernels of the program.
      loops: how many loops it has.
      unknown_trips: how many of them have a trip count that the compiler does not know.
      weight_gradients: how many matrix products inside loops have the shape of a weight.
      ungraphed: how many innermost loops have a body that is not one CUDA graph; 0 on TPUs.
      temporaries: bytes.
      seconds: of tracing, lowering and compiling.
    """

    passes: tuple[Pass, ...]
    launches: int
    loops: int
    unknown_trips: int
    weight_gradients: int
    ungraphed: int
    temporaries: int
    seconds: float


@functools.lru_cache(maxsize=4)
def count(case: Case) -> Counts:
    """Compiles a case and counts."""
    device = targets.device(case.target)
    made = program(case)
    arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), made.arguments)
    with tempfile.TemporaryDirectory(prefix="jaxpack-thunks-") as folder:
        # XLA writes what it launches, and in which graphs, to files only.
        options: dict[str, Any] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": False}
        start = time.perf_counter()
        lowered = jax.jit(made.run).trace(*arguments).lower()
        compiled = lowered.compile(options if case.target in targets.GPUS else None)
        seconds = time.perf_counter() - start
        ungraphed = sum(1 for body in loop_bodies(pathlib.Path(folder)) if body != ["kCommandBuffer"])
    parsed = Program.parse(compiled.as_text())
    return Counts(
        passes=tuple(_pass(case, parsed, is_backward) for is_backward in (False, True)[: 1 + case.training]),
        launches=sum(launch.times for launch in parsed.launches),
        loops=len(parsed.loops),
        unknown_trips=sum(loop.trips is None for loop in parsed.loops),
        weight_gradients=sum(
            is_weight_gradient(case, product) for each in parsed.launches if each.loops for product in each.products
        ),
        ungraphed=ungraphed,
        temporaries=compiled.memory_analysis().temp_size_in_bytes,
        seconds=seconds,
    )


def _pass(case: Case, parsed: Program, is_backward: bool) -> Pass:
    """Sums up a pass. A loop belongs to the pass of the outermost loop around it."""

    def belongs(launch: Launch) -> bool:
        return bool(launch.loops) and launch.loops[0].is_backward == is_backward

    products = [
        (launch.times if launch.loops else 0, launch.times)
        for launch in parsed.launches
        for product in launch.products
        if is_recurrent(case, product) and product.is_backward == is_backward
    ]
    inside, every = (sum(column) for column in zip(*products, strict=True)) if products else (0, 0)
    share = inside / every if every else 0.0
    looped = [launch for launch in parsed.launches if belongs(launch)]
    steps = share * case.steps or 1
    kernels = sum(launch.times for launch in looped) / steps
    cycles = sum(launch.times * launch.instruction.cycles for launch in looped) / steps
    return Pass(round(kernels, 2), round(share, 3), round(cycles))


def is_recurrent(case: Case, product: Product) -> bool:
    """Whether a product takes the rows of one step to the gates, or their cotangents back to the state."""
    gates = _gates(case)
    rows, width = sorted((product.m, product.n))
    return rows <= B and width in gates | {D + H} and product.k in gates | {case.directions * k for k in gates}


def is_weight_gradient(case: Case, product: Product) -> bool:
    """Whether a product has the shape of a weight, and sums over rows or cells."""
    inputs, gates = {D, H, D + H}, _gates(case)
    has_shape = any(a in inputs and b in gates for a, b in ((product.m, product.n), (product.n, product.m)))
    features = {number * k for number in (1, case.directions) for k in inputs | gates}
    return has_shape and (product.k <= case.directions * B or product.k not in features)


def _gates(case: Case) -> set[int]:
    """Returns the widths of one gate, two gates and so on."""
    return {number * H for number in range(1, GATES[case.layer] + 1)}


def loop_bodies(folder: pathlib.Path) -> list[list[str]]:
    """Returns the kinds of what each innermost loop of a GPU launches, from the files that XLA wrote.

    A loop is written with its body indented, and a graph with its kernels:

        018: kWhile         [prev=000 (1) | next=000 (1)]
        condition:
            019: kCustomKernel ...
          body:
            000: kCommandBuffer [source | sink]
                020: kCustomKernel ...
    """
    text = "".join(path.read_text() for path in folder.glob("*thunk_sequence_after_thunk_passes.txt"))
    bodies = []
    for start in re.finditer(r"^( *)body:$", text, re.MULTILINE):
        after = re.compile(rf"((?:^ {{{len(start.group(1)) + 1},}}.*\n)*)", re.MULTILINE).match(text, start.end() + 1)
        thunks = re.findall(r"^( *)\d+: (k\w+)", after.group(1) if after else "", re.MULTILINE)
        if "kWhile" not in [kind for _, kind in thunks]:
            outermost = min((len(indent) for indent, _ in thunks), default=0)
            bodies.append([kind for indent, kind in thunks if len(indent) == outermost])
    return bodies
