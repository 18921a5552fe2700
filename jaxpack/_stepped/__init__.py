"""Layers that run step by step: convolutional cells, sLSTM, and cells that know the time between steps."""
