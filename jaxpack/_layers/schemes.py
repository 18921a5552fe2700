"""Named ways to draw parameters, those of other libraries, and biases with which a layer keeps its memory for long."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import initializers as init

from jaxpack._cells.cell import Cell
from jaxpack._cells.mgu import FlaxMGUCell
from jaxpack._checks import as_int

Initializer = Callable[[jax.Array, tuple[int, ...], Any], Any]  # (key, shape, dtype), as in Flax and jax.nn


class Scheme(NamedTuple):
    """How a library draws the parameters of one layer and direction.

    Attributes:
      kernel, recurrent_kernel: of the matrices, all gates side by side.
      forget_bias: the bias of the gate that keeps the memory; None for 0, as the other gates have.
    """

    kernel: Initializer
    recurrent_kernel: Initializer
    forget_bias: float | None = None


@dataclasses.dataclass(frozen=True)
class Chrono:
    """Biases that keep the memory for up to `max_length` steps: a value of `forget_bias`.

    Each unit gets a time scale, uniform from 1 to max_length - 1, and the gate that keeps the memory its logarithm as a
    bias: log(u). A gate i gets -log(u), for the same u.

    Examples:
      >>> lstm = jaxpack.LSTM(2, 4)
      >>> bias = lstm.init(jax.random.key(0), forget_bias=jaxpack.Chrono(200))["l0"]["bias_ih"]
      >>> bool((bias[:4] == -bias[4:8]).all() and (bias[4:8] <= np.log(199)).all())  # the gates are i, f, g, o
      True

    Args:
      max_length: the longest dependency that is expected, in steps, at least 2.

    Raises:
      TypeError: if max_length is not an int.
      ValueError: if it is below 2.
    Source: Tallec & Ollivier 2018, "Can recurrent neural networks warp time?", equation 16.
    """

    max_length: int

    def __post_init__(self) -> None:
        if as_int("max_length", self.max_length) < 2:
            raise ValueError(f"max_length must be at least 2, got {self.max_length}.")


ForgetBias = float | Chrono | None


def scheme_of(name: str, cell: Cell, input_size: int) -> Scheme | None:
    """Returns a library's scheme for a cell; None for PyTorch's, which is the default.

    Raises:
      ValueError: if there is no scheme with this name.
    """
    if name not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(map(repr, SCHEMES))}, got {name!r}.")
    make = SCHEMES[name]
    return None if make is None else make(cell, input_size)


def check_forget_bias(forget_bias: ForgetBias, cell: Cell, bias: bool, bias_init: object) -> None:
    """Validates the argument `forget_bias` of `init`.

    Args:
      forget_bias: as given.
      cell: the layer's cell.
      bias: whether the layer has biases.
      bias_init: the other argument.

    Raises:
      TypeError: if it is neither a number nor a Chrono.
      ValueError: if it is not finite, the layer has no biases or no gate that keeps its state, or both arguments give
        this gate's bias.
    """
    if forget_bias is None:
        return
    if not isinstance(forget_bias, Chrono):
        if isinstance(forget_bias, bool) or not isinstance(forget_bias, numbers.Real):
            raise TypeError(f"forget_bias must be a number or a jaxpack.Chrono, got {forget_bias!r}.")
        if not math.isfinite(forget_bias):
            raise ValueError(f"forget_bias must be finite, got {forget_bias!r}.")
    if cell.forget_gate is None:
        raise ValueError(f"forget_bias is for cells with a gate that keeps their state, which {cell} does not have.")
    if not bias:
        raise ValueError("forget_bias needs biases, and the layer has bias=False.")
    drawn = [gate for gate in gates_kept(forget_bias, cell) if isinstance(bias_init, Mapping) and gate in bias_init]
    if drawn:
        raise ValueError(f"bias_init and forget_bias both give the bias of the gate {drawn[0]!r}: give one of them.")


def gates_kept(forget_bias: ForgetBias, cell: Cell) -> dict[str, int]:
    """Returns the gates whose bias a `forget_bias` sets, and with which sign."""
    if forget_bias is None or cell.forget_gate is None:
        return {}
    gate, sign = cell.forget_gate
    return {gate: sign} | ({"i": -sign} if isinstance(forget_bias, Chrono) and "i" in cell.gates else {})


def keep_memory(name: str, key: jax.Array, bias: jax.Array, forget_bias: float | Chrono, cell: Cell) -> jax.Array:
    """Returns a bias [gates*H] with those of `gates_kept` set: in bias_ih to their value, in bias_hh to 0."""
    parts = jnp.split(bias, len(cell.gates))
    if isinstance(forget_bias, Chrono):
        scales = jax.random.uniform(key, parts[0].shape, bias.dtype, 1, forget_bias.max_length - 1)
        value = jnp.log(scales)
    else:
        value = jnp.full_like(parts[0], forget_bias)
    for gate, sign in gates_kept(forget_bias, cell).items():
        parts[cell.gates.index(gate)] = sign * value if name == "bias_ih" else jnp.zeros_like(value)
    return jnp.concatenate(parts)


def _orthogonal(parts: int) -> Initializer:
    """Returns an initialiser of orthogonal matrices, so many side by side, drawn in at least float32."""

    def draw(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        wide, part = jnp.promote_types(dtype, jnp.float32), (shape[0], shape[1] // parts)
        drawn = [init.orthogonal()(each, part, wide) for each in jax.random.split(key, parts)]
        return jnp.concatenate(drawn, axis=1).astype(dtype)

    return draw


def _truncated(fan_in: int | None = None) -> Initializer:
    """Returns an initialiser of normal numbers within two standard deviations, 1/sqrt(fan_in) before truncation."""

    def draw(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.truncated_normal(key, -2, 2, shape, dtype) / math.sqrt(fan_in or shape[0])

    return draw


def _has_memory(cell: Cell) -> bool:
    return len(jax.tree.leaves(cell.state_sizes)) == 2


def _keras(cell: Cell, input_size: int) -> Scheme:
    return Scheme(init.glorot_uniform(), _orthogonal(1), 1.0 if _has_memory(cell) else None)


def _flax(cell: Cell, input_size: int) -> Scheme:
    forget_bias = 1.0 if isinstance(cell, FlaxMGUCell) else None
    return Scheme(init.lecun_normal(), _orthogonal(len(cell.gates)), forget_bias)


def _haiku(cell: Cell, input_size: int) -> Scheme:
    if _has_memory(cell):
        both = _truncated(input_size + cell.output_size)
        return Scheme(both, both, 1.0)
    each = _truncated() if len(cell.gates) == 1 else init.lecun_normal()
    return Scheme(each, each)


SCHEMES: Mapping[str, Callable[[Cell, int], Scheme] | None] = MappingProxyType(
    {"pytorch": None, "keras": _keras, "flax": _flax, "haiku": _haiku}
)
