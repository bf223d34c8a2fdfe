"""Aliases for renamed public objects: they work until 0.2, with a warning."""

import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from importlib import import_module
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar

__all__ = ["moved_to", "old_names", "renamed", "warn_of_rename"]

P = ParamSpec("P")
T = TypeVar("T")


def warn_of_rename(old_name: str, new_name: str, *, stacklevel: int) -> None:
    """Warn that `old_name` is deprecated. `stacklevel` 2 names the caller's line, 3 the line of its caller."""
    warnings.warn(f"{old_name} is now {new_name}; the old name will be removed in 0.2", DeprecationWarning, stacklevel)


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
        warn_of_rename(f"{package}.{name}", f"{package}.{new_name}", stacklevel=stacklevel + 1)
        return namespace[new_name]

    return find


<<<<<<< HEAD
def moved_to(
    module: str, old_module: str, *, elsewhere: Mapping[str, str] = MappingProxyType({})
) -> Callable[[str], Any]:
    """Return a `__getattr__` for a module whose contents are in `module` now: it gives them, and warns.

    Shape:  both are absolute names of modules. `elsewhere` has the modules of names that went to other ones.
    Raises: AttributeError for every other name.
=======
def moved_to(module: str, old_module: str) -> Callable[[str], Any]:
    """Return a `__getattr__` for a module whose contents are now in `module`: it returns them, and warns.

    Shape:  both arguments are absolute names of modules.
    Raises: AttributeError for every name that `module` does not have.
>>>>>>> texts
    """

    def find(name: str) -> Any:
        if name == "__all__":
            return [*import_module(module).__all__, *elsewhere]
        if name.startswith("__"):
            raise AttributeError(f"module {old_module!r} has no attribute {name!r}")
<<<<<<< HEAD
        home = elsewhere.get(name, module)
        value = getattr(import_module(home), name)
        warn_of_rename(f"{old_module}.{name}", f"{home}.{name}", stacklevel=3)
=======
        value = getattr(import_module(module), name)
        warnings.warn(
            f"{old_module} is now {module}; the old path will be removed in 0.2", DeprecationWarning, stacklevel=2
        )
>>>>>>> texts
        return value

    return find


def renamed(new_name: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Return a decorator for a function that has the old name of another one: each call warns of it."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @wraps(function)
        def warning(*args: P.args, **kwargs: P.kwargs) -> T:
            warn_of_rename(function.__qualname__, new_name, stacklevel=3)
            return function(*args, **kwargs)

        return warning

    return decorate
