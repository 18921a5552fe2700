"""The ragged batch that tests of the drop-ins share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
from flax_apis import F, H

from jaxpack import plan_buckets, plan_rows

LENGTHS = np.array([3, 6, 2, 4])
B, T = 4, 6
REAL = np.arange(T) < LENGTHS[:, None]
ROWS, BUCKETS = plan_rows(LENGTHS), plan_buckets(LENGTHS, 2)


def batch(nan=True):
    return oracles.random_batch(LENGTHS, F) if nan else np.nan_to_num(oracles.random_batch(LENGTHS, F))


def assert_close(actual, expected):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10), actual, expected)


def carry_like(api, name):
    """An initial carry that is not zero."""
    generator = np.random.default_rng(2)
    h = jnp.asarray(generator.standard_normal((B, H)))
    return (h, h / 2) if "LSTM" in name else h
