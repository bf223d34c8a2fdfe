"""Aliases for renamed public objects: they work until 0.2, with a warning."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["old_names"]


def old_names(
    package: str, new_name_of: Mapping[str, str], namespace: Mapping[str, Any], *, stacklevel: int = 2
) -> Callable[[str], Any]:
    """Return a `__getattr__` for a package: an old name gives the object with the new name, and warns.

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
