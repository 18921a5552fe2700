"""Rollouts and long sequences: resets from done flags, fragments, replay windows, burn-in, chunks and streams."""
