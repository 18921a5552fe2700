"""Public namespaces: the names they export, and the deprecation of names that they no longer have."""

from __future__ import annotations

import inspect
import sys
import typing
import warnings
from typing import Any


def publish(namespace: str) -> None:
    """Makes a module the home of what its `__all__` names, so that reprs, pickles and docs say `jaxpack.LSTM`.

    Classes and functions of jaxpack get the module as their `__module__`. As in NumPy, a class keeps where its source
    is as `_module_source`. Its annotations are evaluated, since `typing.get_type_hints` would look their names up in
    the public module.

    Args:
      namespace: the module's `__name__`, at the end of the module.
    """
    module = sys.modules[namespace]
    for name in module.__all__:
        exported: Any = getattr(module, name)
        home = getattr(exported, "__module__", "")
        if not home.startswith("jaxpack") or not hasattr(exported, "__name__"):
            continue
        if "._" not in home and len(home) < len(namespace):  # gru_cell, say: jaxpack rather than jaxpack.cells
            continue
        if isinstance(exported, type) and "_module_source" not in vars(exported):
            source = sys.modules[exported.__module__]
            own = inspect.get_annotations(exported)
            exported.__annotations__ = {name: _evaluated(hint, vars(source)) for name, hint in own.items()}
            exported._module_source = source.__name__  # type: ignore[attr-defined]
        exported.__module__ = namespace


def _evaluated(hint: Any, scope: dict[str, Any]) -> Any:
    """Returns an annotation, evaluated if it is text."""
    text = hint.__forward_arg__ if isinstance(hint, typing.ForwardRef) else hint
    return eval(text, scope) if isinstance(text, str) else hint


def deprecated(namespace: str, renamed: dict[str, str], removal: str) -> Any:
    """Returns a module's `__getattr__`, which serves names that were renamed, with a DeprecationWarning.

        __getattr__ = deprecated(__name__, {"old": "new"}, removal="0.3.0")

    Args:
      namespace: the module's `__name__`.
      renamed: the name that replaces each deprecated one, both in this module.
      removal: the version that no longer has the old names.
    """

    def get(name: str) -> Any:
        if name not in renamed:
            raise AttributeError(f"module {namespace!r} has no attribute {name!r}")
        new = renamed[name]
        warnings.warn(
            f"{namespace}.{name} is now {namespace}.{new}, and the old name will be removed in jaxpack {removal}.",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(sys.modules[namespace], new)

    return get
