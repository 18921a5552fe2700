"""resets_from_dones: from flags that end a step to flags that begin one."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy.typing as npt

from jaxpack._checks import as_int
from jaxpack._dtypes import as_jax


def resets_from_dones(dones: npt.ArrayLike, *, first: npt.ArrayLike, axis: int) -> jax.Array:
    """Returns where episodes begin, from flags that say where they end: the flags, one step later.

        step        0  1  2  3  4
        dones       .  .  x  .  .     step 2 is the last one of its episode
        resets      f  .  .  x  .     so step 3 is the first one of the next; f is `first`

        resets[0] = first,   resets[t] = dones[t - 1]

    The two are one step apart, and both are [T, N] bool arrays, so taking one for the other raises no error: the policy
    then trains on states that it never acted from.

    Examples:
      A rollout [T, N] of two environments, the first of which was reset before it:

      >>> dones = jnp.array([[False, False], [True, False], [False, True]])
      >>> resets_from_dones(dones, first=jnp.array([True, False]), axis=0).tolist()
      [[True, False], [False, False], [True, False]]

      The next rollout begins where this one ended. Its first step is a reset where this one's last step was done:

      >>> resets_from_dones(dones, first=dones[-1], axis=0).tolist()
      [[False, True], [False, False], [True, False]]

    Args:
      dones: bool, any shape with a time axis, such as [T, N] or [N, T]: True at the last step of an episode.
        Gymnasium's `terminated | truncated` of step t, where the observation at step t + 1 belongs to the next episode:
        in gymnax and brax, and in Gymnasium's vector environments in autoreset mode SAME_STEP. In their default mode,
        NEXT_STEP, step t + 1 still shows the last observation of the old episode and ignores its action. There the
        function is applied twice:

            ignored = resets_from_dones(dones, first=..., axis=0)     # steps to leave out of the loss
            resets = resets_from_dones(ignored, first=..., axis=0)

      first: bool, whether the first step begins an episode: one for all, or one for each row [N]. True after `reset`;
        else the last flags of the rollout before, `dones[-1]`.
      axis: the time axis: 0 for [T, N], 1 for [N, T]. It has no default, because no shape tells which one is meant.

    Returns:
      bool, in the shape of dones. Layers take it as `resets=`, `cut_rollout` as `resets`.

    Raises:
      TypeError: if dones or first are not bool, or axis is not an int.
      ValueError: if dones have no such axis, or first is neither one flag nor one a row.
    Source: the modes are those of gymnasium.vector.AutoresetMode.
    """
    flags = {"dones": as_jax(dones, "dones"), "first": as_jax(first, "first")}
    for name, array in flags.items():
        if array.dtype != bool:
            raise TypeError(
                f"{name} must be bool, got dtype {array.dtype}. Of zeros and ones write {name}.astype(bool); of a step "
                f"type or a discount compare first, such as discount == 0."
            )
    ends, begins = flags.values()
    axis = as_int("axis", axis)
    if not -ends.ndim <= axis < ends.ndim:
        raise ValueError(f"axis={axis} is no axis of dones, which have shape {ends.shape}. [T, N] has time at axis 0.")
    axis %= ends.ndim
    rows = ends.shape[:axis] + ends.shape[axis + 1 :]
    if begins.shape not in ((), rows):
        raise ValueError(
            f"first must be one bool, or one for each row, {list(rows)} (dones {list(ends.shape)} without the time "
            f"axis {axis}), got shape {list(begins.shape)}. Is axis right?"
        )
    return _shifted(ends, begins, axis)


@functools.partial(jax.jit, static_argnames="axis")
def _shifted(ends: jax.Array, begins: jax.Array, axis: int) -> jax.Array:
    """Returns the flags one step later, behind the first ones."""
    steps = ends.shape[axis]
    rows = ends.shape[:axis] + ends.shape[axis + 1 :]
    first = jnp.expand_dims(jnp.broadcast_to(begins, rows), axis)
    return jax.lax.slice_in_dim(jnp.concatenate([first, ends], axis), 0, steps, axis=axis)
