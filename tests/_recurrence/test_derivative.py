"""The own derivative on every schedule beside the plain scan's, and what its loops cost."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from jaxpack import (
    GRU,
    LSTM,
    MGU,
    RNN,
    BucketPlan,
    IndRNN,
    LayerNormGRU,
    LayerNormLSTM,
    PeepholeLSTM,
    Regularization,
    pack_padded_sequence,
    plan_exact,
    plan_padded,
    plan_rows,
)
from jaxpack._layers.stack import Stack, run_stack
from jaxpack._packed.inputs import batch_plan
from jaxpack._packed.layout import lay_out
from jaxpack._packed.resets import Resets
from jaxpack._recurrence.derivative import CPU, GPU, KEPT_BYTES, TPU, Schedules

F, H, B = 3, 4, 3
LENGTHS = [9, 0, 6]
PLANS = {
    "stairs": BucketPlan((4, 10), (3, 2)),
    "none": None,
    "rows": BucketPlan((11, 13), (2, 1), ((0, 9), (0,))),
}
LAYERS = {
    "tanh": RNN(F, H),
    "relu": RNN(F, H, nonlinearity="relu"),
    "lstm": LSTM(F, H),
    "projected": LSTM(F, H, proj_size=2),
    "gru": GRU(F, H),
}
each_layer = pytest.mark.parametrize("name", LAYERS)
VARIANTS = {
    "gru before": GRU(F, H, reset_after=False),
    "mgu": MGU(F, H),
    "mgu none": MGU(F, H, reset=None),
    "ind_rnn": IndRNN(F, H),
    "peephole": PeepholeLSTM(F, H),
    "layer_norm_lstm": LayerNormLSTM(F, H),
    "layer_norm_gru": LayerNormGRU(F, H),
}
# Chunks of 7 cells do not divide the buckets, so that windows overlap; 1 is a step each; None is a bucket each.
SCHEDULES = {
    "small chunks": CPU._replace(chunk_cells=7),
    "single steps": CPU._replace(chunk_cells=1),
    "cpu": CPU,
    "accelerator": GPU,
    "tpu": TPU,
}


def directions_of(schedule):
    """How many directions a schedule is tested with: accelerators run both in one loop, CPUs one after the other."""
    return 2 if schedule in ("accelerator", "tpu") else 1


def operands(name, plan, num_directions, poison):
    """Parameters, packed data, states, and cotangents of outputs and states; slack holds the poison."""
    cell, rng = (LAYERS | VARIANTS)[name].cell, np.random.default_rng(0)
    params = [
        {key: rng.uniform(-0.5, 0.5, shape) for key, shape in cell.shapes(F, bias=True).items()}
        for _ in range(num_directions)
    ]
    batch = oracles.random_batch(LENGTHS, F, extra=2)
    if PLANS[plan] is None:
        packed = lay_out(batch, jnp.array(LENGTHS), batch_plan(*batch.shape[:2]), sort=False)
    else:
        packed = pack_padded_sequence(batch, LENGTHS, batch_first=True, plan=PLANS[plan])
    packed = packed.replace(data=jnp.where(packed.mask[:, None], packed.data, poison))
    states, dstates = (
        jax.tree.map(lambda size: rng.standard_normal((num_directions, B, size)), cell.state_sizes) for _ in range(2)
    )
    doutput = rng.standard_normal((len(packed.data), num_directions * cell.output_size))
    return params, packed, states, (jnp.where(packed.mask[:, None], doutput, poison), dstates)


@functools.cache
def program(name, plan, num_directions, schedule=None, optimized=False, with_resets=False, regularized=""):
    """Returns outputs, final states and pulled-back cotangents, on a schedule or by the plain scan."""
    every = Schedules(*[SCHEDULES[schedule]] * 3) if schedule else Schedules()
    cell, planned = (LAYERS | VARIANTS)[name].cell, PLANS[plan] is not None
    stack = Stack(cell, num_directions, planned=planned, forward_mode=not schedule, schedules=every)
    if regularized:
        zoneout: Any = (0.3, 0.4) if len(jax.tree.leaves(cell.state_sizes)) == 2 else 0.3
        stack = stack._replace(regularization=Regularization(recurrent_dropout=0.4, zoneout=zoneout))
    key = jax.random.key(0) if regularized == "training" else None

    @jax.jit
    def run(params, packed, states, cotangents):
        resets = Resets(jnp.arange(len(packed.data)) % 3 == 1) if with_resets else None

        def apply(params, data, states):
            return run_stack(stack, params, packed.replace(data=data), states, key, resets)

        values, vjp = jax.vjp(apply, params, packed.data, states)
        return values, vjp(cotangents)

    return run


def pulled_back(name, plan, num_directions, schedule=None, poison=0.0, **options):
    """Runs a program. Those for tests marked `optimized` are apart from the others."""
    return program(name, plan, num_directions, schedule, **options)(*operands(name, plan, num_directions, poison))


def assert_close(ours, theirs, tolerance=1e-12):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("schedule", "name"),
    [*[("small chunks", name) for name in LAYERS], ("single steps", "projected"), ("cpu", "gru")],
)
def test_equals_autodiff_through_the_plain_scan(name, schedule):
    case = (name, "stairs", 1)
    assert_close(pulled_back(*case, schedule), pulled_back(*case))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["projected", "gru"])  # whose derivatives differ most
@pytest.mark.optimized
def test_equals_autodiff_where_programs_are_optimized(name):
    case = (name, "stairs", 1)
    assert_close(pulled_back(*case, "small chunks", optimized=True), pulled_back(*case, optimized=True))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["relu", "lstm", "projected", "gru"])  # tanh is relu with another slope
def test_equals_autodiff_through_the_plain_scan_as_accelerators_run(name):
    case = (name, "stairs", 2)
    assert_close(pulled_back(*case, "accelerator"), pulled_back(*case))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("plan", ["rows", "none"])
@pytest.mark.parametrize("name", ["relu", "projected", "gru"])  # one of each kind of state and product
def test_equals_autodiff_under_other_plans(name, plan):
    assert_close(pulled_back(name, plan, 1, "small chunks"), pulled_back(name, plan, 1))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "plan", "schedule"),
    [*((name, "rows", "small chunks") for name in VARIANTS), ("layer_norm_lstm", "stairs", "accelerator")],
)
def test_further_cells_equal_autodiff_with_resets_and_nan_in_slack(name, plan, schedule):
    case = (name, plan, directions_of(schedule))
    ours = pulled_back(*case, schedule, poison=np.nan, with_resets=True)
    assert_close(ours, pulled_back(*case, with_resets=True))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "plan", "schedule", "regularized"),
    [
        ("projected", "rows", "small chunks", "training"),
        ("gru", "none", "small chunks", "training"),
        ("lstm", "stairs", "accelerator", "training"),
        ("tanh", "stairs", "small chunks", "evaluation"),
    ],
)
def test_masks_of_the_recurrence_equal_autodiff(name, plan, schedule, regularized):
    case, options = (name, plan, directions_of(schedule)), {"with_resets": True, "regularized": regularized}
    assert_close(pulled_back(*case, schedule, poison=np.nan, **options), pulled_back(*case, **options))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("divisors", [(1,), (2,), (1, 3, 8)])
def test_every_deal_equals_autodiff(divisors, monkeypatch):
    schedule = CPU._replace(chunk_cells=7, divisors=divisors)
    monkeypatch.setitem(SCHEDULES, f"deals {divisors}", schedule)
    case = ("projected", "none", 1)
    assert_close(pulled_back(*case, f"deals {divisors}"), pulled_back(*case))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("plan", "schedule"),
    [("rows", "accelerator"), ("none", "accelerator"), ("stairs", "tpu"), ("rows", "tpu"), ("none", "tpu")],
)
def test_equals_autodiff_under_other_plans_as_accelerators_run(plan, schedule):
    assert_close(pulled_back("projected", plan, 2, schedule), pulled_back("projected", plan, 2))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "plan", "schedule"),
    [
        ("projected", "stairs", "small chunks"),
        ("gru", "rows", "small chunks"),
        ("projected", "none", "small chunks"),
        ("projected", "stairs", "accelerator"),
        ("gru", "rows", "accelerator"),
        ("projected", "rows", "tpu"),
    ],
)
def test_equals_autodiff_with_resets(name, plan, schedule):
    case = (name, plan, directions_of(schedule))
    assert_close(pulled_back(*case, schedule, with_resets=True), pulled_back(*case, with_resets=True))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("plan", "schedule"),
    [("stairs", "accelerator"), ("rows", "small chunks"), ("none", "small chunks")],
)
@pytest.mark.parametrize("name", ["relu", "projected", "gru"])
def test_nan_in_slack_of_inputs_and_cotangents_is_inert(name, plan, schedule):
    case = (name, plan, directions_of(schedule), schedule)
    assert_close(pulled_back(*case, poison=np.nan), pulled_back(*case), 0)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("name", "plan"), [("gru", "rows"), ("lstm", "none")])
def test_reverse_over_reverse_is_the_plain_scans(name, plan):
    layer = LAYERS[name]
    params, batch = oracles.random_params(layer), oracles.random_batch(LENGTHS, F)

    def loss(scale, forward_mode):
        scaled = jax.tree.map(lambda leaf: leaf * scale, params)
        output, final = layer.apply(
            scaled, batch * scale, lengths=np.array(LENGTHS), plan=PLANS[plan], forward_mode=forward_mode
        )
        return (output**2).sum() + sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves(final))

    fast, plain = (functools.partial(loss, forward_mode=mode) for mode in (False, True))
    assert_close(jax.jit(jax.grad(jax.grad(fast)))(1.1), jax.jit(jax.hessian(plain))(1.1))


def test_forward_mode_says_what_to_pass():
    layer = LAYERS["lstm"]
    params = layer.init(jax.random.key(0))

    def run(data, **options):
        return layer.apply(params, data, **options)[0]

    data = jnp.ones((2, 3, F))
    with pytest.raises(TypeError, match=r"LSTM.apply has its own derivative.*forward_mode=True"):
        jax.jvp(run, (data,), (data,))
    value, tangent = jax.jvp(functools.partial(run, forward_mode=True), (data,), (data,))
    assert value.shape == tangent.shape


def rows_multiplied(jaxpr, shape, times=1):
    """Rows multiplied with a matrix of this shape over a run of the jaxpr: of a platform's branches, in each."""
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general" and equation.invars[1].aval.shape == shape:
            total += times * equation.invars[0].aval.shape[0]
        inner = [j for p in params.values() for j in (p if isinstance(p, (tuple, list)) else [p])]
        inner = [getattr(j, "jaxpr", j) for j in inner if hasattr(j, "eqns") or hasattr(j, "jaxpr")]
        counts = [rows_multiplied(j, shape, times * params.get("length", 1)) for j in inner]
        total += max(counts, default=0) if name == "cond" else sum(counts)
    return total


@pytest.mark.parametrize(
    ("plan", "cells"), [(plan_exact, 45), (lambda lengths: plan_padded(8, 8), 64), (lambda n: plan_rows(n, 6), 48)]
)
def test_the_recurrent_product_is_made_once_for_each_cell_of_the_plan(plan, cells):
    lengths = [4, 6, 8, 5, 4, 3, 7, 8]
    layer = LSTM(3, 5)
    packed = pack_padded_sequence(jnp.ones((8, 8, 3)), lengths, batch_first=True, plan=plan(lengths))
    params, cpus = layer.init(jax.random.key(0)), Schedules(CPU, CPU, CPU)  # GPUs may take a few steps more
    states = jax.tree.map(lambda size: jnp.zeros((1, 8, size)), layer.cell.state_sizes)
    run = functools.partial(run_stack, Stack(layer.cell, 1, schedules=cpus))
    jaxpr = jax.make_jaxpr(run)([params["l0"]], packed, states).jaxpr
    assert rows_multiplied(jaxpr, (5, 20)) == cells
    assert rows_multiplied(jaxpr, (3, 20)) == cells  # and so is the input's


def compiled_training(layer, plan, lengths, input_size):
    """A compiled gradient with respect to parameters and data."""
    params = layer.init(jax.random.key(0))
    batch = jnp.ones((len(lengths), max(lengths), input_size))
    packed = pack_padded_sequence(batch, lengths, batch_first=True, plan=plan)

    def loss(params, data):
        return (layer.apply(params, packed.replace(data=data))[0].data ** 2).sum()

    return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, packed.data).compile()


def dots_in_innermost_loops(text):
    """How many dots of an optimized HLO module stand in loops that hold dots, but no other loop with dots."""
    computations = dict(re.findall(r"^(?:ENTRY )?%([\w.\-]+) \(.*?\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))

    def dots(name):
        called = re.findall(r"(?:calls|to_apply)=%([\w.\-]+)", computations[name])
        return len(re.findall(r" dot\(", computations[name])) + sum(map(dots, called))

    def dots_in_loops(name):
        inner = re.findall(r" while\(.*body=%([\w.\-]+)", computations[name])
        return sum(dots(body) + dots_in_loops(body) for body in inner)

    bodies = re.findall(r" while\(.*body=%([\w.\-]+)", text)
    assert bodies
    return sum(dots(body) for body in bodies if not dots_in_loops(body))


PADDED, STAIRS = BucketPlan((200,), (8,)), BucketPlan((100, 200), (8, 8))
ROWS = BucketPlan((400,), (4,), ((0, 200),) * 4)


@pytest.mark.parametrize(
    ("layer", "plan"),
    [(LSTM(8, 16), PADDED), (LSTM(8, 16), STAIRS), (LSTM(8, 16), ROWS), (GRU(8, 16), STAIRS), (RNN(8, 16), ROWS)],
    ids=["LSTM padded", "LSTM stairs", "LSTM rows", "GRU stairs", "RNN rows"],
)
@pytest.mark.optimized(code=False)
def test_one_dot_a_step_forward_and_one_backward(layer, plan):
    text = compiled_training(layer, plan, [200] * 8, 8).as_text()
    assert dots_in_innermost_loops(text) == 2 * plan.num_buckets


def test_a_row_plan_lowers_to_as_many_loops_as_a_padded_one():
    layer = LSTM(3, 4)
    params = layer.init(jax.random.key(0))

    def loops(plan):
        def loss(params, batch, lengths):
            return layer.apply(params, batch, lengths=lengths, plan=plan)[0].sum()

        export = jax.export.export(jax.jit(jax.grad(loss)), platforms=("cpu",))
        return export(params, jnp.ones((8, 40, 3)), jnp.full(8, 40)).mlir_module().count("stablehlo.while")

    padded = loops(plan_padded(8, 40))
    assert loops(BucketPlan((80,), (4,), ((0, 40),) * 4)) <= padded + 2  # chunks of which there are two, not one
    assert loops(plan_exact([40, 30, 20, 10] * 2)) > padded


@pytest.mark.optimized(code=False)
@pytest.mark.parametrize(("steps", "kept"), [(400, True), (20_000, False)])
def test_gates_are_kept_while_they_are_few(steps, kept):
    memory = compiled_training(LSTM(8, 64), plan_padded(8, steps), [steps] * 8, 8).memory_analysis().temp_size_in_bytes
    per_cell = memory / (8 * steps) / 4 / 64  # float32 arrays of width H
    assert 4 * 8 * 64 * 4 * steps <= KEPT_BYTES if kept else 4 * 8 * 64 * 4 * steps > KEPT_BYTES
    # h, its cotangent and a few more, the 4 gates beside them or not; autodiff keeps some 15.
    assert (6 if kept else 1) < per_cell < (9 if kept else 4)


def test_inference_keeps_no_more_than_the_outputs():
    layer, steps = LSTM(8, 64), 2_000
    params, batch = layer.init(jax.random.key(0)), jnp.ones((8, steps, 8))
    packed = pack_padded_sequence(batch, [steps] * 8, batch_first=True, plan=plan_padded(8, steps))
    compiled = jax.jit(lambda params, packed: layer.apply(params, packed)[0].data).lower(params, packed).compile()
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 0.5 * 8 * steps * 64 * 4


@pytest.mark.optimized(code=False)
def test_no_gate_is_recomputed_where_they_are_kept():
    text = compiled_training(LSTM(8, 16), plan_padded(8, 200), [200] * 8, 8).as_text()
    # Forward: of inputs, and of h in each step. Backward: of each step, and for x, W_x and W_h.
    assert len(re.findall(r" dot\(", text)) == 6


def test_each_platform_gets_its_own_loops_in_one_export():
    layer = LSTM(F, H, bidirectional=True)
    params = layer.init(jax.random.key(0))
    packed = pack_padded_sequence(jnp.ones((B, 9, F)), LENGTHS, batch_first=True, plan=PLANS["stairs"])
    step = jax.jit(jax.grad(lambda p, packed: (layer.apply(p, packed)[0].data ** 2).sum()))

    def whiles(*platforms):
        return jax.export.export(step, platforms=platforms)(params, packed).mlir_module().count("stablehlo.while")

    assert whiles("cpu", "cuda") == whiles("cpu") + whiles("cuda")
    assert max(whiles("cuda"), whiles("tpu")) < whiles("cpu")  # both directions share a loop
