"""The command `jaxpack bench rollout`."""
