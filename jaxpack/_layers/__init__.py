"""Recurrent layers: specifications, parameters, and the stack of directions and layers that they run."""
