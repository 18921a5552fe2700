"""Packages that an extra brings, imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType


def import_extra(module: str, extra: str, what: str, package: str | None = None) -> ModuleType:
    """Imports a module, or says which extra brings it.

    Args:
      module: its full name.
      extra: of jaxpack, which brings it.
      what: what needs it: the subject of the error, plural.
      package: its name on PyPI. Default: that of the outermost package.

    Raises:
      ModuleNotFoundError: with the command that installs the extra, if the package is not there.
    """
    outermost = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != outermost:
            raise
        raise ModuleNotFoundError(
            f"{what} need {package or outermost}, which is not installed: pip install 'jaxpack[{extra}]'",
            name=error.name,
        ) from error
