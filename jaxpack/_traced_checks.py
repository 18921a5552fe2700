"""Checks of traced values, which `checkify` reports and plain programs do not contain; and `unchecked`.

`checkify.debug_check` is an effect. An effect does nothing in a plain program, but a jitted function that has one is
called through Python (100 microseconds a call of a small layer, on a CPU), and jax.export does not serialise it. So a
check here is the identity, a primitive that checkify knows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import checkify
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

_rules: dict[Primitive, Callable[..., Any]] | None
try:
    from jax._src import checkify as _internal

    _rules = _internal.error_checks  # there is no public way to give checkify a rule
except (ImportError, AttributeError):
    _rules = None  # then the checks are effects


def checked(value: jax.Array, ok: jax.Array, message: str, **values: jax.Array) -> jax.Array:
    """Returns the value. Under checkify it is an error unless `ok`.

    The check is part of a program as long as the result is used.

    Args:
      value: integers or bools.
      ok: bool.
      message: the error, with the names of `values` in braces.
      **values: what the message quotes.
    """
    if _rules is None:
        checkify.debug_check(ok, message, **values)
        return value
    return _checked.bind(value, ok, *values.values(), message=message, names=tuple(values))


def unchecked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Removes the checks that a function has for `checkify`.

    jaxpack's own checks are not in a program without checkify. Where a function has others (`checkify.debug_check`),
    jax.export serialises it without them: jax.export.export(jax.jit(jaxpack.unchecked(serve)))(packed).serialize()

    Examples:
      >>> packed = jaxpack.pack_sequence([jnp.ones(1), jnp.ones(2)])
      >>> jax.jit(unchecked(jaxpack.segment_sum))(packed).tolist()
      [1.0, 2.0]

    Sequences that do not fit still give NaN.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        _, result = checkify.checkify(function, errors=frozenset())(*args, **kwargs)
        return result

    return run


def _identity(value: Any, *_: Any, **__: Any) -> Any:
    return value


def _batched(operands: Any, axes: Any, **params: Any) -> tuple[jax.Array, int]:
    """Gives all operands a leading axis, so that the check of each has its own values."""
    size = next(operand.shape[axis] for operand, axis in zip(operands, axes, strict=True) if axis is not None)
    leading = (batching.bdim_at_front(operand, axis, size) for operand, axis in zip(operands, axes, strict=True))
    return _checked.bind(*leading, **params), 0


def _report(*args: Any, message: str, names: tuple[str, ...]) -> Any:
    """Checks under checkify, by its rule for a jitted function with the check as an effect.

    Args:
      args: what checkify's rules take first, and the operands.
      message, names: as bound.
    """
    count = len(names) + 2
    state, operands = args[:-count], args[-count:]
    assert _rules is not None

    def check(value: jax.Array, ok: jax.Array, *values: jax.Array) -> jax.Array:
        checkify.debug_check(ok, message, **dict(zip(names, values, strict=True)))
        return value

    for _ in range(operands[1].ndim):
        check = jax.vmap(check)
    (call,) = jax.make_jaxpr(jax.jit(check))(*operands).eqns
    error, (value,) = _rules[call.primitive](*state, *operands, **call.params)
    return error, value


_checked = Primitive("jaxpack_checked")
_checked.def_impl(_identity)
_checked.def_abstract_eval(_identity)
mlir.register_lowering(_checked, lambda context, value, *operands, **params: [value])
batching.primitive_batchers[_checked] = _batched
if _rules is not None:
    _rules[_checked] = _report
