"""Joining directions."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpack._packed.merge import MERGES, check_merge, merge_directions, merged_width


def test_each_merge_is_numpys():
    a, b = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    expected = {"concat": np.concatenate([a, b], -1), "sum": a + b, "mean": (a + b) / 2, "mul": a * b, None: (a, b)}
    assert set(expected) == set(MERGES)
    for merge, value in expected.items():
        check_merge(merge)
        found = merge_directions([jnp.asarray(a), jnp.asarray(b)], merge)
        np.testing.assert_allclose(found, value, rtol=1e-6)
        assert merged_width([3, 3], merge) == np.shape(value)[-1]


@pytest.mark.parametrize("merge", ["ave", "Sum", True, ["sum"]])
def test_other_merges_are_refused(merge):
    with pytest.raises(ValueError, match=r'merge must be "concat", "sum", "mean", "mul" or None .*, got '):
        check_merge(merge)
