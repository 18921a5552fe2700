"""The command `jaxpack bench gpu`."""
