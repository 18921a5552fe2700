"""`jaxpack demo g2p`."""
