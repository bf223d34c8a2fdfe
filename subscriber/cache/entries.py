"""The entries of a local cache: the wrapped mapping, and an index of which entries an invalidation concerns."""

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from itertools import chain, islice
from typing import Any, Final

from cachetools import Cache, FIFOCache, LFUCache, LRUCache, RRCache, TLRUCache, TTLCache

from ...shared.invalidation import Invalidation
from .mapping.expiry import ExpirySlices
from .mapping.removal import removal_of
from .mapping_errors import MappingErrors
from .recent import History
from .stats import Count

__all__ = ["MISSING", "Count", "Entries"]

_DROP_AT_ONCE_MAX: Final = 64
"""Up to this many entries of a tag are dropped at once. If the tag has more, the sweep removes them."""
_EXPIRY_SLICE_ENTRIES: Final = 64
_INDEX_SLACK: Final = 1_024
_SET_ATTEMPTS_MAX: Final = 100
_STUCK_MAX: Final = 65_536
"""How many keys that could not be removed are remembered for another attempt."""
_COUNT_SAMPLE_MAX: Final = 1_000
"""How many entries are examined to count."""
_COUNT_STEP_KEYS: Final = 100
_COUNT_REACH_MAX: Final = 50_000
"""How far from either end of the index these are chosen: skipping an entry is quick, but not free."""
_COUNT_STEP_REACH: Final = 12_500

MISSING: Final = object()
"""Stands for a value that is absent, or that cannot be read without changing the order of entries."""
# Cache's own lookup, which every class here shares, leaves the order of entries alone.
_PEEKS: Final[dict[type, Callable[[Any, str], Any]]] = {
    dict: dict.__getitem__,
    **dict.fromkeys((Cache, FIFOCache, LFUCache, LRUCache, RRCache, TLRUCache, TTLCache), Cache.__getitem__),
}


class Entries:
    """Values with their stamps, tags and expiries. Not thread-safe: LocalCache holds its lock around every call.

    The mapping may evict and expire entries silently, so the index beside it may name entries that are gone. A sweep
    cleans the index when it has grown to twice its size after the previous sweep.

    A prefix, or everything, is applied by raising a stamp: entries that are older and match are dead from then on, and
    a sweep removes them in slices. While `is_settled` is false, reads have to check `is_live`.

    The mapping is the user's: it may raise anything, and call back into the cache. Three rules keep its failures from
    being served. An entry leaves the index before it leaves the mapping, and only entries in the index are live. An
    entry that could not be removed from the mapping is *stuck*, and `is_settled` is false until it is gone. An entry is
    checked after the mapping was called, not before. Keys and tags are exact strings, so the index runs no user code.
    """

    def __init__(self, mapping: MutableMapping[str, Any], history: History, errors: MappingErrors) -> None:
        self.mapping: Final = mapping
        self._history = history
        self.errors = errors
        self.expiry: Final = ExpirySlices(mapping)
        self._remove: Final = removal_of(mapping)
        self._stamps: dict[str, int] = {}
        self._tags: dict[str, tuple[str, ...]] = {}
        self._keys_of_tag: dict[str, set[str]] = {}
        self._expiries: dict[str, float] = {}
        self._expiry_heap: list[tuple[float, str]] = []
        # The sweep: entries still to be checked, moved here as a whole so that its start costs nothing.
        self._unswept: dict[str, int] = {}
        # The one that it checks. A key about to go must not enter `_stamps`: Python copies it to make room, for 8 ms.
        self._checked: dict[str, int] = {}
        self._doomed: deque[set[str]] = deque()
        self._doomed_tags: dict[str, int] = {}
        self._is_sweeping = False
        self._sweep_stamp = 0
        self._swept_stamp = 0
        self._rule_stamp = 0
        self._index_max = _INDEX_SLACK
        # Keys that could not be removed from the mapping, for `retry`. Beyond _STUCK_MAX they are not remembered.
        self.stuck: dict[str, None] = {}
        self._has_lost_stuck = False
        self.retry_at: float = -math.inf
        # Whether the mapping is being changed: its own code may run, and call the cache.
        self.is_changing: bool = False
        # Whether the mapping can check for a key without reading its entry, which may make the entry the newest.
        self._has_contains = type(mapping).__contains__ is not Mapping.__contains__

    @property
    def is_settled(self) -> bool:
        """Whether every entry of the mapping is live, except those past their own expiry."""
        has_dead = self._rule_stamp > self._swept_stamp or self._doomed
        return not (has_dead or self.is_changing or self.stuck or self._has_lost_stuck)

    @property
    def has_sweep_work(self) -> bool:
        """Whether `sweep` has work to do. Stuck entries are the work of `retry`."""
        has_dead = self._rule_stamp > self._swept_stamp or self._doomed
        return self._is_sweeping or bool(has_dead) or len(self._stamps) > self._index_max

    @property
    def held(self) -> int:
        """How many entries the mapping has, dead ones included; if its length raises, how many the index has."""
        try:
            return len(self.mapping)
        except Exception as error:  # noqa: BLE001  (the user's code)
            self.errors.report(error, "counting entries: the index counts them instead")
            return len(self._stamps) + len(self._unswept)

    def all_live(self, now: float) -> int | None:
        """How many entries the mapping has, if each of them is live; None when some may not be."""
        if self.is_settled and self.earliest_expiry > now:
            held = self.held
            if not self.expiry.is_behind:
                return held
        return None

    @property
    def earliest_expiry(self) -> float:
        """The time before which no entry reaches an expiry of its own."""
        return self._expiry_heap[0][0] if self._expiry_heap else math.inf

    def put(self, key: str, value: Any, stamp: int, tags: tuple[str, ...], expires_at: float) -> None:
        """Store an entry that is known to be fresh as of `stamp`.

        Raises: ValueError when the mapping refuses it, and any other error of the mapping. The previous entry is
                dropped even so: it is older than the value that could not be stored.
        """
        if key in self._tags or key in self._expiries:
            self._forget(key)
        was_changing, self.is_changing = self.is_changing, True
        try:
            self._set(key, value)
            self._index(key, stamp, tags, expires_at)
        except BaseException:
            self._unswept.pop(key, None)
            self._checked.pop(key, None)
            self._stamps[key] = stamp  # so that `discard` looks for it in the mapping
            self.discard(key)
            raise
        finally:
            self.is_changing = was_changing

    def _index(self, key: str, stamp: int, tags: tuple[str, ...], expires_at: float) -> None:
        self.stuck.pop(key, None)
        self._unswept.pop(key, None)
        self._checked.pop(key, None)
        self._stamps[key] = stamp
        if tags:
            self._tags[key] = tags
            for tag in tags:
                self._keys_of_tag.setdefault(tag, set()).add(key)
        if expires_at != math.inf:
            self._expiries[key] = expires_at
            heapq.heappush(self._expiry_heap, (expires_at, key))
            if len(self._expiry_heap) > 2 * len(self._expiries) + _INDEX_SLACK:
                self._expiry_heap = [(expiry, key) for key, expiry in self._expiries.items()]
                heapq.heapify(self._expiry_heap)

    def _set(self, key: str, value: Any) -> None:
        # A cachetools mapping that is full looks for its oldest entry. When a hit in another thread, which takes no
        # lock, makes an entry the newest at that moment, the mapping raises RuntimeError ("OrderedDict mutated during
        # iteration"). Nothing is lost: try again.
        for _ in range(_SET_ATTEMPTS_MAX):
            try:
                self.mapping[key] = value
            except RuntimeError:
                continue
            return
        self.mapping[key] = value

    def drop(self, key: str) -> bool:
        """Remove one entry; return whether it existed. Raises: any error of the mapping; the entry is dead even so."""
        is_unknown = self._stamps.pop(key, None) is None and self._unswept.pop(key, None) is None
        if is_unknown and self._checked.pop(key, None) is None:
            return False
        if self._tags or self._expiries:
            self._forget(key)
        remove = self._remove  # in a line of its own, as in `LocalCache.get`
        try:
            remove(key)
        except BaseException as error:  # noqa: BLE001  (raised again, unless the entry was gone already)
            return self._handle_unremoved(key, error)
        return True

    def discard(self, key: str) -> bool:
        """Remove one entry; return whether it existed. An error of the mapping is reported instead of raised."""
        try:
            return self.drop(key)
        except Exception as error:  # noqa: BLE001  (the user's code)
            self.errors.report(error, "removing an entry: it is no longer served, and is removed later")
            return False

    def _handle_unremoved(self, key: str, error: BaseException) -> bool:
        """Handle an error that the mapping raised while removing `key`; ignore it if the entry was gone already."""
        is_gone = not self._has(key, in_doubt=True)
        if not is_gone:
            if len(self.stuck) < _STUCK_MAX:
                self.stuck[key] = None
            else:
                self._has_lost_stuck = True
        if is_gone and isinstance(error, KeyError):  # evicted or expired earlier
            return False
        raise error

    def _has(self, key: str, *, in_doubt: bool) -> bool:
        """Whether the mapping has `key`; `in_doubt` when it raises."""
        try:
            return key in self.mapping
        except Exception as error:  # noqa: BLE001  (the user's code)
            self.errors.report(error, "looking for an entry: it is not served")
            return in_doubt

    def drop_tag(self, tag: str, stamp: int) -> int:
        """Kill the entries with this tag, and remove them at once if they are few; return how many were removed."""
        keys = self._keys_of_tag.pop(tag, None)
        if keys is None:
            return 0
        if len(keys) <= _DROP_AT_ONCE_MAX:
            return sum(map(self.drop, tuple(keys)))
        self._doomed.append(keys)
        self._doomed_tags[tag] = stamp
        return 0

    def kill_older(self, stamp: int) -> None:
        """Make the sweep check every entry: a prefix or everything was recorded in the history at `stamp`."""
        if self._stamps or self._unswept or self._checked:
            self._rule_stamp = stamp

    def is_live(self, key: str) -> bool:
        """Whether the index has an entry, and no invalidation since it was stored concerns it."""
        stamp = self._stamps.get(key) or self._unswept.get(key) or self._checked.get(key)
        if stamp is None or self._history.concerns_entry(stamp, key):
            return False
        if not self._doomed_tags:
            return True
        return all(self._doomed_tags.get(tag, 0) <= stamp for tag in self._tags.get(key, ()))

    def is_served(self, key: str, now: float) -> bool:
        """Whether it is live, and not past an expiry of its own."""
        return self._expiries.get(key, math.inf) > now and self.is_live(key)

    def has_served(self, key: str, now: float) -> bool:
        """Whether it is in the mapping, and `is_served`."""
        return self._has(key, in_doubt=False) and self.is_served(key, now)

    def live_keys(self, now: float) -> Iterable[str]:
        """The keys of the entries that a read would return, each checked when it is yielded."""
        for key in (*self._checked, *self._unswept, *self._stamps):
            if self.has_served(key, now):
                yield key

    def peek(self, key: str) -> Any:
        """Return the value under `key` without making it the newest; `MISSING` when that cannot be done."""
        look = _PEEKS.get(type(self.mapping))
        if look is None:
            return MISSING
        try:
            return look(self.mapping, key)
        except KeyError:
            return MISSING

    def counting(self, invalidation: Invalidation, now: float, uniform: Callable[[], float]) -> Iterator[Count]:
        """Count the live entries that an invalidation names, without reading them, in short steps.

        Each step yields the count so far; the last one is the result. It is exact while at most `_COUNT_SAMPLE_MAX`
        have to be examined, else an estimate. An entry that changes between two steps may be counted or not.
        """
        if invalidation.everything and (live := self.all_live(now)) is not None:
            yield Count(live, is_estimate=False)
            return
        if invalidation.everything or invalidation.prefixes:
            total = len(self._unswept) + len(self._stamps)
            choosing = self._sampled(total, uniform)
        else:
            total = len(invalidation.keys) + sum(len(self._keys_of_tag.get(tag, ())) for tag in invalidation.tags)
            choosing = self._named(total, invalidation)
        chosen: list[str] = []
        for keys in choosing:
            chosen += keys
            yield Count(0, is_estimate=True)
        is_estimate = total > _COUNT_SAMPLE_MAX
        if not is_estimate:
            chosen = list(dict.fromkeys(chosen))  # a key may be named by itself and by several tags
        # `chosen` is empty if all entries are dropped between two steps.
        scale = total / len(chosen) if is_estimate and chosen else 1
        is_named = self._matcher(invalidation)
        found = 0
        for start in range(0, len(chosen), _COUNT_STEP_KEYS):
            step = chosen[start : start + _COUNT_STEP_KEYS]
            found += sum(1 for key in step if is_named(key) and self._is_counted(key, now))
            yield Count(round(found * scale), is_estimate)
        if not chosen:
            yield Count(0, is_estimate)

    def _matcher(self, invalidation: Invalidation) -> Callable[[str], bool]:
        """Return a predicate: does the invalidation name this key?"""
        if invalidation.everything:
            return lambda key: True
        prefixes, keys, tags = invalidation.prefixes, frozenset(invalidation.keys), frozenset(invalidation.tags)
        if not keys and not tags:
            return lambda key: key.startswith(prefixes)
        tags_of = self._tags.get
        return lambda key: key in keys or key.startswith(prefixes) or not tags.isdisjoint(tags_of(key, ()))

    def _is_counted(self, key: str, now: float) -> bool:
        if self._has_contains and not self._has(key, in_doubt=False):
            return False
        is_live = key in self._stamps or key in self._unswept if self.is_settled else self.is_live(key)
        return is_live and self._expiries.get(key, math.inf) > now

    def _sampled(self, total: int, uniform: Callable[[], float]) -> Iterator[list[str]]:
        """Choose the keys of all entries, or a sample: from the whole index or, if it is very large, from both ends."""
        if total <= _COUNT_SAMPLE_MAX:
            yield [*self._unswept, *self._stamps]
            return
        # At random distances, because keys may follow a pattern: a product and its price in turns.
        reach = min(total // 2, _COUNT_REACH_MAX)
        gap = 2 * reach / _COUNT_SAMPLE_MAX
        for start in range(0, reach, _COUNT_STEP_REACH):
            part = slice(start, min(start + _COUNT_STEP_REACH, reach))
            yield list(_scattered(chain(self._unswept, self._stamps), part, gap, uniform))
            yield list(_scattered(chain(reversed(self._stamps), reversed(self._unswept)), part, gap, uniform))

    def _named(self, total: int, invalidation: Invalidation) -> Iterator[list[str]]:
        """Choose the keys that are named, directly or by a tag, or the same share of each."""
        share = min(1.0, _COUNT_SAMPLE_MAX / total) if total else 1.0
        yield list(islice(invalidation.keys, math.ceil(len(invalidation.keys) * share)))
        for start in range(0, len(invalidation.tags), _COUNT_STEP_KEYS):
            tagged = [self._keys_of_tag.get(tag, ()) for tag in invalidation.tags[start : start + _COUNT_STEP_KEYS]]
            yield list(chain.from_iterable(islice(keys, math.ceil(len(keys) * share)) for keys in tagged))

    def expire(self, now: float) -> int:
        """Remove a slice of the entries that are past their own expiry; return how many."""
        removed = 0
        was_changing, self.is_changing = self.is_changing, True
        try:
            for _ in range(_EXPIRY_SLICE_ENTRIES):
                if not self._expiry_heap or self._expiry_heap[0][0] > now:
                    break
                expiry, key = heapq.heappop(self._expiry_heap)
                if self._expiries.get(key) == expiry:
                    removed += self.discard(key)
        finally:
            self.is_changing = was_changing
        return removed

    def expire_held(self, *, is_due: bool = False) -> None:
        """Remove a slice of the entries past the mapping's own expiry, if any are known to remain, or `is_due`."""
        try:
            self.expiry.advance(is_due=is_due)
        except Exception as error:  # noqa: BLE001  (the user's timer)
            self.errors.report(error, "removing expired entries: they are not served, and are removed later")

    def sweep(self, entries_max: int, stamp: int) -> int:
        """Sweep up to `entries_max` entries; return how many were removed. `stamp` is the newest one."""
        removed = 0
        if self.is_changing:
            return removed
        self.is_changing = True
        try:
            for _ in range(entries_max):
                if self._doomed:
                    removed += self._sweep_doomed()
                elif self._unswept:
                    removed += self._sweep_one(stamp)
                elif not self._next_sweep(stamp):
                    break
        finally:
            self.is_changing = False
        return removed

    def retry(self, entries_max: int) -> bool:
        """Try again to remove up to `entries_max` stuck keys; stop and return false at the first failure."""
        was_changing, self.is_changing = self.is_changing, True
        try:
            return all(map(self._remove_stuck, tuple(islice(self.stuck, entries_max))))
        finally:
            self.is_changing = was_changing

    def _remove_stuck(self, key: str) -> bool:
        if key not in self.stuck:  # stored anew by the mapping's own code
            return True
        try:
            del self.mapping[key]
        except Exception as error:  # noqa: BLE001  (the user's code)
            if self._has(key, in_doubt=True):
                self.errors.report(error, "removing an entry again: it is not served, and is removed later")
                self.stuck.pop(key, None)
                self.stuck[key] = None  # last in the next retry
                return False
        self.stuck.pop(key, None)
        return True

    def _sweep_doomed(self) -> int:
        keys = self._doomed[0]
        key = keys.pop()
        if not keys:
            self._doomed.popleft()
        removed = not self.is_live(key) and self.discard(key)
        if not self._doomed:
            self._doomed_tags.clear()
        return removed

    def _sweep_one(self, stamp: int) -> int:
        key, entry_stamp = self._unswept.popitem()
        self._checked[key] = entry_stamp
        try:
            if self._has(key, in_doubt=False) and self.is_live(key):
                self._stamps[key] = stamp
                return 0
            return self.discard(key)
        except BaseException:
            if key in self._checked:  # the mapping's own code has not dropped it meanwhile
                self._stamps[key] = entry_stamp
            raise
        finally:
            self._checked.pop(key, None)

    def _next_sweep(self, stamp: int) -> bool:
        """End the sweep that has run out of entries; begin the next one if there is work, and return whether it did."""
        if self._is_sweeping:
            self._is_sweeping = False
            self._swept_stamp = self._sweep_stamp
            self._index_max = 2 * len(self._stamps) + _INDEX_SLACK
        if not self.has_sweep_work:
            return False
        self._is_sweeping = True
        self._sweep_stamp = stamp
        self._unswept, self._stamps = self._stamps, {}
        return True

    def _forget(self, key: str) -> None:
        self._expiries.pop(key, None)
        for tag in self._tags.pop(key, ()):
            keys = self._keys_of_tag.get(tag)
            if keys is not None:
                keys.discard(key)
                if not keys:
                    del self._keys_of_tag[tag]


def _scattered(keys: Iterator[str], part: slice, gap: float, uniform: Callable[[], float]) -> Iterator[str]:
    """Yield some keys of a part, on average one in every `gap`."""
    rest = islice(keys, part.start, part.stop)
    while (key := next(islice(rest, int(uniform() * (2 * gap - 1)), None), None)) is not None:
        yield key
