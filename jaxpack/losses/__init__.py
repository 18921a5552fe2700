"""Losses of packed outputs, each a `Mean`: a sum, and the sum of weights that divides it.

Slack, padding and rows of weight 0 (the weight that jaxpack.data gives to empty rows) contribute exactly nothing to
values and gradients, whatever they hold. A sequence that does not fit its plan makes total and weight NaN, whatever its
own weight, which is replaced by NaN. Losses are computed and summed in float32 or wider.
"""

from jaxpack._namespace import publish as _publish
from jaxpack.losses._cross_entropy import sequence_cross_entropy, token_cross_entropy
from jaxpack.losses._ctc import ctc, ctc_min_frames
from jaxpack.losses._mean import Mean

__all__ = ["Mean", "ctc", "ctc_min_frames", "sequence_cross_entropy", "token_cross_entropy"]

_publish(__name__)
