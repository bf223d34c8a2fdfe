"""Reads of several keys at once."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, TypeVar, overload

from ....shared.errors import InvalidName
from ..checks import Names, Ttl, checked_key, checked_tags, checked_ttl
from .loaded import Loaded
from .refresh import RefreshedLoads

__all__ = ["ManyReads"]

T = TypeVar("T")

_MISSING: Final = object()


class ManyReads:
    """The reads of several keys of a cache; a base class of `LocalCache`."""

    _loads: RefreshedLoads

    @property
    def loads(self) -> RefreshedLoads:
        """The loads under way."""
        return self._loads

    @overload
    async def get_or_load_many(
        self,
        keys: Names,
        load_missing: Callable[[list[str]], Awaitable[Mapping[str, Loaded[T]]]],
        *,
        tags: Names = (),
        ttl_seconds: Ttl = None,
    ) -> dict[str, T]: ...
    @overload
    async def get_or_load_many(
        self,
        keys: Names,
        load_missing: Callable[[list[str]], Awaitable[Mapping[str, T]]],
        *,
        tags: Names = (),
        ttl_seconds: Ttl = None,
    ) -> dict[str, T]: ...
    @overload
    async def get_or_load_many(
        self,
        keys: Names,
        load_missing: Callable[[list[str]], Mapping[str, Loaded[T]]],
        *,
        tags: Names = (),
        ttl_seconds: Ttl = None,
    ) -> dict[str, T]: ...
    @overload
    async def get_or_load_many(
        self,
        keys: Names,
        load_missing: Callable[[list[str]], Mapping[str, T]],
        *,
        tags: Names = (),
        ttl_seconds: Ttl = None,
    ) -> dict[str, T]: ...
    async def get_or_load_many(
        self,
        keys: Names,
        load_missing: Callable[[list[str]], Any],
        *,
        tags: Names = (),
        ttl_seconds: Ttl = None,
    ) -> dict[str, Any]:
        """Return the values stored under `keys`, and those that one call of `load_missing` returns for all others.

        Each key is a load of its own: another caller's load of it is joined and not repeated, callers of `get_or_load`
        join this one, and an invalidation during the load keeps that value from being stored, and no other. Cancelling
        one caller does not affect the others.

        Shape:  `load_missing` is given the keys that are neither stored nor being loaded, in their order. It returns a
                mapping of keys to values, each of which may be `Loaded`, or an awaitable of such a mapping. A key that
                it leaves out has no value: it is not in the result. `tags` and `ttl_seconds` are those of each value.
        Raises: as `get_or_load`; InvalidLoader when `load_missing` returns no mapping.
        """
        names = checked_keys(keys)
        cache: Any = self
        found, missing = _read(cache, names)
        if found and cache.loads.refreshes and (due := cache.loads.due(found)):
            cache.loads.refresh_many(due, load_missing, checked_tags(tags), checked_ttl(ttl_seconds))
        if missing:
            loaded = cache.loads.load_many(missing, load_missing, checked_tags(tags), checked_ttl(ttl_seconds))
            found.update(await loaded)
        return {name: found[name] for name in names if name in found}

    @overload
    def get_or_load_many_sync(
        self,
        keys: Names,
        load_missing: Callable[[list[str]], Mapping[str, Loaded[T]]],
        *,
        tags: Names = (),
        ttl_seconds: Ttl = None,
    ) -> dict[str, T]: ...
    @overload
    def get_or_load_many_sync(
        self,
        keys: Names,
        load_missing: Callable[[list[str]], Mapping[str, T]],
        *,
        tags: Names = (),
        ttl_seconds: Ttl = None,
    ) -> dict[str, T]: ...
    def get_or_load_many_sync(
        self,
        keys: Names,
        load_missing: Callable[[list[str]], Any],
        *,
        tags: Names = (),
        ttl_seconds: Ttl = None,
    ) -> dict[str, Any]:
        """Do what `get_or_load_many` does, with a `load_missing` that blocks. Call it from any thread."""
        names = checked_keys(keys)
        cache: Any = self
        found, missing = _read(cache, names)
        if found and cache.loads.refreshes and (due := cache.loads.due(found)):
            cache.loads.refresh_many_sync(due, load_missing, checked_tags(tags), checked_ttl(ttl_seconds))
        if missing:
            found.update(
                cache.loads.load_many_sync(missing, load_missing, checked_tags(tags), checked_ttl(ttl_seconds))
            )
        return {name: found[name] for name in names if name in found}


def checked_keys(keys: Names) -> list[str]:
    """Return keys as exact strings, each once. Raises: InvalidName."""
    if isinstance(keys, str):
        raise InvalidName(f"expected several keys, got the string {keys!r:.100}; write [{keys!r:.100}]")
    return list(dict.fromkeys(map(checked_key, keys)))


def _read(cache: Any, keys: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the values that are stored, and the keys of the others."""
    found: dict[str, Any] = {}
    missing: list[str] = []
    for key in keys:
        value = cache.get(key, _MISSING)
        if value is _MISSING or (cache.loads.refreshes and cache.loads.is_within(key)):
            missing.append(key)
        else:
            found[key] = value
    return found, missing
