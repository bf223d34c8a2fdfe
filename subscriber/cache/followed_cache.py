"""FollowedCache: the side of a cache that its subscriber drives."""

import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any, Final, Literal, TypeAlias

from ...shared.clock import Clock
from ...shared.errors import InvalidSettings, InvalidTarget
from ...shared.invalidation import Everything, Invalidation, Keys, Prefixes, Tags, Target
from .checks import exact
from .entries import Entries
from .inspection import Inspection
from .mapping.reads import Reads
from .mapping.renewal import Storeless, renewed
from .mapping_errors import MappingErrors
from .recent import History
from .token import LoadToken
from .upkeep import Upkeep

__all__ = ["FollowedCache", "WhenIncoherent"]

WhenIncoherent: TypeAlias = Literal["bypass", "serve"]

_log = logging.getLogger("broadcache.subscriber")

_CLEARED: Final = "mapping failed"
_SWEEP_SLICE_ENTRIES: Final = 32
_RETRY_SECONDS: Final = 1.0
"""How long after a failed removal the sweep tries to remove the entry again."""


class FollowedCache(Inspection):
    """Entries, the invalidations applied to them, and the time until which reads may be served.

    A subscriber applies invalidations, sweeps dead entries, and renews or ends the lease: all the methods here may be
    called from any thread. `LocalCache` adds what an application uses: reads, loads and stores.

    It is a base class, not a part of LocalCache: the hit path reads `_stamp` and `_fast_until`, and each message calls
    `apply_invalidation`. Another object in between would cost each of them.
    """

    def __init__(
        self,
        mapping: MutableMapping[str, Any],
        *,
        max_staleness_seconds: float,
        when_incoherent: WhenIncoherent,
        clock: Clock,
        on_invalidated: Callable[[Invalidation], object] | None,
    ) -> None:
        self.max_staleness_seconds: Final = max_staleness_seconds
        self._clock = clock
        self._lock = threading.RLock()  # re-entrant: the mapping's own code, or a finalizer, may call this cache
        self._history = History()
        self._entries = Entries(mapping, self._history, MappingErrors(mapping, clock))
        # Bound once: looking them up for each message would be a good part of its cost.
        self._record_key = self._history.keys.record
        self._drop = self._entries.drop
        self._reads = Reads(mapping, clock, expires_in_slices=self._entries.expiry.is_sliced)
        self._source, self._touches = self._reads.source, self._reads.touches
        # `_issued` is the newest stamp given out; `_stamp` is the one that reads and loads see. They differ while an
        # invalidation is applied, which takes two stamps: its names are recorded with the first, and the second is
        # shown at the end. So both only grow, also when one invalidation is applied within another.
        self._issued = 1
        self._stamp = 1
        self._coherent_as_of = -math.inf
        self.upkeep: Final = Upkeep(on_invalidated)  # for its subscriber
        # A hit may be served until the first, and needs no further check until the second: see _refresh.
        self._serve_until = -math.inf
        self._fast_until = -math.inf
        self._dropped = 0
        self._applied: Counter[str] = Counter()
        self._applied_keys = 0
        self._clears: Counter[str] = Counter()
        self.when_incoherent = when_incoherent
        if on_invalidated is not None:
            # In this object only, so that it costs other caches nothing.
            setattr(self, "apply_invalidation", self._apply_and_report)  # noqa: B010

    # --- applying -----------------------------------------------------------------------------------------------------

    def apply(self, target: Target, *, reason: str = "invalidation") -> None:
        """Drop the entries that `target` names, and void the loads under way that it concerns. Reads are then right.

        Prefixes and everything cost the same however many entries the cache has; the sweep frees the memory later.
        A clear of everything is counted under `reason`.
        """
        match target:
            case Keys(names):
                invalidation = Invalidation(keys=names)
            case Tags(names):
                invalidation = Invalidation(tags=names)
            case Prefixes(names):
                invalidation = Invalidation(prefixes=names)
            case Everything():
                invalidation = Invalidation(everything=True, reason=reason)
            case _:
                raise InvalidTarget(
                    f"expected Keys, Tags, Prefixes or Everything, got {type(target).__name__}; "
                    'wrap the names: Keys("product:42")'
                )
        self.apply_invalidation(invalidation, reason=reason)

    def apply_invalidation(self, invalidation: Invalidation, *, reason: str = "invalidation") -> None:
        """Apply all targets of an invalidation in one step.

        Names first, the mapping next, the stamp last: when the mapping's own code runs, loads and reads know all names,
        also those that this code begins. An error of the mapping clears the cache; only an error that is no
        `Exception`, such as KeyboardInterrupt, is raised again.
        """
        keys = invalidation.keys
        with self._lock:
            try:
                record, drop = self._record_key, self._drop  # once: CPython is slow to call what an attribute holds
                self._issued = stamp = self._issued + 1
                for key in keys:
                    record(key, stamp)
                self._applied_keys += len(keys)
                has_others = invalidation.tags or invalidation.prefixes or invalidation.everything
                if has_others:
                    self._count_others(invalidation, reason)
                    self._record_others(invalidation, stamp)
                if self._issued != stamp:
                    stamp = self._record_again(invalidation)
                # Hits may go on meanwhile: an entry that leaves the mapping is not found, and if one does not leave,
                # _clear_after closes the hit path before the stamp moves.
                for key in keys:
                    if drop(key):
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

    def _apply_and_report(self, invalidation: Invalidation, *, reason: str = "invalidation") -> None:
        clears = self._clears[_CLEARED]
        type(self).apply_invalidation(self, invalidation, reason=reason)
        if self._clears[_CLEARED] != clears:
            invalidation = Invalidation(everything=True, namespace=invalidation.namespace, reason=_CLEARED)
        self.upkeep.report_invalidated(invalidation)

    def apply_counted(self, invalidation: Invalidation, *, reason: str = "invalidation") -> int:
        """Apply an invalidation; return how many entries it removed at once or, for everything, how many existed."""
        with self._lock:
            entries, dropped = self._entries.held, self._dropped
            self.apply_invalidation(invalidation, reason=reason)
            return entries if invalidation.everything else self._dropped - dropped

    def is_void(self, token: LoadToken, tags: Iterable[str] = ()) -> bool:
        """Whether an invalidation since the token was made concerns its key, one of `tags`, or everything."""
        with self._lock:
            if token.stamp == self._issued:
                return False
            try:
                return self._history.concerns_load(token.stamp, token.key, tags)
            except Exception as error:  # noqa: BLE001  (a name of a user's own type was recorded: its hash or eq)
                self._clear_after(error)
                self._stamp = self._issued
                return True

    def _count_others(self, invalidation: Invalidation, reason: str) -> None:
        self._applied["tags"] += len(invalidation.tags)
        self._applied["prefixes"] += len(invalidation.prefixes)
        self._applied["everything"] += invalidation.everything
        if invalidation.everything:
            self._clears[reason] += 1

    def _record_others(self, invalidation: Invalidation, stamp: int) -> None:
        """Record tags, prefixes and everything. Close the hit path if dead entries stay until a sweep."""
        history = self._history
        for tag in invalidation.tags:
            history.tags.record(exact(tag), stamp)
        for prefix in invalidation.prefixes:
            history.prefixes.record(exact(prefix), stamp)
        if invalidation.everything:
            history.everything_stamp = stamp
        if invalidation.prefixes or invalidation.everything:
            self._entries.kill_older(stamp)
        self._refresh()

    def _record_again(self, invalidation: Invalidation) -> int:
        """Record all names with a newer stamp, because another invalidation was applied while they were recorded.

        A finalizer, or the hash of a name, may do that. An entry stored or swept after the first name was recorded, and
        before the last, has to be older than all of them.
        """
        stamp = 0
        while stamp != self._issued:
            self._issued = stamp = self._issued + 1
            for key in invalidation.keys:
                self._record_key(exact(key), stamp)
            self._record_others(invalidation, stamp)
        return stamp

    def _clear_after(self, error: BaseException) -> None:
        """Drop everything: an apply that ended midway may have left any of its entries in the mapping."""
        stamp = 0
        while stamp != self._issued:  # once more if a finalizer has applied an invalidation in between
            self._issued = stamp = self._issued + 1
            self._history.restart(stamp)
            self._entries.kill_older(stamp)
        self._refresh()
        self._clears[_CLEARED] += 1
        if isinstance(error, Exception):
            self._entries.errors.report(error, "applying an invalidation: the cache was cleared")

    # --- sweeping -----------------------------------------------------------------------------------------------------

    @property
    def has_sweep_work(self) -> bool:
        """Whether dead entries still take up memory, and it is time to remove some."""
        return self._entries.has_sweep_work or self._entries.expiry.is_behind or self._is_retry_due

    def sweep(self) -> bool:
        """Free the memory of some dead entries, in far less than a millisecond; return whether more remain.

        The subscriber does this in the background, and each store does a little of it. An entry that cannot be removed
        now is tried again later, and does not count as remaining.
        """
        with self._lock:
            return self._sweep(_SWEEP_SLICE_ENTRIES) and self.has_sweep_work

    def _sweep(self, entries_max: int) -> bool:
        """Sweep one slice; return false within an apply, whose names may not all be recorded yet: nothing is swept."""
        if self._stamp != self._issued or self._entries.is_changing:
            return False
        try:
            self._dropped += self._entries.sweep(entries_max, self._stamp)
            self._entries.expire_held()
            if self._is_retry_due and not self._entries.retry(entries_max):
                self._entries.retry_at = self._clock() + _RETRY_SECONDS
        finally:
            self._refresh()
        return True

    @property
    def _is_retry_due(self) -> bool:
        return bool(self._entries.stuck) and self._clock() >= self._entries.retry_at

    def _expire(self, now: float) -> None:
        """Remove a slice of the expired entries, if there are any: a hit could not tell them from the others."""
        if self._entries.earliest_expiry <= now or self._reads.oldest_expiry <= now:
            try:
                self._entries.expire(now)
                if self._stamp == self._issued and not self._entries.is_changing:
                    self._entries.expire_held(is_due=self._reads.oldest_expiry <= now)
            finally:
                self._refresh()

    # --- coherence ----------------------------------------------------------------------------------------------------

    @property
    def when_incoherent(self) -> WhenIncoherent:
        """What a read does while the cache is not coherent: `bypass` finds nothing, `serve` serves until the TTL.

        A change to `serve` has an effect once the subscriber has registered it, with its next echo: until then,
        publishers rely on it that this replica serves nothing when it is cut off.
        """
        return self._when_incoherent

    @when_incoherent.setter
    def when_incoherent(self, mode: WhenIncoherent) -> None:
        if mode not in ("bypass", "serve"):
            raise InvalidSettings(f"expected when_incoherent to be 'bypass' or 'serve', got {mode!r}")
        with self._lock:
            self._when_incoherent: WhenIncoherent = mode
            self._renew()
        if mode == "serve" and self.upkeep.is_listed_as_bypass and not self.upkeep.is_connected:
            _log.warning(
                "a cache stays bypassed, although when_incoherent is 'serve' now: it is cut off, and publishers have "
                "been told that it serves nothing then; it has an effect once Redis is reached: set it before that"
            )

    @property
    def is_coherent(self) -> bool:
        """Whether a read may be served locally now within `max_staleness_seconds`, whatever `when_incoherent` is."""
        return self.upkeep.is_connected and self._clock() < self._coherent_as_of + self.max_staleness_seconds

    @property
    def clock(self) -> Clock:
        """The clock of all times of this cache. Its subscriber must use the same."""
        return self._clock

    @property
    def coherent_as_of(self) -> float:
        """When, on this cache's clock, every accepted invalidation was last proven to be applied; -inf before that."""
        return self._coherent_as_of

    @property
    def staleness_seconds(self) -> float | None:
        """How long ago every accepted invalidation was proven to be applied: the most that a read can be stale now."""
        return None if self._coherent_as_of == -math.inf else self._clock() - self._coherent_as_of

    def confirm_coherent(self, as_of: float) -> None:
        """Record that every invalidation accepted before `as_of`, on this cache's clock, has been applied.

        For a subscriber. Reads are served until `as_of + max_staleness_seconds`, or until `disconnect`.
        """
        with self._lock:
            self.upkeep.is_connected, self.upkeep.has_left = True, False
            self._coherent_as_of = max(self._coherent_as_of, as_of)
            self._renew()

    def disconnect(self) -> None:
        """Record that invalidations no longer arrive: bypass, until `confirm_coherent`. For a subscriber."""
        with self._lock:
            self.upkeep.is_connected = False
            self._renew()

    def leave(self) -> None:
        """Bypass, also with `serve`: no publisher expects this replica any more. For a subscriber that leaves."""
        with self._lock:
            self.upkeep.is_connected, self.upkeep.has_left = False, True
            self._renew()

    def enter(self) -> None:
        """Undo `leave`: a subscriber starts. With `serve` this drops what was stored before: it may be stale."""
        with self._lock:
            if self.upkeep.has_left:
                if self._when_incoherent == "serve":
                    self.apply(Everything(), reason="subscribed")
                self.upkeep.has_left = False
                self._renew()

    def list_as(self, *, is_bypass: bool) -> None:
        """Record whether publishers are told that this cache serves nothing once it is cut off. For a subscriber.

        It is to be called before they are told so, and after they are told the contrary.
        """
        if self.upkeep.is_listed_as_bypass != is_bypass:
            with self._lock:
                self.upkeep.is_listed_as_bypass = is_bypass
                self._renew()

    def _renew(self) -> None:
        self._reads.compare_clocks()
        may_serve = self._when_incoherent == "serve" and not self.upkeep.is_listed_as_bypass
        if may_serve and not self.upkeep.has_left:
            self._serve_until = math.inf
        elif self.upkeep.is_connected:
            self._serve_until = self._coherent_as_of + self.max_staleness_seconds
        else:
            self._serve_until = -math.inf
        self._refresh()

    def _may_serve(self, now: float) -> bool:
        """Whether a read may be served. Its subscriber is told once, unless it runs. Under the lock."""
        may_serve = now < self._serve_until  # with `serve`, also before any subscriber has started
        if (on_bypass := self.upkeep.on_bypass) is not None and not (may_serve and self.upkeep.is_connected):
            self.upkeep.on_bypass = None
            on_bypass()
        return may_serve

    # --- what others change -------------------------------------------------------------------------------------------

    def _start_over(self) -> None:
        """Bypass, drop everything, and void all loads: in a forked child, which receives no invalidation.

        Another thread of the parent may have held the lock at the fork: the mapping may then be half-changed, and is
        replaced. It is not touched, because it may not end.
        """
        is_whole = self._lock.acquire(blocking=False)
        self._lock = threading.RLock()
        self.upkeep.is_connected = self.upkeep.is_listed_as_bypass = False
        # Also with when_incoherent="serve", until the subscriber is started again: no publisher knows this process.
        self.upkeep.has_left = True
        self._coherent_as_of = self._serve_until = self._fast_until = -math.inf
        self._dropped = self._applied_keys = 0
        self._applied, self._clears = Counter(), Counter()
        self._entries.errors.start_over()
        if not is_whole:
            self._history = History()
            self._entries = Entries(self._renewed_mapping(), self._history, self._entries.errors)
            self._record_key = self._history.keys.record
            self._drop = self._entries.drop
        expires_in_slices = self._entries.expiry.is_sliced
        self._reads = Reads(self._entries.mapping, self._clock, expires_in_slices=expires_in_slices)
        self._source, self._touches = self._reads.source, self._reads.touches
        self._issued = self._stamp = self._issued + 1
        self._history.restart(self._stamp)
        self._entries.kill_older(self._stamp)

    def _renewed_mapping(self) -> MutableMapping[str, Any]:
        mapping = self._entries.mapping
        if (empty := renewed(mapping)) is not None:
            return empty
        _log.warning(
            "a local cache stores nothing in this process: it was forked while the mapping (%s) was being changed; "
            "expected a mapping that can be made anew, of cachetools or a dict, or a fork before the cache is used",
            type(mapping).__qualname__,
        )
        return Storeless()

    def _refresh(self) -> None:
        """Decide until when a hit needs no further check. Whatever ends that earlier has to call this."""
        reads = self._reads
        if reads.is_misled:
            self._fast_until = -math.inf
            reads.look_outside()
            self._source = reads.source
        if reads.is_lock_free and self._entries.is_settled:
            # In this order: the ttl of a mapping may be NaN, and then its entries are never served.
            self._fast_until = min(reads.oldest_expiry, self._entries.earliest_expiry, self._serve_until)
        else:
            self._fast_until = -math.inf

    def _settle_touches(self) -> None:
        """Called by a hit when there is no room for more touches, without the lock.

        Not if this thread has it already: a signal handler or a finalizer may read while the mapping is being changed.
        """
        lock: Any = self._lock
        if lock._is_owned() or not lock.acquire(blocking=False):
            self._reads.forget_a_touch()
            return
        try:
            self._settle()
        finally:
            lock.release()

    def _settle(self) -> None:
        try:
            self._reads.settle()
        except Exception as error:  # noqa: BLE001  (a mapping that other code has changed)
            self._entries.errors.report(error, "noting which entries were used: some may be evicted too early")
