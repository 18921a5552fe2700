"""Probabilities that batches drawn at random fit rooms, and the rooms that they miss with a given probability.

A random batch fits if few enough of its sequences are longer than each room. Drawn without replacement, those counts
are hypergeometric. The probability that no count is exceeded follows exactly from a recursion over the rooms, largest
first (Noé 1972, The Calculation of Distributions of Two-Sided Kolmogorov-Smirnov Type Statistics; here for draws from a
finite corpus).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.special import gammaln, xlog1py, xlogy  # jax needs scipy too

from jaxpack.data._corpus import Corpus

_BISECTIONS = 20  # in the search for the quantile of a miss probability
_CHANCES = 2**24  # the most probabilities computed at once, one for each slot and length
_DEVIATIONS = 9  # a count is within this many standard deviations of its mean, to a float's precision
_NOTHING = 1e-30  # a chance below this share of the largest one is dropped


def random_rooms(corpus: Corpus, batch_size: int) -> Callable[[float], np.ndarray]:
    """Returns a function from a miss probability to rooms [B], each exceeded with the same probability."""
    drawn = min(batch_size, corpus.size)
    every = -(-len(corpus.lengths) * drawn // _CHANCES)  # takes one in this many lengths, always the longest
    lengths, longer = corpus.lengths[::every], (corpus.ends - corpus.counts)[::every]
    tails = _tails(corpus.size, longer, drawn)

    def rooms(quantile: float) -> np.ndarray:
        """Returns for each slot the least length which it exceeds with at most this probability."""
        places = np.array([np.searchsorted(tail, quantile, "right") - 1 for tail in tails])
        found = np.maximum(1, lengths[places])
        return np.concatenate([found, np.ones(batch_size - drawn, found.dtype)])

    def missed_at_most(miss: float) -> np.ndarray:
        low, high = 0.0, miss  # no slot is missed more often than all jointly
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if miss_probability(corpus, rooms(middle)) <= miss else (low, middle)
        return rooms(low)

    return missed_at_most


def _tails(size: int, longer: np.ndarray, drawn: int) -> np.ndarray:
    """Computes [drawn, U], the probability that the i-th longest of a batch exceeds each of U lengths, longest first.

    Args:
      size: how many sequences the corpus has.
      longer: int [U], how many of them are longer than each length, longest length first.
      drawn: how many sequences a batch has.
    """
    counts = np.arange(drawn)[:, None]
    chances = np.exp(_log_hypergeometric(size, longer, drawn, counts))  # [drawn, U]
    return np.maximum.accumulate(1 - np.cumsum(chances, axis=0), axis=1)


def miss_probability(corpus: Corpus, room: np.ndarray) -> float:
    """Computes the exact probability that a batch drawn without replacement does not fit.

    The recursion takes the distinct rooms, largest first. If slot s is the first with a room, at most s sequences may
    be longer than it. If each sequence were drawn independently, with probability drawn / size, the numbers of
    sequences drawn between two rooms would be binomial and independent. Given that `drawn` are drawn in all, their
    distribution is that of a batch. `chances[m]` is the probability that m sequences are longer than the room reached
    and no limit was exceeded before.
    """
    size, drawn = corpus.size, min(len(room), corpus.size)
    rooms, first = np.unique(-room[:drawn], return_index=True)
    longer = corpus.longer_than(-rooms)  # sequences of the corpus per room
    share = drawn / size
    low, chances, before = 0, np.ones(1), 0  # `chances` are those of low, low + 1, ...
    for most, now in zip(first, longer, strict=True):
        more_low, more = _binomial(now - before, share, most - low)
        chances = np.convolve(chances, more)[: most + 1 - low - more_low] if more.size else more
        if not chances.any():
            return 1.0
        low, before = low + more_low, now
        kept = np.flatnonzero(chances > _NOTHING * chances.max())
        low, chances = low + kept[0], chances[kept[0] : kept[-1] + 1]
    counts = low + np.arange(len(chances))
    fits = (chances * np.exp(_log_binomial(size - before, share, drawn - counts))).sum()
    return float(np.clip(1 - fits / np.exp(_log_binomial(size, share, np.array(drawn))), 0, 1))


def _binomial(number: int, share: float, most: int) -> tuple[int, np.ndarray]:
    """Returns the least number of hits with a chance above zero, to a float's precision, and the chances from it up.

    Chances of more than `most` >= 0 hits are left out, so there may be none.
    """
    mean = number * share
    spread = _DEVIATIONS * (np.sqrt(mean) + _DEVIATIONS)
    low, high = max(0, int(mean - spread)), min(number, most, int(mean + spread) + 1)
    return low, np.exp(_log_binomial(number, share, np.arange(low, high + 1)))


def _log_binomial(number: int, share: float, hits: np.ndarray) -> np.ndarray:
    """Computes log P(hits) of `number` draws, each with the chance `share`; -inf where impossible."""
    possible = (hits >= 0) & (hits <= number)
    hits = np.where(possible, hits, 0)
    log = _log_choose(number, hits) + xlogy(hits, share) + xlog1py(number - hits, -share)
    return np.where(possible, log, -np.inf)


def _log_hypergeometric(size: int, marked: np.ndarray, drawn: int, hits: np.ndarray) -> np.ndarray:
    """Computes log P(hits) of draws without replacement from `size`, `marked` of them; -inf where impossible."""
    possible = (hits <= marked) & (hits <= drawn) & (drawn - hits <= size - marked)
    hits = np.where(possible, hits, np.maximum(0, drawn - (size - marked)))
    with np.errstate(invalid="ignore"):
        log = _log_choose(marked, hits) + _log_choose(size - marked, drawn - hits) - _log_choose(size, drawn)
    return np.where(possible, log, -np.inf)


def _log_choose(n: np.ndarray | int, k: np.ndarray | int) -> np.ndarray:
    return gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
