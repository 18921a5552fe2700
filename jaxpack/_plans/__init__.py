"""Plans, the static shapes of packed batches: planners, the cost model, and pictures."""
