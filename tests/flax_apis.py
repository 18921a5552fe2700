"""Both Flax APIs under one interface, so that a test can hold a promise to either: pure functions of parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

import jaxpack.linen
import jaxpack.nnx

F, H = 3, 3


class Api:
    """One of the two APIs.

    Attributes:
      ours, flax: the module of jaxpack and the one of Flax.
      cells: the names of Flax's cells.
      unknown: the name of a cell that jaxpack runs as it is.
    """

    ours: Any
    flax: Any
    cells: tuple[str, ...]
    unknown: str

    def cell(self, name: str, **options: Any) -> Any:
        """Makes a cell with float64 parameters."""
        raise NotImplementedError

    def of_kind(self, kind: Any, **options: Any) -> Any:
        """Makes a cell of a class."""
        raise NotImplementedError

    def pure(self, module: Any, jit: bool = True) -> tuple[Any, Any]:
        """Returns the module as a function of its parameters, and parameters of which none is zero."""
        raise NotImplementedError


class OwnLinenCell(linen.MGUCell):
    """A subclass of a known cell, which may do something else."""


class Linen(Api):
    """The API of flax.linen: parameters are variables."""

    ours, flax = jaxpack.linen, linen
    cells = ("LSTMCell", "OptimizedLSTMCell", "GRUCell", "SimpleCell", "MGUCell", "OwnCell")
    unknown = "OwnCell"

    def cell(self, name, **options):
        kind = OwnLinenCell if name == "OwnCell" else getattr(linen, name)
        return self.of_kind(kind, param_dtype=jnp.float64, **options)

    def of_kind(self, kind, **options):
        return kind(H, **options)

    def pure(self, module, jit=True):
        variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1, F)))
        return jitted(module.apply) if jit else module.apply, _numbers(variables)


class OwnCell(nnx.GRUCell):
    """A subclass of a known cell, which may do something else."""


class Nnx(Api):
    """The API of flax.nnx: parameters are the state of nnx.Param."""

    ours, flax = jaxpack.nnx, nnx
    cells = ("LSTMCell", "OptimizedLSTMCell", "GRUCell", "SimpleCell")
    unknown = "OwnCell"

    def cell(self, name, **options):
        kind = OwnCell if name == "OwnCell" else getattr(nnx, name)
        return self.of_kind(kind, **{"dtype": None, "param_dtype": jnp.float64} | options)

    def of_kind(self, kind, **options):
        return kind(F, H, rngs=nnx.Rngs(0), **options)

    def pure(self, module, jit=True):
        graph, params, rest = nnx.split(module, nnx.Param, ...)

        def apply(params, *args, **kwargs):
            return nnx.merge(graph, params, rest, copy=True)(*args, **kwargs)

        return jitted(apply) if jit else apply, _numbers(params)


def jitted(apply):
    """Returns the function as one program a call, with its options, lengths among them, as they are given."""

    def call(params, *args, initial_carry=None, **options):
        def run(params, args, initial_carry):
            carry = {} if initial_carry is None else {"initial_carry": initial_carry}
            return apply(params, *args, **carry, **options)

        return jax.jit(run)(params, args, initial_carry)

    return call


APIS: dict[str, Api] = {"linen": Linen(), "nnx": Nnx()}
CELLS = [(api, cell) for api, each in APIS.items() for cell in each.cells]


def _numbers(params):
    """Numbers in the place of every parameter, the same for all modules with these shapes."""
    generator = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(0.5 * generator.standard_normal(leaf.shape), leaf.dtype), params)
