"""Packed batches: PackedSequence, conversions, reductions, packed_scan, and their checks."""
