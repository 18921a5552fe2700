"""Parameters of a layer: drawing them, and checking that a pytree matches a layer."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpack._cells.cell import Cell
from jaxpack._layers.schemes import (
    ForgetBias,
    Initializer,
    Scheme,
    check_forget_bias,
    keep_memory,
    scheme_of,
)
from jaxpack._types import PyTree

Shapes = dict[str, dict[str, tuple[int, ...]]]
InitializerByGate = Initializer | Mapping[str, Initializer] | None  # None, and a gate not named: PyTorch's draw

# The initialiser, and in Flax the metadata, that each parameter takes.
ROLES = {
    "weight_ih": "kernel",
    "weight_hr": "kernel",
    "weight_hh": "recurrent_kernel",
    "bias_ih": "bias",
    "bias_hh": "bias",
    "weight_ch": "peephole",
    "scale_ih": "scale",
    "scale_hh": "scale",
    "scale_c": "scale",
    "bias_c": "scale",
    "h_0": "initial_state",
    "c_0": "initial_state",
}


class Drawing(NamedTuple):
    """How to draw parameters: the options of `init`.

    Attributes:
      kernel, recurrent_kernel, bias: an initialiser, or some by gate, for each role.
      scheme: the name of the library whose defaults are those of what these leave open.
      forget_bias: the bias of the gate that keeps the state; None for what the others give.
    """

    kernel: InitializerByGate = None
    recurrent_kernel: InitializerByGate = None
    bias: InitializerByGate = None
    scheme: str = "pytorch"
    forget_bias: ForgetBias = None

    def of_role(self, role: str) -> InitializerByGate:
        """Returns the initialiser of a role, if it has one."""
        return getattr(self, role, None)

    def forget_bias_of(self, scheme: Scheme | None) -> ForgetBias:
        """Returns the forget bias that applies: that of the scheme only where no initialiser draws the gate's bias."""
        if self.forget_bias is None and scheme is not None and self.bias is None:
            return scheme.forget_bias
        return self.forget_bias


def draw(key: jax.Array, shapes: Shapes, cell: Cell, dtype: Any, drawing: Drawing) -> dict[str, dict[str, Any]]:
    """Draws parameters: by initialisers, else as the cell does, else as the scheme does.

    Raises:
      TypeError: if key is not a random key, dtype is not floating, or an initialiser is not a function.
      ValueError: if a mapping names another gate, a result has another shape, the metadata of gates disagree, or the
        scheme or the forget bias is not one.
    """
    dtype = floating(float if dtype is None else dtype)
    for role in ("kernel", "recurrent_kernel", "bias"):
        _check_initializer(drawing.of_role(role), f"{role}_init", cell.gates)
    has_bias = any("bias_ih" in entries for entries in shapes.values())
    check_forget_bias(drawing.forget_bias, cell, has_bias, drawing.bias)
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes, is_leaf=_is_shape)
    try:
        keys = jax.random.split(key, len(leaves))
    except TypeError as error:
        raise TypeError(f"key must be a JAX random key, such as jax.random.key(0), got {key!r}.") from error
    drawn = []
    for leaf_key, ((group, entry), shape) in zip(keys, leaves, strict=True):
        scheme = scheme_of(drawing.scheme, cell, shapes[group.key]["weight_ih"][0])
        value: Any = _default(entry.key, leaf_key, jax.ShapeDtypeStruct(shape, dtype), cell, scheme)
        initializer = drawing.of_role(ROLES[entry.key])
        if initializer is not None:
            value = _by_gate(entry.key, leaf_key, value, cell.gates, initializer)
        forget_bias = drawing.forget_bias_of(scheme)
        if forget_bias is not None and entry.key in ("bias_ih", "bias_hh"):
            kept = functools.partial(keep_memory, entry.key, leaf_key, forget_bias=forget_bias, cell=cell)
            value = jax.tree.map(kept, value)
        drawn.append(value)
    return jax.tree.unflatten(structure, drawn)


def _default(name: str, key: jax.Array, like: jax.ShapeDtypeStruct, cell: Cell, scheme: Scheme | None) -> jax.Array:
    """Returns a parameter that no initialiser is given for: of the cell, of the scheme, or uniform, as in PyTorch."""
    shape, dtype = like.shape, like.dtype
    if name in cell.initializers:
        return cell.initializers[name](key, shape, dtype)
    role = ROLES[name]
    if scheme is not None and role == "bias":
        return jnp.zeros(shape, dtype)
    if scheme is not None and role in ("kernel", "recurrent_kernel"):
        return getattr(scheme, role)(key, shape, dtype)
    bound = 1 / math.sqrt(cell.hidden_size)
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def floating(dtype: Any) -> Any:
    """Returns the dtype as JAX has it.

    Raises:
      TypeError: if it is not floating.
    """
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be a floating dtype, got {dtype}.")
    return dtype


def check_params(params: PyTree, shapes: Shapes, layer: object) -> Any:
    """Checks parameters against a layer, and returns their common dtype.

    Raises:
      TypeError: if their structure is not the layer's.
      ValueError: if a shape is not the layer's.
    """
    given = jax.tree.map(jnp.shape, params)
    if given != shapes:
        expected, found = dict(_flat(shapes)), dict(_flat(given))
        wrong = [f"{name} is missing" for name in expected if name not in found]
        wrong += [f"{name} is not known" for name in found if name not in expected]
        wrong += [
            f"{name} has shape {found[name]}, not {shape}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ]
        raise (TypeError if set(expected) != set(found) else ValueError)(
            f"params do not match {layer}: {'; '.join(wrong[:4])}. Make them with init(key), or convert them "
            f"from another library with a from_... method of the layer."
        )
    return jnp.result_type(*jax.tree.leaves(params))


def check_sharding(params: PyTree) -> None:
    """Raises ValueError if a parameter's type includes a sharding, under which loops cannot split and join gates."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        spec = getattr(getattr(jax.typeof(leaf), "sharding", None), "spec", ())
        if any(axis is not None for axis in spec):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(
                f"params: {name} is sharded by {spec} under an explicit mesh. Give the mesh automatic axes "
                f"(jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,))), or call the layer under "
                f"jax.sharding.auto_axes."
            )


def _check_initializer(initializer: object, name: str, gates: tuple[str, ...]) -> None:
    if isinstance(initializer, Mapping):
        known = [gate for gate in gates if gate]
        for gate in initializer:
            if gate not in known:
                way_out = (
                    f"Its gates are {', '.join(known)}." if known else "Its one gate has no name: give a function."
                )
                raise ValueError(f"{name} names the gate {gate!r}, which the cell does not have. {way_out}")
    functions = initializer.values() if isinstance(initializer, Mapping) else [initializer] * (initializer is not None)
    for function in functions:
        if not callable(function):
            raise TypeError(
                f"{name} must be an initialiser, a function of (key, shape, dtype) such as jax.nn.initializers.ones, "
                f"or a mapping from gates to some, got {function!r}."
            )


def _by_gate(
    name: str,
    key: jax.Array,
    default: jax.Array,
    gates: tuple[str, ...],
    initializer: Initializer | Mapping[str, Initializer],
) -> Any:
    """Returns a parameter whose named gates are drawn one by one; the others are those of the default."""
    gates = ("",) if name == "weight_hr" else gates  # the projection, which has none
    named: Mapping[str, Initializer]
    named = initializer if isinstance(initializer, Mapping) else dict.fromkeys(gates, initializer)
    parts: list[Any] = jnp.split(default, len(gates), axis=-1)
    structures: dict[str, Any] = {}
    for i, gate in enumerate(gates):
        if gate in named:
            drawn = _draw_gate(name, named[gate], jax.random.fold_in(key, i), parts[i])
            (parts[i],), structures[gate] = jax.tree.flatten(drawn)
    if not structures:
        return default
    (first, structure), *others = structures.items()
    for gate, other in others:
        if other != structure:
            raise ValueError(
                f"the gates of {name} are one array, with one metadata, but gate {first!r} is {structure} and gate "
                f"{gate!r} is {other}. Wrap their initialisers alike."
            )
    return jax.tree.unflatten(structure, [jnp.concatenate(parts, axis=-1)])


def _draw_gate(name: str, initializer: Initializer, key: jax.Array, like: jax.Array) -> Any:
    """Returns the initialiser's result: an array, or a pytree that holds one. The bias b_hh starts at 0."""
    drawn = initializer(key, like.shape, like.dtype)
    found = [getattr(leaf, "shape", leaf) for leaf in jax.tree.leaves(drawn)]
    if found != [like.shape]:
        raise ValueError(
            f"{ROLES[name]}_init must return an array of shape {like.shape} for a gate of {name}, got "
            f"{found[0] if len(found) == 1 else found}."
        )
    return jax.tree.map(
        lambda leaf: jnp.zeros_like(like) if name == "bias_hh" else jnp.asarray(leaf, like.dtype), drawn
    )


def _flat(shapes: PyTree) -> list[tuple[str, tuple[int, ...]]]:
    """Returns the shapes in a nested dict, with their keys joined."""
    leaves = jax.tree_util.tree_leaves_with_path(shapes, is_leaf=_is_shape)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), shape) for path, shape in leaves]


def _is_shape(node: object) -> bool:
    return isinstance(node, tuple)
