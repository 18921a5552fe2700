"""The command `jaxpack demo`."""
