"""Plots of a plan, of a corpus beside its plan, and of a benchmark. The extra `plot` installs matplotlib.

    jaxpack.plot.plot_plan(plan, lengths).savefig("plan.svg")

Figures are made without pyplot, so no global state changes and no window opens; notebooks show them.
Colours are those of Okabe and Ito, which colour-blind readers can tell apart; they also differ in lightness, for print.
"""

from jaxpack._namespace import publish as _publish
from jaxpack.plot._figures import formats, plot_bench, plot_corpus, plot_plan

__all__ = ["formats", "plot_bench", "plot_corpus", "plot_plan"]

_publish(__name__)
