"""Bucket plans: the static shapes of packed batches, how they are chosen, what they cost and how they are drawn."""
