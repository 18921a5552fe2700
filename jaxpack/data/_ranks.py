"""Ranks and rank correlation."""

from __future__ import annotations

import numpy as np


def ranks(values: np.ndarray) -> np.ndarray:
    """Returns the rank of each value, from 1; equal values get the mean of their ranks.

    Examples:
      >>> ranks(np.array([5, 9, 5])).tolist()
      [1.5, 3.0, 1.5]
    """
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Returns Spearman's rank correlation; 0 if all values of x or of y are tied.

    Examples:
      >>> round(rank_correlation(np.array([1, 2, 3]), np.array([9, 4, 2])), 6)
      -1.0
    """
    if len(x) < 2:
        return 0.0
    x, y = ranks(x), ranks(y)
    spread = x.std() * y.std()
    return float(np.mean((x - x.mean()) * (y - y.mean())) / spread) if spread else 0.0
