"""Recurrences that are linear in their state: linear_scan, and the layers that are built on it."""
