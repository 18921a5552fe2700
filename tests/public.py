"""The public namespaces."""

PACKAGES = [
    "",
    ".cells",
    ".data",
    ".data.grain",
    ".datasets",
    ".interop",
    ".linen",
    ".losses",
    ".metrics",
    ".nnx",
    ".plot",
    ".rollouts",
    ".serving",
    ".sharding",
]
