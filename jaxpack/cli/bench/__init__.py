"""The command `jaxpack bench`."""
