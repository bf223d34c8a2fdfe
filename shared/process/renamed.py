"""Aliases for renamed public objects: they work until 0.2, with a warning."""

import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

__all__ = ["moved_to", "old_names"]


def old_names(
    package: str, new_name_of: Mapping[str, str], namespace: Mapping[str, Any], *, stacklevel: int = 2
) -> Callable[[str], Any]:
    """Return a `__getattr__` for a package: it returns the object with the new name, and warns.

    Shape:  `stacklevel` is 2 where this is the package's `__getattr__` itself, one more for each function around it.
    Raises: AttributeError for every other name.
    """

    def find(name: str) -> Any:
        if name not in new_name_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        new_name = new_name_of[name]
        warnings.warn(
            f"{package}.{name} is now {package}.{new_name}; the old name will be removed in 0.2",
            DeprecationWarning,
            stacklevel=stacklevel,
        )
        return namespace[new_name]

    return find


def moved_to(module: str, old_module: str) -> Callable[[str], Any]:
    """Return a `__getattr__` for a module whose contents are now in `module`: it returns them, and warns.

    Shape:  both arguments are absolute names of modules.
    Raises: AttributeError for every name that `module` does not have.
    """

    def find(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {old_module!r} has no attribute {name!r}")
        value = getattr(import_module(module), name)
        warnings.warn(
            f"{old_module} is now {module}; the old path will be removed in 0.2", DeprecationWarning, stacklevel=2
        )
        return value

    return find
