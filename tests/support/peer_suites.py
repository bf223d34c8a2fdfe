"""The test suites of cachetools and async-lru, run with our decorator in the place of theirs. A plugin of pytest.

`pytest -p tests.support.peer_suites` in an unpacked source distribution: its tests import `cachetools` or `async_lru`,
and find there what is built here of `LocalCache.cached`. Keys are texts, since ours are; equal numbers have one text.
"""

import asyncio
import math
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import cachetools
import cachetools.keys

from broadcache.shared import Keys
from broadcache.subscriber import CacheInfo, LocalCache

Key = Callable[..., str]


def coherent(mapping: Any) -> "PeerCache":
    cache = PeerCache(mapping, max_staleness_seconds=1e6, negative_ttl_seconds=1e6)
    cache.confirm_coherent(cache.clock())
    return cache


class PeerCache(LocalCache[Any]):
    """A cache that serves without a subscriber."""


def text_of(value: object) -> str:
    """Return a text that is equal for equal values of the suites, as their hashes are."""
    if isinstance(value, bool | int | float) and not (isinstance(value, float) and not math.isfinite(value)):
        return repr(int(value) if value == int(value) else float(value))
    return repr(value) if type(value).__repr__ is not object.__repr__ else f"{type(value).__qualname__} {id(value)}"


def untyped_key(*args: object, **kwargs: object) -> str:
    return repr([list(map(text_of, args)), sorted((name, text_of(value)) for name, value in kwargs.items())])


def typed_key(*args: object, **kwargs: object) -> str:
    kinds = [type(value).__qualname__ for value in (*args, *(value for _, value in sorted(kwargs.items())))]
    return repr([untyped_key(*args, **kwargs), kinds])


# --- cachetools ------------------------------------------------------------------------------------------------------


def cached(cache: Any, key: Key = untyped_key, lock: Any = None, condition: Any = None, info: bool = False) -> Any:
    """`cachetools.cached`. Our cache has a lock of its own, so `lock` and `condition` are not used."""
    return ours(cache).cached(key)


_wrapped: dict[int, tuple[Any, LocalCache[Any]]] = {}


def ours(mapping: Any) -> Any:
    """Return a cache of ours for a mapping of a suite, the same each time."""
    if isinstance(mapping, LocalCache):
        return mapping
    if id(mapping) not in _wrapped:
        _wrapped[id(mapping)] = (mapping, coherent(mapping))
    return _wrapped[id(mapping)][1]


def cachedmethod(
    cache: Callable[[Any], Any], key: Key | None = None, lock: Any = None, condition: Any = None, info: bool = False
) -> Any:
    """`cachetools.cachedmethod`: the cache is an attribute of the object, as that of a mixin is."""
    from broadcache.subscriber import decorator

    make_key = untyped_key if key is None else key

    class OfObject(decorator._OfMixin):
        def _cache_of(self, instance: object) -> Any:
            return ours(cache(instance))

    def decorate(method: Any) -> Any:
        from broadcache.subscriber.cache.decorating.decorator import CallOptions

        return OfObject(method, CallOptions(make_key, tags=(), ttl_seconds=None, typed=False).plan_of(method))

    return decorate


def peer_cachetools() -> types.ModuleType:
    module = types.ModuleType("cachetools")
    module.__path__ = cachetools.__path__
    module.__dict__.update({name: getattr(cachetools, name) for name in cachetools.__all__})
    for name in ("Cache", "LRUCache", "FIFOCache", "LFUCache", "RRCache", "TTLCache"):
        module.__dict__[name] = _makes_our(getattr(cachetools, name))
    keys = types.ModuleType("cachetools.keys")
    keys.__dict__.update(hashkey=untyped_key, typedkey=typed_key, methodkey=untyped_key, typedmethodkey=typed_key)
    module.__dict__.update(cached=cached, cachedmethod=cachedmethod, keys=keys)
    sys.modules["cachetools.keys"] = keys
    return module


def _makes_our(kind: Any) -> Any:
    class Made(kind):  # type: ignore[misc]
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return coherent(kind(*args, **kwargs))

    return Made


# --- async-lru -------------------------------------------------------------------------------------------------------


def alru_cache(
    maxsize: Any = 128,
    typed: bool = False,
    *,
    ttl: float | None = None,
    jitter: Any = None,
    key: Callable[..., object] | None = None,
) -> Any:
    """`async_lru.alru_cache`, whose counters are those of its own cache: callers that share a load are hits."""
    if callable(maxsize):
        return alru_cache()(maxsize)
    if maxsize is not None and not isinstance(maxsize, int):
        raise NotImplementedError(f"{maxsize!r} decorating is not supported")

    def decorate(function: Any) -> Any:
        size = math.inf if maxsize is None else maxsize
        mapping: Any = cachetools.TTLCache(size, ttl) if ttl is not None else cachetools.LRUCache(size)
        cache = coherent(mapping)
        function = getattr(function, "_make_unbound_method", lambda: function)()
        make_key: Key = typed_key if typed else untyped_key
        if key is not None:
            own_key = key
            make_key = lambda *args, **kwargs: text_of(own_key(*args, **kwargs))  # noqa: E731
        wrapped = cache.cached(make_key)(function)
        if not wrapped._plan.is_async:
            raise RuntimeError(f"Coroutine function is required, got {function!r}")
        counted = [0, 0]

        def cache_info() -> CacheInfo:
            stats = cache.stats()
            hits, misses = stats.hits + stats.shared_loads, stats.misses - stats.shared_loads
            entries = len(cache) + len(cache.loads._running)
            return CacheInfo(hits - counted[0], misses - counted[1], maxsize, entries)

        def cache_clear() -> None:
            cache.clear()
            info = cache_info()
            counted[0] += info.hits
            counted[1] += info.misses

        def cache_contains(*args: Any, **kwargs: Any) -> bool:
            return (name := wrapped._plan.key_of(*args, **kwargs)) in cache or name in cache.loads._running

        def cache_invalidate(*args: Any, **kwargs: Any) -> bool:
            is_held = cache_contains(*args, **kwargs)
            cache.apply(Keys(wrapped._plan.key_of(*args, **kwargs)))
            return is_held

        def cache_parameters() -> dict[str, Any]:
            return {"maxsize": maxsize, "typed": typed, "tasks": len(cache.loads._running), "closed": False}

        vars(wrapped).update(
            cache_info=cache_info,
            cache_clear=cache_clear,
            cache_contains=cache_contains,
            cache_invalidate=cache_invalidate,
            cache_parameters=cache_parameters,
        )
        return wrapped

    return decorate


def peer_async_lru() -> types.ModuleType:
    module = types.ModuleType("async_lru")
    module.__dict__.update(
        alru_cache=alru_cache,
        _R=Any,
        _LRUCacheWrapper=dict,
        _CacheParameters=dict,
        _CacheItem=object,
        AlruCacheLoopResetWarning=UserWarning,
    )
    return module


def pytest_pyfunc_call(pyfuncitem: Any) -> bool | None:
    """Run tests that are coroutine functions, as the plugin of pytest does that the suite expects."""
    if not asyncio.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
    return True


def pytest_configure(config: Any) -> None:
    """Know the mark of that plugin."""
    config.addinivalue_line("markers", "asyncio: of another plugin")


PEERS = {"cachetools": peer_cachetools, "async_lru": peer_async_lru}
if (peer := os.environ.get("BROADCACHE_PEER")) is not None:
    sys.modules[peer] = PEERS[peer]()


def outcomes_of(report: str) -> Iterator[tuple[str, str]]:
    """Yield each test of a report of `pytest -rA`, and its outcome."""
    for line in report.splitlines():
        outcome, _, test = line.partition(" ")
        if outcome in ("PASSED", "FAILED", "ERROR", "SKIPPED", "XFAIL", "XPASS"):
            yield test.partition(" - ")[0], outcome
