"""Layers that are made of other layers: both directions of any two, and stacks of any kinds."""
