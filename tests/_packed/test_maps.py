"""Maps of a plan inside a program: those of the plan, in a text that does not grow with the cells."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import packed_functions
import pytest

import jaxpack
from jaxpack import LSTM, BucketPlan, PackedSequence, losses, metrics, pack_padded_sequence, plan_padded
from jaxpack._packed import maps
from jaxpack._packed.gather import CellMaps

RNG = np.random.default_rng(0)
SMALL = {
    "one cell": plan_padded(1, 1),
    "padded": plan_padded(3, 5),
    "buckets": BucketPlan((4, 7, 10), (4, 3, 2)),
    "many buckets": jaxpack.plan_exact(range(1, 40)),
    "rows": BucketPlan((10,), (3,), ((0, 9), (0, 3, 7), (0,))),
    "rows in buckets": BucketPlan((11, 13), (3, 2), ((0, 9), (0, 3, 7), (0,))),
    "many rows": jaxpack.plan_rows(RNG.integers(1, 30, 100)),
}
LARGE = {
    "padded": plan_padded(300, 150),
    "buckets": BucketPlan((50, 120, 200), (300, 200, 100)),
    "many buckets": BucketPlan(tuple(range(3, 201, 3)), tuple(range(360, 30, -5))),
    "rows": BucketPlan((200,), (200,), ((0, 150), (0, 30, 70, 71)) * 100),
}
B, T = 16_384, 400  # of a batch whose maps took 315 MB of text
HUGE = {
    "padded": plan_padded(B, T),
    "buckets": BucketPlan((T // 2, T), (B, B // 2)),
    "rows": BucketPlan((T,), (B // 4,), ((0, 100, 200, 300),) * (B // 4)),
}
MOST_TEXT = 1_000_000


@pytest.mark.parametrize("name", SMALL)
def test_computed_maps_are_those_of_the_plan(name, monkeypatch):
    plan = SMALL[name]
    monkeypatch.setattr(maps, "MOST_CONSTANT", 0)
    uncached: Any = maps.by_cell
    slots, steps = jax.jit(lambda: uncached.__wrapped__(plan))()
    np.testing.assert_array_equal(slots, plan.cell_slots)
    np.testing.assert_array_equal(steps, plan.cell_steps)
    assert slots.dtype == steps.dtype == np.int32
    np.testing.assert_array_equal(maps.cells_of(plan, slots, steps), np.arange(plan.size))


@pytest.mark.parametrize("plan", [*SMALL.values(), *LARGE.values()], ids=[*SMALL, *(f"large {name}" for name in LARGE)])
def test_the_maps_of_a_batch(plan):
    lengths = np.minimum(plan.room, RNG.integers(0, plan.room + 1))
    lengths[:1] = plan.room[:1] + (np.arange(1) < plan.num_sequences - 1)  # a misfit, all of whose cells count
    order = np.argsort(-lengths, kind="stable")
    packed = PackedSequence(None, jnp.asarray(lengths), jnp.asarray(order), jnp.asarray(np.argsort(order)), plan)
    found = jax.tree.map(np.asarray, jax.jit(CellMaps.of)(packed))
    held = lengths[order]
    fits = held <= plan.room
    real = plan.cell_steps < np.where(fits, held, plan.room)[plan.cell_slots]
    np.testing.assert_array_equal(found.mask, real)
    np.testing.assert_array_equal(found.slots, plan.cell_slots)
    np.testing.assert_array_equal(found.steps, plan.cell_steps)
    np.testing.assert_array_equal(found.first, plan.slot_begins)
    np.testing.assert_array_equal(found.last, plan.slot_ends)
    mirrored = np.where(real & fits[plan.cell_slots], held[plan.cell_slots] - 1 - plan.cell_steps, plan.cell_steps)
    np.testing.assert_array_equal(plan.cell_slots[found.reverse], plan.cell_slots)
    np.testing.assert_array_equal(plan.cell_steps[found.reverse], mirrored)


@pytest.mark.parametrize("name", LARGE)
def test_a_batch_too_large_for_constants_is_packed_padded_and_reduced(name):
    plan = LARGE[name]
    assert plan.size > maps.MOST_CONSTANT
    lengths = RNG.permutation(RNG.integers(0, plan.room + 1))
    x = RNG.normal(size=(len(lengths), plan.max_length)).astype(np.float32)
    packed = pack_padded_sequence(x, lengths, batch_first=True, plan=plan)
    real = np.arange(plan.max_length) < lengths[:, None]
    np.testing.assert_array_equal(jaxpack.pad_packed_sequence(packed, True)[0], np.where(real, x, 0))
    np.testing.assert_allclose(jaxpack.segment_sum(packed), np.where(real, x, 0).sum(1), rtol=1e-4, atol=1e-4)
    assert int(packed.mask.sum()) == lengths.sum()
    backwards = jaxpack.pad_packed_sequence(jaxpack.reverse_sequences(packed), True)[0]
    expected = [np.pad(row[:n][::-1], (0, len(row) - n)) for row, n in zip(x, lengths, strict=True)]
    np.testing.assert_array_equal(backwards, expected)


def _shapes(plan, features=3):
    """A packed batch of shapes, and a padded one."""
    indices: Any = jax.ShapeDtypeStruct((plan.num_sequences,), jnp.int32)
    data = jax.ShapeDtypeStruct((plan.size, features), jnp.float32)
    padded = jax.ShapeDtypeStruct((plan.num_sequences, plan.max_length, features), jnp.float32)
    return PackedSequence(data, indices, indices, indices, plan), padded


# The labels of the first two are constants of the table; the layer is below.
LIGHT = sorted(set(packed_functions.names(jits=True)) - {"losses.token_cross_entropy", "metrics.accuracy", "RNN.apply"})


@pytest.mark.parametrize("name", HUGE)
def test_the_text_of_functions_does_not_grow_with_cells(name):
    packed, padded = _shapes(HUGE[name])
    functions = {each: packed_functions.FUNCTIONS[each].run for each in LIGHT}
    functions["losses.token_cross_entropy"] = lambda p, x: losses.token_cross_entropy(p, p.map(_label))
    functions["metrics.accuracy"] = lambda p, x: metrics.accuracy(p, p.map(_label))
    sizes = {each: len(jax.jit(run).lower(packed, padded).as_text()) for each, run in functions.items()}
    assert max(sizes.values()) < MOST_TEXT, sizes


def _label(data):
    return jnp.zeros(len(data), int)


@pytest.mark.parametrize(
    "name",
    [
        "padded",
        "buckets",
        "rows",
        "none",
    ],
)
def test_the_text_of_a_training_step_does_not_grow_with_cells(name):
    plan = HUGE.get(name)
    steps = T if plan is None else plan.max_length
    layer = LSTM(8, 16)

    def loss(params, x, lengths):
        return jnp.sum(layer.apply(params, x, lengths=lengths, plan=plan)[0])

    x, lengths = jax.ShapeDtypeStruct((B, steps, 8), jnp.float32), jax.ShapeDtypeStruct((B,), jnp.int32)
    arguments = jax.eval_shape(layer.init, jax.random.key(0)), x, lengths
    step = jax.jit(jax.value_and_grad(loss))
    assert len(step.lower(*arguments).as_text()) < MOST_TEXT
    assert len(jax.export.export(step)(*arguments).serialize()) < MOST_TEXT
