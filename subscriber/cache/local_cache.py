"""LocalCache: a `cachetools.TTLCache` that can be told to forget, and that never serves what it was told to drop."""

import math
import random
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple, TypeAlias, TypeVar, cast, overload

from cachetools import Cache, FIFOCache, LRUCache, RRCache, TLRUCache, TTLCache

from ...shared.clock import Clock, monotonic
from ...shared.errors import InvalidSettings, InvalidTarget
from ...shared.fingerprint import NO_FINGERPRINT, fingerprint_of
from ...shared.invalidation import Everything, Invalidation, Keys, Prefixes, Tags, Target, invalidation_of
from .entries import MISSING, Count, Entries
from .loads import Loads
from .mapping_errors import MappingErrors
from .recent import History

__all__ = ["CacheStats", "LoadToken", "LocalCache", "WhenIncoherent"]

T = TypeVar("T")
WhenIncoherent: TypeAlias = Literal["bypass", "serve"]

_MISSING: Final = object()
_SWEEP_SLICE_ENTRIES: Final = 32
_STORE_SWEEP_ENTRIES: Final = 4
_RETRY_SECONDS: Final = 1.0
"""How long an entry that could not be removed is left alone, before the sweep tries again."""
# A lookup in these mappings changes nothing that another thread could find half-done, so hits need no lock. Exact types
# only: a subclass may do anything in __getitem__ or __missing__.
_LOCK_FREE_LOOKUPS: Final = frozenset({dict, Cache, FIFOCache, LRUCache, RRCache, TLRUCache, TTLCache})


class LoadToken(NamedTuple):
    """Proof of when a load began. Made by `LocalCache.begin_load`, handed back to `LocalCache.store`."""

    key: str
    stamp: int
    began_at: float


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Counters of one cache since it was made; `entries` is how many it holds now, dead ones not yet swept included.

    Shape:  `applied` counts the names applied by target kind (`keys`, `tags`, `prefixes`, `everything`), `clears` how
            often everything was dropped, by reason. `bypassed` reads are not counted as misses. `mapping_errors` counts
            what the wrapped mapping raised, but for absent keys and values that are too large.
    Source: exact when one thread reads. Hits are counted without a lock, so several threads may lose a few of them.
    """

    entries: int
    hits: int
    misses: int
    bypassed: int
    loads: int
    shared_loads: int
    voided_fills: int
    refused_fills: int
    dropped: int
    mapping_errors: int
    applied: dict[str, int] = field(default_factory=dict)
    clears: dict[str, int] = field(default_factory=dict)


class LocalCache(MutableMapping[str, Any]):
    """A mapping that serves only what it may: entries that no invalidation has named, while it hears of invalidations.

    It takes over an empty `TTLCache` (or any other mutable mapping), which nobody else should write to from then on.
    A `Subscriber` tells it what to drop and how long it may serve; without one, every read is bypassed, that is: it
    finds nothing, and `get_or_load` goes to the source. All methods may be called from any thread.

    A mapping that raises breaks nothing but its own usefulness. An invalidation then clears this cache; a value that
    could not be stored or read is a miss; an entry that could not be removed is never served. Such errors are logged
    once, and counted.

    Units:  `max_staleness_seconds` bounds how long after an invalidation was accepted a read may still be served the
            old value. `ttl_jitter` is the largest share of an entry's lifetime that is randomly cut off, from 0 to 1.
            `negative_ttl_seconds` is how long the answer None is kept; without it None is never stored.
    Raises: InvalidSettings.
    """

    def __init__(
        self,
        mapping: MutableMapping[str, Any],
        *,
        max_staleness_seconds: float = 5.0,
        when_incoherent: WhenIncoherent = "bypass",
        ttl_jitter: float = 0.0,
        negative_ttl_seconds: float | None = None,
        clock: Clock = monotonic,
        uniform: Callable[[], float] = random.random,
    ) -> None:
        _check_settings(mapping, max_staleness_seconds, ttl_jitter, negative_ttl_seconds)
        self.max_staleness_seconds: Final = max_staleness_seconds
        self._ttl_jitter = ttl_jitter
        self._negative_ttl_seconds = negative_ttl_seconds
        self._clock = clock
        self._uniform = uniform
        self._lock = threading.RLock()  # re-entrant: a mapping's own code, or a finaliser, may come back to us
        self._history = History()
        self._entries = Entries(mapping, self._history, MappingErrors(mapping, clock))
        self._loads = Loads(self, self._lock)
        # Bound once: looking them up for each read and each message would be a good part of what those cost. So would a
        # 31st attribute of this object: CPython keeps no more than 30 where it finds them fastest.
        self._lookup = mapping.__getitem__
        self._record_key = self._history.keys.record
        self._drop = self._entries.drop
        self._is_lookup_lock_free = type(mapping) in _LOCK_FREE_LOOKUPS
        # The newest stamp that was given out, and the one that reads and loads see. They differ while an invalidation
        # is applied, which takes two stamps: its names are recorded with the first, and the second is shown when all is
        # done. So both only grow, also where one invalidation is applied within another.
        self._issued = 1
        self._stamp = 1
        self._coherent_as_of = -math.inf
        self._is_connected = False
        # Until when a hit may be served, and until when without a further look: see _refresh.
        self._serve_until = -math.inf
        self._fast_until = -math.inf
        self._hits = self._misses = self._bypassed = 0
        self._voided_fills = self._refused_fills = self._dropped = 0
        self._applied: Counter[str] = Counter()
        self._applied_keys = 0
        self._clears: Counter[str] = Counter()
        self.when_incoherent = when_incoherent

    # --- reading -----------------------------------------------------------------------------------------------------

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value stored under `key`, or `default` when there is none that may be served."""
        # The hit path. One clock reading answers three questions: is the promise kept until now, is no sweep under way,
        # has no entry reached an expiry of its own. A stamp that stands still around the lookup says that no other
        # thread has applied an invalidation meanwhile.
        stamp = self._stamp
        if self._clock() < self._fast_until:
            try:
                value = self._lookup(key)
            except KeyError:
                self._misses += 1
                return default
            except Exception:
                if not isinstance(key, str):
                    raise  # the caller's mistake; any other is looked at again below
            else:
                if self._stamp == stamp:
                    self._hits += 1
                    return value
        return self._get_checked(key, default)

    def _get_again(self, key: str, default: Any) -> Any:
        """Look again for what was missed a moment ago, before a load begins: another thread may have stored it."""
        with self._lock:
            return self.get(key, default) if key in self else default

    def _get_checked(self, key: str, default: Any) -> Any:
        with self._lock:
            now = self._clock()
            if not now < self._serve_until:
                self._bypassed += 1
                return default
            self._expire(now)
            issued = self._issued
            try:
                if self._entries.is_served(key, now):
                    value = self._lookup(key)
                    if self._issued == issued:  # the mapping's own code may have applied an invalidation
                        self._hits += 1
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
        self,
        key: str,
        loader: Callable[[], Awaitable[T]],
        *,
        tags: Iterable[str] = (),
        ttl_seconds: float | None = None,
    ) -> T: ...
    @overload
    async def get_or_load(
        self,
        key: str,
        loader: Callable[[], T],
        *,
        tags: Iterable[str] = (),
        ttl_seconds: float | None = None,
    ) -> T: ...
    async def get_or_load(
        self,
        key: str,
        loader: Callable[[], Any],
        *,
        tags: Iterable[str] = (),
        ttl_seconds: float | None = None,
    ) -> Any:
        """Return the value stored under `key`, or what `loader` returns, which is then stored if it may be.

        Callers that miss at the same time share one call of the loader. One that is cancelled leaves the others alone;
        an exception reaches all of them and is not stored. A value whose load began before an invalidation of its key,
        its tags, its prefix or everything is returned, and not stored; whoever asks later starts a new load.

        Shape:  `loader` takes nothing and returns the value, or an awaitable of it. None is stored only with
                `negative_ttl_seconds`.
        Units:  `ttl_seconds` shortens the entry's lifetime; it cannot outlive the mapping's own.
        Raises: whatever the loader raises.
        """
        value = self.get(key, _MISSING)
        if value is not _MISSING:
            return value
        return await self._loads.load(_checked_key(key), loader, _checked_tags(tags), _checked_ttl(ttl_seconds))

    def get_or_load_sync(
        self,
        key: str,
        loader: Callable[[], T],
        *,
        tags: Iterable[str] = (),
        ttl_seconds: float | None = None,
    ) -> T:
        """Do the same for a loader that blocks, from any thread. Misses in other threads wait for the same load."""
        value = self.get(key, _MISSING)
        if value is not _MISSING:
            return cast("T", value)
        key, tags = _checked_key(key), _checked_tags(tags)
        return cast("T", self._loads.load_sync(key, loader, tags, _checked_ttl(ttl_seconds)))

    # --- filling -----------------------------------------------------------------------------------------------------

    def begin_load(self, key: str) -> LoadToken:
        """Take a token, before the source is read. Raises: InvalidTarget when `key` is not a string."""
        return LoadToken(_checked_key(key), self._stamp, self._clock())

    def store(
        self, token: LoadToken, value: Any, *, tags: Iterable[str] = (), ttl_seconds: float | None = None
    ) -> bool:
        """Store what the source returned, unless an invalidation since the token was taken concerns it.

        Returns: whether it was stored. Not stored are also None without `negative_ttl_seconds`, what the mapping
                 refuses as too large, and what it failed to store. An older value is dropped even so.
        """
        tags = _checked_tags(tags)
        ttl_seconds = _checked_ttl(ttl_seconds)
        with self._lock:
            if self.is_void(token, tags):
                self._voided_fills += 1
                return False
            return self._put(token, value, tags, ttl_seconds)

    def is_void(self, token: LoadToken, tags: Iterable[str] = ()) -> bool:
        """Whether an invalidation since the token was taken concerns its key, one of `tags`, or everything."""
        with self._lock:
            if token.stamp == self._issued:
                return False
            try:
                return self._history.concerns_load(token.stamp, token.key, tags)
            except Exception as error:  # noqa: BLE001  (a name of a type of the user's was recorded: its hash or eq)
                self._clear_after(error)
                self._stamp = self._issued
                return True

    def _put(self, token: LoadToken, value: Any, tags: tuple[str, ...], ttl_seconds: float | None) -> bool:
        if value is None:
            if self._negative_ttl_seconds is None:
                self._discard(token.key)  # the source no longer has it
                return False
            ttl_seconds = min(self._negative_ttl_seconds, math.inf if ttl_seconds is None else ttl_seconds)
        # Hits wait until this is done: meanwhile the mapping's own code, e.g. getsizeof, may apply an invalidation.
        self._fast_until = -math.inf
        now, issued = self._clock(), self._issued
        try:
            self._entries.put(token.key, value, self._stamp, tags, self._expiry_of(now, ttl_seconds))
            if self._issued != issued and self.is_void(token, tags):
                self._voided_fills += 1
                self._entries.discard(token.key)
                return False
            self._expire(now)
            if self._entries.has_sweep_work or self._entries.stuck:
                self._sweep(_STORE_SWEEP_ENTRIES)
        except ValueError:  # cachetools: "value too large"
            self._entries.discard(token.key)
            self._refused_fills += 1
            return False
        except Exception as error:  # noqa: BLE001  (code of the user's)
            self._entries.discard(token.key)
            self._entries.errors.report(error, "storing a value: it is returned to its callers, and not kept")
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
            ttl_seconds = lifetime * (1 - self._ttl_jitter * self._uniform())
        return math.inf if ttl_seconds is None else now + ttl_seconds

    # --- forgetting --------------------------------------------------------------------------------------------------

    def apply(self, target: Target, *, reason: str = "invalidation") -> None:
        """Forget what `target` names, and void the loads under way that it concerns. Reads are right when it returns.

        Prefixes and everything cost the same however many entries there are; the memory is given back by the sweep.
        `reason` is what a clear of everything is counted under.
        """
        match target:
            case Keys(names):
                invalidation = Invalidation(keys=names)
            case Tags(names):
                invalidation = Invalidation(tags=names)
            case Prefixes(names):
                invalidation = Invalidation(prefixes=names)
            case Everything():
                invalidation = Invalidation(everything=True)
            case _:
                raise InvalidTarget(f"expected Keys, Tags, Prefixes or Everything, got {type(target).__name__}")
        self.apply_invalidation(invalidation, reason=reason)

    def apply_invalidation(self, invalidation: Invalidation, *, reason: str = "invalidation") -> None:
        """Do the same for everything that an invalidation names, in one step.

        Names first, the mapping next, the stamp last: once the mapping's own code runs, all names are known to loads
        and reads, also to those that it begins itself. Whatever it raises clears the cache, and only what is no
        `Exception`, such as KeyboardInterrupt, is passed on.
        """
        keys = invalidation.keys
        with self._lock:
            try:
                self._issued = stamp = self._issued + 1
                for key in keys:
                    self._record_key(key, stamp)
                self._applied_keys += len(keys)
                has_others = invalidation.tags or invalidation.prefixes or invalidation.everything
                if has_others:
                    self._count_others(invalidation, reason)
                    self._record_others(invalidation, stamp)
                if self._issued != stamp:
                    stamp = self._record_again(invalidation)
                # Hits may go on meanwhile: what leaves the mapping is found no more, and if it does not leave, hits are
                # closed by _clear_after before the stamp moves.
                for key in keys:
                    if self._drop(key):
                        self._dropped += 1
                if has_others:
                    for tag in invalidation.tags:
                        self._dropped += self._entries.drop_tag(tag, stamp)
                    self._refresh()
            except BaseException as error:
                self._clear_after(error)
                if not isinstance(error, Exception):
                    raise
            finally:
                # Last: a hit that sees the old stamp on both sides of its lookup counts as read before all this.
                self._issued = self._stamp = self._issued + 1

    def _count_others(self, invalidation: Invalidation, reason: str) -> None:
        self._applied["tags"] += len(invalidation.tags)
        self._applied["prefixes"] += len(invalidation.prefixes)
        self._applied["everything"] += invalidation.everything
        if invalidation.everything:
            self._clears[reason] += 1

    def _record_others(self, invalidation: Invalidation, stamp: int) -> None:
        """Record tags, prefixes and everything. Hits are closed if dead entries stay in the mapping for the sweep."""
        history = self._history
        for tag in invalidation.tags:
            history.tags.record(_exact(tag), stamp)
        for prefix in invalidation.prefixes:
            history.prefixes.record(_exact(prefix), stamp)
        if invalidation.everything:
            history.everything_stamp = stamp
        if invalidation.prefixes or invalidation.everything:
            self._entries.kill_older(stamp)
        self._refresh()

    def _record_again(self, invalidation: Invalidation) -> int:
        """Record all names with a stamp newer than that of an invalidation which was applied while they were recorded.

        A finaliser, or the hash of a name, may do that. What it stored or swept after the first name was recorded, and
        before the last, has to be older than all of them.
        """
        stamp = 0
        while stamp != self._issued:
            self._issued = stamp = self._issued + 1
            for key in invalidation.keys:
                self._record_key(_exact(key), stamp)
            self._record_others(invalidation, stamp)
        return stamp

    def _clear_after(self, error: BaseException) -> None:
        """Forget everything: an apply that ended midway may have left any of its entries in the mapping."""
        stamp = 0
        while stamp != self._issued:  # once more if a finaliser has applied an invalidation in between
            self._issued = stamp = self._issued + 1
            self._history.restart(stamp)
            self._entries.kill_older(stamp)
        self._refresh()
        self._clears["mapping failed"] += 1
        if isinstance(error, Exception):
            self._entries.errors.report(error, "applying an invalidation: the cache was cleared")

    def apply_counted(self, invalidation: Invalidation, *, reason: str = "invalidation") -> int:
        """Do the same; return how many entries were removed on the spot or, for everything, how many there were."""
        with self._lock:
            entries, dropped = self._entries.held, self._dropped
            self.apply_invalidation(invalidation, reason=reason)
            return entries if invalidation.everything else self._dropped - dropped

    @property
    def has_sweep_work(self) -> bool:
        """Whether dead entries still take up memory, and it is time to remove some."""
        return self._entries.has_sweep_work or self._is_retry_due

    def sweep(self) -> bool:
        """Give back the memory of some dead entries, in far less than a millisecond; return whether more remain.

        The subscriber does this in the background, and each store does a little of it. What cannot be removed is left
        for a later time, and is not counted as more.
        """
        with self._lock:
            return self._sweep(_SWEEP_SLICE_ENTRIES) and self.has_sweep_work

    def _sweep(self, entries_max: int) -> bool:
        """Sweep one slice; return whether it could: not within an apply, whose names may not all be recorded yet."""
        if self._stamp != self._issued or self._entries.is_changing:
            return False
        try:
            self._dropped += self._entries.sweep(entries_max, self._stamp)
            if self._is_retry_due and not self._entries.retry(entries_max):
                self._entries.retry_at = self._clock() + _RETRY_SECONDS
        finally:
            self._refresh()
        return True

    @property
    def _is_retry_due(self) -> bool:
        return bool(self._entries.stuck) and self._clock() >= self._entries.retry_at

    def _expire(self, now: float) -> None:
        if self._entries.earliest_expiry <= now:
            try:
                self._entries.expire(now)
            finally:
                self._refresh()

    # --- coherence ---------------------------------------------------------------------------------------------------

    @property
    def when_incoherent(self) -> WhenIncoherent:
        """What a read does when the promise cannot be kept: `bypass` finds nothing, `serve` serves until the TTL."""
        return self._when_incoherent

    @when_incoherent.setter
    def when_incoherent(self, mode: WhenIncoherent) -> None:
        if mode not in ("bypass", "serve"):
            raise InvalidSettings(f"expected when_incoherent to be 'bypass' or 'serve', got {mode!r}")
        with self._lock:
            self._when_incoherent: WhenIncoherent = mode
            self._renew()

    @property
    def is_coherent(self) -> bool:
        """Whether the promise is kept now: a read may be served locally, whatever `when_incoherent` says."""
        return self._is_connected and self._clock() < self._coherent_as_of + self.max_staleness_seconds

    @property
    def clock(self) -> Clock:
        """The clock that all times of this cache are read from. Its subscriber must use the same."""
        return self._clock

    @property
    def coherent_as_of(self) -> float:
        """The time, on this cache's clock, as of which everything accepted has been applied; -inf before any is."""
        return self._coherent_as_of

    @property
    def staleness_seconds(self) -> float | None:
        """How long ago everything accepted was known to be applied: the most that a read can be stale now."""
        return None if self._coherent_as_of == -math.inf else self._clock() - self._coherent_as_of

    def confirm_coherent(self, as_of: float) -> None:
        """Take note that everything accepted before `as_of`, on this cache's clock, has been applied.

        For a subscriber. Reads are served until `as_of + max_staleness_seconds`, or until `disconnect`.
        """
        with self._lock:
            self._is_connected = True
            self._coherent_as_of = max(self._coherent_as_of, as_of)
            self._renew()

    def disconnect(self) -> None:
        """Take note that invalidations no longer arrive: bypass, until `confirm_coherent`. For a subscriber."""
        with self._lock:
            self._is_connected = False
            self._renew()

    def _renew(self) -> None:
        if self._when_incoherent == "serve":
            self._serve_until = math.inf
        elif self._is_connected:
            self._serve_until = self._coherent_as_of + self.max_staleness_seconds
        else:
            self._serve_until = -math.inf
        self._refresh()

    def _refresh(self) -> None:
        is_fast = self._is_lookup_lock_free and self._entries.is_settled
        self._fast_until = min(self._serve_until, self._entries.earliest_expiry) if is_fast else -math.inf

    # --- seeing ------------------------------------------------------------------------------------------------------

    def stats(self) -> CacheStats:
        """Return the counters, all read at one moment."""
        with self._lock:
            return CacheStats(
                entries=self._entries.held,
                hits=self._hits,
                misses=self._misses,
                bypassed=self._bypassed,
                loads=self._loads.started,
                shared_loads=self._loads.shared,
                voided_fills=self._voided_fills,
                refused_fills=self._refused_fills,
                dropped=self._dropped,
                mapping_errors=self._entries.errors.count,
                applied={"keys": self._applied_keys, **self._applied} if self._applied_keys else dict(self._applied),
                clears=dict(self._clears),
            )

    def count(self, *targets: Target) -> Count:
        """Return how many live entries `targets` name, and whether that is an estimate. Nothing is dropped or read.

        Exact while 1,000 entries at most have to be looked at, and for everything. Of more, 1,000 are looked at and the
        number is scaled up: from all over the cache, or, in one of more than 100,000, from among the 50,000 that it has
        had for longest and the 50,000 that it stored last. It takes a few milliseconds at most.

        Raises: InvalidTarget.
        """
        *_, count = self.counting(invalidation_of(targets))
        return count

    def counting(self, invalidation: Invalidation) -> Iterator[Count]:
        """Do the same for what an invalidation names, in steps of less than a millisecond: others may run between.

        After each step it yields what is known by then: the last is the answer.
        """
        steps = self._entries.counting(invalidation, self._clock(), self._uniform)
        while True:
            with self._lock:
                count = next(steps, None)
            if count is None:
                return
            yield count

    def fingerprint(self, key: str) -> str | None:
        """Return the fingerprint of what a read of `key` would be served now; None when it would find nothing.

        It is no read: nothing is counted, and no entry is made the newest. `NO_FINGERPRINT` for a value that has none,
        and where the mapping cannot be looked into without a read.
        """
        with self._lock:
            if key not in self:
                return None
            value = self._entries.peek(key)
        if value is MISSING:
            return NO_FINGERPRINT
        try:
            return fingerprint_of(value)
        except Exception:  # noqa: BLE001  (the value's own code)
            return NO_FINGERPRINT

    def __repr__(self) -> str:
        state = "coherent" if self.is_coherent else f"incoherent, {self._when_incoherent}"
        return f"<LocalCache of {self.stats().entries} entries, {state}>"

    # --- the mapping protocol: it shows what a read would be served --------------------------------------------------

    def __getitem__(self, key: str) -> Any:
        value = self.get(key, _MISSING)
        if value is _MISSING:
            raise KeyError(key)
        return value

    def __setitem__(self, key: str, value: Any) -> None:
        """Store a value by hand. Loads of this key that are under way are void: they may have read an older one."""
        with self._lock:
            self.apply_invalidation(Invalidation(keys=(_checked_key(key),)))
            self._put(self.begin_load(key), value, (), None)

    def __delitem__(self, key: str) -> None:
        self.pop(key)

    def pop(self, key: str, /, default: Any = _MISSING) -> Any:
        """Forget `key`, and return the value that a read would have been served, else `default`.

        Like `del`, it is an order: the entry goes although reads are bypassed, and loads of it under way are void.
        Raises: KeyError when there is no such value, and no default.
        """
        with self._lock:
            value = self.get(key, _MISSING)
            self.apply_invalidation(Invalidation(keys=(_checked_key(key),)))
        if value is not _MISSING:
            return value
        if default is _MISSING:
            raise KeyError(key)
        return default

    def __contains__(self, key: object) -> bool:
        with self._lock:
            now = self._clock()
            self._expire(now)
            return isinstance(key, str) and now < self._serve_until and self._entries.has_served(_exact(key), now)

    def __iter__(self) -> Iterator[str]:
        with self._lock:
            now = self._clock()
            keys = list(self._entries.live_keys(now)) if now < self._serve_until else []
        return iter(keys)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def clear(self) -> None:
        """Forget everything, and void every load that is under way."""
        self.apply(Everything(), reason="clear")

    # A cache is itself, not its contents: two of them may stand in one set.

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


def _exact(name: str) -> str:
    """Return a name as an exact string: hash and comparison of a type of the user's may raise."""
    return name if type(name) is str else str.__str__(name)


def _checked_key(key: str) -> str:
    if type(key) is str:
        return key
    if not isinstance(key, str):
        raise InvalidTarget(
            f"expected a string as key, got {type(key).__name__}: {key!r:.100}; invalidations name keys as strings"
        )
    return _exact(key)


def _checked_tags(tags: Iterable[str]) -> tuple[str, ...]:
    if isinstance(tags, str):
        raise InvalidTarget(f"expected tags as a tuple or list of strings, got the string {tags!r}; write ({tags!r},)")
    if not tags:
        return ()
    tags = tuple(tags)
    for tag in tags:
        if not isinstance(tag, str):
            raise InvalidTarget(
                f"expected strings as tags, got {type(tag).__name__}: {tag!r:.100}; invalidations name tags as strings"
            )
    return tuple(map(_exact, tags))


def _checked_ttl(ttl_seconds: float | None) -> float | None:
    if ttl_seconds is not None and ttl_seconds != ttl_seconds:  # noqa: PLR0124  (only NaN differs from itself)
        raise InvalidSettings("expected ttl_seconds to be a number of seconds or None, got NaN")
    return ttl_seconds


def _check_settings(
    mapping: MutableMapping[str, Any],
    max_staleness_seconds: float,
    ttl_jitter: float,
    negative_ttl_seconds: float | None,
) -> None:
    if not isinstance(mapping, MutableMapping):
        raise InvalidSettings(f"expected a mutable mapping such as TTLCache, got {type(mapping).__name__}")
    if isinstance(mapping, LocalCache):
        raise InvalidSettings("expected a plain mapping such as TTLCache, got a LocalCache; use it as it is")
    if len(mapping):
        raise InvalidSettings(
            f"expected an empty mapping, got one with {len(mapping)} entries, which may be stale by now; "
            "empty it, or hand over a new one"
        )
    if not 0 < max_staleness_seconds < math.inf:
        raise InvalidSettings(f"expected max_staleness_seconds to be a positive number, got {max_staleness_seconds!r}")
    if not 0 <= ttl_jitter < 1:
        raise InvalidSettings(f"expected ttl_jitter to be at least 0 and below 1, got {ttl_jitter!r}")
    if negative_ttl_seconds is not None and not 0 < negative_ttl_seconds < math.inf:
        raise InvalidSettings(
            f"expected negative_ttl_seconds to be None or a positive number, got {negative_ttl_seconds!r}"
        )
