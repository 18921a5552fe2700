"""Time axes of examples: which leaves vary in time, and which of them share their steps.

An example has one time axis, shared by all leaves that vary in time, or several named ones, such as source and target.
The argument `time_varying` declares them with a bool or a name for each leaf. Each axis has its own plan.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax

from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._types import PyTree

Plans = BucketPlan | Mapping[str, BucketPlan]


def axis_names(time_varying: PyTree) -> tuple[str, ...]:
    """Returns the names of the time axes in the order of the leaves; none for a single axis without a name.

    Examples:
      >>> axis_names({"words": "source", "phonemes": "target", "label": False})
      ('target', 'source')
      >>> axis_names(None)
      ()

    Raises:
      TypeError: if time_varying holds anything but bools, names and None.
      ValueError: if it holds names for some leaves and True for others.
    """
    flags = jax.tree.leaves(time_varying, is_leaf=_is_none)
    if time_varying is not None and not all(
        flag is None or (isinstance(flag, (bool, str)) and flag != "") for flag in flags
    ):
        raise TypeError(f"time_varying must hold bools, or names of time axes, got {time_varying!r}.")
    names = tuple(dict.fromkeys(flag for flag in flags if isinstance(flag, str)))
    if names and any(flag is True for flag in flags):
        raise ValueError(
            f"time_varying must name the time axis of every leaf that varies in time, got True beside {names}. Write a "
            f"name in place of True, and False for a leaf of fixed size."
        )
    return names


def axes_of(time_varying: PyTree, structure: Any, ranks: Sequence[int]) -> tuple[int | None, ...]:
    """Returns the number of each leaf's time axis, None for a leaf of fixed size.

    Args:
      time_varying: a bool or a name for each leaf, or for a prefix of the structure. None means that every leaf with an
        axis varies.
      structure: the tree structure of an example.
      ranks: the number of axes of each leaf.

    Raises:
      ValueError: if time_varying is no prefix of the structure.
    """
    if time_varying is None:
        return tuple(0 if rank else None for rank in ranks)
    names = axis_names(time_varying)
    try:
        spread = jax.tree.map(
            lambda flag, part: [flag or False] * len(jax.tree.leaves(part)),
            time_varying,
            jax.tree.unflatten(structure, ranks),
            is_leaf=_is_none,
        )
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"time_varying must be a bool or the name of a time axis for each leaf of an example, or a prefix of its "
            f"structure {structure}, got {time_varying!r}."
        ) from error
    flags = jax.tree.leaves(spread)
    return tuple((names.index(flag) if names else 0) if flag else None for flag in flags)


def plans_of(plan: Plans, names: Sequence[str]) -> tuple[BucketPlan, ...]:
    """Returns the plan of each time axis, from one plan or a mapping from the axes' names.

    Examples:
      >>> plans = {"target": jaxpack.plan_padded(2, 9), "source": jaxpack.plan_padded(2, 5)}
      >>> [plan.max_length for plan in plans_of(plans, ("source", "target"))]
      [5, 9]

    Raises:
      TypeError: if it is neither.
      ValueError: if the mapping has other names, or the plans have different batch sizes.
    """
    if isinstance(plan, BucketPlan):
        if len(names) < 2:
            return (plan,)
        raise ValueError(f"examples have the time axes {_listed(names)}: pass a plan for each, {_mapping(names)}.")
    if not isinstance(plan, Mapping):
        raise TypeError(f"plan must be a jaxpack.BucketPlan, or a dict of them by time axis, got {plan!r}.")
    if not names:
        raise ValueError(
            f"plan is for the time axes {_listed(list(plan))}, but time_varying names none. Write the name of its axis "
            f"for each leaf of an example, as in time_varying={tuple(plan)}."
        )
    if set(plan) != set(names):
        raise ValueError(f"plan is for the time axes {_listed(list(plan))}, but time_varying names {_listed(names)}.")
    for name in names:
        if not isinstance(plan[name], BucketPlan):
            raise TypeError(f"plan[{name!r}] must be a jaxpack.BucketPlan, got {plan[name]!r}.")
    sizes = {name: plan[name].num_sequences for name in names}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the plans of all time axes must be for the same number of sequences, got {sizes}.")
    return tuple(plan[name] for name in names)


def by_axis(values: Sequence[Any], names: Sequence[str]) -> Any:
    """Returns a dict of the values by the axes' names, or the value itself if there is one axis."""
    return dict(zip(names, values, strict=True)) if len(names) > 1 else values[0]


def suggestions(structure: Any, lengths: Sequence[int | None]) -> tuple[str, str]:
    """Returns two suggestions for time_varying where leaves have different lengths: with names, and with bools.

    Examples:
      >>> suggestions(jax.tree.structure((0, 0)), [3, 5])
      ("time_varying=('source', 'target')", 'time_varying=(True, False)')

    Args:
      structure: the tree structure of an example.
      lengths: the length of each leaf, None for leaves of fixed size.
    """
    paths, _ = jax.tree_util.tree_flatten_with_path(jax.tree.unflatten(structure, range(len(lengths))))
    keys = [_key(path) for path, _ in paths]
    distinct = list(dict.fromkeys(length for length in lengths if length is not None))
    names: dict[int, str] = {}
    for length, key in zip(lengths, keys, strict=True):
        if length is not None and length not in names:
            place = len(names)
            names[length] = key if isinstance(key, str) else f"axis{place}"
    if len(distinct) == 2 and not any(isinstance(key, str) for key in keys):
        names = dict(zip(distinct, ("source", "target"), strict=True))
    if len(set(names.values())) < len(names):
        names = {length: f"axis{place}" for place, length in enumerate(distinct)}
    named = [length is not None and (len(distinct) == 1 or names[length]) for length in lengths]
    fixed = [length == distinct[0] for length in lengths]
    return tuple(f"time_varying={jax.tree.unflatten(structure, flags)!r}" for flags in (named, fixed))  # type: ignore[return-value]


def leaf_names(structure: Any) -> list[str]:
    """Returns the path to each leaf as Python code; an empty string for an example that is one array."""
    paths, _ = jax.tree_util.tree_flatten_with_path(jax.tree.unflatten(structure, range(structure.num_leaves)))
    return [jax.tree_util.keystr(path) for path, _ in paths]


def _key(path: Sequence[Any]) -> Hashable:
    """Returns the last entry of a path to a leaf: a key, a field's name or a number."""
    last = path[-1]
    return next(getattr(last, name) for name in ("key", "name", "idx") if hasattr(last, name))


def _listed(names: Sequence[str]) -> str:
    return " and ".join(repr(name) for name in names)


def _mapping(names: Sequence[str]) -> str:
    return "{" + ", ".join(f'"{name}": plan' for name in names) + "}"


def _is_none(node: object) -> bool:
    return node is None
