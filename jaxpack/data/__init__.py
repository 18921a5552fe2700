"""From a corpus to batches: plans that it fits, batchers that fill them, and the way to the device."""

from jaxpack.data.batch import Batch
from jaxpack.data.batcher import Batcher, BatchIterator
from jaxpack.data.bucket_by_length import BucketByLength
from jaxpack.data.cover import Coverage, coverage, plan_cover, plan_family
from jaxpack.data.packing import pack_on_host
from jaxpack.data.prefetch import PrefetchIterator, prefetch_to_device
from jaxpack.data.slot_filling import SlotFilling
from jaxpack.data.sorted_chunks import SortedChunks
from jaxpack.data.statistics import AxisStatistics, Statistics

__all__ = [
    "AxisStatistics",
    "Batch",
    "BatchIterator",
    "Batcher",
    "BucketByLength",
    "Coverage",
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
