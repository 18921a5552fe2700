"""Platforms: the names of those that jaxpack distinguishes, and the one that JAX uses by default."""

from __future__ import annotations

import jax

_KINDS = {"cpu": "cpu", "gpu": "gpu", "cuda": "gpu", "rocm": "gpu", "tpu": "tpu"}


def platform_kind(platform: str | None = None) -> str:
    """Returns "cpu", "gpu" or "tpu" for a platform's name; None is the platform of JAX's default backend.

    If JAX is told its platforms (JAX_PLATFORMS), the first of them is read, and no backend starts. A default backend of
    any other name counts as a GPU, because layers run there as they do on GPUs.

    Raises:
      ValueError: if the name is unknown.
    """
    if platform is None:
        told = jax.config.read("jax_platform_name") or jax.config.jax_platforms or ""  # type: ignore[attr-defined]
        return _KINDS.get(told.split(",")[0] or jax.default_backend(), "gpu")
    if platform not in _KINDS:
        raise ValueError(f"platform must be one of {', '.join(_KINDS)}, or None for the default, got {platform!r}.")
    return _KINDS[platform]
