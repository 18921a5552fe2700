"""split_weight_norm and join_weight_norm: weight matrices as a length and a direction for each output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpack._types import PyTree

_PARTS = {"g", "v"}


def split_weight_norm(params: PyTree, names: Sequence[str] = ("weight_ih", "weight_hh")) -> PyTree:
    """Splits weight matrices [F, G] into lengths g [G] and directions v [F, G], one of each for an output.

        W[:, j] = g[j] v[:, j] / norm(v[:, j]),   g[j] = norm(W[:, j]) and v = W at first

    Train what it returns, and pass `join_weight_norm` of it to the layer.

    Examples:
      >>> lstm = jaxpack.LSTM(2, 4)
      >>> split = jaxpack.split_weight_norm(lstm.init(jax.random.key(0)))
      >>> jax.tree.map(jnp.shape, split["l0"]["weight_hh"])
      {'g': (16,), 'v': (4, 16)}
      >>> output, _ = lstm.apply(jaxpack.join_weight_norm(split), np.ones((1, 3, 2)))

    Args:
      params: the parameters of a layer, or any pytree of dicts that holds them.
      names: the names of the matrices to split. Vectors of these names (weight_hh of IndRNN) stay as they are.

    Returns:
      The same pytree, with a dict of g and v in place of each of these matrices.

    Raises:
      ValueError: if a name is not among the parameters.
    Source: Salimans & Kingma 2016, "Weight normalization"; torch.nn.utils.parametrizations.weight_norm with dim=0.
    """
    found = set()

    def split(path: tuple[Any, ...], leaf: Any) -> Any:
        name = getattr(path[-1], "key", None) if path else None
        if name not in names:
            return leaf
        found.add(name)
        return {"g": jnp.linalg.norm(leaf, axis=0), "v": leaf} if jnp.ndim(leaf) == 2 else leaf

    result = jax.tree_util.tree_map_with_path(split, params)
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"params have no {', '.join(missing)}. Pass names= with those that they have.")
    return result


def join_weight_norm(params: PyTree) -> PyTree:
    """Returns parameters with each dict of g and v, from `split_weight_norm`, as the matrix that they are.

        W[:, j] = g[j] v[:, j] / norm(v[:, j])

    Examples:
      >>> params = {"weight_hh": {"g": jnp.array([10.0]), "v": jnp.array([[3.0], [4.0]])}}
      >>> jaxpack.join_weight_norm(params)["weight_hh"].tolist()
      [[6.0], [8.0]]

    Args:
      params: a pytree of dicts. What is not split stays as it is.

    Returns:
      The parameters as `layer.apply` takes them. Differentiable; a column of zeros counts as one of length 1.

    Source: Salimans & Kingma 2016, "Weight normalization".
    """

    def join(node: Any) -> Any:
        if not _is_split(node):
            return node
        g, v = node["g"], node["v"]
        squares = jnp.sum(v * v, axis=0)
        # The gradient of a square root is infinite at 0.
        norms = jnp.sqrt(jnp.where(squares > 0, squares, 1))
        return v * (g / norms)[None]

    return jax.tree.map(join, params, is_leaf=_is_split)


def _is_split(node: object) -> bool:
    return isinstance(node, Mapping) and set(node) == _PARTS
