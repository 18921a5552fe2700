"""Batches in Grain's pipelines, with its checkpoints, prefetch and worker processes. The extra `data` installs Grain.

    batches = SlotFilling(map_dataset, plan)               a MapDataset is a source, read by position
    BatcherIterDataset(batches)                            any batcher as an IterDataset
    iter_dataset.pipe(SlotFillIterDataset, plan)           a stream, which may be endless, fills one plan
    dataset.batch(64, batch_fn=pack_fn(plans))             batches whose examples were chosen before

jaxpack's batchers shuffle and repeat themselves, so their MapDataset has no `.repeat()`. They know all lengths, so
their batches are the fullest, and with `shard_count` all hosts have the same number of batches. SlotFillIterDataset is
for mixed, filtered or generated streams; `.shuffle()`, `.repeat()` and slicing by host come before it.
`grain.experimental.device_put` after any of them overlaps packing with the device's computation.

Grain's own packing serves another purpose. FirstFitPackIterDataset and BestFitPackIterDataset lay whole examples end to
end in rows of a fixed length, ConcatThenSplitIterDataset splits examples to fill such rows, and all of them mark the
tokens of each example with segment ids and positions. This suits attention, which masks by segment. A recurrence would
have to be reset at boundaries that depend on the data, would have final states in the middle of rows, and would take as
many steps as a row is long. A PackedSequence has its boundaries in the static plan: no reset depends on the data, and
lengths, order and final states are by example. Use Grain's packing for attention, and this module for recurrent layers.
"""

from jaxpack._namespace import publish as _publish
from jaxpack.data._grain import BatcherIterDataset, SlotFillIterDataset, pack_fn

__all__ = ["BatcherIterDataset", "SlotFillIterDataset", "pack_fn"]

_publish(__name__)
