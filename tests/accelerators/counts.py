"""What is counted in a compiled program."""

import functools
import hashlib
import pathlib
import re
import tempfile
import time
from typing import Any, NamedTuple

import jax

from accelerators import targets
from accelerators.cases import GATES, B, Case, D, H, program
from accelerators.hlo import Program
from accelerators.products import Product


class Counts(NamedTuple):
    """What is counted in a program. Tuples hold the forward pass and, for training, the backward pass.

    Attributes:
      kernels: launches inside loops, for each step that is in a loop.
      share: the part of the steps that is in loops, by their recurrent products.
      cycles: the TPU compiler's estimate for a step in a loop; 0 on GPUs, whose compiler gives none.
      launches: all kernels of the program, as often as they run.
      loops: how many loops there are.
      innermost: how many of them hold no other loop.
      graphs: how many innermost loops have a body that is one CUDA graph.
      unknown_trips: how many loops have a trip count that the compiler does not know.
      weight_gradients: how many matrix products inside loops make the gradient of a weight.
      temporaries: bytes.
      seconds: CPU seconds of tracing, lowering and compiling.
      digest: of the program that the compiler is given, as `digest` returns it.
    """

    kernels: tuple[float, ...]
    share: tuple[float, ...]
    cycles: tuple[int, ...]
    launches: int
    loops: int
    innermost: int
    graphs: int
    unknown_trips: int
    weight_gradients: int
    temporaries: int
    seconds: float
    digest: str


def lower(case: Case) -> jax.stages.Lowered:
    """Returns the program of a case, as its compiler is given it."""
    device = targets.device(case.target)
    made = program(case)
    arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), made.arguments)
    return jax.jit(made.run).trace(*arguments).lower()


def digest(case: Case, lowered: jax.stages.Lowered) -> str:
    """Returns a digest of a lowered program and of what is known of its target: with the same one counts are the same.

    The text has no places in the source, so it changes only if what is computed does.
    """
    return hashlib.sha256((targets.description(case.target) + lowered.as_text()).encode()).hexdigest()[:16]


@functools.cache
def count(case: Case) -> Counts:
    """Compiles a case and counts."""
    targets.device(case.target)  # loads the compiler, which is not timed
    with tempfile.TemporaryDirectory(prefix="jaxpack-graphs-") as folder:
        # XLA says in files alone what it puts into graphs.
        options: dict[str, Any] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": False}
        start = time.process_time()
        lowered = lower(case)
        compiled: Any = lowered.compile(options if case.target in targets.GPUS else None)
        seconds = time.process_time() - start
        written = "".join(path.read_text() for path in pathlib.Path(folder).glob("*_after_thunk_passes.txt"))
    parsed = Program(compiled.as_text())
    passes = [_count_pass(case, parsed, is_backward) for is_backward in (False, True)[: 1 + case.training]]
    kernels, share, cycles = zip(*passes, strict=True)
    in_loops = [product for launch in parsed.launches if launch.loops for product in launch.products]
    return Counts(
        kernels=kernels,
        share=share,
        cycles=cycles,
        launches=sum(launch.times for launch in parsed.launches),
        loops=len(parsed.loops),
        innermost=sum(loop.is_innermost for loop in parsed.loops),
        graphs=sum(body == ["kCommandBuffer"] for body in innermost_bodies(written)),
        unknown_trips=sum(loop.trips is None for loop in parsed.loops),
        weight_gradients=sum(is_weight_gradient(case, product) for product in in_loops),
        temporaries=compiled.memory_analysis().temp_size_in_bytes,
        seconds=round(seconds, 1),
        digest=digest(case, lowered),
    )


def renewed(case: Case, known: Counts | None) -> Counts:
    """Returns the known counts of a case if they are of the same lowered program; otherwise compiles it and counts."""
    return known if known and known.digest == digest(case, lower(case)) else count(case)


def _count_pass(case: Case, parsed: Program, is_backward: bool) -> tuple[float, float, int]:
    """Returns kernels and the share of steps, and cycles, of one pass. A loop belongs to that of its outermost loop."""
    products = [
        launch
        for launch in parsed.launches
        for product in launch.products
        if is_recurrent(case, product) and product.is_backward == is_backward
    ]
    every = sum(launch.times for launch in products)
    if not every:
        raise ValueError(f"{case.name} has no product of one step {'backward' if is_backward else 'forward'}.")
    share = sum(launch.times for launch in products if launch.loops) / every
    looped = [each for each in parsed.launches if each.loops and each.loops[0].is_backward == is_backward]
    steps = case.steps * share or 1
    kernels = sum(launch.times for launch in looped) / steps
    cycles = sum(launch.times * launch.instruction.cycles for launch in looped) / steps
    return round(kernels, 2), round(share, 3), round(cycles)


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


def innermost_bodies(written: str) -> list[list[str]]:
    """Returns the kinds of what each innermost loop of a GPU launches, from what XLA writes about a program.

    A loop is written with its body indented, and a graph with its kernels:

        018: kWhile         [prev=000 (1) | next=000 (1)]
        condition:
            019: kCustomKernel ...
          body:
            000: kCommandBuffer [source | sink]
                020: kCustomKernel ...
    """
    bodies = []
    for start in re.finditer(r"^( *)body:$", written, re.MULTILINE):
        deeper = re.compile(rf"(?:^ {{{len(start.group(1)) + 1},}}.*\n?)*", re.MULTILINE)
        block = deeper.match(written, start.end() + 1)
        found = re.findall(r"^( *)\d+: (k\w+)", block.group() if block else "", re.MULTILINE)
        if "kWhile" not in [kind for _, kind in found]:
            outermost = min((len(indent) for indent, _ in found), default=0)
            bodies.append([kind for indent, kind in found if len(indent) == outermost])
    return bodies
