"""Tests of checks of traced values: what checkify reports, and that plain programs do not contain them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from packed_functions import FUNCTIONS, names

import jaxpack
from jaxpack import _traced_checks
from jaxpack._traced_checks import checked

LENGTHS = (3, 1, 2)


def halved(number):
    """Half of an even number."""
    return checked(number, number % 2 == 0, "{odd} of {all} is odd.", odd=number, all=jnp.int32(8)) // 2


def error_of(function, *args):
    """What checkify reports of a call."""
    return checkify.checkify(function)(*args)[0].get()


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, jax.checkpoint], ids=["plain", "jit", "checkpoint"])
def test_checkify_reports_what_is_not_so(transform):
    function = transform(halved)
    assert function(jnp.int32(5)) == 2
    assert error_of(function, jnp.int32(4)) is None
    assert "5 of 8 is odd." in error_of(function, jnp.int32(5))


def test_a_batched_check_reports_the_element():
    function = jax.vmap(jax.vmap(halved), in_axes=1)
    numbers = jnp.array([[2, 4], [6, 7], [8, 0]])
    np.testing.assert_array_equal(function(numbers), numbers.T // 2)
    assert "7 of 8 is odd." in error_of(function, numbers)
    assert error_of(function, 2 * numbers) is None


def test_checks_in_loops_and_branches_are_reported():
    def looped(numbers):
        return jax.lax.scan(lambda total, n: (total + jax.lax.cond(n > 5, halved, lambda n: n, n), None), 0, numbers)[0]

    assert error_of(looped, jnp.array([1, 6, 3])) is None
    assert "9 of 8 is odd." in error_of(looped, jnp.array([1, 9, 3]))


def test_gradients_report_too():
    def loss(x, lengths):
        packed = jaxpack.pack_padded_sequence(x, lengths, batch_first=True, plan=jaxpack.plan_padded(3, 4))
        return jnp.sum(packed.data**2)

    assert "lengths[1] = 5 does not fit" in error_of(jax.jit(jax.grad(loss)), jnp.ones((3, 4)), jnp.array([1, 5, 2]))


def test_without_a_rule_the_check_is_an_effect(monkeypatch):
    monkeypatch.setattr(_traced_checks, "_rules", None)
    function = jax.jit(lambda number: halved(number))
    assert jax.make_jaxpr(function)(jnp.int32(4)).effects
    assert "5 of 8 is odd." in error_of(function, jnp.int32(5))


def test_functions_of_packed_batches_have_no_effects():
    """A jitted function with an effect is called through Python, which takes longer than a small model."""
    x = jnp.ones((3, 4, 3))

    def run(lengths):
        packed = jaxpack.pack_padded_sequence(x, lengths, batch_first=True, plan=jaxpack.plan_padded(3, 4))
        return [FUNCTIONS[name].run(packed, x) for name in names(jits=True)]

    assert not jax.make_jaxpr(run)(jnp.array(LENGTHS)).effects
