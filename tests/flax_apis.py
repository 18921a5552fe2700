"""Both Flax APIs behind one face, so that a test can hold a promise to either: pure functions of parameters."""

import jax
import jax.numpy as jnp
from flax import linen, nnx

import jaxpack.linen.rnn
import jaxpack.nnx.rnn

F, H = 3, 4


class Linen:
    """Of flax.linen: parameters are variables."""

    ours, flax = jaxpack.linen.rnn, linen
    cells = ("LSTMCell", "OptimizedLSTMCell", "GRUCell", "SimpleCell", "MGUCell")

    def cell(self, name, **options):
        return getattr(linen, name)(H, param_dtype=jnp.float64, **options)

    def pure(self, module):
        """The module as a function of its parameters, and parameters that are not zero."""
        variables = module.init(jax.random.key(0), jnp.zeros((1, 1, F)))
        return module.apply, _shake(variables)


class Nnx:
    """Of flax.nnx: parameters are the state of nnx.Param."""

    ours, flax = jaxpack.nnx.rnn, nnx
    cells = ("LSTMCell", "OptimizedLSTMCell", "GRUCell", "SimpleCell")

    def cell(self, name, **options):
        kind = getattr(nnx, name)
        return kind(F, H, dtype=jnp.float64, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **options)

    def pure(self, module):
        """The module as a function of its parameters, and parameters that are not zero."""
        graph, params, rest = nnx.split(module, nnx.Param, ...)

        def apply(params, *args, **kwargs):
            return nnx.merge(graph, params, rest, copy=True)(*args, **kwargs)

        return apply, _shake(params)


APIS = {"linen": Linen(), "nnx": Nnx()}
CELLS = [(api, cell) for api, each in APIS.items() for cell in each.cells]


def _shake(params):
    """Every parameter moved at random, so that biases are not zero."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [
        leaf + 0.3 * jax.random.normal(key, leaf.shape, leaf.dtype) for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, moved)
