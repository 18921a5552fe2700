"""Both Flax APIs behind one face, so that a test can hold a promise to either: pure functions of parameters.

Calls are jitted, since op by op a call of a module is hundreds of programs to compile.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

import jaxpack.linen
import jaxpack.nnx

F, H = 3, 4


class Linen:
    """Of flax.linen: parameters are variables."""

    ours, flax = jaxpack.linen, linen
    cells = ("LSTMCell", "OptimizedLSTMCell", "GRUCell", "SimpleCell", "MGUCell")

    def cell(self, name, **options):
        return getattr(linen, name)(H, param_dtype=jnp.float64, **options)

    def pure(self, module, jit=True):
        """The module as a function of its parameters, and parameters of which none is zero."""
        variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1, F)))
        return jitted(module.apply) if jit else module.apply, _numbers(variables)


class Nnx:
    """Of flax.nnx: parameters are the state of nnx.Param."""

    ours, flax = jaxpack.nnx, nnx
    cells = ("LSTMCell", "OptimizedLSTMCell", "GRUCell", "SimpleCell")

    def cell(self, name, **options):
        kind = getattr(nnx, name)
        return kind(F, H, dtype=jnp.float64, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **options)

    def pure(self, module, jit=True):
        """The module as a function of its parameters, and parameters of which none is zero."""
        graph, params, rest = nnx.split(module, nnx.Param, ...)

        def apply(params, *args, **kwargs):
            return nnx.merge(graph, params, rest, copy=True)(*args, **kwargs)

        return jitted(apply) if jit else apply, _numbers(params)


def jitted(apply):
    """The function in one program a call, with options that are no arrays, lengths among them, as they are given."""

    def call(params, *args, initial_carry=None, **options):
        def run(params, args, initial_carry):
            carry = {} if initial_carry is None else {"initial_carry": initial_carry}
            return apply(params, *args, **carry, **options)

        return jax.jit(run)(params, args, initial_carry)

    return call


APIS = {"linen": Linen(), "nnx": Nnx()}
CELLS = [(api, cell) for api, each in APIS.items() for cell in each.cells]


def _numbers(params):
    """Numbers in the place of every parameter, the same for all modules with these shapes."""
    generator = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(0.5 * generator.standard_normal(leaf.shape), leaf.dtype), params)
