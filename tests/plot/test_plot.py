"""Plots show the counts and measurements, and the error about a missing matplotlib names the extra."""

import pickle
import struct
import sys
import types

import numpy as np
import pytest

import jaxpack
from jaxpack import plot
from jaxpack.data import plan_cover

LENGTHS = [4, 6, 8, 5, 4, 3, 7, 8]


@pytest.fixture
def matplotlib():
    return pytest.importorskip("matplotlib", reason="matplotlib, which the extra `plot` brings, is not installed")


def drawn_spans(axes, label):
    """Returns row, start and end of each rectangle with a label; all are one row high."""
    (spans,) = [spans for spans in axes.collections if spans.get_label() == label]
    boxes = [path.get_extents() for path in spans.get_paths()]
    assert all(box.height == 1 for box in boxes)
    return [(box.y0, box.x0, box.x1) for box in boxes]


def drawn_cells(axes, label):
    """Returns the area of the rectangles with a label, which are one row high."""
    return sum(end - start for _, start, end in drawn_spans(axes, label))


def drawn_lines(axes):
    """Returns row and step of each line where a slot starts within a row."""
    (lines,) = [lines for lines in axes.collections if hasattr(lines, "get_segments")]
    return [(segment[0, 1], segment[0, 0]) for segment in lines.get_segments()]


def test_corpus_is_drawn_beside_the_rooms_of_its_plan(matplotlib):
    lengths = np.random.default_rng(0).integers(1, 40, 3200)
    plan = plan_cover(lengths, 32)
    left, right = plot.plot_corpus(lengths, plan).axes
    assert sum(bar.get_height() for bar in left.patches) == len(lengths)
    assert left.patches[5].get_height() == (lengths == 5).sum()
    rooms, _ = right.patches
    assert rooms.get_data().values.tolist() == plan.room.tolist()
    (real,) = [drawn for drawn in right.collections if drawn.get_label() == "real"]
    (outline,) = [path.vertices for path in real.get_paths()]
    x, y = outline[:, 0], outline[:, 1]
    area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    assert area == pytest.approx(lengths.sum() / 100, rel=0.01)  # 100 batches
    assert right.get_title().startswith(f"{lengths.sum() / (100 * plan.size):.1%} of cells real")


def test_a_plan_too_short_for_the_corpus_is_not_drawn(matplotlib):
    with pytest.raises(ValueError, match=r"lengths\[0\] = 9 does not fit the plan"):
        plot.plot_corpus([3, 9], jaxpack.plan_padded(2, 4))


def ratio(median):
    return {"median": median, "low": median - 0.5, "high": median + 0.25}


def results():
    """Returns the part of a benchmark's result that is drawn."""
    medians = {"jaxpack": (2.0, 2.25), "flax.nnx": (4.0, 7.0)}
    peers = [
        {"name": name, "forward": {"times_limit": ratio(f)}, "training": {"times_limit": ratio(t)}}
        for name, (f, t) in medians.items()
    ]
    return {
        "workload": {"name": "lognormal"},
        "machine": {"cpu": "a processor", "backend": "cpu", "device": "cpu"},
        "peers": peers,
    }


@pytest.mark.parametrize("num_buckets", [1, 3, None])
def test_plan_is_drawn_with_its_real_and_slack_cells(matplotlib, num_buckets):
    plan = jaxpack.plan_buckets(LENGTHS, num_buckets)
    (axes,) = plot.plot_plan(plan, LENGTHS).axes
    assert drawn_cells(axes, "real") == sum(LENGTHS)
    assert drawn_cells(axes, "slack: computed, masked") == plan.size - sum(LENGTHS)
    outlines = [patch for patch in axes.patches if not patch.get_fill()]
    assert [(p.get_x(), p.get_width(), p.get_height()) for p in outlines] == [
        (b.start, b.steps, b.rows) for b in plan.buckets
    ]


def test_row_plan_is_drawn_in_its_rows_with_lines_where_slots_start(matplotlib):
    plan = jaxpack.BucketPlan((4,), (2,), ((0,), (0, 2)))
    (axes,) = plot.plot_plan(plan, [1, 3, 2]).axes
    assert drawn_spans(axes, "real") == [(0, 0, 3), (1, 0, 2), (1, 2, 3)]
    assert drawn_spans(axes, "slack: computed, masked") == [(0, 3, 4), (1, 2, 2), (1, 3, 4)]
    assert drawn_lines(axes) == [(1, 2)]
    assert axes.get_ylim() == (2, 0)
    assert axes.get_title() == "2 rows of 4 steps, 8 cells, 75% of them real"


@pytest.mark.parametrize("num_rows", [1, 4, None])
def test_row_plan_is_drawn_with_its_real_and_slack_cells(matplotlib, num_rows):
    plan = jaxpack.plan_rows(LENGTHS, num_rows)
    (axes,) = plot.plot_plan(plan, LENGTHS).axes
    assert drawn_cells(axes, "real") == sum(LENGTHS)
    assert drawn_cells(axes, "slack: computed, masked") == plan.size - sum(LENGTHS)
    assert len(drawn_lines(axes)) == len(LENGTHS) - plan.rows[0]


def test_staircase_has_no_lines_within_its_rows(matplotlib):
    (axes,) = plot.plot_plan(jaxpack.plan_buckets(LENGTHS, 3)).axes
    assert drawn_lines(axes) == []


def test_plan_plot_says_what_it_shows(matplotlib):
    plan = jaxpack.plan_buckets(LENGTHS, 3)
    (axes,) = plot.plot_plan(plan, LENGTHS).axes
    assert axes.get_title() == "3 buckets, 48 cells, 94% of them real"
    assert axes.get_xlabel() == "time [steps]"
    assert axes.get_ylabel() == "sequences, longest first [rows]"
    assert axes.yaxis_inverted()


def test_plan_without_lengths_is_drawn_as_its_cells(matplotlib):
    plan = jaxpack.plan_padded(3, 4)
    (axes,) = plot.plot_plan(plan).axes
    assert axes.get_title() == "1 bucket, 12 cells"
    assert drawn_cells(axes, "cells") == 12


def test_plan_plot_takes_fewer_lengths_than_rows_and_refuses_misfits(matplotlib):
    plan = jaxpack.plan_padded(3, 4)
    (axes,) = plot.plot_plan(plan, [2, 0]).axes
    assert drawn_cells(axes, "real") == 2
    with pytest.raises(ValueError, match="does not fit"):
        plot.plot_plan(plan, [5])


def test_bench_bars_are_the_ratios_with_their_spread(matplotlib):
    figure = plot.plot_bench(results())
    for axes, key in zip(figure.axes, ("forward", "training"), strict=True):
        expected = [peer[key]["times_limit"] for peer in results()["peers"]]
        bars, errors = [c for c in axes.containers if hasattr(c, "patches")], axes.collections
        assert [bar.get_width() for bar in bars[0].patches] == [r["median"] for r in expected]
        ends = [segment[:, 0].tolist() for segment in errors[0].get_segments()]
        assert ends == [[r["low"], r["high"]] for r in expected]
        assert axes.get_xlabel() == "time / matmul limit [1]"
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["jaxpack", "flax.nnx"]
    assert figure.get_suptitle() == "lognormal, on a processor"


def test_bench_plot_says_what_its_lines_are(matplotlib):
    assert (
        plot.plot_bench(results()).get_supxlabel() == "bars: median of the turns; lines: 25 to 75 %; dashed: the limit"
    )


def size_of_png(data):
    """Reads width and height from the header of a PNG."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_figures_show_themselves_at_two_pixels_to_one_of_the_page(matplotlib):
    figure = plot.plot_plan(jaxpack.plan_padded(3, 4), [4, 1])
    data, shown_at = figure._repr_png_()
    assert shown_at == {"width": 614, "height": 384}
    assert size_of_png(data) == pytest.approx((2 * 614, 2 * 384), abs=1)
    copy = pickle.loads(pickle.dumps(figure))
    assert copy._repr_png_()[0] == data
    copy.axes[0].set_title("another")
    assert copy._repr_png_()[0] != data


def test_notebooks_show_a_figure_once_with_pyplot_and_without(matplotlib):
    formatters = pytest.importorskip("IPython.core.formatters", reason="IPython is not installed")
    pylabtools = pytest.importorskip("IPython.core.pylabtools")
    figure = plot.plot_plan(jaxpack.plan_padded(3, 4), [4, 1])
    notebook = formatters.DisplayFormatter()
    shown, metadata = notebook.format(figure)
    assert shown.keys() == {"text/plain", "image/png"}
    assert metadata["image/png"]["width"] == 614
    pylabtools.select_figure_formats(types.SimpleNamespace(display_formatter=notebook), {"png"})  # as pyplot does
    shown, metadata = notebook.format(figure)
    assert shown.keys() == {"text/plain", "image/png"}
    assert "image/png" not in metadata  # pyplot's own display comes first


def test_figures_can_be_saved_in_the_formats_that_are_named(matplotlib, tmp_path):
    assert {"png", "svg", "pdf"} <= set(plot.formats())
    for name, draw in {
        "plan.png": lambda: plot.plot_plan(jaxpack.plan_exact(LENGTHS), LENGTHS),
        "rows.svg": lambda: plot.plot_plan(jaxpack.plan_rows(LENGTHS), LENGTHS),
        "bench.svg": lambda: plot.plot_bench(results()),
    }.items():
        draw().savefig(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000


@pytest.mark.parametrize(
    "draw", [lambda: plot.plot_plan(jaxpack.plan_padded(3, 4)), lambda: plot.plot_bench(results()), plot.formats]
)
def test_a_missing_matplotlib_is_named_with_the_extra(monkeypatch, draw):
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'jaxpack\[plot\]'"):
        draw()
