"""Metrics of packed outputs and decoded sequences, each a `jaxpack.losses.Mean`, so that batches add up."""

from jaxpack._namespace import publish as _publish
from jaxpack.metrics._classification import accuracy, perplexity
from jaxpack.metrics._ctc import ctc_greedy_decode
from jaxpack.metrics._edit_distance import best_error_rate, edit_distance, error_rate

__all__ = ["accuracy", "best_error_rate", "ctc_greedy_decode", "edit_distance", "error_rate", "perplexity"]

_publish(__name__)
