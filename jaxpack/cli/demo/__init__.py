"""`jaxpack demo`."""
