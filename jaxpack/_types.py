"""Type names that many modules use."""

from __future__ import annotations

from typing import Any

PyTree = Any
