"""`jaxpack bench`."""
