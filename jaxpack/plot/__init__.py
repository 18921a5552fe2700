"""Plots, drawn by matplotlib, which the extra `plot` brings: a plan, a corpus beside its plan, a benchmark.

    jaxpack.plot.plot_plan(plan, lengths).savefig("plan.svg")

Figures are made without pyplot, so nothing global changes and no window opens; notebooks show them all the same.
Colours are Okabe and Ito's, which colour-blind readers can tell apart; they differ in lightness too, for print.
"""

from jaxpack._namespace import publish as _publish
from jaxpack.plot._figures import formats, plot_bench, plot_corpus, plot_plan

__all__ = ["formats", "plot_bench", "plot_corpus", "plot_plan"]

_publish(__name__)
