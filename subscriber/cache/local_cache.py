"""LocalCache: a mapping that applies invalidations, and never serves an entry that one has dropped."""

import math
import random
from abc import ABCMeta
from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, Final, NoReturn, TypeVar, cast, overload

from cachetools import Cache

from ...shared.clock import Clock, monotonic
from ...shared.errors import InvalidSettings
from ...shared.invalidation import Everything, Invalidation, Target, invalidation_of
from ...shared.process.copying import refuse_copy
from ...shared.process.forks import in_forked_child
from .checks import (
    Names,
    Seconds,
    Ttl,
    check_settings,
    checked_key,
    checked_tags,
    checked_ttl,
    claim_mapping,
    seconds_of,
    warn_of_unnameable,
    why_unnameable,
)
from .decorating.decorator import DecoratingCache
from .entries import Count
from .followed_cache import FollowedCache, WhenIncoherent
from .loading.loaded import AsyncLoader, Loaded, Loader
from .loading.loads import LoadOptions
from .loading.reading import ManyReads
from .loading.refresh import RefreshedLoads
from .mapping.reads import TOUCHES_MAX
from .mapping.views import LiveMapping, V
from .mapping_errors import is_refusal
from .stats import CacheStats
from .token import LoadToken

__all__ = ["LocalCache"]

T = TypeVar("T")

_MISSING: Final = object()
_STORE_SWEEP_ENTRIES: Final = 4


class LocalCache(FollowedCache, DecoratingCache, ManyReads, LiveMapping[V]):
    """A mapping that serves an entry only while no invalidation has named it, and while invalidations arrive.

    It takes over an empty `TTLCache` (or any other mutable mapping), which no other code may write to from then on.
    A `Subscriber` applies invalidations to it and decides how long it may serve. Without a subscriber every read is
    bypassed: it finds nothing, and `get_or_load` calls the loader. All methods may be called from any thread.

    A mapping that raises costs hits, never correctness. If it raises during an invalidation, this cache is cleared; a
    value that could not be stored or read is a miss; an entry that could not be removed is never served. Such errors
    are logged once, and counted.

    Shape:  `V` is the type of the values that reads return, as in `products: LocalCache[Product] = LocalCache(…)`;
            without it, reads return Any. With `finish_loads`, a load goes on when its last caller has left.
            `on_invalidated` is called with each invalidation after it was applied, in any thread; it must not block.
    Units:  `max_staleness_seconds` bounds how long after an invalidation was accepted a read may still be served the
            old value. `ttl_jitter` is the largest share of an entry's lifetime that is randomly cut off, from 0 to 1.
            `negative_ttl_seconds` is how long the value None is kept; without it None is never stored.
            `refresh_after_seconds` is the age from which a hit is served and loaded again in the background.
            `load_timeout_seconds` limits asynchronous loads. Each duration may be a timedelta.
    Raises: InvalidSettings.
    """

    def __init__(
        self,
        mapping: MutableMapping[str, Any],
        *,
        max_staleness_seconds: Seconds = 5.0,
        when_incoherent: WhenIncoherent = "bypass",
        ttl_jitter: float = 0.0,
        negative_ttl_seconds: Seconds | None = None,
        refresh_after_seconds: Seconds | None = None,
        finish_loads: bool = False,
        load_timeout_seconds: Seconds | None = None,
        on_invalidated: Callable[[Invalidation], object] | None = None,
        clock: Clock = monotonic,
        uniform: Callable[[], float] = random.random,
    ) -> None:
        if isinstance(mapping, LocalCache):
            raise InvalidSettings("expected a plain mapping such as TTLCache, got a LocalCache; use it as it is")
        max_staleness, negative_ttl = check_settings(mapping, max_staleness_seconds, ttl_jitter, negative_ttl_seconds)
        super().__init__(
            mapping,
            max_staleness_seconds=max_staleness,
            when_incoherent=when_incoherent,
            clock=clock,
            on_invalidated=on_invalidated,
        )
        self._ttl_jitter = ttl_jitter
        self._negative_ttl_seconds = negative_ttl
        self._uniform = uniform
        options = LoadOptions.checked(finish_loads, load_timeout_seconds, refresh_after_seconds)
        self._loads = RefreshedLoads(self, self._lock, self._reread, self._discard, options)
        self._reads.is_lock_free &= not self._loads.refreshes  # each hit looks at the age of its entry
        # A 31st attribute of this object, those of FollowedCache included, would be a good part of what a hit costs:
        # CPython keeps no more than 30 where it finds them fastest.
        self._misses = self._bypassed = 0
        self._not_stored: Counter[str] = Counter()
        claim_mapping(mapping, self)
        in_forked_child(self._start_over)

    def _start_over(self) -> None:
        super()._start_over()
        self._loads.start_over(self._lock)
        self._reads.is_lock_free &= not self._loads.refreshes
        self._misses = self._bypassed = 0
        self._not_stored = Counter()

    # --- reading ------------------------------------------------------------------------------------------------------

    @overload
    def get(self, key: str, default: None = None) -> V | None: ...
    @overload
    def get(self, key: str, default: V | T) -> V | T: ...
    def get(self, key: str, default: Any = None) -> Any:
        """Return the value stored under `key`, or `default` when no value may be served."""
        # The hit path. One clock reading answers four questions: is the cache coherent, is no sweep under way, has no
        # entry reached an expiry of its own, nor that of the mapping. If the stamp stays the same, no other thread has
        # applied an invalidation meanwhile. `get_or_load` and its twin have a copy each: a call would cost their hits.
        stamp = self._stamp
        clock = self._clock  # in a line of its own: CPython is slow to find an attribute that it takes for a method
        if clock() < self._fast_until:
            try:
                value = self._source[key]
            except KeyError:
                self._misses += 1
                return default
            except Exception:
                if not isinstance(key, str):
                    raise  # the caller's mistake; _get_checked handles any other error
            else:
                if self._stamp == stamp:
                    touches = self._touches
                    touches.append(key)
                    if len(touches) > TOUCHES_MAX:
                        self._settle_touches()
                    return value
        return self._get_checked(key, default)

    def _reread(self, key: str, default: Any) -> Any:
        """Repeat a read that has just missed, before a load begins: another thread may have stored the value since."""
        with self._lock:
            return self.get(key, default) if key in self else default

    def _get_checked(self, key: str, default: Any) -> Any:
        if len(self._touches) > TOUCHES_MAX:
            self._settle_touches()
        with self._lock:
            now = self._clock()
            if not self._may_serve(now):
                self._bypassed += 1
                return default
            self._expire(now)
            issued = self._issued
            try:
                if self._entries.is_served(key, now):
                    value = self._reads.look_up(key)
                    if self._issued == issued:  # the mapping's own code may have applied an invalidation
                        self._touches.append(key)
                        return value
            except KeyError:
                pass
            except Exception as error:
                if not isinstance(key, str):
                    raise
                self._entries.errors.report(error, "reading an entry: it counts as a miss")
            self._misses += 1
            return default

    @overload
    async def get_or_load(
        self, key: str, loader: AsyncLoader[Loaded[T]], *, tags: Names = (), ttl_seconds: Ttl = None
    ) -> T: ...
    @overload
    async def get_or_load(
        self, key: str, loader: AsyncLoader[T], *, tags: Names = (), ttl_seconds: Ttl = None
    ) -> T: ...
    @overload
    async def get_or_load(
        self, key: str, loader: Loader[Loaded[T]], *, tags: Names = (), ttl_seconds: Ttl = None
    ) -> T: ...
    @overload
    async def get_or_load(self, key: str, loader: Loader[T], *, tags: Names = (), ttl_seconds: Ttl = None) -> T: ...
    async def get_or_load(self, key: str, loader: Loader[Any], *, tags: Names = (), ttl_seconds: Ttl = None) -> Any:
        """Return the value stored under `key`, or else the loader's value, which is then stored if it may be.

        Callers that miss at the same time share one call of the loader. Cancelling one of them does not affect the
        others; an exception reaches all of them and is not stored. A value whose load began before an invalidation of
        its key, its tags, its prefix or everything is returned, and not stored; a later caller starts a new load.

        Shape:  `loader` has no arguments and returns the value, or an awaitable of it; or `Loaded`, with the tags and
                lifetime that only the source knows. None is stored only with `negative_ttl_seconds`.
        Units:  `ttl_seconds`, a number or a timedelta, shortens the entry's lifetime; it cannot outlive the mapping's
                own.
        Raises: whatever the loader raises. A caller that shares the load of another one raises a copy. InvalidName
                when `key` or a tag is not a string; InvalidSettings.
        """
        stamp = self._stamp  # as in `get`
        clock = self._clock
        if clock() < self._fast_until:
            try:
                value = self._source[key]
            except Exception:  # noqa: BLE001, S110  (a miss, or what _get_checked handles)
                pass
            else:
                if self._stamp == stamp:
                    touches = self._touches
                    touches.append(key)
                    if len(touches) > TOUCHES_MAX:
                        self._settle_touches()
                    return value
        value = self._get_checked(key, _MISSING)
        if value is not _MISSING and not (self._loads.refreshes and self._loads.is_within(key)):
            if self._loads.refreshes and self._loads.due((key,)):
                self._loads.refresh(checked_key(key), loader, checked_tags(tags), checked_ttl(ttl_seconds))
            return value
        return await self._loads.load(checked_key(key), loader, checked_tags(tags), checked_ttl(ttl_seconds))

    @overload
    def get_or_load_sync(
        self, key: str, loader: Loader[Loaded[T]], *, tags: Names = (), ttl_seconds: Ttl = None
    ) -> T: ...
    @overload
    def get_or_load_sync(self, key: str, loader: Loader[T], *, tags: Names = (), ttl_seconds: Ttl = None) -> T: ...
    def get_or_load_sync(self, key: str, loader: Loader[Any], *, tags: Names = (), ttl_seconds: Ttl = None) -> Any:
        """Return the value stored under `key`, or else that of a loader that blocks. Call it from any thread.

        Misses in other threads wait for the same load. Raises: whatever the loader raises.
        """
        stamp = self._stamp  # as in `get`
        clock = self._clock
        if clock() < self._fast_until:
            try:
                value = self._source[key]
            except Exception:  # noqa: BLE001, S110  (a miss, or what _get_checked handles)
                pass
            else:
                if self._stamp == stamp:
                    touches = self._touches
                    touches.append(key)
                    if len(touches) > TOUCHES_MAX:
                        self._settle_touches()
                    return value
        value = self._get_checked(key, _MISSING)
        if value is not _MISSING and not (self._loads.refreshes and self._loads.is_within(key)):
            if self._loads.refreshes and self._loads.due((key,)):
                self._loads.refresh_sync(checked_key(key), loader, checked_tags(tags), checked_ttl(ttl_seconds))
            return value
        return self._loads.load_sync(checked_key(key), loader, checked_tags(tags), checked_ttl(ttl_seconds))

    # --- filling ------------------------------------------------------------------------------------------------------

    def begin_load(self, key: str) -> LoadToken:
        """Return a token. Call this before the source is read. Raises: InvalidName when `key` is not a string."""
        return LoadToken(checked_key(key), self._stamp, self._clock())

    def store(self, token: LoadToken, value: V | None, *, tags: Names = (), ttl_seconds: Ttl = None) -> bool:
        """Store the source's value, unless an invalidation since the token was made concerns it.

        Returns: whether it was stored. Also not stored: None without `negative_ttl_seconds`, a value that the mapping
                 refuses as too large, one that it failed to store, and one whose key or tags no invalidation could
                 name. An older value is dropped even so.
        Raises:  InvalidName, InvalidSettings.
        """
        names, seconds = checked_tags(tags), checked_ttl(ttl_seconds)
        with self._lock:
            if self.is_void(token, names):
                self._not_stored["voided"] += 1
                return False
            return self._put(token, value, names, seconds)

    def _put(self, token: LoadToken, value: Any, tags: tuple[str, ...], ttl_seconds: float | None) -> bool:
        if value is None:
            if self._negative_ttl_seconds is None:
                self._discard(token.key)  # the source no longer has a value
                return False
            ttl_seconds = min(self._negative_ttl_seconds, math.inf if ttl_seconds is None else ttl_seconds)
        if (why := why_unnameable(token.key, tags)) is not None:
            self._discard(token.key)
            self._not_stored["unnameable"] += 1
            if self._not_stored["unnameable"] == 1:
                warn_of_unnameable(why)
            return False
        if self._touches:
            self._settle()  # before the mapping evicts
        now, issued = self._clock(), self._issued
        # Close the hit path until this is done: the mapping's own code, e.g. getsizeof, may apply an invalidation. With
        # `is_changing` first, nothing that runs in between opens it again.
        was_changing, self._entries.is_changing = self._entries.is_changing, True
        self._fast_until = -math.inf
        try:
            try:
                self._entries.put(token.key, value, self._stamp, tags, self._expiry_of(now, ttl_seconds))
            finally:
                self._entries.is_changing = was_changing
            self._reads.note_store(token.key)
            if self._issued != issued and self.is_void(token, tags):
                self._not_stored["voided"] += 1
                self._entries.discard(token.key)
                return False
            self._expire(now)
            if self._entries.has_sweep_work or self._entries.stuck:
                self._sweep(_STORE_SWEEP_ENTRIES)
        except Exception as error:  # noqa: BLE001  (the user's code)
            self._entries.discard(token.key)
            if isinstance(error, ValueError) and is_refusal(error):
                self._not_stored["refused"] += 1
            else:
                self._entries.errors.report(error, "storing a value: its callers receive it, but it is not kept")
            return False
        finally:
            self._refresh()
        return True

    def _discard(self, key: str) -> None:
        try:
            self._entries.discard(key)
        finally:
            self._refresh()

    def _expiry_of(self, now: float, ttl_seconds: float | None) -> float:
        if self._ttl_jitter:
            lifetime = getattr(self._entries.mapping, "ttl", math.inf) if ttl_seconds is None else ttl_seconds
            ttl_seconds = seconds_of(lifetime, "ttl") * (1 - self._ttl_jitter * self._uniform())
        return math.inf if ttl_seconds is None else now + ttl_seconds

    # --- inspecting ---------------------------------------------------------------------------------------------------

    def stats(self) -> CacheStats:
        """Return the counters, all of one moment."""
        with self._lock:
            return CacheStats(
                entries=self._entries.held,
                hits=self._reads.hits + len(self._touches),
                misses=self._misses,
                bypassed=self._bypassed,
                loads=self._loads.started,
                shared_loads=self._loads.shared,
                voided_fills=self._not_stored["voided"],
                refused_fills=self._not_stored["refused"],
                unnameable_fills=self._not_stored["unnameable"],
                dropped=self._dropped,
                mapping_errors=self._entries.errors.count,
                applied={"keys": self._applied_keys, **self._applied} if self._applied_keys else dict(self._applied),
                clears=dict(self._clears),
            )

    def count(self, *targets: Target) -> Count:
        """Return how many live entries `targets` name, and whether that is an estimate. Nothing is dropped or read.

        The count is exact for everything, and while at most 1,000 entries have to be examined. Beyond that, 1,000 are
        examined and the number is scaled up. They are chosen from the whole cache or, if it has more than 100,000
        entries, from the oldest 50,000 and the newest 50,000. It takes a few milliseconds at most.

        Raises: InvalidTarget.
        """
        *_, count = self.counting(invalidation_of(targets))
        return count

    def counting(self, invalidation: Invalidation) -> Iterator[Count]:
        """Count the entries that an invalidation would drop, in steps of less than a millisecond: other tasks may run
        in between.

        Each step yields the count so far; the last one is the result.
        """
        steps = self._entries.counting(invalidation, self._clock(), self._uniform)
        while True:
            with self._lock:
                count = next(steps, None)
            if count is None:
                return
            yield count

    def __repr__(self) -> str:
        state = "coherent" if self.is_coherent else f"incoherent, {self._when_incoherent}"
        return f"<LocalCache of {self.stats().entries} entries, {state}>"

    def __getstate__(self) -> NoReturn:
        refuse_copy(self)

    # --- the mapping protocol, over the entries that a read would return ----------------------------------------------

    def __getitem__(self, key: str) -> V:
        value: Any = self.get(key, _MISSING)
        if value is _MISSING:
            raise KeyError(checked_key(key))
        return cast("V", value)

    def __setitem__(self, key: str, value: V) -> None:
        """Store a value by hand. Loads of this key that are under way are void: they may have read an older value."""
        with self._lock:
            self.apply_invalidation(Invalidation(keys=(checked_key(key),)))
            self._put(self.begin_load(key), value, (), None)

    def __delitem__(self, key: str) -> None:
        self.pop(key)

    @overload
    def pop(self, key: str, /) -> V: ...
    @overload
    def pop(self, key: str, /, default: V | T) -> V | T: ...
    def pop(self, key: str, /, default: Any = _MISSING) -> Any:
        """Drop `key`, and return the value that a read would have returned, else `default`.

        As with `del`, the entry is dropped even while reads are bypassed, and loads of it under way are void.
        Raises: KeyError when there is neither such a value nor a default.
        """
        with self._lock:
            value = self.get(key, _MISSING)
            self.apply_invalidation(Invalidation(keys=(checked_key(key),)))
        if value is not _MISSING:
            return value
        if default is _MISSING:
            raise KeyError(key)
        return default

    def __iter__(self) -> Iterator[str]:
        with self._lock:
            now = self._clock()
            keys = list(self._entries.live_keys(now)) if self._may_serve(now) else []
        return iter(keys)

    def __len__(self) -> int:
        """How many entries a read would return. Counted one by one only while some wait to be swept."""
        with self._lock:
            now = self._clock()
            if not self._may_serve(now):
                return 0
            live = self._entries.all_live(now)
            return super().__len__() if live is None else live

    def clear(self) -> None:
        """Drop everything, and void every load that is under way."""
        self.apply(Everything(), reason="clear")


# So that `cache_info()` of `cachetools.cached` shows its sizes: of other mappings it shows the length only.
cast("ABCMeta", Cache).register(LocalCache)
