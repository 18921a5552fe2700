"""Code that jaxpack.nnx and jaxpack.linen share."""
