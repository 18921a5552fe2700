"""Draws the picture of the README.

python .docs/pictures.py
"""

import pathlib

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

import jaxpack

LENGTHS = np.array([4, 6, 8, 5, 4, 3, 7, 8])
REAL, PADDING, EDGE = "#0072B2", "#F0E442", "#333333"
IMAGES = pathlib.Path(__file__).parent / "images"


def draw_cells(axes, lengths: np.ndarray, rows: np.ndarray) -> None:
    """Draws a square for each cell: `rows` cells of each sequence are computed, `lengths` of them are real."""
    for i, (length, computed) in enumerate(zip(lengths, rows, strict=True)):
        for step in range(computed):
            color = REAL if step < length else PADDING
            axes.add_patch(plt.Rectangle((step, i), 1, 1, facecolor=color, edgecolor="white", linewidth=1.5))
        axes.text(8.9, i + 0.5, f"{length}", ha="center", va="center", color=EDGE)
    axes.text(8.9, 8.45, "length", ha="center", va="center", color=EDGE)
    axes.set(xlim=(0, 9.6), ylim=(8, 0), aspect="equal", yticks=[])
    axes.set_xlabel("time [steps]", color=EDGE)
    axes.set_xticks(np.arange(8) + 0.5, range(8))
    axes.tick_params(length=0, colors=EDGE)
    axes.spines[:].set_visible(False)


def packing() -> None:
    """Draws the batch of the README, padded and packed."""
    order = np.argsort(-LENGTHS, kind="stable")
    plan = jaxpack.plan_exact(LENGTHS)
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.2, 3.8), layout="constrained")
    draw_cells(left, LENGTHS, np.full(8, LENGTHS.max()))
    draw_cells(right, LENGTHS[order], plan.room)
    left.set_title(f"Padded: {LENGTHS.max() * len(LENGTHS)} cell steps", color=EDGE)
    right.set_title(f"Packed: {plan.size} cell steps", color=EDGE)
    left.set_ylabel("sequences", color=EDGE)
    right.set_ylabel("sequences, longest first", color=EDGE)
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in (REAL, PADDING)]
    figure.legend(handles, ["real", "padding"], loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(IMAGES / "packing.svg", metadata={"Date": None})


if __name__ == "__main__":
    matplotlib.rcParams.update({"svg.hashsalt": "jaxpack", "font.size": 11, "axes.titlesize": 12})
    packing()
