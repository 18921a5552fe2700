"""Losses on packed outputs, as sums beside the weights they are divided by: `Mean`.

A row of weight 0 (which is what jaxpack.data gives to empty rows), slack and padding count for exactly nothing, in
values and in gradients, whatever they hold. A sequence that does not fit its plan makes total and weight NaN, whatever
its own weight: its weight is replaced by NaN. Losses are computed and summed in float32 or wider.
"""

from jaxpack._namespace import publish as _publish
from jaxpack.losses._cross_entropy import sequence_cross_entropy, token_cross_entropy
from jaxpack.losses._ctc import ctc, ctc_min_frames
from jaxpack.losses._mean import Mean

__all__ = ["Mean", "ctc", "ctc_min_frames", "sequence_cross_entropy", "token_cross_entropy"]

_publish(__name__)
