"""Feeding: plans for a corpus, batchers that fill them, and prefetching to the device."""

from jaxpack._namespace import publish as _publish
from jaxpack.data._batch import Batch
from jaxpack.data._batcher import Batcher, BatchIterator
from jaxpack.data._bucket_by_length import BucketByLength
from jaxpack.data._cover import Coverage, coverage, plan_cover, plan_family
from jaxpack.data._histogram import LengthHistogram
from jaxpack.data._packing import pack_on_host
from jaxpack.data._prefetch import PrefetchIterator, prefetch_to_device
from jaxpack.data._slot_filling import SlotFilling
from jaxpack.data._sorted_chunks import SortedChunks
from jaxpack.data._statistics import AxisStatistics, Statistics

__all__ = [
    "AxisStatistics",
    "Batch",
    "BatchIterator",
    "Batcher",
    "BucketByLength",
    "Coverage",
    "LengthHistogram",
    "PrefetchIterator",
    "SlotFilling",
    "SortedChunks",
    "Statistics",
    "coverage",
    "pack_on_host",
    "plan_cover",
    "plan_family",
    "prefetch_to_device",
]

_publish(__name__)
