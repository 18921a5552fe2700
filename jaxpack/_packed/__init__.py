"""Packed batches: PackedSequence, packing and unpacking, reductions, and `packed_scan`."""
