"""How loops, products and graphs are read, on small programs and texts whose counts are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from accelerators.cases import B, Case, D, H
from accelerators.counts import innermost_bodies, is_recurrent, is_weight_gradient
from accelerators.hlo import Program
from accelerators.products import Product

# As compilers for TPUs write a loop: six trips of 2 from 4, both carried as constants, with a product in a fusion.
COUNTING = """
HloModule counting

%fused (a: f32[2,64,256], b: f32[2,256,1024]) -> f32[2,64,1024] {
  %a = f32[2,64,256]{2,1,0:T(8,128)} parameter(0)
  %b = f32[2,256,1024]{2,1,0} parameter(1)
  ROOT %product = f32[2,64,1024]{2,1,0} convolution(%a, %b), window={size=2}, dim_labels=0bf_0io->0bf
}

%body (carried: (s32[], s32[], s32[], f32[2,64,256])) -> (s32[], s32[], s32[], f32[2,64,256]) {
  %carried = (s32[], s32[], s32[], /*index=3*/f32[2,64,256]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carried), index=0
  %two = s32[] get-tuple-element(%carried), index=1
  %end = s32[] get-tuple-element(%carried), index=2
  %h = f32[2,64,256]{2,1,0} get-tuple-element(%carried), index=3
  %w = f32[2,256,1024]{2,1,0} constant({...})
  %gates = f32[2,64,1024]{2,1,0} fusion(%h, %w), kind=kOutput, calls=%fused, backend_config={"estimated_cycles":"90"}
  %next_h = f32[2,64,256]{2,1,0} slice(%gates), slice={[0:2], [0:64], [0:256]}, backend_config={"estimated_cycles":"7"}
  %next = s32[] add(%i, %two)
  ROOT %out = (s32[], s32[], s32[], /*index=3*/f32[2,64,256]{2,1,0}) tuple(%next, %two, %end, %next_h)
}

%condition (carried.1: (s32[], s32[], s32[], f32[2,64,256])) -> pred[] {
  %carried.1 = (s32[], s32[], s32[], /*index=3*/f32[2,64,256]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%carried.1), index=0
  %end.1 = s32[] get-tuple-element(%carried.1), index=2
  ROOT %less = pred[] compare(%i.1, %end.1), direction=LT
}

ENTRY %main (x: f32[2,64,256]) -> (s32[], s32[], s32[], f32[2,64,256]) {
  %x = f32[2,64,256]{2,1,0} parameter(0)
  %four = s32[] constant(4)
  %start = s32[] copy(%four)
  %step = s32[] constant(2)
  %stop = s32[] constant(15)
  %first = (s32[], s32[], s32[], /*index=3*/f32[2,64,256]{2,1,0}) tuple(%start, %step, %stop, %x)
  ROOT %loop = (s32[], s32[], s32[], /*index=3*/f32[2,64,256]{2,1,0}) while(%first), condition=%condition, body=%body
}
"""


def compiled(run, *arguments):
    return Program(jax.jit(run).lower(*arguments).compile().as_text() or "")


def test_a_counting_loop_has_its_trips_and_its_body_is_launched_as_often():
    program = Program(COUNTING)
    (loop,) = program.loops
    assert loop.trips == 6  # 4, 6, ..., 14
    launched = [(each.instruction.name, each.times, each.instruction.cycles) for each in program.launches if each.loops]
    assert launched == [("gates", 6, 90), ("next_h", 6, 7), ("next", 6, 0)]
    assert [product for each in program.launches for product in each.products] == [Product(64, 1024, 512, False)]


@pytest.mark.parametrize(
    ("known", "changed"),
    [
        ("direction=LT", "direction=NE"),
        ("s32[] constant(15)", "s32[] parameter(1)"),
        ("add(%i, %two)", "multiply(%i, %two)"),
        ("tuple(%next, %two, %end,", "tuple(%next, %next, %end,"),
    ],
)
def test_the_trips_of_a_loop_that_does_not_count_up_to_a_constant_are_unknown(known, changed):
    assert COUNTING.count(known) == 1
    (loop,) = Program(COUNTING.replace(known, changed)).loops
    assert loop.trips is None


def test_a_compiled_scan_and_its_derivative():
    def run(w, xs):
        return jax.lax.scan(lambda h, x: (jnp.tanh(x + h @ w), None), jnp.zeros_like(xs[0]), xs)[0].sum()

    w, xs = np.ones((16, 16), np.float32), np.ones((5, 3, 16), np.float32)
    program = compiled(jax.grad(run), w, xs)
    products = [(each.loops[0].trips, product) for each in program.launches for product in each.products if each.loops]
    forward, backward, gradient = Product(3, 16, 16, False), Product(3, 16, 16, True), Product(16, 16, 3, True)
    assert sorted(products) == sorted((5, each) for each in (forward, backward, gradient))
    assert [loop.is_backward for loop in program.loops] == [False, True]


def test_a_compiled_loop_whose_end_is_computed_has_unknown_trips():
    program = compiled(lambda x, n: jax.lax.fori_loop(0, n, lambda _, x: jnp.sin(x), x), np.ones(3, np.float32), 4)
    assert [loop.trips for loop in program.loops] == [None]


def test_products_of_steps_and_gradients_of_weights_are_told_apart():
    case = Case("h100", "LSTM", "padded", directions=2)
    steps = [Product(B, 4 * H, H, False), Product(B, 4 * H, 2 * H, False), Product(B, H, 4 * H, True)]
    gradients = [Product(D, 4 * H, B, True), Product(4 * H, H, 2 * B, True), Product(D + H, 4 * H, 100 * B, True)]
    others = [Product(128 * B, 4 * H, D, False), Product(128 * B, 4 * H, H, True), Product(128 * B, D, 4 * H, True)]
    each = [*steps, *gradients, *others]
    assert [product for product in each if is_recurrent(case, product)] == steps
    assert [product for product in each if is_weight_gradient(case, product)] == gradients


def test_graphs_of_innermost_loops_are_found():
    written = """\
000: kCommandBuffer [source       | next=018 (1)]
    001: kCopy         [source        | next=002 (1)] kCopy
018: kWhile         [prev=000 (1) | next=000 (1)]
condition:
    019: kCustomKernel [source | sink] loop_compare_fusion
  body:
    000: kCommandBuffer [source | sink]
        020: kCustomKernel [source        | next=021 (1)] gemm
        021: kCustomKernel [prev=020 (1)  | sink] tanh
022: kWhile         [prev=018 (1) | sink]
condition:
    023: kCustomKernel [source | sink] loop_compare_fusion
  body:
    000: kCommandBuffer [source | next=024]
        025: kCustomKernel [source | sink] gemm
    024: kCopy [prev=000 | sink]
"""
    assert innermost_bodies(written) == [["kCommandBuffer"], ["kCommandBuffer", "kCopy"]]
