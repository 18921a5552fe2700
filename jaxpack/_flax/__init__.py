"""What the faces for both Flax APIs, jaxpack.nnx and jaxpack.linen, share."""
