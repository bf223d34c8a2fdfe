"""Decorators that cache the results of functions."""

from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar, overload

from ..checks import Names, Ttl, checked_tags, checked_ttl
from ..loading.loaded import Loaded
from .calls import CallPlan
from .functions import CachedCoroutine, CachedFunction, CallCache, replace

__all__ = ["CacheDecorator", "CallOptions", "DecoratingCache"]

P = ParamSpec("P")
R = TypeVar("R")


class CallOptions:
    """The options of a decorator, checked. Raises: InvalidSettings, InvalidName."""

    def __init__(self, key: str | Callable[..., str], *, tags: Names, ttl_seconds: Ttl, typed: bool) -> None:
        self._key = key
        self._tags = checked_tags(tags)
        self._ttl_seconds = checked_ttl(ttl_seconds)
        self._typed = typed

    def plan_of(self, function: Callable[..., Any]) -> CallPlan:
        """Return what is cached of the calls of `function`. Raises: InvalidSettings."""
        return CallPlan(function, self._key, tags=self._tags, ttl_seconds=self._ttl_seconds, typed=self._typed)


class CacheDecorator:
    """A decorator that returns a cached function in place of a function."""

    def __init__(self, cache: CallCache, options: CallOptions) -> None:
        self._cache = cache
        self._options = options

    @overload
    def __call__(  # type: ignore[overload-overlap]  # the first that fits counts
        self, function: Callable[P, Coroutine[Any, Any, Loaded[R]]], /
    ) -> CachedCoroutine[P, R]: ...
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, function: Callable[P, Coroutine[Any, Any, R]], /
    ) -> CachedCoroutine[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, Loaded[R]], /) -> CachedFunction[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> CachedFunction[P, R]: ...
    def __call__(self, function: Callable[..., Any], /) -> Any:
        """Return the cached function. Raises: InvalidSettings."""
        return replace(function, self._options.plan_of(function), self._cache)


class DecoratingCache:
    """The decorator of a cache; a base class of `LocalCache`."""

    def cached(
        self: CallCache,
        key: str | Callable[..., str],
        *,
        tags: Names = (),
        ttl_seconds: Ttl = None,
        typed: bool = False,
    ) -> CacheDecorator:
        """Return a decorator for functions and methods, sync and async, whose results this cache keeps.

        Shape:  `key` is a template of the function's parameters, `product:{product_id}`, or a function of the same
                arguments, without `self`. `tags` are templates as well. The grammar: docs/decorator.md.
        Raises: InvalidSettings, InvalidName. A call raises InvalidName when a value has no stable text, and what
                `get_or_load` raises.
        """
        return CacheDecorator(self, CallOptions(key, tags=tags, ttl_seconds=ttl_seconds, typed=typed))
