"""Batches in Grain's pipelines, with its checkpoints, prefetch and worker processes. The extra `data` brings Grain.

    batches = SlotFilling(map_dataset, plan)               a MapDataset is a source like any other, read by number
    BatcherIterDataset(batches)                            any batcher of ours, as an IterDataset
    iter_dataset.pipe(SlotFillIterDataset, plan)           a stream, endless if need be, filled into one plan
    dataset.batch(64, batch_fn=pack_fn(plans))             batches whose members were chosen before

Our batchers shuffle and go from epoch to epoch themselves: their MapDataset has no `.repeat()`. They know all lengths,
so their batches are the fullest, and with `shard_count` hosts have as many batches each. SlotFillIterDataset is for
what is a stream because it was mixed, filtered or generated: there `.shuffle()`, `.repeat()` and slicing by host come
before it. `grain.experimental.device_put` behind any of them overlaps packing with what the device computes.

Grain's own packing is another thing. FirstFitPackIterDataset and BestFitPackIterDataset lay whole examples end to end
in rows of a fixed length, ConcatThenSplitIterDataset fills such rows by splitting them, and all of them mark with
segment ids and positions which token is whose. That is what attention wants, which masks by segment. A recurrence
would have to be reset at every boundary wherever the data put one, has final states in the middle of rows, and takes
as many steps as a row is long. A PackedSequence has its boundaries in the static plan: nothing is reset by data, and
lengths, order and final states are by example. Use Grain's for attention, and these for recurrent layers.
"""

from jaxpack._namespace import publish as _publish
from jaxpack.data._grain import BatcherIterDataset, SlotFillIterDataset, pack_fn

__all__ = ["BatcherIterDataset", "SlotFillIterDataset", "pack_fn"]

_publish(__name__)
