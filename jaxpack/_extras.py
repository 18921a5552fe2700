"""Imports of optional packages."""

from __future__ import annotations

import importlib
from types import ModuleType


def import_extra(module: str, extra: str, what: str, package: str | None = None) -> ModuleType:
    """Imports a module of an optional package; if it is missing, the error names the extra to install.

    Args:
      module: the full name of the module.
      extra: the extra of jaxpack that installs it.
      what: the subject of the error, plural, such as "plots".
      package: the name on PyPI. Default: the name of the outermost package.

    Raises:
      ModuleNotFoundError: with the command that installs the extra, if the package is not installed.
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
