"""Windows of fixed length over the episodes of a rollout: what a replay memory samples."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax

from jaxpack._checks import as_int, at_least_one
from jaxpack._packed.broadcast import expand
from jaxpack._rollouts.fragments import Runs, rows_of_resets
from jaxpack._rollouts.states import checked_arrays, stored
from jaxpack._types import PyTree


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["rows", "starts", "lengths", "begins"],
    meta_fields=["length", "shape", "axis"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """M windows of at most `length` steps, each within one episode. Made by `replay_windows`.

    A pytree: pass sampled windows to a jitted function, which takes their steps out of the memory. Samples of one size
    are one program.

    Examples:
      >>> resets = np.array([[True, False, False, False, True, False]])  # [N, T], episodes of 4 and 2 steps
      >>> windows = replay_windows(resets, length=3, overlap=1, axis=1)
      >>> windows.starts.tolist(), windows.lengths.tolist()
      ([0, 1, 4], [3, 3, 2])
      >>> windows.take(jnp.arange(6)[None]).tolist(), windows.mask.tolist()[2]
      ([[0, 1, 2], [1, 2, 3], [4, 5, 0]], [True, True, False])

    Attributes:
      rows: int32 [M], the row of each window.
      starts: int32 [M], its first step.
      lengths: int32 [M], the number of its steps.
      begins: bool [M], whether a reset begins it.
      length: the number of steps of a full window (static).
      shape: (T, N) or (N, T), of the memory (static).
      axis: the time axis of the memory (static).
    """

    rows: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    begins: np.ndarray
    length: int
    shape: tuple[int, int]
    axis: int

    def __len__(self) -> int:
        """Returns the number of windows."""
        return len(self.rows)

    @property
    def mask(self) -> jax.Array:
        """True at real steps: bool [M, length]."""
        return jnp.arange(self.length) < jnp.asarray(self.lengths)[:, None]

    def sample(self, generator: np.random.Generator, size: int, weights: npt.ArrayLike | None = None) -> Windows:
        """Draws windows at random, with replacement.

        Examples:
          >>> windows = replay_windows(np.zeros((1, 8), bool), length=4, axis=1)
          >>> windows.sample(np.random.default_rng(0), 5).starts.tolist()
          [4, 4, 4, 0, 0]
          >>> windows.sample(np.random.default_rng(0), 3, weights=[0, 1]).starts.tolist()
          [4, 4, 4]

        Args:
          generator: the source of randomness: the same state draws the same windows.
          size: how many to draw.
          weights: [M], 0 or more, in proportion to which windows are drawn (priorities). Default: all alike.

        Raises:
          TypeError: if generator is not a numpy.random.Generator, or size is not an int.
          ValueError: if size is below 1, or weights are not M numbers of 0 or more with a sum above 0.
        """
        if not isinstance(generator, np.random.Generator):
            raise TypeError(f"generator must be a numpy.random.Generator, got {type(generator).__name__}.")
        chances = None
        if weights is not None:
            chances = np.asarray(weights, np.float64)
            total = chances.sum()
            if chances.shape != (len(self),) or not (chances >= 0).all() or not 0 < total < np.inf:
                raise ValueError(
                    f"weights must be {len(self)} numbers of 0 or more, one for each window, with a sum above 0, got "
                    f"shape {list(chances.shape)} and sum {total}."
                )
            chances = chances / total
        return self[generator.choice(len(self), at_least_one("size", size), p=chances)]

    def __getitem__(self, places: slice | npt.ArrayLike) -> Windows:
        """Returns the windows at these places: a slice, or an array of ints or bools."""
        index = places if isinstance(places, slice) else np.atleast_1d(np.asarray(places))
        return dataclasses.replace(
            self,
            rows=self.rows[index],
            starts=self.starts[index],
            lengths=self.lengths[index],
            begins=self.begins[index],
        )

    def take(self, rollout: PyTree) -> PyTree:
        """Takes the steps of each window out of the memory.

        Args:
          rollout: an array [T, N, *F] (or [N, T, *F], as the resets were), or a pytree of such arrays.

        Returns:
          [M, length, *F], zeros past each window's length.

        Raises:
          ValueError: if an array does not begin with the axes of the resets.
        """
        return _take(self, checked_arrays(rollout, self))

    def stored_state(self, states: PyTree, fresh: PyTree = None, *, batch_axis: int) -> PyTree:
        """Returns the state from which each window starts, out of those that were stored before every step.

        Args and errors: as `Fragments.stored_state`.

        Returns:
          A state with M rows at the batch axis; fresh where a reset begins the window.

        Source: Kapturowski et al. 2019, R2D2 (https://openreview.net/forum?id=r1lyTjAqYX).
        """
        return stored(self, states, fresh, batch_axis)


def replay_windows(resets: npt.ArrayLike, *, length: int, overlap: int = 0, axis: int) -> Windows:
    """Returns the windows of a fixed length that cover the episodes of a rollout, none across a border.

    Windows begin every `length - overlap` steps of an episode. The last one ends with the episode, so it may overlap
    more. Only an episode that is shorter than `length` has a window with padding.

        length 4, overlap 1, an episode of 9 steps:    0 1 2 3 | 3 4 5 6 | 5 6 7 8

    Examples:
      >>> windows = replay_windows(np.zeros((1, 9), bool), length=4, overlap=1, axis=1)
      >>> windows.starts.tolist()
      [0, 3, 5]

    Args:
      resets: bool [T, N] or [N, T], concrete: True where a step begins an episode. Of a ring buffer mark the oldest
        step, too.
      length: the number of steps of a window.
      overlap: how many steps two windows in a row share, less than length. R2D2 has 40 of 80.
      axis: the time axis: 0 for [T, N], 1 for [N, T].

    Raises:
      TypeError: as `cut_rollout`.
      ValueError: as `cut_rollout`, and if length is below 1, or overlap not in 0 to length - 1.
    Source: Kapturowski et al. 2019, R2D2 (https://openreview.net/forum?id=r1lyTjAqYX).
    """
    rows = rows_of_resets(resets, axis)
    length, overlap = at_least_one("length", length), as_int("overlap", overlap)
    if not 0 <= overlap < length:
        raise ValueError(f"overlap must be in 0 to {length - 1}, as windows have {length} steps, got {overlap}.")
    runs, stride = Runs.of(rows), length - overlap
    longest = np.maximum(runs.lengths - length, 0)  # the start of the last window, counted from the episode's
    counts = -(-longest // stride) + 1
    of = np.repeat(np.arange(len(counts)), counts)
    order = np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
    offsets = np.minimum(order * stride, longest[of])
    return Windows(
        runs.rows[of].astype(np.int32),
        (runs.starts[of] + offsets).astype(np.int32),
        np.minimum(runs.lengths[of], length).astype(np.int32),
        runs.begins[of] & (offsets == 0),
        length,
        rows.shape[::-1] if axis == 0 else rows.shape,
        axis,
    )


@jax.jit
def _take(windows: Windows, arrays: PyTree) -> PyTree:
    """Computes `Windows.take`."""
    steps = jnp.asarray(windows.starts)[:, None] + lax.iota(jnp.int32, windows.length)
    rows, mask = jnp.asarray(windows.rows)[:, None], windows.mask

    def gather(leaf: jax.Array) -> jax.Array:
        index = (steps, rows) if windows.axis == 0 else (rows, steps)
        found = leaf.at[index].get(mode="clip")
        return jnp.where(expand(mask, found), found, jnp.zeros_like(found))

    return jax.tree.map(gather, arrays)
