"""The figures of a plan, of a corpus beside its plan, and of a benchmark."""

from __future__ import annotations

import functools
import importlib
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxpack._extras import import_extra
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack.data._cover import Lengths, coverage_of, num_batches
from jaxpack.data._histogram import corpus_of

Figure = Any  # matplotlib.figure.Figure, which only the extra installs

_REAL, _SLACK, _EDGE = "#0072B2", "#F0E442", "#333333"
_BEST, _OURS, _OTHER = "#0072B2", "#56B4E9", "#BBBBBB"
_PAGE_DPI = 96  # pixels per inch of a page, as CSS defines them
_BARS, _POINTS = 100, 2000  # the most bars of a histogram and points of a curve
_PASSES = {"forward": "Forward", "training": "Forward and backward"}


def plot_plan(plan: BucketPlan, lengths: npt.ArrayLike | None = None) -> Figure:
    """Plots the rows of a plan.

    Time runs right, sequences run down, longest first. Lines mark the starts of further slots in a row.

    Examples:
      >>> figure = plot_plan(jaxpack.plan_padded(2, 3), [3, 1])
      >>> figure.axes[0].get_title()
      '1 bucket, 6 cells, 67% of them real'

    Args:
      plan: the plan.
      lengths: [N] the lengths of a batch; with them, real cells are dark and slack is light.

    Returns:
      A matplotlib.figure.Figure; save it with `.savefig(path)`.

    Raises:
      ModuleNotFoundError: if matplotlib is not installed.
      TypeError: if the lengths are not a vector of numbers.
      ValueError: if the lengths do not fit the plan.
    """
    cells = f"{plan.size:,} cells"
    if lengths is None:
        filled = plan.room
    else:
        cells += f", {plan.efficiency(lengths):.0%} of them real"
        filled = plan.filled(lengths)
    figure = _figure(6.4, 4.0)
    axes = figure.add_subplot()
    starts, ends = plan.slot_starts, plan.slot_starts + plan.room
    _draw_spans(axes, plan.slot_rows, starts, starts + filled, _REAL, "cells" if lengths is None else "real")
    if lengths is not None:
        _draw_spans(axes, plan.slot_rows, starts + filled, ends, _SLACK, "slack: computed, masked")
    inner = starts > 0
    axes.vlines(starts[inner], plan.slot_rows[inner], plan.slot_rows[inner] + 1, color="white", linewidth=1)
    patches = importlib.import_module("matplotlib.patches")
    for b in plan.buckets:
        axes.add_patch(patches.Rectangle((b.start, 0), b.steps, b.rows, fill=False, edgecolor=_EDGE, linewidth=1))
    axes.set_xlim(0, plan.num_steps)
    axes.set_ylim(plan.rows[0], 0)
    axes.set_xlabel("time [steps]")
    axes.set_ylabel("sequences, longest first [rows]")
    axes.set_title(f"{plan.summary}, {cells}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def plot_corpus(lengths: Lengths, plan: BucketPlan) -> Figure:
    """Plots a corpus beside the plan that its batches fill: a histogram of lengths, and the filling of the slots.

    Examples:
      >>> figure = plot_corpus([1, 2, 3, 4], jaxpack.plan_padded(2, 4))
      >>> [axes.get_title() for axes in figure.axes]
      ['4 sequences of 1 to 4 steps', '62.5% of cells real, 83.3% at best']

    Args:
      lengths: [N] whole numbers >= 0: the lengths of the corpus, or their LengthHistogram.
      plan: the plan of every batch, such as jaxpack.data.plan_cover makes. Each slot takes the sequences between its
        two marks.

    Returns:
      A matplotlib.figure.Figure; save it with `.savefig(path)`.

    Raises:
      ModuleNotFoundError: if matplotlib is not installed.
      ValueError: if the corpus is empty, lengths are negative or not whole, or one is longer than the plan.
    """
    corpus = corpus_of(lengths)
    plan.check(corpus.lengths[:1])
    expected, shortest = coverage_of(corpus, plan), corpus.lengths[-1]
    figure = _figure(8.0, 3.6)
    left, right = figure.subplots(1, 2)
    width = -(-(corpus.longest + 1) // _BARS)
    bars = np.arange(0, corpus.longest + width + 1, width) - 0.5
    left.hist(corpus.lengths, bars, weights=corpus.counts, color=_REAL)
    left.set_xlabel("length [steps]")
    left.set_ylabel("sequences")
    left.set_title(f"{corpus.size:,} sequences of {shortest:,} to {corpus.longest:,} steps")
    drawn = np.unique(np.linspace(0, corpus.size - 1, _POINTS).astype(int))
    slots = drawn / num_batches(corpus, plan.room)
    right.stairs(plan.room, fill=True, color=_SLACK, label="slack: computed, masked")
    right.fill_between(slots, corpus.at(drawn), step="post", color=_REAL, linewidth=0, label="real")
    right.stairs(plan.room, color=_EDGE, linewidth=1)
    right.set_xlabel("slots of the plan, longest first")
    right.set_ylabel("time [steps]")
    right.set_title(f"{expected.efficiency:.1%} of cells real, {expected.slot_bound:.1%} at best")
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    right.set_xlim(0, plan.num_sequences)
    right.legend(loc="upper right", frameon=False)
    return figure


def plot_bench(results: Mapping[str, Any]) -> Figure:
    """Plots how many times the matmul limit each library takes: bars to the median, lines from 25 to 75 %.

    Args:
      results: the content of the file that `jaxpack bench --json FILE` writes.

    Returns:
      A matplotlib.figure.Figure; save it with `.savefig(path)`.

    Raises:
      ModuleNotFoundError: if matplotlib is not installed.
    """
    peers = results["peers"]
    names = [peer["name"] for peer in peers]
    colors = [_BEST if name == "jaxpack" else _OURS if name.startswith("jaxpack") else _OTHER for name in names]
    figure = _figure(8.0, 1.8 + 0.34 * len(peers))
    for axes, (key, title) in zip(figure.subplots(1, 2, sharey=True), _PASSES.items(), strict=True):
        ratios = [peer[key]["times_limit"] for peer in peers]
        medians = np.array([ratio["median"] for ratio in ratios])
        spread = np.array([[r["median"] - r["low"], r["high"] - r["median"]] for r in ratios]).T
        bars = axes.barh(names, medians, xerr=spread, color=colors, ecolor=_EDGE, capsize=3)
        axes.bar_label(bars, [f"{median:,.1f}" for median in medians], padding=4)
        axes.axvline(1, color=_EDGE, linestyle="--", linewidth=1)
        axes.margins(x=0.18)
        axes.set_xlim(left=0)
        axes.set_title(title)
        axes.set_xlabel("time / matmul limit [1]")
        axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_inverted(True)
    figure.supxlabel("bars: median of the turns; lines: 25 to 75 %; dashed: the limit", fontsize="small")
    machine = results["machine"]
    figure.suptitle(
        f"{results['workload']['name']}, on {machine['cpu'] if machine['backend'] == 'cpu' else machine['device']}"
    )
    return figure


def formats() -> tuple[str, ...]:
    """Returns the formats in which a figure can be saved, as the endings of file names.

    Examples:
      >>> "png" in formats() and "svg" in formats()
      True

    Raises:
      ModuleNotFoundError: if matplotlib is not installed.
    """
    return tuple(sorted(_figure(1, 1).canvas.get_supported_filetypes()))


def _figure(width: float, height: float) -> Figure:
    """Returns an empty figure with a size in inches, which notebooks show."""
    figure = import_extra("matplotlib.figure", "plot", "plots").Figure(
        figsize=(width, height), layout="constrained", dpi=150
    )
    figure._repr_png_ = functools.partial(_png, figure)
    return figure


def _png(figure: Figure) -> tuple[bytes, dict[str, int]]:
    """Returns a figure for IPython: a PNG with two pixels for each of the page's, and the size to show it in.

    IPython calls it unless pyplot has registered its own way to show figures, which comes first.
    """
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=2 * _PAGE_DPI)
    width, height = figure.get_size_inches() * _PAGE_DPI
    return written.getvalue(), {"width": round(width), "height": round(height)}


def _draw_spans(axes: Any, rows: np.ndarray, starts: np.ndarray, ends: np.ndarray, color: str, label: str) -> None:
    """Draws rectangles one row high, as one artist, since blurred edges of many would leave seams between rows."""
    collections = importlib.import_module("matplotlib.collections")
    corners = np.stack([[starts, ends, ends, starts], [rows, rows, rows + 1, rows + 1]])  # [2, 4, B]
    axes.add_collection(collections.PolyCollection(corners.T, facecolor=color, antialiased=False, label=label))
