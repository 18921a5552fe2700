import jax
import jax.numpy as jnp
import pytest

from jaxpack._layers.stack import drop


def test_dropout_keeps_the_mean_and_its_rate():
    dropped = drop(jax.random.key(0), jnp.ones((100, 100)), 0.3)
    assert (dropped == 0).mean() == pytest.approx(0.3, abs=0.02)
    assert dropped.mean() == pytest.approx(1, abs=0.03)
    assert (drop(jax.random.key(0), jnp.ones(3), 1.0) == 0).all()
