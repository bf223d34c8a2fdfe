"""The objects that take the place of a function whose results are cached."""

import asyncio
import functools
import inspect
import sys
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, Final, Generic, NamedTuple, ParamSpec, Protocol, TypeVar, overload

from ....shared.errors import LinkLost
from ....shared.invalidation import Keys, Target
from ....shared.receipt import Receipt
from ..loading.refresh import RefreshedLoads
from ..stats import CacheStats
from .calls import CallPlan

__all__ = [
    "CacheInfo",
    "CachedCoroutine",
    "CachedFunction",
    "CallCache",
    "bound",
    "marked_as_coroutine_function",
    "replace",
]

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")
Q = ParamSpec("Q")

_MISSING: Final = object()
_CLEAR_SLICES_MAX: Final = 32


class CacheInfo(NamedTuple):
    """The counters and sizes of a cache, as functions of `functools` and cachetools show them.

    Shape:  of the whole cache, which other functions may share. Bypassed reads count as misses.
    """

    hits: int
    misses: int
    maxsize: float | None
    currsize: float


class CallCache(Protocol):
    """What cached functions need of a cache: a `LocalCache`."""

    @property
    def upkeep(self) -> Any:
        """Its subscriber and namespace."""
        ...

    @property
    def maxsize(self) -> float | None:
        """Its limit."""
        ...

    @property
    def currsize(self) -> float:
        """What counts towards the limit."""
        ...

    @property
    def loads(self) -> RefreshedLoads:
        """Its loads."""
        ...

    def get(self, key: str, default: Any = None, /) -> Any:
        """Read."""
        ...

    def apply(self, target: Target, /) -> None:
        """Drop."""
        ...

    def clear(self) -> None:
        """Drop everything."""
        ...

    def sweep(self) -> bool:
        """Free memory; return whether more remains."""
        ...

    def stats(self) -> CacheStats:
        """Return the counters."""
        ...


class _Cached(Generic[P, R]):
    """A function whose results are cached. In a class it is a method: `self` is not part of the key."""

    # What a hit needs is in slots, which are found faster than what a function's attributes are copied to.
    __slots__ = ("__dict__", "__weakref__", "_cache", "_get", "_key_of", "_loads", "_plan")

    _key_of: Callable[..., str]
    __wrapped__: Callable[P, Any]
    __name__: str
    __qualname__: str

    def __init__(self, function: Callable[P, Any], plan: CallPlan, cache: CallCache) -> None:
        wrapper: Any = self
        functools.update_wrapper(wrapper, function)
        self._plan = plan
        self._cache = cache
        self._get = cache.get
        self._loads = cache.loads
        self._key_of = plan.key_of

    def key(self, /, *args: P.args, **kwargs: P.kwargs) -> str:
        """Return the key of a call with these arguments. Raises: InvalidName, TypeError."""
        return self._key_of(*args, **kwargs)

    def cache_info(self) -> CacheInfo:
        """Return the counters and sizes of the whole cache; `LocalCache.stats` has more."""
        stats = self._cache.stats()
        return CacheInfo(stats.hits, stats.misses + stats.bypassed, self._cache.maxsize, self._cache.currsize)

    def cache_clear(self) -> None:
        """Drop everything in the cache of this process, also the results of other functions. Publishes nothing.

        The memory of about a thousand entries is freed at once, that of others by the sweep.
        """
        self._cache.clear()
        for _ in range(_CLEAR_SLICES_MAX):
            if not self._cache.sweep():
                break

    def become_method(self) -> None:
        """From now on, the first argument is an object that a key function is not given."""
        self._key_of = self._plan.key_of_method

    def __set_name__(self, owner: type, name: str) -> None:
        self.become_method()

    def __reduce__(self) -> str:
        return self.__qualname__  # found by its name, as a function

    def __repr__(self) -> str:
        return f"<cached {self.__wrapped__!r}>"


class CachedFunction(_Cached[P, R]):
    """A cached function that blocks. Call it from any thread; concurrent misses of a key are one call of it."""

    __slots__ = ()

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Return the cached result, or else that of the function. Raises: InvalidName; what the function raises."""
        # Two cases, and `get` in a line of its own: CPython merges empty dictionaries, and is slow to find an attribute
        # that it takes for a method.
        key = self._key_of(*args, **kwargs) if kwargs else self._key_of(*args)
        get = self._get
        value = get(key, _MISSING)
        if value is not _MISSING:
            return value  # type: ignore[no-any-return]
        return self._load(key, args, kwargs)  # type: ignore[no-any-return]

    def _load(self, key: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        plan = self._plan
        loader = functools.partial(self.__wrapped__, *args, **kwargs)
        return self._loads.load_sync(key, loader, plan.tags_of(args, kwargs), plan.ttl_seconds)

    def invalidate(self, /, *args: P.args, **kwargs: P.kwargs) -> Receipt:
        """Drop the result of a call with these arguments here at once, then publish its key to all other replicas.

        Raises: LinkLost when it was not published, or the cache has no subscriber; this replica has dropped it even so.
                InvalidSettings on the subscriber's own event loop: await `subscriber.invalidate` there.
        """
        key = Keys(self.key(*args, **kwargs))
        subscriber, namespace = _home_of(self._cache, key)
        receipt: Receipt = subscriber.invalidate_sync(key, namespace=namespace)
        return receipt

    @overload
    def __get__(self, instance: None, owner: type, /) -> "CachedFunction[P, R]": ...
    @overload
    def __get__(
        self: "CachedFunction[Concatenate[S, Q], R]", instance: S, owner: type | None = None, /
    ) -> "CachedFunction[Q, R]": ...
    def __get__(self, instance: Any, owner: type | None = None, /) -> Any:
        return self if instance is None else _Bound(self, instance)


class CachedCoroutine(_Cached[P, R]):
    """A cached coroutine function. Concurrent misses of a key are one call of it."""

    __slots__ = ()

    async def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Return the cached result, or else that of the function. Raises: InvalidName; what the function raises."""
        key = self._key_of(*args, **kwargs) if kwargs else self._key_of(*args)
        get = self._get
        value = get(key, _MISSING)
        if value is not _MISSING:
            return value  # type: ignore[no-any-return]
        return await self._load(key, args, kwargs)  # type: ignore[no-any-return]

    def _load(self, key: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Coroutine[Any, Any, Any]:
        plan = self._plan
        loader = functools.partial(self.__wrapped__, *args, **kwargs)
        return self._loads.load(key, loader, plan.tags_of(args, kwargs), plan.ttl_seconds)

    async def invalidate(self, /, *args: P.args, **kwargs: P.kwargs) -> Receipt:
        """Drop the result of a call with these arguments here at once, then publish its key to all other replicas.

        Raises: LinkLost when it was not published, or the cache has no subscriber; this replica has dropped it even so.
        """
        key = Keys(self.key(*args, **kwargs))
        subscriber, namespace = _home_of(self._cache, key)
        receipt: Receipt = await subscriber.invalidate(key, namespace=namespace)
        return receipt

    @overload
    def __get__(self, instance: None, owner: type, /) -> "CachedCoroutine[P, R]": ...
    @overload
    def __get__(
        self: "CachedCoroutine[Concatenate[S, Q], R]", instance: S, owner: type | None = None, /
    ) -> "CachedCoroutine[Q, R]": ...
    def __get__(self, instance: Any, owner: type | None = None, /) -> Any:
        return self if instance is None else _BoundCoroutine(self, instance)


class _Bound:
    """A cached method of one object. Made anew at each access, as bound methods are."""

    __slots__ = ("__self__", "__weakref__", "_method")

    def __init__(self, method: Any, instance: object) -> None:
        self._method = method
        self.__self__ = instance
        method.become_method()

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return self._method(self.__self__, *args, **kwargs)

    def key(self, /, *args: Any, **kwargs: Any) -> str:
        return self._method.key(self.__self__, *args, **kwargs)  # type: ignore[no-any-return]

    def invalidate(self, /, *args: Any, **kwargs: Any) -> Any:
        return self._method.invalidate(self.__self__, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._method, name)
        return bound(value, self.__self__) if name == "__wrapped__" else value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bound) and other._method is self._method and other.__self__ is self.__self__

    def __hash__(self) -> int:
        return hash((self._method, id(self.__self__)))

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.__self__, self._method.__name__)

    def __repr__(self) -> str:
        return f"<cached {self.__wrapped__!r}>"


def bound(function: Any, instance: object) -> Callable[..., Any]:
    """Return the method of an object; that of an object that is no descriptor, such as a partial, too."""
    method: Callable[..., Any] = (
        function.__get__(instance) if hasattr(function, "__get__") else functools.partial(function, instance)
    )
    return method


class _BoundCoroutine(_Bound):
    __slots__ = ()


def marked_as_coroutine_function(kind: type[S]) -> type[S]:
    """Mark the objects of a class, so that frameworks await what they return: `inspect.iscoroutinefunction` is true."""
    if sys.version_info >= (3, 12):
        inspect.markcoroutinefunction(kind)
    # What asyncio.iscoroutinefunction looks for, the only one of Python 3.11 that an object can answer.
    setattr(kind, "_is_coroutine", getattr(asyncio.coroutines, "_is_coroutine", None))  # noqa: B010
    return kind


marked_as_coroutine_function(CachedCoroutine)
marked_as_coroutine_function(_BoundCoroutine)


class _RefreshedFunction(CachedFunction[P, R]):
    """A cached function of a cache that refreshes: a hit looks at the age of its entry."""

    __slots__ = ()

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        key = self._key_of(*args, **kwargs) if kwargs else self._key_of(*args)
        get = self._get
        value = get(key, _MISSING)
        if value is _MISSING or self._loads.is_within(key):
            return self._load(key, args, kwargs)  # type: ignore[no-any-return]
        if self._loads.due((key,)):
            loader = functools.partial(self.__wrapped__, *args, **kwargs)
            self._loads.refresh_sync(key, loader, self._plan.tags_of(args, kwargs), self._plan.ttl_seconds)
        return value  # type: ignore[no-any-return]


class _RefreshedCoroutine(CachedCoroutine[P, R]):
    __slots__ = ()

    async def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        key = self._key_of(*args, **kwargs) if kwargs else self._key_of(*args)
        get = self._get
        value = get(key, _MISSING)
        if value is _MISSING or self._loads.is_within(key):
            return await self._load(key, args, kwargs)  # type: ignore[no-any-return]
        if self._loads.due((key,)):
            loader = functools.partial(self.__wrapped__, *args, **kwargs)
            self._loads.refresh(key, loader, self._plan.tags_of(args, kwargs), self._plan.ttl_seconds)
        return value  # type: ignore[no-any-return]


def replace(function: Callable[..., Any], plan: CallPlan, cache: CallCache) -> Any:
    """Return the object that takes the place of `function`."""
    if cache.loads.refreshes:
        return (_RefreshedCoroutine if plan.is_async else _RefreshedFunction)(function, plan, cache)
    return (CachedCoroutine if plan.is_async else CachedFunction)(function, plan, cache)


def _home_of(cache: CallCache, key: Keys) -> tuple[Any, str]:
    """Return the subscriber of a cache, and its namespace.

    Raises: LinkLost when it has none, after the key was dropped here.
    """
    home = cache.upkeep.home
    if home is None or (subscriber := home[0]()) is None:
        cache.apply(key)
        raise LinkLost(
            "the invalidation was not published: no subscriber follows the cache; this replica has dropped its entry, "
            "others have not: expected Subscriber(url, caches={'products': cache}), entered before"
        )
    return subscriber, home[1]
