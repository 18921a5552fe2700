"""Plans for a whole corpus: few programs that its batches fit, and their expected cost.

Order statistics of a random batch concentrate: with B sequences drawn, the i-th longest is near the corpus's quantile
1 - i/B. So one plan serves a corpus. There are two uses, with different plans:

- Batches that are *made to fit* (`SlotFilling`). With N sequences in n = ceil(N/B) batches, slot i needs room for the
  (n i)-th longest of the corpus: the n sequences that slot i takes over the epoch then all fit, and with less room some
  would not. So sum(lengths) / (n sum(room)), the *slot bound*, is the largest efficiency of B slots in n batches.
- Batches *drawn at random*. The rooms must then be larger than the quantiles, and some batches still miss.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import overload

import numpy as np
import numpy.typing as npt

from jaxpack._checks import at_least_one
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._plans.cost import CostModel
from jaxpack._plans.planners import plan_padded, plan_rows
from jaxpack.data._chances import miss_probability, random_rooms
from jaxpack.data._corpus import Axes, Corpus
from jaxpack.data._histogram import LengthHistogram, corpus_of
from jaxpack.data._lengths import lengths_by_axis

Planner = Callable[[np.ndarray], BucketPlan]
Lengths = npt.ArrayLike | LengthHistogram

_RUNS = 1e5  # runs of a corpus's program, beside which compiling one more bucket costs nothing
_MISSES = (0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 1e-3, 1e-4)  # candidates for the plans of a family
_ALIKE = 64  # steps of the search for a batch size start at this part, since plans have few cells beyond their rooms


@dataclasses.dataclass(frozen=True)
class Coverage:
    """The expected efficiency and miss probability of a plan for a corpus.

    Examples:
      >>> expected = coverage([400, 400, 200, 200], jaxpack.BucketPlan(boundaries=(200, 400), rows=(2, 1)))
      >>> round(expected.miss, 3)  # of the 6 possible pairs, the two longest miss
      0.167

    Attributes:
      efficiency: the share of the plan's cells that sequences fill in an epoch of `SlotFilling`; 0 if the longest
        sequence does not fit.
      slot_bound: the largest efficiency of any plan with as many slots that needs the fewest batches, ceil(N/B).
      miss: the probability that a batch drawn at random, without replacement, does not fit.
      random_efficiency: the expected share of the cells that a batch drawn at random fills; batches that miss count
        too.
    """

    efficiency: float
    slot_bound: float
    miss: float
    random_efficiency: float

    def __str__(self) -> str:
        return (
            f"slot filling: efficiency {self.efficiency:.1%}, slot bound {self.slot_bound:.1%}\n"
            f"batches drawn at random: efficiency {self.random_efficiency:.1%}, {self.miss:.2%} miss"
        )


@overload
def plan_cover(  # noqa: D418
    lengths: Mapping[str, Lengths],
    batch_size: int | None = ...,
    *,
    max_cells: int | None = ...,
    miss: float | None = ...,
    platform: str | None = ...,
    planner: Planner | None = ...,
) -> dict[str, BucketPlan]:
    """Returns one plan for each time axis."""


@overload
def plan_cover(  # noqa: D418
    lengths: Lengths,
    batch_size: int | None = ...,
    *,
    max_cells: int | None = ...,
    miss: float | None = ...,
    platform: str | None = ...,
    planner: Planner | None = ...,
) -> BucketPlan:
    """Returns one plan."""


def plan_cover(
    lengths: Lengths | Mapping[str, Lengths],
    batch_size: int | None = None,
    *,
    max_cells: int | None = None,
    miss: float | None = None,
    platform: str | None = None,
    planner: Planner | None = None,
) -> BucketPlan | dict[str, BucketPlan]:
    """Returns one plan for all batches of a corpus, or one for each time axis of its examples.

    `coverage(lengths, plan)` computes its expected efficiency.

    Examples:
      >>> plan_cover([400, 400, 200, 200], batch_size=2)  # one long and one short per batch
      BucketPlan(boundaries=(200, 400), rows=(2, 1))
      >>> plans = plan_cover({"source": [90, 90, 10, 10], "target": [70, 70, 20, 20]}, batch_size=2)
      >>> {name: plan.room.tolist() for name, plan in plans.items()}
      {'source': [90, 10], 'target': [70, 20]}

    Args:
      lengths: [N] whole numbers >= 0: the lengths of the corpus, or their LengthHistogram. Or a dict of such arrays by
        time axis, with an example's lengths at the same place in each; of histograms, if miss is given.
      batch_size: how many sequences a batch holds.
      max_cells: instead of batch_size, the most cells of the plan, or of the plans of all axes together: the batch is
        the largest that needs no more. This is fairseq's max_tokens, which counts padding too. Batches of more than a
        thousand sequences may have 0.1 % fewer than would fit.
      miss: None for `SlotFilling`, whose batches are made to fit. For batches drawn at random, the highest probability
        with which a batch may miss the plan, or that of any axis.
      platform: where the plans will run, as in `jaxpack.plan_best`. Default: that of JAX's default backend.
      planner: makes a plan from the rooms that it needs, instead of a platform. The default, plan_rows with up to 4
        buckets, leaves hardly any slack; staircases (jaxpack.plan_buckets) take fewer steps and have 4 to 13 % of
        slack.

    Raises:
      ValueError: if the corpus is empty, lengths are negative or not whole, both or none of batch_size and max_cells
        are given, or one of them or miss is out of range; if the platform is unknown, or both platform and planner are
        given; if lengths are histograms of several time axes, and miss is None.
      TypeError: if batch_size or max_cells is not an int.
    """
    if not isinstance(lengths, Mapping):
        corpus = Axes((corpus_of(lengths),))
    elif any(isinstance(each, LengthHistogram) for each in lengths.values()):
        corpus = Axes(tuple(map(corpus_of, lengths.values())))
    elif lengths:
        corpus = Axes.of(lengths_by_axis(lengths, list(lengths)))
    else:
        raise ValueError("lengths is an empty dict: a plan needs the lengths on at least one time axis.")
    planner = _planner_for(platform, planner)
    plans = cover(corpus, batch_size, max_cells=max_cells, miss=miss, planner=planner)
    return dict(zip(lengths, plans, strict=True)) if isinstance(lengths, Mapping) else plans[0]


def cover(
    corpus: Axes,
    batch_size: int | None,
    *,
    max_cells: int | None = None,
    miss: float | None = None,
    planner: Planner | None = None,
) -> tuple[BucketPlan, ...]:
    """Returns one plan for each time axis of a corpus; the rest is as in `plan_cover`."""
    if (batch_size is None) == (max_cells is None):
        raise ValueError("pass either batch_size or max_cells.")
    if miss is not None and not 0 < miss < 1:
        raise ValueError(f"miss must be a probability between 0 and 1, got {miss}.")
    planner, num_axes = planner or _planner_for(), len(corpus.corpora)

    def rooms(batch_size: int) -> list[np.ndarray]:
        if miss is not None:
            return [random_rooms(each, batch_size)(miss / num_axes) for each in corpus.corpora]
        return corpus.rooms(batch_size)

    if batch_size is not None:
        return tuple(map(planner, rooms(at_least_one("batch_size", batch_size))))
    return _largest_within(rooms, planner, at_least_one("max_cells", max_cells), corpus.corpora)


def plan_family(
    lengths: Lengths,
    batch_size: int,
    num_plans: int = 3,
    *,
    platform: str | None = None,
    planner: Planner | None = None,
) -> tuple[BucketPlan, ...]:
    """Returns a few plans for batches drawn at random, each of which runs under the cheapest plan that it fits.

    Every batch fits the last plan. The family is the one with the fewest expected cells, among plans that are missed
    with different probabilities.

    Examples:
      >>> plan_family([4, 2, 2, 2], batch_size=2, num_plans=2)
      (BucketPlan(boundaries=(2,), rows=(2,)), BucketPlan(boundaries=(4,), rows=(2,)))

    Args:
      lengths: [N] whole numbers >= 0: the lengths of the corpus, or their LengthHistogram.
      batch_size: how many sequences a batch holds.
      num_plans: the most plans, and so the most programs.
      platform, planner: as in `plan_cover`.

    Returns:
      At least one plan, by increasing size. The last is padded to the longest sequence.

    Raises:
      ValueError: if the corpus is empty, lengths are negative or not whole, or another argument is below 1; or as in
        `plan_cover` about platform and planner.
      TypeError: if batch_size or num_plans is not an int.
    """
    corpus = corpus_of(lengths)
    batch_size = at_least_one("batch_size", batch_size)
    num_plans = at_least_one("num_plans", num_plans)
    planner = _planner_for(platform, planner)
    every = plan_padded(batch_size, max(1, corpus.longest))
    rooms = random_rooms(corpus, batch_size)
    options = {planner(rooms(miss)): None for miss in _MISSES}
    smaller = sorted((plan for plan in options if plan.size < every.size), key=lambda plan: plan.size)
    missed = {plan: miss_probability(corpus, plan.room) for plan in smaller} | {every: 0.0}

    def expected_cells(plans: tuple[BucketPlan, ...]) -> float:
        reach = [1.0, *(missed[plan] for plan in plans)]
        return sum(plan.size * max(0.0, more - less) for plan, more, less in zip(plans, reach, reach[1:], strict=False))

    fewer = ((*chosen, every) for count in range(num_plans) for chosen in itertools.combinations(smaller, count))
    return min(fewer, key=expected_cells)


def coverage(lengths: Lengths, plan: BucketPlan) -> Coverage:
    """Computes the efficiency of a plan for a corpus, for batches made to fit it and for batches drawn at random.

    Examples:
      >>> lengths = [400, 400, 200, 200]
      >>> print(coverage(lengths, plan_cover(lengths, batch_size=2)))
      slot filling: efficiency 100.0%, slot bound 100.0%
      batches drawn at random: efficiency 100.0%, 16.67% miss

    Args:
      lengths: [N] whole numbers >= 0: the lengths of the corpus, or their LengthHistogram.
      plan: any plan; plan.num_sequences is the batch size.

    Raises:
      ValueError: if the corpus is empty, or lengths are negative or not whole.
    """
    return coverage_of(corpus_of(lengths), plan)


def coverage_of(corpus: Corpus, plan: BucketPlan) -> Coverage:
    """Computes the coverage of a corpus by a plan."""
    slots, steps, fits = plan.num_sequences, corpus.num_steps, corpus.longest <= plan.max_length
    efficiency = steps / (num_batches(corpus, plan.room) * plan.size) if fits else 0
    bound = steps / (-(-corpus.size // slots) * int(corpus.rooms(slots).sum()))
    filled = min(slots, corpus.size) * steps / corpus.size / plan.size
    return Coverage(float(efficiency), float(bound), miss_probability(corpus, plan.room), float(filled))


def num_batches(corpus: Corpus, room: np.ndarray) -> int:
    """Computes the fewest batches that hold a corpus in slots with these rooms, largest first.

    The longest must fit. The i largest slots of n batches must hold all sequences that are too long for the next slot.
    """
    needed = -(-corpus.longer_than(room[1:]) // np.arange(1, len(room)))
    return max(-(-corpus.size // len(room)), int(needed.max(initial=0)))


def _planner_for(platform: str | None = None, planner: Planner | None = None) -> Planner:
    """Returns the planner; by default rows of several sequences, in a staircase where that pays on the platform."""
    if planner is None:
        cost_model = dataclasses.replace(CostModel.for_platform(platform), runs=_RUNS)
        return functools.partial(plan_rows, num_buckets=4, cost_model=cost_model)
    if platform is not None:
        raise ValueError(
            f"pass platform or planner, not both, or a planner for that platform: "
            f"functools.partial(jaxpack.plan_best, platform={platform!r})."
        )
    return planner


def _largest_within(
    rooms: Callable[[int], list[np.ndarray]], planner: Planner, max_cells: int, corpora: Sequence[Corpus]
) -> tuple[BucketPlan, ...]:
    """Returns the plans of the largest batch size that needs at most max_cells, by bisection.

    No plan has fewer cells than its rooms have steps, and counting these is faster than planning.
    """
    longest = sum(corpus.longest for corpus in corpora)
    if longest > max_cells:
        raise ValueError(f"max_cells = {max_cells} does not hold the longest sequence, which has {longest} steps.")
    rooms = functools.cache(rooms)
    plans = functools.cache(lambda batch_size: tuple(map(planner, rooms(batch_size))))

    def steps(batch_size: int) -> int:
        return sum(int(each.sum()) for each in rooms(batch_size))

    def cells(batch_size: int) -> int:
        return sum(plan.size for plan in plans(batch_size))

    most = _largest_size(lambda batch_size: steps(batch_size) <= max_cells, 1, min(max_cells, corpora[0].size))
    least, step = most, -(-most // _ALIKE)
    while least > 1 and cells(least) > max_cells:
        least, most, step = max(1, least - step), least - 1, 4 * step
    return plans(_largest_size(lambda batch_size: cells(batch_size) <= max_cells, least, max(least, most)))


def _largest_size(fits: Callable[[int], bool], least: int, most: int) -> int:
    """Bisects for the largest batch size that fits, to one part in 1,024; the least must fit."""
    while most - least > least // 1024:
        middle = min((least + most + 1) // 2, 4 * least)  # most batches have far fewer sequences than cells
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    return least
