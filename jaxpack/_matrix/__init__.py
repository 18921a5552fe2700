"""Recurrences whose state is a matrix for each head, in chunks of steps; and the layers made of them."""
