"""Parts of a corpus with several time axes, one for each slot of a batch, whose sequences are alike in all lengths."""

from __future__ import annotations

import numpy as np


def cut_in_parts(lengths: np.ndarray, slots: int, size: int | None = None) -> list[np.ndarray]:
    """Returns the numbers of the sequences in each part.

    Sequences are halved by one of their lengths, each time by the one that needs the least room if the sequences of
    each half are padded to its longest. The parts depend on the lengths alone, not on the order of the sequences.

    Examples:
      >>> [part.tolist() for part in cut_in_parts(np.array([[9, 2], [1, 8], [9, 1], [1, 9]]), 2)]
      [[2, 0], [1, 3]]

    Args:
      lengths: int [N, A].
      slots: how many parts to make.
      size: how many sequences a part holds, the last parts fewer. Default: parts are as equal as possible.
    """
    order = np.lexsort(lengths.T[::-1])
    return _cut(lengths, order, slots, size)


def joint_rooms(lengths: np.ndarray, slots: int) -> list[np.ndarray]:
    """Returns the rooms [slots] on each axis that batches of one sequence per part need, at least 1, longest first.

    Examples:
      >>> [rooms.tolist() for rooms in joint_rooms(np.array([[9, 2], [1, 8], [9, 1], [1, 9]]), 2)]
      [[9, 1], [9, 2]]
    """
    parts = cut_in_parts(lengths, slots, -(-len(lengths) // slots))
    longest = np.array([lengths[part].max(axis=0, initial=1) for part in parts])
    return list(-np.sort(-longest.T, axis=1))


def _cut(lengths: np.ndarray, held: np.ndarray, slots: int, size: int | None) -> list[np.ndarray]:
    if slots == 1:
        return [held]
    first = slots // 2
    place = len(held) * first // slots if size is None else first * size
    halves = []
    for a in range(lengths.shape[1]):
        ordered = held[np.argsort(-lengths[held, a], kind="stable")]
        halves.append((ordered[:place], ordered[place:]))
    longer, shorter = min(
        halves, key=lambda half: _room(lengths[half[0]], first) + _room(lengths[half[1]], slots - first)
    )
    return _cut(lengths, longer, first, size) + _cut(lengths, shorter, slots - first, size)


def _room(lengths: np.ndarray, slots: int) -> int:
    """Counts the cells on all axes of `slots` slots with room for the longest of these lengths."""
    return slots * int(lengths.max(axis=0, initial=1).sum())
