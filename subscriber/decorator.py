"""The decorator of methods whose object has the cache."""

import functools
from collections.abc import Callable, Coroutine
from inspect import getattr_static
from typing import Any, ParamSpec, Protocol, TypeVar, overload

from ..shared.errors import InvalidSettings
from .cache.checks import Names, Ttl
from .cache.decorating.calls import CallPlan
from .cache.decorating.decorator import CallOptions
from .cache.decorating.functions import (
    CachedCoroutine,
    CachedFunction,
    bound,
    marked_as_coroutine_function,
    replace,
)
from .cache.loading.loaded import Loaded
from .cache.local_cache import LocalCache
from .mixin import CacheInvalidationMixin

__all__ = ["MethodDecorator", "cached"]

P = ParamSpec("P")
R = TypeVar("R")


class MethodDecorator(Protocol):
    """A decorator that returns a cached method in place of a method."""

    @overload
    def __call__(  # type: ignore[overload-overlap]  # the first that fits counts
        self, method: Callable[P, Coroutine[Any, Any, Loaded[R]]], /
    ) -> CachedCoroutine[P, R]: ...
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, method: Callable[P, Coroutine[Any, Any, R]], /
    ) -> CachedCoroutine[P, R]: ...
    @overload
    def __call__(self, method: Callable[P, Loaded[R]], /) -> CachedFunction[P, R]: ...
    @overload
    def __call__(self, method: Callable[P, R], /) -> CachedFunction[P, R]: ...


def cached(
    key: str | Callable[..., str],
    *,
    tags: Names = (),
    ttl_seconds: Ttl = None,
    typed: bool = False,
) -> MethodDecorator:
    """Return a decorator for methods of a `CacheInvalidationMixin`, sync and async: its cache keeps their results.

    For other functions, and methods of other classes, use `LocalCache.cached`.

    Shape:  `key` is a template of the method's parameters, `product:{product_id}`, or a function of the same arguments.
            `self` is never part of the key, nor given to a key function. `tags` are templates as well. The grammar:
            docs/decorator.md.
    Raises: InvalidSettings, InvalidName. A call raises InvalidName when a value has no stable text, and what
            `get_or_load` raises.
    """
    options = CallOptions(key, tags=tags, ttl_seconds=ttl_seconds, typed=typed)

    def decorate(method: Callable[..., Any]) -> Any:
        plan = options.plan_of(method)
        return (_CoroutineOfMixin if plan.is_async else _OfMixin)(method, plan)

    return decorate


class _OfMixin:
    """A cached method in its class. What it is for one object is made at the first access, and kept by the object."""

    def __init__(self, method: Callable[..., Any], plan: CallPlan) -> None:
        functools.update_wrapper(self, method)
        self._method = method
        self._plan = plan
        self._name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None, /) -> Any:
        if instance is None:
            return self
        made = replace(bound(self._method, instance), self._plan.of(instance), self._cache_of(instance))
        # A class that can be copied would take it along to the copy, where it would still call this object's method.
        if (
            getattr(type(instance), "__getstate__", None) is CacheInvalidationMixin.__getstate__
            and getattr_static(type(instance), self._name, None) is self
            and hasattr(instance, "__dict__")
        ):
            vars(instance)[self._name] = made
        return made

    def _cache_of(self, instance: object) -> LocalCache:
        cache = getattr(instance, "cache", None)
        if isinstance(cache, LocalCache):
            return cache
        raise InvalidSettings(
            f"expected {self._plan.name} to be a method of a CacheInvalidationMixin, got a call with "
            f"{type(instance).__name__} as self; for other functions, use the cache's own decorator: @cache.cached(…)"
        )

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return self._bound(args)(*args[1:], **kwargs)

    def key(self, /, *args: Any, **kwargs: Any) -> str:
        return self._plan.key_of_method(*args, **kwargs)

    def invalidate(self, /, *args: Any, **kwargs: Any) -> Any:
        return self._bound(args).invalidate(*args[1:], **kwargs)

    def _bound(self, args: tuple[Any, ...]) -> Any:
        if not args:
            raise TypeError(f"{self._plan.name}() missing 1 required positional argument: 'self'")
        return self.__get__(args[0])

    def __reduce__(self) -> str:
        return str(self._method.__qualname__)

    def __repr__(self) -> str:
        return f"<cached {self._method!r}>"


@marked_as_coroutine_function
class _CoroutineOfMixin(_OfMixin):
    pass
