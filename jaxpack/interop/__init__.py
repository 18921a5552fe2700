"""Weights from and to other libraries: one file each."""
